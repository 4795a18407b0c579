"""Read the authors' checkpoints: `python -m hub.convert --from mae FILE.pth --to DIR`.

Sizes are read from the tensors; what a file does not say (attention heads, the kind of target) is asked for by flags.
Every key of the file is used, or the conversion stops and names it.
"""

import argparse
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

from hub import convert_beit, convert_mae, convert_simmim
from hub.export import PRETRAINING, export

FORMATS: dict[str, Any] = {"mae": convert_mae, "simmim": convert_simmim, "beit": convert_beit}


def main(arguments: list[str] | None = None) -> None:
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        model = FORMATS[options.method].convert(read_checkpoint(options.file), options)
        recipe = {"converted_from": Path(options.file).name}
        problem = export(model, options.to, method=options.method, recipe=recipe)
    except ValueError as error:
        sys.exit(f"hub.convert: {error}")
    root = "no encoder at the root" if problem else "encoder for AutoModel at the root"
    print(f"{options.to}: {root}, whole model in {PRETRAINING}/" + (f" ({problem})" if problem else ""))


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Which flags there are depends on --from."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--from", dest="method", choices=FORMATS)
    method = first.parse_known_args(arguments)[0].method
    parser = argparse.ArgumentParser(
        prog="python -m hub.convert",
        description=__doc__.split("\n")[0],
        epilog="" if method else "Each kind of file has flags of its own: add --from and --help.",
    )
    parser.add_argument("file", help="the authors' checkpoint, e.g. mae_visualize_vit_base.pth")
    parser.add_argument("--from", dest="method", choices=FORMATS, required=True, help="whose code wrote the file")
    parser.add_argument(
        "--to", required=True, help="folder to write: encoder at its root, whole model in pretraining/"
    )
    if method:
        FORMATS[method].add_flags(parser)
    return parser.parse_args(arguments)


# What the authors' files hold beside the weights, read as plain containers and then left aside.
_OTHER_CONTENT: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]


def read_checkpoint(path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict inside a `.pth`, read without executing anything it contains."""
    if not Path(path).is_file():
        raise ValueError(f"no file {str(path)!r}")
    try:
        with torch.serialization.safe_globals(_OTHER_CONTENT):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as a checkpoint of plain tensors: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("model"), dict):
        content = content["model"]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no state dict (a dict of tensors, or one under the key 'model')")
    return content


if __name__ == "__main__":
    main()

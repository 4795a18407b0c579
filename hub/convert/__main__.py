"""Read the authors' checkpoints: `python -m hub.convert --from mae FILE.pth --to DIR`, or `--inspect FILE`.

Sizes are read from the tensors; what a file does not say (attention heads, the kind of target) is asked for by flags.
Every key of the file is used, or is listed as dropped with the reason, or the conversion stops and names it.
"""

import argparse
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from hub.convert import beit, data2vec, ibot, mae, simmim, timm
from hub.convert.native_models import Converted, State, open_native
from hub.convert.recognize import recognize
from hub.convert.reference import reference_output
from hub.convert.weight_file import WeightFile, open_weights
from hub.export.native import PRETRAINING, export, export_native
from modeling import MimPreTrainedModel
from modeling.base import IMAGENET_MEAN, IMAGENET_STD

FORMATS: dict[str, Any] = {
    "mae": mae,
    "simmim": simmim,
    "beit": beit,
    "data2vec": data2vec,
    "ibot": ibot,
    "timm": timm,
}
IMAGE_STATS = ("imagenet", "half")


def main(arguments: list[str] | None = None) -> None:
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.inspect:
            print("\n".join(inspect(options.inspect)))
        else:
            print("\n".join(convert_file(options)))
    except ValueError as error:
        sys.exit(f"hub.convert: {error}")


def convert_file(options: argparse.Namespace) -> list[str]:
    """Write `options.to`; returns what is to be said."""
    target = Path(options.to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--to {target} is not an empty folder; what lies there is left as it is")
    file = open_weights(options.file)
    name, state = _select(file, options)
    _refuse_other_kinds(file, state, options.method)
    converted, remarks = _convert(state, options)
    recipe = {"converted_from": file.path.name}
    if isinstance(converted.model, MimPreTrainedModel):
        problem = export(converted.model, target, method=options.method, recipe=recipe)
        root = f"no encoder at the root ({problem})" if problem else "encoder for AutoModel at the root"
        written = f"{target}: {root}, whole model in {PRETRAINING}/"
    else:
        problem = None
        method = None if options.method == "timm" else options.method  # timm's does not tell how it was trained
        stats = {"image_mean": options.image_mean, "image_std": options.image_std}
        auto_class = export_native(converted.model, target, method=method, recipe=recipe, **stats)
        written = f"{target}: {type(converted.model).__name__}, for {auto_class}"
    if problem is None:
        remarks += _verify(target, converted)
    return [*_left_aside(file, name), *_dropped(converted), *remarks, written]


def inspect(path: str) -> list[str]:
    """What a file is, what would be dropped, and the command that converts it."""
    file = open_weights(path)
    _, state = file.state()
    kind = recognize(file, state)
    if kind is None:
        raise ValueError(f"{path} is no ViT, BEiT or Swin in the names of their authors: {list(state)[:6]} ...")
    method = kind.methods[0]
    options = _parse(["--from", method, path, "--to", "DIR"])
    name, state = _select(file, options)
    asked = {flag: usual for flag, usual in FORMATS[method].asks(state).items() if getattr(options, flag) is None}
    guesses = [word for flag, usual in asked.items() for word in (f"--{flag}", *_guess(usual))]
    options = _parse(["--from", method, path, "--to", "DIR", *guesses])
    converted, remarks = _convert(state, options)
    command = ["python", "-m", "hub.convert", "--from", method, path, "--to", "DIR"]
    flags = " ".join(f"--{flag} {usual}" for flag, usual in asked.items())
    also = f"; {', '.join(kind.methods[1:])} files have the same names" if kind.methods[1:] else ""
    return [
        f"{path}: {kind.form} (--from {method}{also})",
        f"  opens as {_described(converted.model, asked)}",
        *(f"  {line}" for line in (*_left_aside(file, name), *_dropped(converted), *remarks)),
        f"  convert it: {shlex.join(command)} {flags}".rstrip(),
        *(f"  --{flag}: the file does not say it" for flag in asked),
    ]


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Which flags there are depends on --from."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--from", dest="method", choices=FORMATS)
    first.add_argument("--inspect", metavar="FILE")
    known = first.parse_known_args(arguments)[0]
    parser = argparse.ArgumentParser(
        prog="python -m hub.convert",
        description=__doc__.split("\n")[0],
        epilog="" if known.method else "Each kind of file has flags of its own: add --from and --help.",
    )
    parser.add_argument(
        "--inspect", metavar="FILE", help="say what a file is and how to convert it, and write nothing"
    )
    converts = known.inspect is None
    parser.add_argument("file", nargs=None if converts else "?", help="e.g. mae_visualize_vit_base.pth")
    parser.add_argument("--from", dest="method", choices=FORMATS, required=converts, help="whose code wrote the file")
    parser.add_argument("--to", required=converts, help="a new folder, for AutoModel")
    parser.add_argument("--image_stats", choices=IMAGE_STATS, help="how images were standardized: ImageNet's or 0.5")
    if known.method:
        module = FORMATS[known.method]
        if weights := getattr(module, "WEIGHTS", None):
            parser.add_argument(
                "--weights", choices=list(weights), default=next(iter(weights)), help="of a file of two"
            )
        module.add_flags(parser)
    return parser.parse_args(arguments)


def _select(file: WeightFile, options: argparse.Namespace) -> tuple[str, dict[str, torch.Tensor]]:
    wanted = getattr(FORMATS[options.method], "WEIGHTS", None)
    return file.state(*wanted[options.weights]) if wanted else file.state()


def _refuse_other_kinds(file: WeightFile, state: State, method: str) -> None:
    kind = recognize(file, state)
    if kind is None:
        raise ValueError(
            f"{file.path} is no {method} checkpoint: it lacks patch_embed.proj.weight or blocks; it begins with "
            f"{list(state)[:5]}"
        )
    if method not in kind.methods:
        signs = f" ({', '.join(kind.signs)})" if kind.signs else ""
        raise ValueError(
            f"{file.path} is no {method} checkpoint but a {kind.form}{signs}: give --from {kind.methods[0]}"
        )


def _convert(state: State, options: argparse.Namespace) -> tuple[Converted, list[str]]:
    module = FORMATS[options.method]
    missing = [(flag, usual) for flag, usual in module.asks(state).items() if getattr(options, flag) is None]
    if missing:
        told = ", ".join(f"--{flag} {usual}" for flag, usual in missing)
        raise ValueError(f"the file does not say everything: give {told} (shown: what published files have)")
    stats, remarks = _image_stats(state, options.image_stats, module.image_stats(state))
    options.image_mean, options.image_std = stats
    converted = module.convert(state, options)
    return converted, [*converted.remarks, *remarks]


def _image_stats(state: State, name: str | None, usual: str | None) -> tuple[Any, list[str]]:
    """(mean, deviation) for as many channels as the encoder sees, and what is to be said if nobody chose them."""
    weight = next((tensor for key, tensor in state.items() if key.endswith("patch_embed.proj.weight")), None)
    num_channels = 3 if weight is None else weight.shape[1]
    chosen = name or (usual if num_channels == 3 else "half")
    if chosen == "imagenet" and num_channels != 3:
        raise ValueError(f"--image_stats imagenet is for three colors, this encoder sees {num_channels} channels")
    stats = (IMAGENET_MEAN, IMAGENET_STD) if chosen == "imagenet" else ((0.5,) * num_channels, (0.5,) * num_channels)
    return stats, [] if name else [f"images are standardized with --image_stats {chosen}, usual for such files"]


def _guess(usual: str) -> list[str]:
    """Something to look at the file with: the first of the usual values."""
    return usual.replace("NUMBER", "1").split("|")[0].split()


def _left_aside(file: WeightFile, name: str) -> list[str]:
    taken = f"the weights under {name!r} are taken" if name else "the file is one set of weights"
    beside = [*(key for key in file.states if key != name), *file.others]
    return [f"{taken}; left aside: {', '.join(beside)}"] if beside else []


def _dropped(converted: Converted) -> list[str]:
    """One line for each reason; "blocks.*" stands for all blocks."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in converted.dropped.items():
        keys = by_reason.setdefault(reason, [])
        general = re.sub(r"\b(blocks|layers)\.\d+", r"\1.*", key)
        if general not in keys:
            keys.append(general)
    return [f"dropped {', '.join(keys)}: {reason}" for reason, keys in by_reason.items()]


def _described(model: PreTrainedModel, asked: dict[str, str]) -> str:
    config: Any = model.config
    encoder = getattr(config, "encoder_config", config)
    names: tuple[str, ...] = (
        "depths",
        "embed_dim",
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_heads",
    )
    names += ("intermediate_size", "window_size", "patch_size", "image_size", "num_channels")
    sizes = [f"{name} {getattr(encoder, name)}" for name in names if hasattr(encoder, name) and name not in asked]
    if encoder is not config:
        of_head = ("vocab_size", *(name for name in vars(config) if name.startswith("decoder_")))
        sizes += [f"{name} {getattr(config, name)}" for name in of_head if hasattr(config, name)]
    elif hasattr(model, "classifier"):
        sizes.append(f"num_labels {config.num_labels}")
    return f"{type(model).__name__}: {', '.join(sizes)}"


@torch.no_grad()
def _verify(folder: Path, converted: Converted) -> list[str]:
    """Run what was written beside a computation straight from the file's weights; a Swin has none to compare with.

    Raises:
        ValueError: they differ.
    """
    config: Any = getattr(converted.model.config, "encoder_config", converted.model.config)
    if config.model_type == "swin":
        return []
    classifies = "head.weight" in converted.weights
    written = open_native(folder)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    pixel_values = torch.randn(1, config.num_channels, height, width, generator=torch.Generator().manual_seed(0))
    weights = {key: tensor.float() for key, tensor in converted.weights.items()}
    expected = reference_output(weights, pixel_values, config.num_attention_heads)
    output = written(pixel_values)
    computed = output.logits if classifies else output.last_hidden_state
    difference = ((computed - expected).abs().max() / expected.abs().max()).item()
    if not difference < 1e-4:
        shutil.rmtree(folder)
        raise ValueError(f"nothing was written: it computed something else than the file, off by {difference:.2g}")
    return [f"checked: its output is that of the file's weights, to {difference:.1g} of the largest number"]


if __name__ == "__main__":
    disable_progress_bar()
    main()

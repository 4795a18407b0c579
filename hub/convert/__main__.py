"""Convert checkpoints of other programs: `python -m hub.convert --from mae FILE.pth --to DIR`, or `--inspect FILE`.

Sizes are read from the tensors; what they do not tell (attention heads, the kind of target) is requested by flag.
Every key of the file is used or reported as dropped with the reason; otherwise the conversion stops and names it.
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

from hub.convert import beit, beit2, data2vec, dino, dinov2, ibot, mae, simmim, timm
from hub.convert.native_models import Converted
from hub.convert.recognize import recognize
from hub.convert.reference import reference_features, reference_output
from hub.convert.weight_file import State, WeightFile, open_weights
from hub.export.native import PRETRAINING, export, export_native
from hub.open_model import open_model
from modeling import MimPreTrainedModel
from modeling.base import IMAGENET_MEAN, IMAGENET_STD
from modeling.patches import height_and_width

IMAGE_STATS = ("imagenet", "half")
# A format has `convert`, which raises ValueError if the weights do not fit, and if it needs them: `add_flags`;
# `required_flags`, which returns the flags that a file does not answer with the values of published files;
# `image_stats`, the default of --image_stats if it is not ImageNet's (None: it has none); `WEIGHTS`, keys of the file
# by --weights (`options.states` has the weights under all of them, `options.losses` those of losses).
FORMATS: dict[str, Any] = {
    "mae": mae,
    "simmim": simmim,
    "beit": beit,
    "beit2": beit2,
    "data2vec": data2vec,
    "ibot": ibot,
    "dino": dino,
    "dinov2": dinov2,
    "timm": timm,
}


def main(arguments: list[str] | None = None) -> None:
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    try:
        print("\n".join(inspect(options.inspect) if options.inspect else convert_file(options)))
    except ValueError as error:
        sys.exit(f"hub.convert: {error}")


def convert_file(options: argparse.Namespace) -> list[str]:
    """Write the converted model to `options.to` and return the lines of the report."""
    target = Path(options.to)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--to {target} is not an empty folder; its content is left unchanged")
    file = open_weights(options.file)
    name, state = _select(file, options)
    _refuse_other_formats(file, state, options.method)
    converted, notes = _convert(file, state, options)
    recipe = {"converted_from": file.path.name}
    if isinstance(converted.model, MimPreTrainedModel):
        problem = export(converted.model, target, method=options.method, recipe=recipe)
        root = f"no encoder at the root ({problem})" if problem else "encoder for AutoModel at the root"
        written = f"{target}: {root}, whole model in {PRETRAINING}/"
    elif hasattr(converted.model, "get_codebook_indices"):
        problem = None
        converted.model.save_pretrained(target)
        written = f"{target}: image tokenizer, which run_pretraining.py takes as --tokenizer"
    else:
        problem = None
        method = None if options.method == "timm" else options.method  # a timm file does not tell how it was trained
        stats = {"image_mean": options.image_mean, "image_std": options.image_std}
        auto_class = export_native(converted.model, target, method=method, recipe=recipe, **stats)
        written = f"{target}: {type(converted.model).__name__}, for {auto_class}"
    if problem is None:
        notes += _verify(target, converted)
    return [*_ignored(file, name, converted.also_read), *_dropped(converted), *notes, written]


def inspect(path: str) -> list[str]:
    """Report what a file is, what would be dropped, and the command that converts it."""
    file = open_weights(path)
    _, state = file.state()
    kind = recognize(file, state)
    if kind is None:
        raise ValueError(f"{path} is not a ViT, BEiT or Swin under a known naming scheme: {list(state)[:6]} ...")
    method = kind.methods[0]
    arguments = ["--from", method, path, "--to", "DIR"]
    options = _parse(arguments)
    name, state = _select(file, options)
    unknown = _unanswered(state, options)
    guesses: list[str] = []
    for flag, typical in unknown.items():
        guesses += [f"--{flag}", *typical.replace("NUMBER", "1").split("|")[0].split()]
    converted, notes = _convert(file, state, _parse([*arguments, *guesses]))
    flags = " ".join(f"--{flag} {typical}" for flag, typical in unknown.items())
    also = f"; {', '.join(kind.methods[1:])} files have the same keys" if kind.methods[1:] else ""
    return [
        f"{path}: {kind.form} (--from {method}{also})",
        f"  opens as {_describe(converted.model, unknown)}",
        *(f"  {line}" for line in (*_ignored(file, name, converted.also_read), *_dropped(converted), *notes)),
        f"  convert it: python -m hub.convert {shlex.join(arguments)} {flags}".rstrip(),
        *(f"  --{flag}: not stored in the file" for flag in unknown),
    ]


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line; --from decides which flags exist."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--from", dest="method", choices=FORMATS)
    first.add_argument("--inspect", metavar="FILE")
    known = first.parse_known_args(arguments)[0]
    parser = argparse.ArgumentParser(
        prog="python -m hub.convert",
        description=__doc__.split("\n")[0],
        epilog="" if known.method else "Each format has its own flags: add --from to --help.",
    )
    parser.add_argument("--inspect", metavar="FILE", help="report what a file is and how to convert it; write nothing")
    converts = known.inspect is None
    parser.add_argument("file", nargs=None if converts else "?", help="e.g. mae_visualize_vit_base.pth")
    parser.add_argument("--from", dest="method", choices=FORMATS, required=converts, help="code that wrote the file")
    parser.add_argument("--to", required=converts, help="new folder for the converted model")
    parser.add_argument("--image_stats", choices=IMAGE_STATS, help="mean and std of the images: ImageNet's, or 0.5")
    if known.method:
        module = FORMATS[known.method]
        if weights := list(getattr(module, "WEIGHTS", ())):
            parser.add_argument("--weights", choices=weights, default=weights[0], help="which of the two networks")
        if hasattr(module, "add_flags"):
            module.add_flags(parser)
    return parser.parse_args(arguments)


def _select(file: WeightFile, options: argparse.Namespace) -> tuple[str, dict[str, torch.Tensor]]:
    wanted = getattr(FORMATS[options.method], "WEIGHTS", None)
    return file.state(*wanted[options.weights]) if wanted else file.state()


def _refuse_other_formats(file: WeightFile, state: State, method: str) -> None:
    kind = recognize(file, state)
    if kind is None:
        raise ValueError(
            f"{file.path} is not a checkpoint of {method}: patch_embed.proj.weight or the blocks are missing; its "
            f"first keys are {list(state)[:5]}"
        )
    if method not in kind.methods:
        keys = f" ({', '.join(kind.keys)})" if kind.keys else ""
        raise ValueError(
            f"{file.path} is not a checkpoint of {method} but of {kind.form}{keys}: use --from {kind.methods[0]}"
        )


def _unanswered(state: State, options: argparse.Namespace) -> dict[str, str]:
    """Return flags that the file does not answer and the user did not give, with the values of published files."""
    module = FORMATS[options.method]
    flags: dict[str, str] = module.required_flags(state) if hasattr(module, "required_flags") else {}
    return {flag: typical for flag, typical in flags.items() if getattr(options, flag) is None}


def _convert(file: WeightFile, state: State, options: argparse.Namespace) -> tuple[Converted, list[str]]:
    module = FORMATS[options.method]
    if unknown := _unanswered(state, options):
        flags = ", ".join(f"--{flag} {typical}" for flag, typical in unknown.items())
        raise ValueError(f"the file does not store every setting: add {flags} (values of published files)")
    default = module.image_stats(state) if hasattr(module, "image_stats") else "imagenet"
    (options.image_mean, options.image_std), notes = _image_stats(state, options.image_stats, default)
    options.states, options.losses = file.states, file.losses
    converted = module.convert(state, options)
    return converted, [*converted.notes, *notes]


def _image_stats(state: State, name: str | None, default: str | None) -> tuple[Any, list[str]]:
    """Return (mean, std) for the encoder's channels, and a note if they are the format's default."""
    if name is None and default is None:
        return (None, None), []
    weight = next((tensor for key, tensor in state.items() if key.endswith("patch_embed.proj.weight")), None)
    num_channels = 3 if weight is None else weight.shape[1]
    chosen = name or (default if num_channels == 3 else "half")
    if chosen == "imagenet" and num_channels != 3:
        raise ValueError(f"--image_stats imagenet needs 3 channels, but the encoder has {num_channels}")
    stats = (IMAGENET_MEAN, IMAGENET_STD) if chosen == "imagenet" else ((0.5,) * num_channels, (0.5,) * num_channels)
    return stats, [] if name else [f"images are standardized with --image_stats {chosen}, the default for such files"]


def _ignored(file: WeightFile, name: str, also_read: tuple[str, ...]) -> list[str]:
    others = [key for key in (*file.states, *file.others) if key not in (name, *also_read)]
    names = " and ".join(map(repr, (name, *also_read)))
    ignored = f"; ignored: {', '.join(others)}" if others else ""
    return [f"reading the weights under {names}{ignored}"] if others or also_read else []


def _dropped(converted: Converted) -> list[str]:
    """Return one line for each reason; "blocks.*" stands for all blocks."""
    by_reason: dict[str, list[str]] = {}
    for key, reason in converted.dropped.items():
        keys = by_reason.setdefault(reason, [])
        general = re.sub(r"\b(blocks|layers)\.\d+", r"\1.*", key)
        if general not in keys:
            keys.append(general)
    return [f"dropped {', '.join(keys)}: {reason}" for reason, keys in by_reason.items()]


def _describe(model: PreTrainedModel, unknown: dict[str, str]) -> str:
    config: Any = model.config
    encoder = getattr(config, "encoder_config", config)
    names = (
        *("depths", "embed_dim", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_heads"),
        *("intermediate_size", "window_size", "num_register_tokens", "patch_size", "image_size", "num_channels"),
    )
    sizes = [f"{name} {getattr(encoder, name)}" for name in names if hasattr(encoder, name) and name not in unknown]
    if encoder is not config:
        decoder = (name for name in vars(config) if name.startswith("decoder_"))
        of_model = ("vocab_size", "code_size", "num_prototypes", *decoder)
        sizes += [f"{name} {getattr(config, name)}" for name in of_model if hasattr(config, name)]
    elif hasattr(model, "classifier"):
        sizes.append(f"num_labels {config.num_labels}")
    return f"{type(model).__name__}: {', '.join(sizes)}"


@torch.no_grad()
def _verify(folder: Path, converted: Converted) -> list[str]:
    """Compare the written model with a computation on the file's weights; remove it if the outputs differ."""
    config: Any = getattr(converted.model.config, "encoder_config", converted.model.config)
    if config.model_type == "swin":  # `reference_output` cannot compute it
        return []
    written = open_model(str(folder), keeps_classifier=True).model.eval()
    shape = (1, config.num_channels, *height_and_width(config.image_size))
    pixel_values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    weights = {key: tensor.float() for key, tensor in converted.weights.items()}
    if hasattr(written, "get_codebook_indices"):
        expected = reference_features(weights, pixel_values.sigmoid(), config.num_attention_heads)
        computed = written(pixel_values.sigmoid(), return_loss=False).features
    else:
        expected = reference_output(weights, pixel_values, config.num_attention_heads)
        output = written(pixel_values)
        computed = output.logits if "head.weight" in weights else output.last_hidden_state
    difference = ((computed - expected).abs().max() / expected.abs().max()).item()
    if not difference < 1e-4:
        shutil.rmtree(folder)
        raise ValueError(f"nothing was written: outputs have a relative error of {difference:.2g}")
    return [f"verified against the file's weights: relative error {difference:.1g}"]


if __name__ == "__main__":
    disable_progress_bar()
    main()

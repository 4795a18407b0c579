"""Export a trained model: a native encoder at the root, and the whole model in `pretraining/`.

The root opens with plain `AutoModel.from_pretrained`, without this project and without missing or unexpected keys.
Remote code of a subfolder is looked up at the root, so the code files are in both places; only the config in
`pretraining/` refers to them.
"""

import copy
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.image_utils import PILImageResampling

from modeling import MimPreTrainedModel
from modeling.patches import PATCH_PROJECTION, ValueRange, gray_to_rgb, height_and_width, in_units

PRETRAINING = "pretraining"
UNFINISHED_EXPORT = ".export-"  # prefix of a folder in the output folder


def native_encoder(
    encoder: PreTrainedModel, method: str | None, recipe: dict[str, Any], value_range: ValueRange | None = None
) -> PreTrainedModel:
    """Return the encoder as a native class, with `mim_method` and `mim_recipe` in its config for fine-tuning.

    A grayscale encoder takes RGB images, as those of every image processor and pipeline, and sees them in gray; one of
    measurements does not, and has their `mim_value_range` in its config.
    """
    as_native = getattr(encoder, "as_native", None)  # of an encoder that leaves as another class
    config, weights = as_native() if as_native else (copy.deepcopy(encoder.config), encoder.state_dict())
    record_origin(config, method, recipe, value_range)
    if config.model_type in ("vit", "deit"):
        # AutoModel always builds a pooler. With an identity nothing is random: pooler_output is the class token.
        config.pooler_act, config.pooler_output_size = "linear", config.hidden_size
    state = dict(weights)
    if config.num_channels == 1 and value_range is None:
        config.num_channels = 3
        state |= {name: gray_to_rgb(state[name]) for name in state if name.endswith(PATCH_PROJECTION)}
    native = AutoModel.from_config(config, dtype=torch.float32)
    if config.model_type in ("vit", "deit"):
        state["pooler.dense.weight"] = torch.eye(config.hidden_size)
        state["pooler.dense.bias"] = torch.zeros(config.hidden_size)
    if config.model_type == "beit" and config.use_mean_pooling:  # was fine-tuned once: its final norm is in the pooler
        state.setdefault("pooler.layernorm.weight", torch.ones(config.hidden_size))
        state.setdefault("pooler.layernorm.bias", torch.zeros(config.hidden_size))
    if config.model_type in ("vit", "swin", "deit"):
        state.pop("embeddings.mask_token", None)  # AutoModel builds them without one; pretraining/ keeps it
    native.load_state_dict(state, strict=True)
    return native.eval()


def write_image_processor(
    folder: Path,
    encoder_config: Any,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    resize_to: int | None = None,
    resample: int = PILImageResampling.BICUBIC,
    value_range: ValueRange | None = None,
) -> None:
    """Write the config of a native image processor: resize the short side (default: to the crop), crop the center.

    Native image processors resize photographs only: measurements are just standardized, in their own units.
    """
    height, width = height_and_width(encoder_config.image_size)
    square = height == width

    def per_channel(values: Sequence[float]) -> list[float]:
        return list(values) * (encoder_config.num_channels if len(values) == 1 else 1)  # a grayscale encoder in RGB

    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": encoder_config.num_channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": resize_to or height} if square else {"height": height, "width": width},
        "resample": int(resample),
        "do_center_crop": square,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": per_channel(image_mean),
        "image_std": per_channel(image_std),
    }
    if value_range is not None:
        settings |= dict.fromkeys(("do_convert_rgb", "do_resize", "do_center_crop", "do_rescale"), False)
        settings["image_mean"], settings["image_std"] = in_units(image_mean, image_std, value_range)
        settings["value_range"] = [list(ends) for ends in value_range]
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def native_root_problem(model: MimPreTrainedModel) -> str | None:
    """Return why no native class can hold the encoder, or None if one can; without it the root stays empty."""
    return getattr(model.exported_encoder, "native_root_problem", None)


def export(
    model: MimPreTrainedModel,
    output_dir: str | Path,
    *,
    method: str,
    recipe: dict[str, Any],
    text_tokenizer: Any = None,
) -> str | None:
    """Write both artifacts to `output_dir`, which only changes after the new encoder was opened and compared.

    The companions of the encoder, each in its folder, get the tokenizer of texts.

    Returns the `native_root_problem`; if there is one, only `pretraining/` and its code are written.
    """
    with replacing(Path(output_dir)) as scratch:
        stats, value_range = (model.config.image_mean, model.config.image_std), model.config.value_range
        if (problem := native_root_problem(model)) is None:
            native = native_encoder(model.exported_encoder, method, recipe, value_range)
            native.save_pretrained(scratch)
            write_image_processor(scratch, native.config, *stats, value_range=value_range)
            for name, companion in getattr(model, "companions", {}).items():  # further native models, by folder
                companion.save_pretrained(scratch / name)
                if text_tokenizer is not None:
                    text_tokenizer.save_pretrained(scratch / name)
        model.save_pretrained(scratch / PRETRAINING)
        write_image_processor(scratch / PRETRAINING, model.config.encoder_config, *stats, value_range=value_range)
        for code in (scratch / PRETRAINING).glob("*.py"):
            shutil.copy(code, scratch)
        if problem is None:
            _verify(scratch, model.exported_encoder)
        for folder in (path for path in scratch.iterdir() if path.is_dir()):
            shutil.rmtree(Path(output_dir) / folder.name, ignore_errors=True)
    return problem


def export_native(
    model: PreTrainedModel,
    output_dir: str | Path,
    *,
    method: str | None,
    recipe: dict[str, Any],
    image_mean: Sequence[float],
    image_std: Sequence[float],
    resize_to: int | None = None,
    resample: int = PILImageResampling.BICUBIC,
    value_range: ValueRange | None = None,
) -> str:
    """Write a native encoder or classifier; return the name of the Auto class that opens it.

    For a classifier, the authors' size of the short side is the default of `resize_to`.
    """
    classifies, config = hasattr(model, "classifier"), model.config
    with replacing(Path(output_dir)) as scratch:
        if classifies:
            record_origin(model.config, method, recipe, value_range)
            model.save_pretrained(scratch)
            size = model.config.image_size
            if not resize_to and isinstance(size, int) and size < 384:
                resize_to = size * 256 // 224  # as in the evaluation of all these methods' authors
        else:
            native = native_encoder(model, method, recipe, value_range)
            native.save_pretrained(scratch)
            config = native.config
        write_image_processor(scratch, config, image_mean, image_std, resize_to, resample, value_range)
        _verify(scratch, model)
    return (AutoModelForImageClassification if classifies else AutoModel).__name__


@contextmanager
def replacing(output_dir: Path) -> Iterator[Path]:
    """Yield a folder to write to, whose content moves to `output_dir` at the end unless there was an error."""
    output_dir.mkdir(parents=True, exist_ok=True)
    for left_behind in output_dir.glob(f"{UNFINISHED_EXPORT}*"):  # by an export that was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=UNFINISHED_EXPORT) as scratch_name:
        scratch = Path(scratch_name)
        yield scratch
        umask = os.umask(0)
        os.umask(umask)
        for weights in scratch.rglob("*.safetensors"):  # safetensors lets nobody else read its files
            weights.chmod(0o666 & ~umask)
        marks = ("config.json", PRETRAINING)  # of a complete model, and of a finished run
        for path in sorted(scratch.iterdir(), key=lambda path: marks.index(path.name) if path.name in marks else -1):
            path.replace(output_dir / path.name)


def record_origin(
    config: Any, method: str | None, recipe: dict[str, Any], value_range: ValueRange | None = None
) -> None:
    """Write to a config which method trained the encoder, with which settings, and on which range of values."""
    if method is not None:
        config.mim_method = method
    config.mim_recipe = recipe
    if value_range is not None:
        config.mim_value_range = [list(ends) for ends in value_range]


@torch.no_grad()
def _verify(folder: Path, ours: PreTrainedModel) -> None:
    """Open the folder as a user would. Raises RuntimeError if the outputs differ from those of the model in memory."""
    auto_class = AutoModelForImageClassification if hasattr(ours, "classifier") else AutoModel
    opened, info = auto_class.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    leftovers = {key: value for key, value in info.items() if value}
    shape = (1, ours.config.num_channels, *height_and_width(ours.config.image_size))
    probe = torch.linspace(-2, 2, math.prod(shape)).reshape(shape)
    was_training = ours.training
    parameter = next(ours.parameters())
    expected = ours.eval()(probe.to(parameter.device, parameter.dtype))[0].float().cpu()
    ours.train(was_training)
    probe = probe.expand(-1, opened.config.num_channels, -1, -1)  # a grayscale encoder was opened for RGB
    difference = (opened.eval()(probe)[0] - expected).abs().max().item()
    tolerance = 1e-4 * max(expected.abs().max().item(), 1.0)
    if leftovers or not difference <= tolerance:
        raise RuntimeError(
            f"the exported model differs from the one in memory: outputs differ by {difference:.3g} "
            f"(at most {tolerance:.3g} expected), mismatched keys {leftovers}; nothing was written"
        )

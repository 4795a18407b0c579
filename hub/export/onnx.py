"""Export a model to ONNX, verified with onnxruntime before the file is put in place."""

import glob
import inspect
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from transformers import PreTrainedModel

from hub.open_model import open_model
from modeling.patches import height_and_width

# An ONNX file cannot exceed 2 GB; larger weights go to a second file next to it.
_MOST_BYTES = 1_800_000_000


class _Encoder(nn.Module):
    """A wrapper that returns the outputs as a tuple, as ONNX needs them."""

    def __init__(self, model: PreTrainedModel, output_names: list[str], **options: Any):
        super().__init__()
        self.model, self.output_names, self.options = model, output_names, options

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(pixel_values, **self.options)
        return tuple(output[name] for name in self.output_names)


@torch.no_grad()
def export_onnx(folder: str | Path, file: str | Path) -> list[str]:
    """Write `file` from the encoder or classifier in `folder`; return the report.

    The batch size is dynamic; the image size is dynamic if the encoder's positions can be interpolated. Raises
    ValueError if a library is missing, or the outputs of onnxruntime differ from PyTorch's.
    """
    onnxruntime = _import_onnxruntime()
    file = Path(file)
    # Fused attention with a relative position bias cannot be exported (transformers 5.23, torch 2.13).
    model = open_model(str(folder), keeps_classifier=True, attn_implementation="eager").model.eval()
    config: Any = model.config
    height, width = height_and_width(config.image_size)
    output_names = ["logits"] if hasattr(model, "classifier") else ["last_hidden_state", "pooler_output"]
    is_dynamic = has_dynamic_image_size(config)
    interpolates = is_dynamic and "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    options = {"interpolate_pos_encoding": True} if interpolates else {}
    axes: dict[int, Any] = {0: Dim("batch", min=1)}
    if is_dynamic:
        axes |= {2: Dim("height", min=config.patch_size), 3: Dim("width", min=config.patch_size)}
    # Not the model's own size, for which the interpolation would be skipped and missing from the trace.
    traced = (height + config.patch_size, width + 2 * config.patch_size) if is_dynamic else (height, width)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = f".onnx-{file.name}-"
    for left_behind in file.parent.glob(f"{glob.escape(unfinished)}*"):  # by an export that was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=unfinished) as scratch:
        written = Path(scratch) / file.name
        torch.onnx.export(
            _Encoder(model, output_names, **options).eval(),
            (torch.zeros(2, config.num_channels, *traced),),
            written,
            input_names=["pixel_values"],
            output_names=output_names,
            dynamic_shapes={"pixel_values": axes},
            external_data=sum(p.numel() * p.element_size() for p in model.parameters()) > _MOST_BYTES,
            dynamo=True,
            verbose=False,
        )
        sizes = [(height, width), traced] if is_dynamic else [(height, width)]
        difference = _relative_error(onnxruntime.InferenceSession(written), model, output_names, sizes, options)
        if not difference < 1e-4:
            raise ValueError(f"nothing was written: outputs of onnxruntime have a relative error of {difference:.2g}")
        for part in Path(scratch).iterdir():
            part.replace(file.parent / part.name)
    reason = "relative positions and windows are stored in the file as constants"
    if not isinstance(config.image_size, int):
        reason = "positions of a rectangular image cannot be interpolated"
    size = "any multiple of the patch size" if is_dynamic else f"{height} x {width} only: {reason}"
    return [
        f"{file}: pixel_values (batch, {config.num_channels}, height, width) float32, standardized as in "
        f"{Path(folder) / 'preprocessor_config.json'} -> {', '.join(output_names)}",
        f"  batch size: any; image size: {size}",
        f"  verified with onnxruntime on 1 and 3 images of {' and '.join(f'{h} x {w}' for h, w in sizes)}: relative "
        f"error {difference:.1g}",
    ]


def has_dynamic_image_size(config: Any) -> bool:
    """Return whether positions can be interpolated: absolute ones of a square image, not relative ones or windows."""
    if not isinstance(config.image_size, int):
        return False
    if config.model_type == "beit":
        return config.use_absolute_position_embeddings and not (
            config.use_relative_position_bias or config.use_shared_relative_position_bias
        )
    return config.model_type in ("vit", "deit")


def _import_onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401 - torch.onnx needs it
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise ValueError(f"{error.name} is not installed: pip install onnx onnxscript onnxruntime") from error
    return onnxruntime


def _relative_error(
    session: Any, model: PreTrainedModel, output_names: list[str], sizes: list[tuple[int, int]], options: Any
) -> float:
    """Return the largest error of any output on 1 and 3 images of each size, relative to its largest value."""
    differences = []
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        for num_images in (1, 3):
            images = torch.randn(num_images, model.config.num_channels, *size, generator=generator)
            ours = model(images, **(options if size != sizes[0] else {}))
            theirs = session.run(output_names, {"pixel_values": images.numpy()})
            for name, computed in zip(output_names, theirs, strict=True):
                expected = ours[name]
                differences.append((torch.from_numpy(computed) - expected).abs().max() / expected.abs().max())
    return torch.stack(differences).max().item()

"""The encoder as an ONNX file, checked with onnxruntime before it is left in its place."""

import inspect
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from transformers import PreTrainedModel

from hub.convert.native_models import open_native

# A file of ONNX itself cannot be larger than 2 GB; weights beyond go into a second one beside it.
_MOST_BYTES = 1_800_000_000


class _Encoder(nn.Module):
    """From images to tensors by position, as ONNX has it."""

    def __init__(self, model: PreTrainedModel, output_names: list[str], **how: Any):
        super().__init__()
        self.model, self.output_names, self.how = model, output_names, how

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        output = self.model(pixel_values, **self.how)
        return tuple(output[name] for name in self.output_names)


@torch.no_grad()
def export_onnx(folder: str | Path, file: str | Path) -> list[str]:
    """Write `file` from the encoder, or the classifier, in `folder`; returns what is to be said about it.

    The number of images is free; their size is where the encoder's positions can be interpolated.

    Raises:
        ValueError: a library is missing, or onnxruntime computes something else than PyTorch.
    """
    onnxruntime = _import_onnxruntime()
    file = Path(file)
    # With the fused attention a bias between positions cannot be exported (transformers 5.23, torch 2.13).
    model = open_native(folder, attn_implementation="eager")
    config: Any = model.config
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    output_names = ["logits"] if hasattr(model, "classifier") else ["last_hidden_state", "pooler_output"]
    is_free = has_free_image_size(config)
    how = {"interpolate_pos_encoding": True} if is_free and _interpolates_on_request(model) else {}
    axes: dict[int, Any] = {0: Dim("batch", min=1)}
    if is_free:
        axes |= {2: Dim("height", min=config.patch_size), 3: Dim("width", min=config.patch_size)}
    # Any other size than its own: with its own, what is traced would be the way around the interpolation.
    traced = (height + config.patch_size, width + 2 * config.patch_size) if is_free else (height, width)
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=".onnx-") as scratch:
        written = Path(scratch) / file.name
        torch.onnx.export(
            _Encoder(model, output_names, **how).eval(),
            (torch.zeros(2, config.num_channels, *traced),),
            written,
            input_names=["pixel_values"],
            output_names=output_names,
            dynamic_shapes={"pixel_values": axes},
            external_data=sum(p.numel() * p.element_size() for p in model.parameters()) > _MOST_BYTES,
            dynamo=True,
            verbose=False,
        )
        sizes = [(height, width), traced] if is_free else [(height, width)]
        difference = _largest_difference(onnxruntime.InferenceSession(written), model, output_names, sizes, how)
        if not difference < 1e-4:
            raise ValueError(f"onnxruntime computes something else: off by {difference:.2g}; nothing was written")
        for part in Path(scratch).iterdir():
            part.replace(file.parent / part.name)
    told = "any multiple of the patch" if is_free else f"{height} x {width} only: {_why_fixed(config)}"
    return [
        f"{file}: pixel_values (batch, {config.num_channels}, height, width) float32, standardized as "
        f"{Path(folder) / 'preprocessor_config.json'} says -> {', '.join(output_names)}",
        f"  batch: any; image size: {told}",
        f"  checked with onnxruntime at 1 and 3 images of {' and '.join(f'{h} x {w}' for h, w in sizes)}: off by "
        f"{difference:.1g} of the largest number",
    ]


def has_free_image_size(config: Any) -> bool:
    """Absolute positions of a square image are interpolated; relative ones and windows do not survive free sizes."""
    if not isinstance(config.image_size, int):
        return False
    if config.model_type == "beit":
        return config.use_absolute_position_embeddings and not (
            config.use_relative_position_bias or config.use_shared_relative_position_bias
        )
    return config.model_type in ("vit", "deit")


def _why_fixed(config: Any) -> str:
    if not isinstance(config.image_size, int):
        return "positions of a rectangle cannot be interpolated"
    return "its relative positions or windows are written into the file as numbers"


def _interpolates_on_request(model: PreTrainedModel) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters


def _import_onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401 - torch.onnx needs it
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise ValueError(f"{error.name} is missing: pip install onnx onnxscript onnxruntime") from error
    return onnxruntime


def _largest_difference(
    session: Any, model: PreTrainedModel, output_names: list[str], sizes: list[tuple[int, int]], how: dict[str, Any]
) -> float:
    """Over all outputs at 1 and 3 images of each size, as a share of the largest number."""
    differences = []
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        for num_images in (1, 3):
            images = torch.randn(num_images, model.config.num_channels, *size, generator=generator)
            ours = model(images, **(how if size != sizes[0] else {}))
            theirs = session.run(output_names, {"pixel_values": images.numpy()})
            for name, computed in zip(output_names, theirs, strict=True):
                expected = ours[name]
                differences.append((torch.from_numpy(computed) - expected).abs().max() / expected.abs().max())
    return torch.stack(differences).max().item()

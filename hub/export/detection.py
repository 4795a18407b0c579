"""Export an object detector as a folder for `pipeline("object-detection")`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForObjectDetection, PreTrainedModel

from hub.export.native import record_origin, replacing

_TOLERANCE = 1e-4


def export_detector(
    model: PreTrainedModel,
    folder: Path,
    *,
    method: str | None,
    recipe: dict[str, Any],
    resample: int,
    image_mean: Sequence[float],
    image_std: Sequence[float],
) -> None:
    """Write a native model and an image processor that stretches images to the model's size.

    Raises:
        RuntimeError: If the folder opens with other boxes.
    """
    model = model.cpu().eval()
    record_origin(model.config, method, recipe)
    side = model.config.backbone_config.image_size
    settings = {
        "image_processor_type": "DeformableDetrImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": resample,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image_mean) * (3 if len(image_mean) == 1 else 1),
        "image_std": list(image_std) * (3 if len(image_std) == 1 else 1),
        "do_pad": False,
    }
    with replacing(folder) as scratch:
        model.save_pretrained(scratch)
        text = json.dumps(settings, indent=2) + "\n"
        (scratch / "preprocessor_config.json").write_text(text, encoding="utf-8")
        _verify(scratch, model, side)


@torch.no_grad()
def _verify(folder: Path, ours: PreTrainedModel, side: int) -> None:
    """Open the folder as a user would."""
    opened, info = AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    probe = torch.linspace(-2, 2, 3 * side * side).reshape(1, 3, side, side)
    pairs = [(opened.eval()(probe)[name], ours(probe)[name]) for name in ("logits", "pred_boxes")]
    difference = max((theirs - own).abs().max().item() for theirs, own in pairs)
    tolerance = _TOLERANCE * max(pairs[0][1].abs().max().item(), 1.0)
    leftovers = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if leftovers or not difference <= tolerance:
        raise RuntimeError(
            f"the exported model differs from the one in memory: outputs differ by {difference:.3g} (at most "
            f"{tolerance:.3g} expected), mismatched keys {json.dumps(leftovers)}; nothing was written"
        )

"""Export a model of masks or boxes as a folder for a pipeline of transformers."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from hub.export.native import record_origin, replacing

_TOLERANCE = 1e-4


def export_dense(
    native: Any,
    folder: Path,
    *,
    trained: Any,
    auto_class: Any,
    image_processor: Mapping[str, Any],
    image_stats: Mapping[str, Sequence[float]],
    image_size: int,
    outputs: Sequence[str],
    origin: tuple[str | None, dict[str, Any]],
) -> None:
    """Write a native model and its image processor.

    Args:
        trained: The model whose outputs the folder must give.
        auto_class: Opens the folder.
        image_processor: Its class, and how it resizes images.
        outputs: Names of the outputs that are compared.
        origin: Method and recipe of the pre-training.

    Raises:
        RuntimeError: If the folder opens with other outputs; nothing is written then.
    """
    native = native.cpu().eval()
    record_origin(native.config, *origin)
    settings = {
        **image_processor,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **{name: list(values) * (3 if len(values) == 1 else 1) for name, values in image_stats.items()},
    }
    with replacing(folder) as scratch:
        native.save_pretrained(scratch)
        text = json.dumps(settings, indent=2) + "\n"
        (scratch / "preprocessor_config.json").write_text(text, encoding="utf-8")
        _verify(scratch, trained.eval(), auto_class, image_size, outputs)


def stretched(image_processor_type: str, side: int, resample: Image.Resampling) -> dict[str, Any]:
    """Return the settings of an image processor that stretches images to a square."""
    return {
        "image_processor_type": image_processor_type,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": int(resample),
    }


@torch.no_grad()
def _verify(folder: Path, trained: Any, auto_class: Any, side: int, outputs: Sequence[str]) -> None:
    """Open the folder as a user would."""
    opened, info = auto_class.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    probe = torch.linspace(-2, 2, 3 * side * side).reshape(1, 3, side, side)
    expected, found = trained(probe.to(next(trained.parameters()).device)), opened.eval()(probe)
    pairs = [(expected[name].float().cpu(), found[name]) for name in outputs]
    difference = max((theirs - ours).abs().max().item() for ours, theirs in pairs)
    tolerance = _TOLERANCE * max(1.0, *(ours.abs().max().item() for ours, _ in pairs))
    leftovers = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if leftovers or not difference <= tolerance:
        raise RuntimeError(
            f"the exported model differs from the one in memory: {' and '.join(outputs)} differ by {difference:.3g} "
            f"(at most {tolerance:.3g} expected), mismatched keys {json.dumps(leftovers)}; nothing was written"
        )

"""Read how an encoder's images are standardized from the image processor saved with it."""

import math
from pathlib import Path
from typing import Any

from transformers.image_processing_base import ImageProcessingMixin

from modeling.base import IMAGENET_MEAN, IMAGENET_STD


def image_stats(name: str) -> tuple[dict[str, Any], list[str]]:
    """Return `image_mean` and `image_std` of three channels, and a note if these are ImageNet's by default.

    Of an encoder of measurements: of its channels, and their `value_range`.
    """
    stats = processor_stats(name, num_channels=3)
    if not stats:
        stats = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
        return stats, [f"{name} has no preprocessor_config.json with mean and std: ImageNet's are used"]
    if "value_range" in stats:
        return stats, []
    # All colors of a grayscale encoder get the statistics of its only channel.
    return {key: values * 3 if len(values) == 1 else values for key, values in stats.items()}, []


def processor_stats(name: str, num_channels: int, subfolder: str = "") -> dict[str, Any]:
    """Return `image_mean` and `image_std` of a model's image processor; empty if it has none.

    With the `value_range` of measurements, mean and std are relative to it.

    Raises ValueError if they are not finite, or a standard deviation is not above 0.
    """
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name, subfolder=subfolder)
    except (OSError, ValueError):
        file = Path(name, subfolder, "preprocessor_config.json")
        if file.exists():
            file.open("rb").close()  # raises the error of a file that the user may not read
        return {}
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if processor.get("do_normalize") is False:
        mean, std = 0.0, 1.0
    if mean is None or std is None:
        return {}
    stats = {
        key: [float(number) for number in (value if isinstance(value, list) else [value] * num_channels)]
        for key, value in (("image_mean", mean), ("image_std", std))
    }
    if not all(map(math.isfinite, stats["image_mean"] + stats["image_std"])) or min(stats["image_std"]) <= 0:
        raise ValueError(
            f"preprocessor_config.json of {name} has image_mean {mean} and image_std {std}, expected finite numbers "
            "and an image_std above 0"
        )
    if (ends := processor.get("value_range")) is not None:
        means = [(m - low) / (high - low) for m, (low, high) in zip(stats["image_mean"], ends, strict=True)]
        stds = [s / (high - low) for s, (low, high) in zip(stats["image_std"], ends, strict=True)]
        return {"image_mean": means, "image_std": stds, "value_range": ends}
    return stats


def processor_image_size(name: str) -> tuple[int, int] | None:
    """Return height and width of the images that a model's image processor makes; None if it does not say."""
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except (OSError, ValueError):
        return None
    size = (processor.get("do_center_crop", True) and processor.get("crop_size")) or processor.get("size")
    if isinstance(size, dict):
        side = size.get("shortest_edge")
        size = [size.get("height", side), size.get("width", side)]
    height, width = size if isinstance(size, list) else (size, size)
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None

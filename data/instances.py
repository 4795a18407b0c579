"""Images with one mask per object: a COCO file with masks, and views that move image and masks together.

Shapes: N images, C channels, H W pixels of an image, h w pixels of a view, n objects of an image, M places for the
objects of an image in a batch, B images of a batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.box_datasets import BoxSplits
from data.boxes import BoxSamples
from data.collators import stack_items
from data.decoding import BadImage, check, decode
from data.dense_views import Placement, RandomPlacement, draw_distortion, whole

NO_OBJECT = -1  # class of a place in a batch that has no object
_NUM_TRIED = 1_000  # masks that are read before training; a large file has more
FILL = (0, 0, 0)  # as transformers' image processor pads


@dataclass(frozen=True)
class InstanceSamples(BoxSamples):
    """Images with boxes whose objects have masks."""

    def sample(self, index: int) -> dict[str, Any]:
        rows, mask = self.rows(index), self.raw.mask
        assert mask is not None
        try:
            masks = [mask(row) for row in range(rows.start, rows.stop)]  # (n,) of (H, W)
        except ValueError as error:
            raise BadImage(str(error)) from None
        return {**super().sample(index), "masks": masks, "sample_index": index}


def with_masks(splits: BoxSplits, dataset: str, max_bad_fraction: float) -> BoxSplits:
    """Return the splits with the masks of their objects, after reading some of them.

    Raises:
        ValueError: If the dataset has boxes only, or too many masks cannot be used.
    """
    for name, split in splits.samples.items():
        title, mask = f"the {name} split of {dataset}", split.raw.mask
        if mask is None:
            raise ValueError(
                f"{title} has boxes, but no masks; expected COCO json with a segmentation for each annotation"
            )
        own = np.flatnonzero(np.isin(split.raw.images, split.indices))
        rows = own[np.unique(np.linspace(0, len(own) - 1, min(_NUM_TRIED, len(own))).astype(np.int64))]
        problems = []
        for row in rows.tolist():
            try:
                height, width = mask(row).shape
                header = check(split.source.entry(int(split.raw.images[row])))
            except ValueError as error:
                problems.append(str(error))
                continue
            if (width, height) != (header.width, header.height):
                problems.append(
                    f"that of {split.raw.name(row)} is for {width} x {height} pixels, but the image has "
                    f"{header.width} x {header.height}"
                )
        if len(problems) > max_bad_fraction * len(rows):
            raise ValueError(
                f"{len(problems):,} of {len(rows):,} masks of {title} that were tried cannot be used, such as: "
                f"{problems[0]}; max_bad_fraction allows {max_bad_fraction:.2%}: repair or remove these annotations"
            )
    found = {name: InstanceSamples(split.source, split.indices, split.raw) for name, split in splits.samples.items()}
    return replace(splits, samples=found)


@dataclass(frozen=True)
class InstanceView:
    """The transform to a square view and the masks of its objects, uint8 (n, h, w), with their classes (n,).

    Args:
        scale: Smallest and largest scale of a random view; None shows the whole image, padded at the right or bottom,
            and keeps objects that are too small to have a pixel there, so that an evaluation counts them as missed.
    """

    image_size: int
    scale: tuple[float, float] | None
    interpolation: Image.Resampling

    def __call__(self, sample: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        image, masks = decode(sample["image"], 3), sample["masks"]
        for mask in masks:
            if mask.shape != (image.height, image.width):
                raise BadImage(
                    f"its masks are for {mask.shape[1]} x {mask.shape[0]} pixels, but it has {image.width} x "
                    f"{image.height}"
                )
        stacked = np.stack(masks).astype(np.uint8) if masks else np.zeros((0, image.height, image.width), np.uint8)
        placement = self._place(image, sample, generator)
        pixels = placement.image(image, FILL, self.interpolation)
        if self.scale is not None:
            pixels = draw_distortion(generator).apply(pixels)
        shown = placement.labels(stacked, 0)
        kept = torch.from_numpy(shown.any((1, 2)) | (self.scale is None))
        return {
            "pixel_values": pixels,
            "masks": torch.from_numpy(shown)[kept],
            "classes": sample["classes"][kept],
            "is_crowd": sample["is_crowd"][kept],
            "sample_index": sample["sample_index"],
        }

    def _place(self, image: Image.Image, sample: Mapping[str, Any], generator: torch.Generator) -> Placement:
        """Return the whole image, or a random placement that shows an object, if one of several does."""
        size = (self.image_size, self.image_size)
        if self.scale is None:
            return whole(image.width, image.height, size, "long")
        tried = list(RandomPlacement(size, self.scale, "long").draw(image.width, image.height, generator))
        boxes = sample["boxes"].numpy() * np.array([image.width, image.height] * 2)
        for placement in tried:
            left, top, right, bottom = placement.boxes(boxes).T
            if ((right > left) & (bottom > top)).any():
                return placement
        return tried[0]


def collate_instances(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack items of `InstanceView`: "masks" (B, M, h, w), "classes" and "is_crowd" (B, M)."""
    num_places = max(1, *(len(item["classes"]) for item in items))
    padded = [
        {
            **item,
            "masks": _padded(item["masks"], num_places, 0),
            "classes": _padded(item["classes"], num_places, NO_OBJECT),
            "is_crowd": _padded(item["is_crowd"], num_places, 0),
        }
        for item in items
    ]
    return stack_items(padded)


def _padded(values: Tensor, length: int, fill: int) -> Tensor:
    """Return values (n, ...) with more rows of `fill`, (length, ...)."""
    rest = values.new_full((length - len(values), *values.shape[1:]), fill)
    return torch.cat([values, rest])

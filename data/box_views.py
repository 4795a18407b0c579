"""Views of images with boxes: the whole image stretched to a square, with large-scale jitter in training.

Papers: Ghiasi et al. 2020 (Simple Copy-Paste), arXiv:2012.07177, Sec. 3: a random scale, then a crop or padding.
Code: facebookresearch/detectron2/projects/ViTDet/configs/common/coco_loader_lsj.py at 02b5c4e, scales of 0.1 to 2.
Differs: The sides of an image are stretched to the square, as in RF-DETR's own training and by the image processor of
an exported detector, so that no part of a view in evaluation is padding.
Shapes: B images, C channels, S side of a view, n boxes of an image, M of the image with the most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.collators import stack_items
from data.decoding import decode
from data.dense_views import RandomPlacement, whole

_PADDING = -100.0  # in labels, as Trainer pads them
_SMALLEST_SIDE = 1.0  # pixels of a box in a training view


@dataclass(frozen=True)
class BoxViews:
    """The transform of images with boxes.

    Args:
        scale: Smallest and largest factor of the large-scale jitter; None in evaluation.
        fill: The color of padding, for each channel in 0 to 255.
    """

    side: int
    scale: tuple[float, float] | None
    fill: Sequence[int]
    interpolation: Image.Resampling

    def __call__(self, sample: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        image, boxes = decode(sample["image"], 3), sample["boxes"]
        size = (self.side, self.side)
        # Boxes are fractions, so that the placement is that of a square image with the side 1.
        if self.scale is None:
            placement = whole(1, 1, size, "stretch")
        else:
            placement = next(RandomPlacement(size, self.scale, "long").draw(1, 1, generator))
        moved = torch.from_numpy(placement.boxes(boxes.numpy().astype(np.float64)))
        is_shown = (moved[:, 2:] - moved[:, :2]).amin(dim=1) >= _SMALLEST_SIDE
        is_target = is_shown & ~sample["is_crowd"]
        left, top, right, bottom = placement.box
        in_pixels = (left * image.width, top * image.height, right * image.width, bottom * image.height)
        pixel_values = replace(placement, box=in_pixels).image(image, self.fill, self.interpolation)
        sides = torch.tensor([image.width, image.height], dtype=torch.float32)
        of_image = [
            boxes * sides.repeat(2),
            sample["classes"][:, None],
            sample["areas"][:, None] * sides.prod(),
            sample["is_crowd"][:, None],
        ]
        return {
            "pixel_values": pixel_values,  # uint8 (C, S, S)
            "boxes": _centers(moved[is_target] / self.side),
            "class_labels": sample["classes"][is_target],
            "labels": torch.cat([value.float() for value in of_image], dim=1),  # (n, 7), in pixels of the image
            "sizes": sides,
        }


def collate_boxes(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a batch with "targets", a list of the boxes and classes of each image, and "labels" (B, M, 7), padded."""
    own = ("boxes", "class_labels", "labels")
    batch = stack_items([{key: value for key, value in item.items() if key not in own} for item in items])
    targets = [{"boxes": item["boxes"], "class_labels": item["class_labels"]} for item in items]
    most = max(1, max(len(item["labels"]) for item in items))
    labels = torch.full((len(items), most, 7), _PADDING)
    for row, item in zip(labels, items, strict=True):
        row[: len(item["labels"])] = item["labels"]
    return {**batch, "targets": targets, "labels": labels}


def _centers(boxes: Tensor) -> Tensor:
    """Convert left, top, right and bottom (n, 4) to center, width and height."""
    return torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)

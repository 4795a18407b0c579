"""Views of images and masks for segmentation: random crops in training, whole images and windows in evaluation.

Code: open-mmlab/mmsegmentation: RandomCrop with cat_max_ratio 0.75, and slide inference, as the authors of BEiT, MAE
and iBOT use for ADE20K.
Shapes: B images, C channels, H W pixels of a mask, h w of the largest view of a batch, S side of a crop.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.decoding import BadImage, decode
from data.dense_views import RandomPlacement, draw_distortion, whole
from data.mask_codes import IGNORED, MaskCodes

STRIDE = 2 / 3  # of the side of a window: 341 of 512 pixels
_LARGEST_SHARE = 0.75  # of a class among the counted pixels of a crop, if one of its positions has less


@dataclass(frozen=True)
class TrainViews:
    """The transform to a crop of image and mask, (C, S, S) and uint8 (S, S).

    Args:
        fill: The color of the padding, 0 to 255.
    """

    placement: RandomPlacement
    codes: MaskCodes
    fill: tuple[int, ...]
    interpolation: Image.Resampling = Image.Resampling.BICUBIC

    def __call__(self, sample: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        image, mask = decode_pair(sample, self.codes, len(self.fill))
        for placement in self.placement.draw(*image.size, generator):
            labels = placement.labels(mask, IGNORED)
            counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED]
            if (counts > 0).sum() > 1 and counts.max() < _LARGEST_SHARE * counts.sum():
                break
        pixels = draw_distortion(generator).apply(placement.image(image, self.fill, self.interpolation))
        return {"pixel_values": pixels, "labels": torch.from_numpy(labels.copy())}


@dataclass(frozen=True)
class EvalViews:
    """The transform to an image whose short side is resized to `side`, beside its mask in full size.

    Args:
        tile: Pixels of an image that are resized to `side` instead, where its short side has more.
    """

    side: int
    codes: MaskCodes
    num_channels: int = 3
    tile: int | None = None
    interpolation: Image.Resampling = Image.Resampling.BICUBIC

    def __call__(self, sample: Mapping[str, Any], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        image, mask = decode_pair(sample, self.codes, self.num_channels)
        placement = whole(*image.size, (self.side, self.side), "short", self.tile)
        view = placement.image(image, (0,) * self.num_channels, self.interpolation)
        counted = torch.tensor(int((mask != IGNORED).sum()))
        return {"pixel_values": view, "labels": torch.from_numpy(mask), "num_counted_pixels": counted}


def decode_pair(sample: Mapping[str, Any], codes: MaskCodes, num_channels: int) -> tuple[Image.Image, np.ndarray]:
    """Return an image, and the classes uint8 (H, W) of its pixels.

    Raises:
        BadImage: If one of them cannot be read, or their sizes differ.
    """
    image, mask = decode(sample["image"], num_channels), codes.read(sample["mask"])
    if mask.shape != image.size[::-1]:
        raise BadImage(
            f"its mask is {mask.shape[1]} x {mask.shape[0]} pixels, but the image {image.width} x {image.height}"
        )
    return image, mask


def collate_padded(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack items whose views and masks differ in size, padded at the right and at the bottom.

    "sizes" and "mask_sizes" int64 (B, 2) are their heights and widths without padding.
    """
    batch: dict[str, Any] = {}
    for key, name, fill in (("pixel_values", "sizes", 0), ("labels", "mask_sizes", IGNORED)):
        tensors = [item[key] for item in items]
        sizes = torch.tensor([tensor.shape[-2:] for tensor in tensors])
        height, width = sizes.max(0).values.tolist()
        padded = tensors[0].new_full((len(items), *tensors[0].shape[:-2], height, width), fill)
        for row, tensor in zip(padded, tensors, strict=True):
            row[..., : tensor.shape[-2], : tensor.shape[-1]] = tensor
        batch |= {key: padded, name: sizes}
    for key in ("num_counted_pixels", "image_index"):
        batch[key] = torch.tensor([int(item[key]) for item in items])
    return batch


def window_boxes(height: int, width: int, side: int, stride: float = STRIDE) -> list[tuple[int, int]]:
    """Return the top left corners of windows that cover an image, which overlap by at least a third of a window."""
    step = max(1, int(side * stride))
    tops, lefts = (
        [min(number * step, length - side) for number in range(math.ceil((length - side) / step) + 1)]
        for length in (height, width)
    )
    return [(top, left) for top in tops for left in lefts]

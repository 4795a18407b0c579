"""Crops for fine-tuning and evaluating a classifier, as published.

Recipe: He et al. 2021 (MAE), arXiv:2111.06377, App. A.1, which SimMIM and BEiT follow: random resized crop (0.08, 1),
flip, RandAugment; in evaluation the short side is resized to 256/224 of the crop, and its central part is used.
Shapes: C channels, H W pixels of the crop.
"""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from data.augmentations import RandomResizedCrop
from data.crops import Box, to_image, to_tensor
from data.decoding import decode
from data.measured import Encoded, MeasuredImage, load_measured_crops
from data.randaugment import RandAugment

FINETUNE_SCALE = (0.08, 1.0)
CROP_SHARE = 224 / 256  # of the resized short side, for images of 224 px and less


@dataclass(frozen=True)
class TrainView:
    """A random crop, flipped half of the time, then RandAugment."""

    crop: RandomResizedCrop
    rand_augment: RandAugment | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.crop.size

    def __call__(self, data: Encoded, num_channels: int, generator: torch.Generator) -> Tensor:
        pixels = self.crop(data, num_channels, generator)
        return to_tensor(self.rand_augment(to_image(pixels), generator)) if self.rand_augment else pixels


@dataclass(frozen=True)
class EvalView:
    """The short side resized to `resize_to`, then the central `size` (height, width) pixels.

    Equals transformers' image processors with {"shortest_edge": resize_to} and a center crop pixel for pixel (Pillow's
    filters, long side and offsets rounded down), so that a saved classifier sees what was evaluated. A JPEG is decoded
    in full for it.
    """

    size: tuple[int, int]
    resize_to: int
    interpolation: Image.Resampling = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        if self.resize_to < max(self.size):
            raise ValueError(f"resize_to is {self.resize_to} px, expected at least the crop of {self.size} px")

    def __call__(self, data: Encoded, num_channels: int, generator: torch.Generator | None = None) -> Tensor:
        if isinstance(data, MeasuredImage):
            views = [(self.size, self.interpolation)]
            return load_measured_crops(data, lambda *size: [(self._box(*size), views)])[0][0]
        image = decode(data, num_channels)
        short, long = sorted(image.size)
        resized_long = int(self.resize_to * long / short)
        is_upright = image.width <= image.height
        width, height = (self.resize_to, resized_long) if is_upright else (resized_long, self.resize_to)
        image = image.resize((width, height), self.interpolation)
        left, top = (width - self.size[1]) // 2, (height - self.size[0]) // 2
        return to_tensor(image.crop((left, top, left + self.size[1], top + self.size[0])))

    def _box(self, width: int, height: int) -> Box:
        """Return the part of an image of measurements that is resized at once, at the same scale."""
        scale = min(width, height) / self.resize_to
        crop_height, crop_width = scale * self.size[0], scale * self.size[1]
        left, top = max(0.0, (width - crop_width) / 2), max(0.0, (height - crop_height) / 2)  # not -1e-15
        return left, top, left + crop_width, top + crop_height


def train_view(
    size: tuple[int, int],
    rand_augment: RandAugment | None = None,
    crop_scale: tuple[float, float] = FINETUNE_SCALE,
    interpolation: Image.Resampling = Image.Resampling.BICUBIC,
) -> TrainView:
    return TrainView(RandomResizedCrop(size, crop_scale, interpolation=interpolation), rand_augment)


def eval_view(
    size: tuple[int, int], crop_share: float, interpolation: Image.Resampling = Image.Resampling.BICUBIC
) -> EvalView:
    """Return the evaluation crop; `crop_share` is its part of the resized short side, `CROP_SHARE` or 1."""
    if not 0 < crop_share <= 1:
        raise ValueError(f"crop_share is {crop_share}, expected more than 0 and at most 1 (no margin is removed)")
    return EvalView(size, int(max(size) / crop_share), interpolation)

"""Labeled images for fine-tuning and evaluation: the published train and evaluation views, items and batches.

Recipe: He et al. 2021 (MAE), arXiv:2111.06377, App. A.1, as SimMIM and BEiT do: random resized crop (0.08, 1), flip,
RandAugment; at evaluation the short side resized to 256/224 of the crop, then its central part.
Shapes: B images, N images of a part, C channels, H W pixels of the crop.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.augmentations import RandomResizedCrop, Transform, to_tensor
from data.decoding import decode
from data.images import PretrainingImages
from data.labeled import LabeledSplit
from data.randaugment import RandAugment

FINETUNE_SCALE = (0.08, 1.0)
CROP_SHARE = 224 / 256  # of the resized short side, where pictures of 224 px and less are evaluated


@dataclass(frozen=True)
class TrainView:
    """A random crop, flipped half the time, then RandAugment."""

    crop: RandomResizedCrop
    rand_augment: RandAugment | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.crop.size

    def __call__(self, data: bytes | Path, num_channels: int, generator: torch.Generator) -> Tensor:
        image = self.crop.views(data, num_channels, generator, [(self.size, self.crop.interpolation)])[0]
        return to_tensor(self.rand_augment(image, generator) if self.rand_augment else image)


@dataclass(frozen=True)
class EvalView:
    """The short side resized to `resize_to`, then the central `size` (height, width) pixels.

    Pixel for pixel what transformers' image processors do for {"shortest_edge": resize_to} and a center crop (Pillow's
    filters, long side and offsets rounded down), so that a saved classifier sees what was measured. For that a JPEG is
    decoded in full.
    """

    size: tuple[int, int]
    resize_to: int
    interpolation: Image.Resampling = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        if self.resize_to < max(self.size):
            raise ValueError(f"resize_to is {self.resize_to} px, expected at least the crop of {self.size} px")

    def __call__(self, data: bytes | Path, num_channels: int, generator: torch.Generator | None = None) -> Tensor:
        image = decode(data, num_channels)
        short, long = sorted(image.size)
        resized_long = int(self.resize_to * long / short)
        is_upright = image.width <= image.height
        width, height = (self.resize_to, resized_long) if is_upright else (resized_long, self.resize_to)
        image = image.resize((width, height), self.interpolation)
        left, top = (width - self.size[1]) // 2, (height - self.size[0]) // 2
        return to_tensor(image.crop((left, top, left + self.size[1], top + self.size[0])))


class ClassificationImages(Dataset[dict[str, Any]]):
    """Items {"pixel_values" uint8 (C, H, W), "labels" int, "image_index" int} of a part.

    With `train`, an item is asked for by counter = epoch * len(self) + place in that epoch's order, as `EpochSampler`
    yields it, so that order and augmentation are the same after a resume; else by its plain number.

    An image that cannot be read is reported as `PretrainingImages` does, and another takes its place with its label.
    """

    def __init__(
        self,
        part: LabeledSplit,
        transform: Transform,
        num_channels: int,
        seed: int = 0,
        train: bool = False,
        bad_images_file: Path | None = None,
    ) -> None:
        self.part = part
        self.images = PretrainingImages(
            part.source, part.indices, transform, num_channels, seed, 1, bad_images_file, train
        )

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, counter: int) -> dict[str, Any]:
        return self._labeled(self.images[counter])

    def item(self, image_index: int, epoch: int) -> dict[str, Any]:
        """What a batch of that epoch holds for this image."""
        return self._labeled(self.images.item(image_index, epoch))

    def _labeled(self, item: dict[str, Any]) -> dict[str, Any]:
        index = item["image_index"]
        return {"pixel_values": item["pixel_values"], "labels": int(self.part.labels[index]), "image_index": index}

    @property
    def labels(self) -> np.ndarray:
        """int64 (N,) in the order of plain numbers."""
        return self.part.labels

    def name(self, image_index: int) -> str:
        return self.part.name(image_index)


class StackedImages(Dataset[dict[str, Any]]):
    """The items of an evaluation set, made once and kept: for small pictures that are looked at again and again.

    `pixel_values` is uint8 (N, C, H, W), `labels` int64 (N,).
    """

    def __init__(self, images: ClassificationImages, num_threads: int = 1) -> None:
        if images.images.train:
            raise ValueError("the views of a training set differ in each epoch, and cannot be kept")
        with ThreadPoolExecutor(num_threads) as pool:
            items = list(pool.map(images.__getitem__, range(len(images))))
        self.pixel_values = torch.stack([item["pixel_values"] for item in items])  # (N, C, H, W)
        self.labels = torch.tensor([item["labels"] for item in items])  # (N,)
        self.image_indices = torch.tensor([item["image_index"] for item in items])  # (N,)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "pixel_values": self.pixel_values[index],
            "labels": int(self.labels[index]),
            "image_index": int(self.image_indices[index]),
        }


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
    """`crop_share`: of the resized short side that the crop takes, `CROP_SHARE` or 1."""
    if not 0 < crop_share <= 1:
        raise ValueError(f"crop_share is {crop_share}, expected more than 0 and at most 1 (no margin is cut away)")
    return EvalView(size, int(max(size) / crop_share), interpolation)


def collate_classification(features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """{"pixel_values" uint8 (B, C, H, W), "labels" int64 (B,), "image_index" int64 (B,)}."""
    return {
        "pixel_values": torch.stack([feature["pixel_values"] for feature in features]),
        "labels": torch.tensor([feature["labels"] for feature in features]),
        "image_index": torch.tensor([feature["image_index"] for feature in features]),
    }

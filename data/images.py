"""The dataset of pre-training: every item depends on (seed, epoch, image) only, never on the process that makes it.

Shapes: C channels, H W pixels of the crop.
"""

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.augmentations import CenterCrop, Transform, TwoViews
from data.decoding import BadImage
from data.seeds import seeded_generator
from data.sources import ImageSource

logger = logging.getLogger(__name__)

_NUM_REPLACEMENTS = 10


class PretrainingImages(Dataset[dict[str, Any]]):
    """Crops of the images `indices` of `source`.

    In training an item is asked for by counter = epoch * len(self) + place in that epoch's own order, so that nobody
    needs to tell worker processes which epoch it is. In evaluation (`train=False`) the counter is the plain number.

    An image that cannot be read is written once to `bad_images_file` and another one takes its place; `image_index` of
    the item is then that other one's.

    Args:
        images_per_step: images that all processes together take in one optimizer step.
        bad_images_file: one JSON line {name, reason} an image; None warns only.
        labels: (images, N) tokens made beforehand; a row of -1 is an image that could not be read then.
    """

    def __init__(
        self,
        source: ImageSource,
        indices: np.ndarray,
        transform: Transform,
        num_channels: int,
        seed: int,
        images_per_step: int,
        bad_images_file: Path | None,
        train: bool,
        labels: np.ndarray | None = None,
    ) -> None:
        if not len(indices):
            raise ValueError(f"no image is left of {source.describe()}; name more images or hold out fewer")
        self.source = source
        self.indices = np.asarray(indices, np.int64)
        self.transform = transform
        self.num_channels = num_channels
        self.seed = seed
        self.images_per_step = images_per_step
        self.bad_images_file = bad_images_file
        self.train = train
        self.labels = labels
        self._epoch_of_order = -1
        self._order = torch.empty(0, dtype=torch.int64)
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, counter: int) -> dict[str, Any]:
        epoch, image_index, step = self._locate(counter)
        return self.item(image_index, epoch, step)

    def item(self, image_index: int, epoch: int, step: int = 0) -> dict[str, Any]:
        """What a batch of that epoch holds for this image."""
        image_index, pixels = self._load(image_index, epoch)
        views = pixels if isinstance(pixels, dict) else {"pixel_values": pixels}
        if self.labels is not None:
            views["labels"] = torch.from_numpy(self.labels[image_index].astype(np.int64))  # (N,)
        return {**views, "image_index": image_index, "epoch": epoch, "step": step}

    def name(self, image_index: int) -> str:
        return self.source.name(int(self.indices[image_index]))

    def at_center(self) -> "PretrainingImages":
        """The same images in evaluation: central crops, as many views as in training, in plain order."""
        images = copy(self)
        images.train, images.labels, images._reported = False, None, set()
        center = CenterCrop(self.transform.size)
        views = self.transform
        images.transform = TwoViews(center, views.second_size) if isinstance(views, TwoViews) else center
        return images

    def view(self, image_index: int, epoch: int = 0) -> Any:
        """What the transform makes of this image, and of no other.

        Raises:
            BadImage: it cannot be read.
        """
        data = self.source.read(int(self.indices[image_index]))
        return self.transform(data, self.num_channels, seeded_generator(self.seed, "augment", epoch, image_index))

    def _locate(self, counter: int) -> tuple[int, int, int]:
        if counter < 0 or (not self.train and counter >= len(self)):
            raise IndexError(f"image {counter} of {len(self)}")
        if not self.train:
            return 0, counter, 0
        epoch, position = divmod(counter, len(self))
        steps_per_epoch = -(-len(self) // self.images_per_step)  # rounded up: a last, smaller step counts as one
        return epoch, self._image_at(epoch, position), epoch * steps_per_epoch + position // self.images_per_step

    def _image_at(self, epoch: int, position: int) -> int:
        if self._epoch_of_order != epoch:
            self._order = torch.randperm(len(self), generator=seeded_generator(self.seed, "order", epoch))
            self._epoch_of_order = epoch
        return int(self._order[position])

    def _load(self, image_index: int, epoch: int) -> tuple[int, Tensor | dict[str, Tensor]]:
        """Pixels (C, H, W) of the image, or of the first readable one drawn in its place."""
        candidate = image_index
        for attempt in range(1 + _NUM_REPLACEMENTS):
            if attempt:
                generator = seeded_generator(self.seed, "replace", epoch, image_index, attempt)
                candidate = int(torch.randint(len(self), (), generator=generator))
            try:
                if self.labels is not None and self.labels[candidate][0] < 0:
                    raise BadImage("had no tokens when they were made")
                return candidate, self.view(candidate, epoch)
            except BadImage as error:
                self.report(candidate, str(error))
        raise BadImage(
            f"{self.name(image_index)} cannot be read, nor can any of {_NUM_REPLACEMENTS} others drawn in its place; "
            f"is the storage of {self.source.describe()} still there?"
        )

    def report(self, image_index: int, reason: str) -> None:
        """Write once, by name, that this image cannot be read."""
        if image_index in self._reported:
            return
        self._reported.add(image_index)
        name = self.name(image_index)
        if self.bad_images_file is None:
            logger.warning("another image takes the place of %s: %s", name, reason)
            return
        line = json.dumps({"name": name, "reason": reason}) + "\n"
        self.bad_images_file.parent.mkdir(parents=True, exist_ok=True)
        # One write of a whole line to a file opened for appending: lines of many processes do not mix.
        descriptor = os.open(self.bad_images_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)


def split_validation(num_images: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted training and held-out indices; at least one image is held out, and one kept, where there are two."""
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction is {fraction}, expected at least 0 and less than 1")
    num_validation_images = 0 if fraction == 0 else min(max(1, round(fraction * num_images)), num_images - 1)
    order = torch.randperm(num_images, generator=seeded_generator(seed, "held_out")).numpy()
    return np.sort(order[num_validation_images:]), np.sort(order[:num_validation_images])


def measure_image_stats(images: PretrainingImages, num_samples: int = 1024) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel in [0, 1], over central crops of a seeded choice of images."""
    centered = images.at_center()
    chosen = torch.randperm(len(images), generator=seeded_generator(images.seed, "image_stats"))[:num_samples].tolist()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        moments = torch.stack(list(pool.map(lambda index: _moments(centered[index]["pixel_values"]), chosen)))
    mean, mean_of_squares = moments.mean(0)  # (samples, 2, C) -> (2, C)
    return mean.tolist(), (mean_of_squares - mean**2).clamp(min=0).sqrt().tolist()


def count_bad_images(file: Path) -> dict[str, str]:
    """Reason by name of every image that some process reported; empty if none did."""
    if not file.exists():
        return {}
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    return {entry["name"]: entry["reason"] for entry in entries}


def _moments(pixel_values: Tensor) -> Tensor:
    pixels = pixel_values.flatten(1).double() / 255  # (C, H*W)
    return torch.stack([pixels.mean(1), pixels.square().mean(1)])  # (2, C)

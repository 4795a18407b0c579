"""The order in which training asks for images: a counter that never repeats over the whole run."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from data.seeds import seeded_generator


class EpochSampler(Sampler[int]):
    """Yields `epoch * num_images + position`; the data set turns the counter into an epoch and a shuffled image.

    The epoch is part of the counter because a worker that outlives an epoch keeps a stale copy of the data set.
    """

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self.epoch = 0

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.num_images
        return iter(range(first, first + self.num_images))

    def set_epoch(self, epoch: int) -> None:
        """Start another epoch; called by Trainer and Accelerate, after a resume too."""
        self.epoch = epoch


class EpochOrder:
    """Where the counters of `EpochSampler` point to: a new random order of the images in every epoch.

    `crops_per_image` counters in a row are for the same image, and each of them counts as an image of a step.
    """

    def __init__(self, num_images: int, seed: int, images_per_step: int, crops_per_image: int = 1) -> None:
        self.num_images, self.seed, self.images_per_step = num_images, seed, images_per_step
        self.crops_per_image = crops_per_image
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def locate(self, counter: int) -> tuple[int, int, int, int]:
        """Return the image, the epoch, the optimizer step and the number of the crop of a counter."""
        num_crops = self.num_images * self.crops_per_image
        epoch, position = divmod(counter, num_crops)
        steps_per_epoch = -(-num_crops // self.images_per_step)  # rounded up: a last, smaller step counts as one
        step = epoch * steps_per_epoch + position // self.images_per_step
        position, crop = divmod(position, self.crops_per_image)
        return self._image_at(epoch, position), epoch, step, crop

    def _image_at(self, epoch: int, position: int) -> int:
        if self._epoch != epoch:
            self._order = torch.randperm(self.num_images, generator=seeded_generator(self.seed, "order", epoch))
            self._epoch = epoch
        return int(self._order[position])

"""The order in which training asks for images: a counter that never repeats over the whole run."""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from data.seeds import seeded_generator

RUNS_PER_WINDOW = 32


class EpochSampler(Sampler[int]):
    """Yields `epoch * num_images + position`; the data set turns the counter into an epoch and a shuffled image.

    The epoch is part of the counter because a worker that outlives an epoch keeps a stale copy of the data set.
    """

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self.epoch = 0
        self.shift = 0  # after a resume with another number of images per step

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.num_images + self.shift
        return iter(range(first, first + self.num_images))

    def set_epoch(self, epoch: int) -> None:
        """Start another epoch; called by Trainer and Accelerate, after a resume too."""
        self.epoch = epoch


class RunOrder:
    """An order of images that reads neighbors together: runs are shuffled, and images within windows of 32 runs.

    It depends on (seed, epoch, position) only, and takes memory for runs, not for images.
    """

    def __init__(self, run_sizes: np.ndarray, seed: int) -> None:
        self.run_sizes, self.seed = run_sizes, seed
        self._starts = np.cumsum(run_sizes) - run_sizes
        self._epoch, self._window = -1, (-1, -1)

    def image_at(self, epoch: int, position: int) -> int:
        return int(self._images_of(epoch, self._window_at(epoch, position))[position - self._begin])

    def window_after(self, epoch: int, position: int) -> tuple[int, int]:
        """Return the epoch and the number of the window after the one of this position."""
        number = self._window_at(epoch, position) + 1
        return (epoch, number) if number * RUNS_PER_WINDOW < len(self.run_sizes) else (epoch + 1, 0)

    def first_images(self, epoch: int, window: int) -> list[int]:
        """Return the first image of each run of a window."""
        first: list[int] = self._starts[self._runs_of(epoch)[0][self._slice(window)]].tolist()
        return first

    def _runs_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the order of the runs, and at which position each ends."""
        order = torch.randperm(len(self.run_sizes), generator=seeded_generator(self.seed, "runs", epoch)).numpy()
        return order, np.cumsum(self.run_sizes[order])

    def _window_at(self, epoch: int, position: int) -> int:
        if self._epoch != epoch:
            self._epoch, (self._order, self._ends) = epoch, self._runs_of(epoch)
        return int(np.searchsorted(self._ends, position, side="right")) // RUNS_PER_WINDOW

    def _images_of(self, epoch: int, window: int) -> np.ndarray:
        if self._window != (epoch, window):
            runs = self._order[self._slice(window)]
            ranges = zip(self._starts[runs], self._starts[runs] + self.run_sizes[runs], strict=True)
            images = np.concatenate([np.arange(*some) for some in ranges])
            generator = seeded_generator(self.seed, "order", epoch, window)
            self._images = images[torch.randperm(len(images), generator=generator).numpy()]
            first = window * RUNS_PER_WINDOW
            self._begin = int(self._ends[first - 1]) if first else 0
            self._window = epoch, window
        return self._images

    def _slice(self, window: int) -> slice:
        return slice(window * RUNS_PER_WINDOW, (window + 1) * RUNS_PER_WINDOW)


class EpochOrder:
    """Where the counters of `EpochSampler` point to: a new random order of the images in every epoch.

    `crops_per_image` counters in a row are for the same image, and each of them counts as an image of a step. With the
    sizes of runs of images that are read together, the order is a `RunOrder`.
    """

    def __init__(
        self,
        num_images: int,
        seed: int,
        images_per_step: int,
        crops_per_image: int = 1,
        run_sizes: np.ndarray | None = None,
    ) -> None:
        self.num_images, self.seed, self.images_per_step = num_images, seed, images_per_step
        self.crops_per_image = crops_per_image
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)
        self._runs = None if run_sizes is None else RunOrder(run_sizes, seed)
        self._announced: tuple[int, int] | None = None
        self.shift = 0  # that of the `EpochSampler`

    def locate(self, counter: int) -> tuple[int, int, int, int]:
        """Return the image, the epoch, the optimizer step and the number of the crop of a counter."""
        num_crops = self.num_images * self.crops_per_image
        epoch, position = divmod(counter, num_crops)
        steps_per_epoch = -(-num_crops // self.images_per_step)  # rounded up: a last, smaller step counts as one
        epoch_of_steps, position_of_steps = divmod(counter - self.shift, num_crops)
        step = epoch_of_steps * steps_per_epoch + position_of_steps // self.images_per_step
        position, crop = divmod(position, self.crops_per_image)
        return self._image_at(epoch, position), epoch, step, crop

    def announce(self, counter: int) -> list[int]:
        """Return, once, an image of each run that will be needed after those around this counter."""
        if self._runs is None:
            return []
        epoch, position = divmod(counter, self.num_images * self.crops_per_image)
        window = self._runs.window_after(epoch, position // self.crops_per_image)
        if window == self._announced:
            return []
        self._announced = window
        return self._runs.first_images(*window)

    def _image_at(self, epoch: int, position: int) -> int:
        if self._runs is not None:
            return self._runs.image_at(epoch, position)
        if self._epoch != epoch:
            self._order = torch.randperm(self.num_images, generator=seeded_generator(self.seed, "order", epoch))
            self._epoch = epoch
        return int(self._order[position])

"""The images of a training or evaluation as a map-style data set.

Four parts are independent of each other: the samples (what is read), their order, the transform (named views of a
sample), and the replacement of images that cannot be read. An item depends on (seed, epoch, image) only, never on the
process that makes it.
Shapes: C channels, H W pixels of the crop.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from data.bad_images import BadImages
from data.decoding import BadImage
from data.runs import Runs, cut_into_runs
from data.sampling import EpochOrder, RunOrder
from data.seeds import seeded_generator
from data.size_schedule import ScheduledTransform, Transform
from data.sources import ImageSource
from modeling.patches import in_unit_range

logger = logging.getLogger(__name__)

_NUM_REPLACEMENTS = 10
_SMALLEST_STD = 1e-4  # a fortieth of a level of uint8; rounding leaves less
_SMALLEST_STD_IN_RANGE = 1e-6  # of measurements, which may use a small part of their range


class Samples(Protocol):
    """Numbered samples as they are stored: the encoded "image" and what belongs to it, such as "labels"."""

    def __len__(self) -> int: ...

    def sample(self, index: int) -> Mapping[str, Any]:
        """Read a sample; raises BadImage if that fails."""

    def name(self, index: int) -> str:
        """Return what a person needs to find the sample."""


@runtime_checkable
class NamedItems(Protocol):
    """What the trainer needs from a data set for an exact resume and for messages that name images."""

    def __len__(self) -> int: ...

    def item(self, image_index: int, epoch: int) -> dict[str, Any]: ...

    def name(self, image_index: int) -> str: ...


@dataclass(frozen=True)
class SourceSamples:
    """The images `indices` of a source, in rising order."""

    source: ImageSource
    indices: np.ndarray | Runs

    def __len__(self) -> int:
        return len(self.indices)

    def sample(self, index: int) -> dict[str, Any]:
        return {"image": self.source.read(int(self.indices[index]))}

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    @property
    def run_sizes(self) -> np.ndarray | None:
        """The sizes of runs of samples that are read together; None if any order is as fast."""
        if isinstance(self.indices, Runs):
            return self.indices.sizes
        if self.source.blocks is None:
            return None
        starts = cut_into_runs(self.source.blocks).starts
        sizes = np.diff(np.searchsorted(self.indices, np.append(starts, len(self.source))))
        return sizes[sizes > 0]

    def prefetch(self, positions: Sequence[int], wait: bool = True) -> None:
        if self.source.blocks is not None:
            self.source.prefetch([int(self.indices[position]) for position in positions], wait)

    def select(self, positions: np.ndarray) -> Self:
        """Return the samples at these positions."""
        return replace(self, indices=self.indices[positions])


@dataclass(frozen=True)
class SamplesWithTargets:
    """Samples with targets that were computed before, by `training.token_cache`: files (images, ...) by their key."""

    samples: Samples
    files: Mapping[str, Path]

    @cached_property
    def values(self) -> dict[str, np.ndarray]:
        """The content of the files, which stays on the disk and is shared by all processes."""
        return {key: np.load(file, mmap_mode="r") for key, file in self.files.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "values"}  # else a copy is sent

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, index: int) -> dict[str, Any]:
        targets = {key: np.array(values[index]) for key, values in self.values.items()}
        if any(no_target(values.flat[:1]).item() for values in targets.values()):
            raise BadImage("could not be read when its targets were computed")
        tensors = {
            key: torch.from_numpy(values.astype(np.int64) if values.dtype == np.int32 else values)
            for key, values in targets.items()
        }
        return {**self.samples.sample(index), **tensors}

    def name(self, index: int) -> str:
        return self.samples.name(index)

    @property
    def run_sizes(self) -> np.ndarray | None:
        return getattr(self.samples, "run_sizes", None)

    def prefetch(self, positions: Sequence[int], wait: bool = True) -> None:
        if prefetch := getattr(self.samples, "prefetch", None):
            prefetch(positions, wait)


def no_target(first: np.ndarray) -> np.ndarray:
    """Return where the first values of the targets of images say that an image could not be read."""
    missing: np.ndarray = first == -1 if np.issubdtype(first.dtype, np.integer) else np.isnan(first)
    return missing


class ImageDataset(Dataset[dict[str, Any]]):
    """Items {named views, "image_index", "epoch", "step"} of samples.

    In training, an item is requested by counter = epoch * len(self) + position in that epoch's order (`EpochSampler`),
    so that no worker process needs to know the epoch. Otherwise the counter is the index.

    With `crops_per_image`, as many counters in a row are for different views of the same image, which is decoded once
    if they are in one batch. Items after the first have the number of the "crop", from 1 on.

    An image that cannot be read is recorded once in `bad_images_file` and another one takes its place, whose index is
    then `image_index`.

    Args:
        transform: With `crops_per_image`, it needs `several` as in `augmentations.Views`.
        images_per_step: Items that all processes together use in one optimizer step.
        bad_images_file: One JSON line {name, reason} per image; None only logs a warning.
    """

    def __init__(
        self,
        samples: Samples,
        transform: Transform | ScheduledTransform,
        *,
        seed: int = 0,
        train: bool = False,
        images_per_step: int = 1,
        crops_per_image: int = 1,
        bad_images_file: Path | None = None,
    ) -> None:
        if not len(samples):
            raise ValueError("no image is left; add images or use fewer for validation")
        self.samples, self.transform, self.seed, self.train = samples, transform, seed, train
        self.bad_images_file = bad_images_file
        self.crops_per_image = crops_per_image if train else 1
        run_sizes = getattr(samples, "run_sizes", None) if train else None
        self._order = EpochOrder(len(samples), seed, images_per_step, self.crops_per_image, run_sizes)
        self._reported: set[int] = set()

    def __len__(self) -> int:
        return len(self.samples) * self.crops_per_image

    def __getitem__(self, counter: int) -> dict[str, Any]:
        return self.__getitems__([counter])[0]

    def __getitems__(self, counters: Sequence[int]) -> list[dict[str, Any]]:
        """Return the items of a batch."""
        if any(counter < 0 or (not self.train and counter >= len(self)) for counter in counters):
            raise IndexError(f"image {max(counters)} of {len(self)}")
        places = [self._order.locate(counter) if self.train else (counter, 0, 0, 0) for counter in counters]
        self._prefetch([place[0] for place in places], counters)
        items: list[dict[str, Any]] = []
        for (image_index, epoch), members in groupby(places, lambda place: place[:2]):
            steps, crops = zip(*(place[2:] for place in members), strict=True)
            items += self._items(image_index, epoch, steps, crops)
        return items

    def _prefetch(self, image_indices: list[int], counters: Sequence[int]) -> None:
        """Fetch what the batch needs, and in the background what comes after it, if the images are far away."""
        prefetch = getattr(self.samples, "prefetch", None)
        if prefetch is not None:
            prefetch(image_indices)
            if self.train and (ahead := self._order.announce(counters[-1])):
                prefetch(ahead, wait=False)

    def shift_steps(self, shift: int) -> None:
        """Count steps from other images, as an `EpochSampler` with this `shift` does."""
        self._order.shift = shift

    def item(self, image_index: int, epoch: int, step: int = 0) -> dict[str, Any]:
        """Return what a batch of that epoch holds for this image."""
        return self._items(image_index, epoch, [step], [0])[0]

    def _items(self, image_index: int, epoch: int, steps: Sequence[int], crops: Sequence[int]) -> list[dict[str, Any]]:
        image_index, several = self._load(image_index, epoch, crops, steps[0])
        return [
            {**views, "image_index": image_index, "epoch": epoch, "step": step, **({"crop": crop} if crop else {})}
            for views, step, crop in zip(several, steps, crops, strict=True)
        ]

    def name(self, image_index: int) -> str:
        return self.samples.name(image_index)

    def view(self, image_index: int, epoch: int = 0, step: int = 0) -> dict[str, Any]:
        """Transform this image and no other.

        Raises:
            BadImage: If it cannot be read.
        """
        return self._views(image_index, epoch, [0], step)[0]

    def _views(self, image_index: int, epoch: int, crops: Sequence[int], step: int) -> list[dict[str, Any]]:
        sample = self.samples.sample(image_index)
        transform: Any = self.transform.at(step) if isinstance(self.transform, ScheduledTransform) else self.transform
        if self.crops_per_image == 1:
            return [transform(sample, seeded_generator(self.seed, "augment", epoch, image_index))]
        keys = [(epoch, image_index, *((crop,) if crop else ())) for crop in range(self.crops_per_image)]
        generators = [seeded_generator(self.seed, "augment", *key) for key in keys]
        # All of them, even if this batch needs a part: the scale of decoding depends on the smallest crop.
        several = transform.several(sample, generators)
        return [several[crop] for crop in crops]

    def _load(self, image_index: int, epoch: int, crops: Sequence[int], step: int) -> tuple[int, list[dict[str, Any]]]:
        """Return the views of the image, or of the first readable one drawn in its place, with its index."""
        candidate = image_index
        for attempt in range(1 + _NUM_REPLACEMENTS):
            if attempt:
                generator = seeded_generator(self.seed, "replace", epoch, image_index, attempt)
                candidate = int(torch.randint(len(self.samples), (), generator=generator))
            try:
                return candidate, self._views(candidate, epoch, crops, step)
            except BadImage as error:
                self.report(candidate, str(error))
        raise BadImage(
            f"{self.name(image_index)} cannot be read, nor can any of {_NUM_REPLACEMENTS} others drawn in its place; "
            "is the storage still available?"
        )

    def report(self, image_index: int, reason: str) -> None:
        """Record once that this image cannot be read."""
        if image_index in self._reported:
            return
        self._reported.add(image_index)
        name = self.name(image_index)
        if self.bad_images_file is None:
            logger.warning("another image takes the place of %s: %s", name, reason)
        else:
            BadImages({name: reason}).append_to(self.bad_images_file)


class StackedImages(Dataset[dict[str, Any]]):
    """The items of an evaluation set, loaded once and kept in memory: `columns` has the stacked items by key.

    For small images that are evaluated again and again.
    """

    def __init__(self, images: ImageDataset, num_threads: int = 1) -> None:
        if images.train:
            raise ValueError("the views of a training set differ in each epoch and cannot be kept")
        with ThreadPoolExecutor(num_threads) as pool:
            items = list(pool.map(images.__getitem__, range(len(images))))
        self.columns: dict[str, Tensor] = default_collate(items)

    @property
    def pixel_values(self) -> Tensor:
        return self.columns["pixel_values"]

    @property
    def labels(self) -> Tensor:
        return self.columns["labels"]

    def __len__(self) -> int:
        return len(self.pixel_values)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: column[index] for key, column in self.columns.items()}


def split_validation(num_images: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted indices of training and validation images; at least one of each if there are two images."""
    if not 0 <= fraction < 1:
        raise ValueError(f"validation_fraction is {fraction}, expected at least 0 and less than 1")
    num_validation_images = 0 if fraction == 0 else min(max(1, round(fraction * num_images)), num_images - 1)
    order = torch.randperm(num_images, generator=seeded_generator(seed, "held_out")).numpy()
    return np.sort(order[num_validation_images:]), np.sort(order[:num_validation_images])


def measure_image_stats(
    images: ImageDataset, num_samples: int = 1024, value_range: Sequence[Sequence[float]] | None = None
) -> tuple[list[float], list[float]]:
    """Measure the mean and standard deviation of each channel in [0, 1] on a seeded choice of images.

    `value_range` is that of measurements (`data.value_ranges`).

    The standard deviation of a constant channel is exactly 0.
    """
    chosen = choose_images(images, num_samples, seeded_generator(images.seed, "image_stats"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        read = pool.map(lambda index: _moments(images[index]["pixel_values"], value_range), chosen)
        moments = torch.stack(list(read))
    mean, mean_of_squares = moments.mean(0)  # (samples, 2, C) -> (2, C)
    std = (mean_of_squares - mean**2).clamp(min=0).sqrt()
    smallest = _SMALLEST_STD if value_range is None else _SMALLEST_STD_IN_RANGE
    return mean.tolist(), torch.where(std < smallest, 0.0, std).tolist()


def choose_images(images: ImageDataset, number: int, generator: torch.Generator) -> list[int]:
    """Return the indices of some images; in shards those of a few blocks, which are fetched."""
    run_sizes = getattr(images.samples, "run_sizes", None)
    if run_sizes is None:
        return torch.randperm(len(images), generator=generator)[:number].tolist()
    order = RunOrder(run_sizes, generator.initial_seed())
    chosen = [order.image_at(0, position) for position in range(min(number, len(images)))]
    images.samples.prefetch(chosen)  # type: ignore[attr-defined]
    return chosen


def _moments(pixel_values: Tensor, value_range: Sequence[Sequence[float]] | None) -> Tensor:
    if value_range is None:
        pixels = pixel_values.flatten(1).double() / 255  # (C, H*W)
    else:
        pixels = in_unit_range(pixel_values, value_range).flatten(1).double()
    return torch.stack([pixels.mean(1), pixels.square().mean(1)])  # (2, C)

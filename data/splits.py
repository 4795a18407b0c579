"""Open the splits that a run uses: readable images, with a validation split and the requested number of labels."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from data.bad_images import BadImages
from data.image_checks import Checks, Summary, check_images
from data.images import Samples, SourceSamples, split_validation
from data.labeled import LabeledImages, LabeledSplit, labeled_subset, open_labeled, with_validation
from data.measured import Measured
from data.runs import Runs, split_runs
from data.sources import open_source, open_validation
from data.streams import NUM_LOOKED_AT, NUM_VALIDATED, STREAM_LENGTH, MemorySource, Stream

_VALIDATION_FRACTION = 0.1  # of labeled training images
_GRAY_MODES = ("1", "L", "LA", "I", "I;16", "F")  # of Pillow


@dataclass(frozen=True)
class PretrainingSplits:
    """Readable images for training and validation (maybe none), and a summary of all training images."""

    train: SourceSamples
    validation: SourceSamples
    bad: BadImages
    summary: Summary
    stream: Stream | None = None  # of the training images, of which `train` has the first ones only

    @property
    def num_train_images(self) -> int:
        return STREAM_LENGTH if self.stream is not None else len(self.train)

    def describe(self) -> str:
        return f"{self.train.source.describe()}: {self.summary.describe()}"


def open_pretraining_splits(
    dataset: list[str],
    *,
    validation_fraction: float,
    max_bad_fraction: float,
    seed: int,
    checks: Checks = "new",
    measured: Measured | None = None,
    streaming: bool = False,
) -> PretrainingSplits:
    """Open a dataset with its own validation split, or with a seeded fraction of the images for validation.

    Args:
        checks: Which images `check_images` opens.
        measured: How images are read whose values are measurements.
        streaming: Read the training images from beginning to end; those for validation are the first ones of the
            validation split, if there is one.

    Raises:
        ValueError: If the dataset cannot be opened or too many of its images are unreadable.
    """
    if streaming:
        if measured is not None:
            raise ValueError("streaming is for photographs: index the measurements, or convert them to 8 bits")
        return _open_stream(dataset, max_bad_fraction)
    source = open_source(dataset, measured=measured)
    checked = check_images(source, max_bad_fraction, checks=checks)
    validation_source = open_validation(dataset, measured)
    images, bad = SourceSamples(source, checked.good), checked.bad
    if validation_source is not None and validation_fraction:
        validation = check_images(validation_source, max_bad_fraction, checks=checks)
        splits = images, SourceSamples(validation_source, validation.good)
        bad = BadImages(bad | validation.bad)
    elif isinstance(checked.good, Runs):  # whole runs, else each evaluation would read all blocks
        train, held_out = split_runs(checked.good, validation_fraction, seed)
        splits = SourceSamples(source, train), SourceSamples(source, held_out)
    else:
        train_positions, validation_positions = split_validation(len(images), validation_fraction, seed)
        splits = images.select(train_positions), images.select(validation_positions)
    return PretrainingSplits(*splits, bad, checked.summary)


def _open_stream(dataset: list[str], max_bad_fraction: float) -> PretrainingSplits:
    if len(dataset) != 1:
        raise ValueError(f"a stream is of one dataset, not of {len(dataset)}: {', '.join(dataset)}")
    stream = Stream(dataset[0])
    first = MemorySource(stream.first(NUM_LOOKED_AT), f"stream of {stream.num_shards:,} shards of {dataset[0]}")
    checked = check_images(first, max_bad_fraction, checks="all")
    train, held_out, bad = SourceSamples(first, checked.good), SourceSamples(first, np.empty(0, np.int64)), checked.bad
    if (other := stream.validation()) is not None:
        images = MemorySource(other.first(NUM_VALIDATED), f"{dataset[0]}/{other.split}")
        validation = check_images(images, max_bad_fraction, checks="all")
        held_out, bad = SourceSamples(images, validation.good), BadImages(bad | validation.bad)
    note = f"only the first {len(first):,} images were checked; others are as they come"
    summary = replace(checked.summary, notes=(note, *checked.summary.notes))
    return PretrainingSplits(train, held_out, bad, summary, stream)


class Splits(ABC):
    """Readable images with labels of any kind."""

    bad: BadImages

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the images before training."""
        return ()

    @property
    @abstractmethod
    def by_name(self) -> Mapping[str, Samples]:
        """The splits: "train" and maybe "validation" and "test"."""

    @abstractmethod
    def describe(self) -> tuple[str, str]:
        """Return where the images are from, and their sizes."""

    @property
    def measured(self) -> tuple[str, Samples | None]:
        """The name of the split that results are measured on, and the split: test if there is one, else validation."""
        name = "test" if "test" in self.by_name else "validation"
        return name, self.by_name.get(name)


@dataclass(frozen=True)
class LabeledSplits(Splits):
    """Readable labeled images, and a summary of all training images; `has_subset`: not all labels are used."""

    images: LabeledImages
    bad: BadImages
    summary: Summary
    has_subset: bool

    @property
    def by_name(self) -> Mapping[str, LabeledSplit]:
        return self.images.splits

    def describe(self) -> tuple[str, str]:
        return self.images.train.source.describe(), self.summary.describe()

    @property
    def notes(self) -> tuple[str, ...]:
        return self.summary.notes

    @property
    def num_gray(self) -> int:
        return sum(number for mode, number in self.summary.modes.items() if mode in _GRAY_MODES)


def open_labeled_splits(
    dataset: list[str],
    label_column: str | None,
    *,
    num_per_class: int | None,
    label_fraction: float | None,
    validation_fraction: float | None,
    max_bad_fraction: float,
    seed: int,
    checks: Checks = "new",
    measured: Measured | None = None,
) -> LabeledSplits:
    """Open a labeled dataset, add a validation split if there is none, and select the requested number of labels.

    If there is a test split and only some labels are used, no others are used for validation either: the validation
    images are taken from the selected ones, by default none.

    Raises:
        ValueError: If the dataset cannot be opened, its labels are not usable, or too many images are unreadable.
    """
    opened = open_labeled(dataset, label_column, measured)
    checked = {name: split.readable(max_bad_fraction, checks) for name, split in opened.splits.items()}
    images = replace(opened, splits={name: split for name, (split, _) in checked.items()})
    bad = BadImages(entry for _, found in checked.values() for entry in found.bad.items())
    has_subset = num_per_class is not None or label_fraction is not None
    from_subset = has_subset and images.test is not None
    if validation_fraction is None:
        validation_fraction = 0.0 if from_subset else _VALIDATION_FRACTION
    if validation_fraction and not from_subset:
        images = with_validation(images, validation_fraction, seed)
    if has_subset:
        chosen = labeled_subset(
            images.train.labels,
            num_per_class=num_per_class,
            fraction=label_fraction,
            seed=seed,
            class_names=images.class_names,
        )
        images = replace(images, splits={**images.splits, "train": images.train.select(chosen)})
    if validation_fraction and from_subset:
        images = with_validation(images, validation_fraction, seed)
    return LabeledSplits(images, bad, checked["train"][1].summary, has_subset)

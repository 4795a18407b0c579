"""Open the splits that a run uses: readable images, with a validation split and the requested number of labels."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

from data.bad_images import BadImages
from data.image_checks import Checks, Summary, check_images
from data.images import Samples, SourceSamples, split_validation
from data.labeled import LabeledImages, LabeledSplit, labeled_subset, open_labeled, with_validation
from data.measured import Measured
from data.sources import open_source, open_validation

_VALIDATION_FRACTION = 0.1  # of labeled training images
_GRAY_MODES = ("1", "L", "LA", "I", "I;16", "F")  # of Pillow


@dataclass(frozen=True)
class PretrainingSplits:
    """Readable images for training and validation (maybe none), and a summary of all training images."""

    train: SourceSamples
    validation: SourceSamples
    bad: BadImages
    summary: Summary

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
) -> PretrainingSplits:
    """Open a dataset with its own validation split, or with a seeded fraction of the images for validation.

    Args:
        checks: Which images `check_images` opens.
        measured: How images are read whose values are measurements.

    Raises:
        ValueError: If the dataset cannot be opened or too many of its images are unreadable.
    """
    source = open_source(dataset, measured=measured)
    checked = check_images(source, max_bad_fraction, checks=checks)
    validation_source = open_validation(dataset, measured)
    images, bad = SourceSamples(source, checked.good), checked.bad
    if validation_source is not None and validation_fraction:
        validation = check_images(validation_source, max_bad_fraction, checks=checks)
        splits = images, SourceSamples(validation_source, validation.good)
        bad = BadImages(bad | validation.bad)
    else:
        train_positions, validation_positions = split_validation(len(images), validation_fraction, seed)
        splits = images.select(train_positions), images.select(validation_positions)
    return PretrainingSplits(*splits, bad, checked.summary)


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

"""Open and split datasets with one class per image, and select a few labels of each class.

A dataset is a folder of class folders (or of splits, with train/ beside val/ or test/), a Hub dataset or tables with a
label column, a folder of MNIST's idx files, or `sample-fashion`.

Shapes: N images of a split.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from data.image_checks import CheckedImages, Checks, check_images
from data.images import SourceSamples
from data.label_columns import RawLabels, read_labels
from data.measured import Measured
from data.measured_sources import join_measured
from data.seeds import seeded_generator
from data.sources import open_source, split_names
from data.tables import VALIDATION_NAMES

logger = logging.getLogger(__name__)

_SPLIT_NAMES = {  # and the names that they may have in a dataset
    "train": ("train",),
    "validation": tuple(name for name in VALIDATION_NAMES if name != "test"),
    "test": ("test",),
}


@dataclass(frozen=True)
class LabeledSplit(SourceSamples):
    """Images `indices` of `source` with their class numbers `labels`, both int64 (N,)."""

    indices: np.ndarray
    labels: np.ndarray

    def sample(self, index: int) -> dict[str, Any]:
        return {**super().sample(index), "labels": int(self.labels[index])}

    def select(self, positions: np.ndarray) -> Self:
        return replace(self, indices=self.indices[positions], labels=self.labels[positions])

    def readable(self, max_bad_fraction: float, checks: Checks = "new") -> tuple[Self, CheckedImages]:
        """Return the split without its unreadable images, and the result of checking all images of the source.

        Raises:
            ValueError: If too many images are unreadable, or all images of a class.
        """
        checked = check_images(self.source, max_bad_fraction, checks=checks)
        good = np.isin(self.indices, checked.good)
        lost = np.flatnonzero(~np.isin(self.labels, self.labels[good]))
        if len(lost):
            raise ValueError(
                f"all images of {len(np.unique(self.labels[lost]))} classes are unreadable, such as "
                f"{self.name(lost[0])}; repair them or remove the classes"
            )
        return self.select(np.flatnonzero(good)), checked


@dataclass(frozen=True)
class LabeledImages:
    """The splits of a dataset by name: "train" and maybe "validation" and "test", in this order.

    Class k is called `class_names[k]` in all of them.
    """

    class_names: tuple[str, ...]
    splits: dict[str, LabeledSplit]

    @property
    def train(self) -> LabeledSplit:
        return self.splits["train"]

    @property
    def validation(self) -> LabeledSplit | None:
        return self.splits.get("validation")

    @property
    def test(self) -> LabeledSplit | None:
        return self.splits.get("test")


def open_labeled(
    dataset: str | Sequence[str], label_column: str | None = None, measured: Measured | None = None
) -> LabeledImages:
    """Open one dataset, or several with the same classes.

    Args:
        label_column: Column of a table; None finds it by type and name.
        measured: How images are read whose values are measurements.

    Raises:
        ValueError: If a dataset cannot be opened, has no training split, or its labels are not usable.
    """
    names = [dataset] if isinstance(dataset, str) else dataset
    if not names or not all(names):  # `Path` would take an empty name for the current folder
        raise ValueError("the dataset is missing; name a folder of class folders, or 'sample-fashion'")
    opened = [_open_one(name, label_column, measured) for name in names]
    for other in opened[1:]:
        if other.class_names != opened[0].class_names:
            raise ValueError(
                f"the classes of the datasets differ: {_join(opened[0].class_names)} in the first, "
                f"{_join(other.class_names)} in another; name datasets with the same classes"
            )
    found = {name: [images.splits[name] for images in opened if name in images.splits] for name in _SPLIT_NAMES}
    splits = {name: _join_splits(splits) for name, splits in found.items() if splits}
    return LabeledImages(opened[0].class_names, splits)


def with_validation(images: LabeledImages, fraction: float, seed: int) -> LabeledImages:
    """Add a validation split, a seeded and stratified fraction of the training images, if there is none."""
    if images.validation is not None:
        return images
    kept, validation = split_stratified(images.train.labels, fraction, seed, images.class_names)
    logger.warning(
        "there is no validation split: %d of the %d training images, %.0f%% of each class, are used for validation",
        *(len(validation), len(images.train), 100 * fraction),
    )
    splits = {"train": images.train.select(kept), "validation": images.train.select(validation)}
    return replace(images, splits=splits | ({} if images.test is None else {"test": images.test}))


def split_stratified(
    labels: np.ndarray, fraction: float, seed: int, class_names: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return sorted positions for training and for validation, the latter with `fraction` of each class.

    Both have at least one image of each class.

    Raises:
        ValueError: If a class has only one image, or `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction is {fraction}, expected more than 0 and less than 1")
    kept, validation = [], []
    for label, positions in _by_class(labels, "split", seed):
        if len(positions) < 2:
            raise ValueError(
                f"class {_name(label, class_names)} has one image, which cannot be used for both training and "
                "validation; add images, remove the class, or use a dataset with a validation split"
            )
        num_validation_images = min(max(1, round(fraction * len(positions))), len(positions) - 1)
        validation.append(positions[:num_validation_images])
        kept.append(positions[num_validation_images:])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(validation))


def labeled_subset(
    labels: np.ndarray,
    *,
    num_per_class: int | None = None,
    fraction: float | None = None,
    seed: int,
    class_names: Sequence[str] | None = None,
) -> np.ndarray:
    """Return sorted positions of a few images of each class; with the same seed, larger subsets contain smaller ones.

    Args:
        num_per_class: Number of images of each class.
        fraction: Alternatively the fraction of each class, at least one image.
    """
    if (num_per_class is None) == (fraction is None):
        raise ValueError("expected either num_per_class or fraction, not both or neither")
    if num_per_class is not None and num_per_class < 1:
        raise ValueError(f"labels_per_class is {num_per_class}, expected at least 1")
    if fraction is not None and not 0 < fraction <= 1:
        raise ValueError(f"label_fraction is {fraction}, expected more than 0 and at most 1 (all labels)")
    chosen = []
    for label, positions in _by_class(labels, "labels", seed):
        count = num_per_class if fraction is None else max(1, round(fraction * len(positions)))
        assert count is not None
        if count > len(positions):
            raise ValueError(
                f"labels_per_class is {count}, but class {_name(label, class_names)} has only "
                f"{len(positions)} training images; use a smaller number"
            )
        chosen.append(positions[:count])
    return np.sort(np.concatenate(chosen))


def write_subset(path: Path, split: LabeledSplit, class_names: Sequence[str]) -> None:
    """Write the name and the class of each image, separated by a tab, on one line."""
    lines = [f"{split.name(i)}\t{class_names[label]}\n" for i, label in enumerate(split.labels.tolist())]
    path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")  # a file name need not be Unicode


def _open_one(dataset: str, label_column: str | None, measured: Measured | None) -> LabeledImages:
    names = split_names(dataset, measured)
    if "train" not in names:
        raise ValueError(f"no split 'train' in {dataset}; it has: {', '.join(names)}")
    raw = {}
    for split, candidates in _SPLIT_NAMES.items():
        name = next((name for name in candidates if name in names), None)
        if name is not None:
            raw[split] = read_labels(open_source(dataset, name, measured), label_column)
    class_names = _class_names(raw, dataset)
    for name in [name for name, labels in raw.items() if not len(labels)]:
        logger.warning("the %s split of %s has no labels and is ignored", name, dataset)
        del raw[name]
    return LabeledImages(
        class_names, {name: _number_labels(name, labels, class_names) for name, labels in raw.items()}
    )


def _class_names(raw: dict[str, RawLabels], dataset: str) -> tuple[str, ...]:
    """Return the classes of the training split, in the order of their numbers."""
    train = raw["train"]
    if not len(train):
        others = [name for name, labels in raw.items() if len(labels)]
        hint = f", but the {' and the '.join(others)} split has: are they swapped?" if others else ""
        raise ValueError(f"the training split of {dataset} has no labels{hint}")
    if train.num_missing:
        raise ValueError(
            f"{train.num_missing:,} of the {len(train.source):,} training images of {dataset} have no label; "
            "label or remove them"
        )
    found = set(train.values)
    class_names = train.class_names or tuple(sorted(found, key=_natural_order))
    if len(found) < 2:
        raise ValueError(
            f"all training images of {dataset} have the class {train.values[0]!r}; "
            f"classification needs at least two{train.hint}"
        )
    missing = [name for name in class_names if name not in found]
    if missing:  # for example after Dataset.filter, which keeps all names
        logger.warning(
            "%d of the %d classes of %s have no training images and are ignored: %s",
            *(len(missing), len(class_names), dataset, _join(missing)),
        )
    return tuple(name for name in class_names if name in found)


def _number_labels(name: str, raw: RawLabels, class_names: tuple[str, ...]) -> LabeledSplit:
    number = {class_name: label for label, class_name in enumerate(class_names)}
    unknown = sorted(set(raw.values) - number.keys())
    if unknown:
        raise ValueError(
            f"the {name} split has classes that the training split does not have: {_join(unknown)} (training: "
            f"{_join(class_names)}); some labels are wrong, or the splits belong to different datasets"
        )
    found = set(raw.values)
    absent = [class_name for class_name in class_names if class_name not in found]
    if raw.num_missing:
        logger.warning("%d images of the %s split have no label and are ignored", raw.num_missing, name)
    if absent:
        logger.warning("the %s split has no images of: %s", name, _join(absent))
    return LabeledSplit(raw.source, raw.indices, np.array([number[value] for value in raw.values], np.int64))


def _join_splits(splits: list[LabeledSplit]) -> LabeledSplit:
    starts = np.cumsum([0, *(len(split.source) for split in splits[:-1])])
    return LabeledSplit(
        join_measured([split.source for split in splits]),
        np.concatenate([split.indices + start for split, start in zip(splits, starts, strict=True)]),
        np.concatenate([split.labels for split in splits]),
    )


def _by_class(labels: np.ndarray, purpose: str, seed: int) -> list[tuple[int, np.ndarray]]:
    """Return each class with its positions in random order, which does not depend on the other classes."""
    classes = []
    for label in np.unique(labels).tolist():
        positions = np.flatnonzero(labels == label)
        order = torch.randperm(len(positions), generator=seeded_generator(seed, purpose, label))
        classes.append((label, positions[order.numpy()]))
    return classes


def _natural_order(name: str) -> tuple[bool, int, str]:
    """Sort integers by value and before words: 2 comes before 10."""
    return (False, int(name), "") if name.removeprefix("-").isdecimal() else (True, 0, name)


def _name(label: int, class_names: Sequence[str] | None) -> str:
    return repr(class_names[label]) if class_names else str(label)


def _join(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"

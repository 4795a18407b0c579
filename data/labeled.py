"""Images with one class each: opens what the dataset argument names, splits it, and picks a few labels of each class.

A dataset is a folder of class folders (with train/ beside val/ or test/, or without), a dataset of the Hub or of
tables with a column of labels, a folder of MNIST's idx files, or `sample-fashion`.

Shapes: N images of a part.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.image_checks import Checked, check_images
from data.image_source import ImageSource, joined
from data.label_columns import RawLabels, raw_labels
from data.seeds import seeded_generator
from data.sources import open_source, split_names
from data.tables import VALIDATION_NAMES

logger = logging.getLogger(__name__)

_NAMES_WITHOUT_TEST = tuple(name for name in VALIDATION_NAMES if name != "test")


@dataclass(frozen=True)
class LabeledSplit:
    """Image i is number `indices[i]` of `source` and of class `labels[i]`; both are int64 (N,)."""

    source: ImageSource
    indices: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(int(self.indices[index]))

    def read(self, index: int) -> bytes:
        return self.source.read(int(self.indices[index]))

    def sample(self, index: int) -> dict[str, Any]:
        """Return the encoded image and its class."""
        return {"image": self.read(index), "labels": int(self.labels[index])}

    def select(self, positions: np.ndarray) -> "LabeledSplit":
        """The images at these positions of this part."""
        return replace(self, indices=self.indices[positions], labels=self.labels[positions])

    def readable(self, max_bad_fraction: float, num_threads: int) -> "tuple[LabeledSplit, Checked]":
        """This part without images that cannot be read, and what the check of all images of the source found.

        Raises: ValueError if too many cannot be read, or all of a class.
        """
        checked = check_images(self.source, max_bad_fraction, num_threads)
        good = np.isin(self.indices, checked.good)
        lost = np.flatnonzero(~np.isin(self.labels, self.labels[good]))
        if len(lost):
            raise ValueError(
                f"of {len(np.unique(self.labels[lost]))} classes not one image can be read, such as that of "
                f"{self.name(lost[0])}; repair them or take the classes out"
            )
        return self.select(np.flatnonzero(good)), checked


@dataclass(frozen=True)
class LabeledImages:
    """The parts of a data set; class number k is called `class_names[k]` in all of them."""

    class_names: tuple[str, ...]
    train: LabeledSplit
    validation: LabeledSplit | None
    test: LabeledSplit | None


def open_labeled(dataset: str | Sequence[str], label_column: str | None = None) -> LabeledImages:
    """Opens what `dataset` names, one data set or several with the same classes.

    Args:
        label_column: of a table; None finds it by type and name.
    """
    opened = [_open_one(name, label_column) for name in ([dataset] if isinstance(dataset, str) else dataset)]
    if not opened:
        raise ValueError("no dataset was named; name a folder of class folders, or 'sample-fashion'")
    for other in opened[1:]:
        if other.class_names != opened[0].class_names:
            raise ValueError(
                f"the classes of the datasets differ: {_listed(opened[0].class_names)} in the first, "
                f"{_listed(other.class_names)} in another; name datasets with the same classes"
            )
    train = _joined_splits([each.train for each in opened])
    assert train is not None
    return LabeledImages(
        opened[0].class_names,
        train,
        _joined_splits([each.validation for each in opened]),
        _joined_splits([each.test for each in opened]),
    )


def with_validation(images: LabeledImages, fraction: float, seed: int) -> LabeledImages:
    """The same with a validation part: where there is none, a seeded, stratified share of the training images."""
    if images.validation is not None:
        return images
    kept, validation = split_stratified(images.train.labels, fraction, seed, images.class_names)
    logger.warning(
        "there is no validation part: %d of the %d training images are held out for it, %.0f%% of each class",
        *(len(validation), len(images.train), 100 * fraction),
    )
    return replace(images, train=images.train.select(kept), validation=images.train.select(validation))


def split_stratified(
    labels: np.ndarray, fraction: float, seed: int, class_names: Sequence[str] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Sorted positions to keep and to hold out, `fraction` of each class; at least one image of a class on each side.

    Raises: ValueError if a class has but one image.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the held-out fraction is {fraction}, expected more than 0 and less than 1")
    kept, validation = [], []
    for label, positions in _by_class(labels, "split", seed):
        if len(positions) < 2:
            raise ValueError(
                f"class {_name(label, class_names)} has one image, which cannot be both trained on and held out; "
                "give it more images, remove it, or name a dataset with a validation part"
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
    """Sorted positions of a few images of each class; of one seed, a smaller subset is contained in any larger one.

    Args:
        num_per_class: as many of each class.
        fraction: instead, this share of each class, at least one image.
    """
    if (num_per_class is None) == (fraction is None):
        raise ValueError("give the number of labels per class or the fraction of the labels, not both or neither")
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
                f"labels_per_class is {count}, but class {_name(label, class_names)} has {len(positions)} images "
                "to train on; ask for fewer"
            )
        chosen.append(positions[:count])
    return np.sort(np.concatenate(chosen))


def write_subset(path: Path, part: LabeledSplit, class_names: Sequence[str]) -> None:
    """One line an image: its name, a tab, its class."""
    lines = [f"{part.name(i)}\t{class_names[label]}\n" for i, label in enumerate(part.labels.tolist())]
    path.write_text("".join(lines), encoding="utf-8", errors="surrogateescape")  # a file name need not be unicode


def _open_one(dataset: str, label_column: str | None) -> LabeledImages:
    names = split_names(dataset)
    if "train" not in names:
        raise ValueError(f"no split 'train' in {dataset}; it has: {', '.join(names)}")
    raw = {"train": raw_labels(open_source(dataset, "train"), label_column)}
    for part, candidates in (("validation", _NAMES_WITHOUT_TEST), ("test", ("test",))):
        name = next((name for name in candidates if name in names), None)
        if name is not None:
            raw[part] = raw_labels(open_source(dataset, name), label_column)
    class_names = _class_names(raw, dataset)
    for name in [name for name, labels in raw.items() if not len(labels)]:
        logger.warning("the %s part of %s has no labels, and is left aside", name, dataset)
        del raw[name]
    parts = {name: _part(name, labels, class_names) for name, labels in raw.items()}
    return LabeledImages(class_names, parts["train"], parts.get("validation"), parts.get("test"))


def _class_names(raw: dict[str, RawLabels], dataset: str) -> tuple[str, ...]:
    """The classes of the training part, in the order of their numbers."""
    train = raw["train"]
    if not len(train):
        others = [name for name, labels in raw.items() if len(labels)]
        where = f"; the {' and the '.join(others)} part has labels: is it the wrong one?" if others else ""
        raise ValueError(f"the training part of {dataset} has no labels{where}")
    if train.num_missing:
        raise ValueError(
            f"{train.num_missing:,} of the {len(train.source):,} training images of {dataset} lack a label; "
            "label them, or take them out"
        )
    found = set(train.values)
    class_names = train.class_names or tuple(sorted(found, key=_natural_order))
    if len(found) < 2:
        raise ValueError(
            f"all training images of {dataset} are of one class, {train.values[0]!r}; "
            f"classification needs at least two{train.hint}"
        )
    missing = [name for name in class_names if name not in found]
    if missing:  # as after Dataset.filter, which keeps all names
        logger.warning(
            "%d of the %d classes of %s have no training image, and are left out: %s",
            *(len(missing), len(class_names), dataset, _listed(missing)),
        )
    return tuple(name for name in class_names if name in found)


def _part(name: str, raw: RawLabels, class_names: tuple[str, ...]) -> LabeledSplit:
    number = {class_name: label for label, class_name in enumerate(class_names)}
    unknown = sorted(set(raw.values) - number.keys())
    if unknown:
        raise ValueError(
            f"the {name} part has classes that the training part lacks: {_listed(unknown)} (training: "
            f"{_listed(class_names)}); the labels of one of them are wrong, or the parts are of different datasets"
        )
    found = set(raw.values)
    absent = [class_name for class_name in class_names if class_name not in found]
    if raw.num_missing:
        logger.warning("%d images of the %s part have no label, and are left aside", raw.num_missing, name)
    if absent:
        logger.warning("the %s part has no image of: %s", name, _listed(absent))
    return LabeledSplit(raw.source, raw.indices, np.array([number[value] for value in raw.values], np.int64))


def _joined_splits(found: list[LabeledSplit | None]) -> LabeledSplit | None:
    parts = [part for part in found if part is not None]
    if len(parts) < 2:
        return parts[0] if parts else None
    starts = np.cumsum([0, *(len(part.source) for part in parts[:-1])])
    return LabeledSplit(
        joined([part.source for part in parts]),
        np.concatenate([part.indices + start for part, start in zip(parts, starts, strict=True)]),
        np.concatenate([part.labels for part in parts]),
    )


def _by_class(labels: np.ndarray, purpose: str, seed: int) -> list[tuple[int, np.ndarray]]:
    """Each class with its positions in random order; the order does not depend on the other classes."""
    classes = []
    for label in np.unique(labels).tolist():
        positions = np.flatnonzero(labels == label)
        order = torch.randperm(len(positions), generator=seeded_generator(seed, purpose, label))
        classes.append((label, positions[order.numpy()]))
    return classes


def _natural_order(name: str) -> tuple[bool, int, str]:
    """Whole numbers in their own order and before words: 2 comes before 10."""
    return (False, int(name), "") if name.removeprefix("-").isdecimal() else (True, 0, name)


def _name(label: int, class_names: Sequence[str] | None) -> str:
    return repr(class_names[label]) if class_names else str(label)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10])
    return shown if len(names) <= 10 else f"{shown} and {len(names) - 10} more"

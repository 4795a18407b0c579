"""Boxes of objects in images: which of them can be used, and those of each image.

Shapes: N images, M boxes, n boxes of an image, K classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import numpy as np
import torch

from data.bad_images import printable
from data.images import SourceSamples

_SMALLEST_OVERHANG = 0.01  # of the side of an image; rounding leaves less


@dataclass(frozen=True)
class RawBoxes:
    """Boxes as they are stored, with the name of each for messages.

    Args:
        images: int64 (M,), the image of each box; -1 if there is no such image.
        boxes: float64 (M, 4): left, top, right, bottom as fractions of the image's width and height.
        classes: int64 (M,), numbers of classes; below 0 or from K on if there is no such class.
        areas: float64 (M,), areas of the objects as fractions of that of the image.
        is_crowd: bool (M,), whether a box marks a group of objects.
        mask: Returns the mask of an object, bool (H, W), where objects have masks; raises ValueError if it is damaged.
    """

    images: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    areas: np.ndarray
    is_crowd: np.ndarray
    name: Callable[[int], str]
    mask: Callable[[int], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def take(self, rows: np.ndarray) -> Self:
        values = {key: getattr(self, key)[rows] for key in ("images", "boxes", "classes", "areas", "is_crowd")}
        mask = self.mask
        return replace(
            self,
            **values,
            name=partial(_call_for_row, self.name, rows),
            mask=None if mask is None else partial(_call_for_row, mask, rows),
        )


def _call_for_row(function: Callable[[int], Any], rows: np.ndarray, index: int) -> Any:
    """Call `function` for a row of those that were taken; unlike a lambda, it can be sent to a spawned worker."""
    return function(int(rows[index]))


@dataclass(frozen=True)
class BoxSamples(SourceSamples):
    """The images `indices` of a source with their boxes; an image may have none.

    Args:
        raw: Usable boxes, sorted by image of the source.
    """

    raw: RawBoxes

    def sample(self, index: int) -> dict[str, Any]:
        rows = self.rows(index)
        return {
            **super().sample(index),
            "boxes": torch.from_numpy(self.raw.boxes[rows].astype(np.float32)),  # (n, 4)
            "classes": torch.from_numpy(self.raw.classes[rows]),  # (n,)
            "areas": torch.from_numpy(self.raw.areas[rows].astype(np.float32)),  # (n,)
            "is_crowd": torch.from_numpy(self.raw.is_crowd[rows]),  # (n,)
        }

    def rows(self, index: int) -> slice:
        """Return which rows of `raw` belong to an image."""
        start, end = np.searchsorted(self.raw.images, [self.indices[index], self.indices[index] + 1])
        return slice(int(start), int(end))

    @property
    def num_boxes(self) -> int:
        return int(np.isin(self.raw.images, self.indices).sum())

    @property
    def most_boxes(self) -> int:
        """Number of boxes of the image with the most."""
        return int(np.bincount(self.raw.images[np.isin(self.raw.images, self.indices)], minlength=1).max())

    @property
    def median_size(self) -> tuple[float, float]:
        """Median width and height of the boxes, as fractions of their image."""
        left, top, right, bottom = self.raw.boxes[np.isin(self.raw.images, self.indices)].T
        return float(np.median(right - left)), float(np.median(bottom - top))

    @property
    def num_empty(self) -> int:
        """Number of images without a box."""
        return len(self.indices) - int(np.isin(self.indices, self.raw.images).sum())


def usable_boxes(
    raw: RawBoxes, class_names: Sequence[str], title: str, max_bad_fraction: float
) -> tuple[RawBoxes, list[str]]:
    """Return the boxes that can be used, cut at the edges of their images and sorted by image, and notes.

    Raises:
        ValueError: If too many boxes cannot be used; it counts them by reason, each with an example.
    """
    with np.errstate(invalid="ignore"):
        left, top, right, bottom = raw.boxes.T
        problems = {
            "of an image that is not listed": raw.images < 0,
            f"of a class outside the list of {len(class_names)}": (raw.classes < 0)
            | (raw.classes >= len(class_names)),
            "without four finite numbers": ~np.isfinite(raw.boxes).all(axis=1),
            "with no area": ~((right > left) & (bottom > top)),
            "outside of the image": ~((right > 0) & (bottom > 0) & (left < 1) & (top < 1)),
        }
    is_bad = np.zeros(len(raw), bool)
    found = []
    for reason, rows in problems.items():
        new = np.flatnonzero(rows & ~is_bad)
        is_bad |= rows
        if len(new):
            found.append(f"{len(new):,} {reason}, such as {printable(raw.name(int(new[0])))}")
    good = raw.take(np.flatnonzero(~is_bad))
    num_bad, notes = int(is_bad.sum()), []
    if num_bad > max_bad_fraction * len(raw) or (num_bad and num_bad == len(raw)):
        listed, share = "\n  ".join(found), num_bad / len(raw)
        without = f", or continue without them with max_bad_fraction {np.ceil(share * 1000) / 1000:g}"
        raise ValueError(
            f"{num_bad:,} of {len(raw):,} boxes of {title} cannot be used:\n  {listed}\nThat is {share:.2%}, but "
            f"max_bad_fraction allows {max_bad_fraction:.2%}: repair or remove these boxes{without * (share < 1)}"
        )
    if num_bad:
        notes.append(f"{num_bad:,} of {len(raw):,} boxes of {title} are left out: {'; '.join(found)}")
    overhang = np.maximum(-good.boxes[:, :2], good.boxes[:, 2:] - 1).max(axis=1, initial=0)
    if len(cut := np.flatnonzero(overhang > _SMALLEST_OVERHANG)):
        example = f"such as {printable(good.name(int(cut[0])))}"
        notes.append(f"{len(cut):,} boxes of {title} reach beyond their image and are cut at its edge, {example}")
    order = np.argsort(good.images, kind="stable")
    return replace(good, boxes=good.boxes.clip(0, 1)).take(order), notes

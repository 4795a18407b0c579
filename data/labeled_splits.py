"""The parts of a labeled data set as a fine-tuning uses them: readable images, held-out ones, and so many labels."""

from dataclasses import dataclass, replace

from data.bad_images import BadImages
from data.image_checks import Summary
from data.labeled import LabeledImages, LabeledSplit, labeled_subset, open_labeled, with_validation

_VALIDATION_FRACTION = 0.1
_GRAY_MODES = ("1", "L", "LA", "I", "I;16", "F")  # of Pillow


@dataclass(frozen=True)
class LabeledSplits:
    """`summary` says what all training images are like; `has_subset`: only some of their labels are used."""

    images: LabeledImages
    bad: BadImages
    summary: Summary
    has_subset: bool

    @property
    def by_name(self) -> dict[str, LabeledSplit]:
        parts = {"train": self.images.train, "validation": self.images.validation, "test": self.images.test}
        return {name: part for name, part in parts.items() if part is not None}

    @property
    def measured(self) -> tuple[str, LabeledSplit | None]:
        """The part that results are measured on, and its name: the test part, where there is one."""
        name = "validation" if self.images.test is None else "test"
        return name, self.by_name.get(name)

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
) -> LabeledSplits:
    """Look at every header, hold a part out, and keep as many labels as are wanted.

    With a test part, no label beside those is used: what is held out comes from them too, by default nothing.

    Raises:
        ValueError: the data cannot be learned from.
    """
    opened = open_labeled(dataset, label_column)
    parts, bad, summaries = {}, BadImages(), []
    for name in ("train", "validation", "test"):
        part = getattr(opened, name)
        if part is not None:
            parts[name], checked = part.readable(max_bad_fraction)
            bad.update(checked.bad)
            summaries.append(checked.summary)
    images = replace(opened, **parts)
    has_subset = num_per_class is not None or label_fraction is not None
    from_subset = has_subset and images.test is not None
    fraction = _VALIDATION_FRACTION if validation_fraction is None else validation_fraction
    if from_subset and validation_fraction is None:  # what is held out of a few labels would be missed
        fraction = 0.0
    if fraction and not from_subset:
        images = with_validation(images, fraction, seed)
    if has_subset:
        chosen = labeled_subset(
            images.train.labels,
            num_per_class=num_per_class,
            fraction=label_fraction,
            seed=seed,
            class_names=images.class_names,
        )
        images = replace(images, train=images.train.select(chosen))
    if fraction and from_subset:
        images = with_validation(images, fraction, seed)
    return LabeledSplits(images, bad, summaries[0], has_subset)

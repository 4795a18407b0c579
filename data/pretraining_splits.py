"""The images that a run without labels learns from, and those held out: readable ones, from what a user named."""

from dataclasses import dataclass

import numpy as np

from data.bad_images import BadImages
from data.image_checks import check_images
from data.images import split_validation
from data.sources import ImageSource, open_source


@dataclass(frozen=True)
class PretrainingSplits:
    """The readable images of one run: `train` indexes `source`, and `held_out` indexes `held_out_source`."""

    source: ImageSource
    train: np.ndarray
    validation_source: ImageSource
    validation: np.ndarray
    bad: BadImages
    summary: str


def open_pretraining_splits(
    dataset: list[str], *, validation_fraction: float, max_bad_fraction: float, seed: int
) -> PretrainingSplits:
    """Open what `dataset` names, look at every header, and set a part aside: its own, or a seeded share.

    Raises:
        ValueError: the data cannot be learned from.
    """
    source = open_source(dataset)
    checked = check_images(source, max_bad_fraction)
    summary = checked.summary.describe()
    own_part = source.validation()
    if own_part is not None and validation_fraction:
        validation = check_images(own_part, max_bad_fraction)
        bad = BadImages(checked.bad | validation.bad)
        return PretrainingSplits(source, checked.good, own_part, validation.good, bad, summary)
    kept, validation_of_it = split_validation(len(checked.good), validation_fraction, seed)
    good = checked.good
    return PretrainingSplits(source, good[kept], source, good[validation_of_it], checked.bad, summary)

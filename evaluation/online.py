"""Frozen features while an encoder is trained: the same few labeled images at every look.

The classifiers' settings are fixed, so that two looks differ by the encoder alone; `run_evaluation.py` tunes them.
Shapes: N training images, Q test images, C channels, H W pixels, D width.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.augmentations import CenterCrop, single_view
from data.images import ImageDataset, StackedImages
from data.labeled import LabeledSplit, labeled_subset, open_labeled, split_stratified
from evaluation.features import FrozenEncoder
from evaluation.knn import Knn
from evaluation.linear_probe import fit_logistic_at
from evaluation.online_history import KNN, LINEAR, RANKME
from evaluation.quality import rankme

_NUM_NEIGHBORS, _TEMPERATURE, _C = 20, 0.07, 1e-2
_BATCH_SIZE = 64
_NUM_TRAIN, _NUM_TEST = 2_000, 1_000  # a look takes seconds, and 1,000 images tell 3 points apart
_NUM_PER_CLASS = 10  # more images where there are more classes than that allows
_TEST_FRACTION = 0.2


@dataclass(frozen=True)
class OnlineEvaluation:
    """Measures a head's encoder on `train` and `test`; draws no random number and leaves the head as it was."""

    train: StackedImages
    test: StackedImages
    num_classes: int

    def __call__(self, head: Any) -> dict[str, float]:
        """`head` has an `encoder`, and a `standardize` for uint8 images. Nothing if its features are not finite."""
        train, test = (self._features(head, part.pixel_values) for part in (self.train, self.test))
        if not (train.isfinite().all() and test.isfinite().all()):
            return {}  # the run is lost, which the guard of the training says better
        labels, truth = (part.labels.to(train.device) for part in (self.train, self.test))
        bank = torch.nn.functional.normalize(train, dim=1)
        knn = Knn(bank, labels, self.num_classes, min(_NUM_NEIGHBORS, len(bank)), _TEMPERATURE, None)
        linear = fit_logistic_at(train, labels, self.num_classes, _C)
        return {
            LINEAR: (linear(test).argmax(1) == truth).double().mean().item(),
            KNN: (knn(test).argmax(1) == truth).double().mean().item(),
            RANKME: rankme(test),
        }

    def describe(self) -> str:
        return (
            f"mean of patches, {len(self.train.labels):,} labeled images and {len(self.test.labels):,} to test on, "
            f"{self.num_classes} classes"
        )

    def _features(self, head: Any, images: Tensor) -> Tensor:
        encoder = FrozenEncoder(head.exported_encoder, head.exported_encoder.config)
        batches = (head.standardize(batch.to(encoder.device)) for batch in images.split(_BATCH_SIZE))
        return torch.cat([encoder(batch).mean for batch in batches])  # (N, D)


def open_online_evaluation(
    dataset: Sequence[str], size: tuple[int, int], num_channels: int, seed: int, label_column: str | None = None
) -> OnlineEvaluation:
    """Reads a seeded share of each class of a labeled data set and keeps it, cut to `size` (height, width).

    Judged on the validation part, or a share of the training part: people stop a run, or choose one, by what they see
    here, and the test part is for the end.

    Raises:
        ValueError: there is no such data set, or it has no labels to learn from.
    """
    images = open_labeled(dataset, label_column)
    train, test = images.train, images.validation
    if test is None:
        kept, validation = split_stratified(train.labels, _TEST_FRACTION, seed, images.class_names)
        train, test = train.select(kept), train.select(validation)

    def kept_in_memory(part: LabeledSplit, num_images: int) -> StackedImages:
        wanted = max(num_images, _NUM_PER_CLASS * len(images.class_names))
        few = part.select(labeled_subset(part.labels, fraction=min(1.0, wanted / len(part)), seed=seed))
        return StackedImages(ImageDataset(few, single_view(CenterCrop(size), num_channels)), os.cpu_count() or 1)

    return OnlineEvaluation(
        kept_in_memory(train, _NUM_TRAIN), kept_in_memory(test, _NUM_TEST), len(images.class_names)
    )

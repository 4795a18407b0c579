"""Online evaluation: measure frozen features during pre-training, each time on the same few labeled images.

The hyperparameters of the classifiers are fixed, so that only the encoder differs between two evaluations;
`run_evaluation.py` tunes them.
Shapes: N images, D feature dimension.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.augmentations import CenterCrop, single_view
from data.images import ImageDataset, SourceSamples, StackedImages
from data.labeled import LabeledSplit, labeled_subset, open_labeled, split_stratified
from data.measured import Measured
from evaluation.class_balance import BALANCED, accuracy_with_error, is_unbalanced
from evaluation.features import FrozenEncoder
from evaluation.knn import Knn
from evaluation.linear_probe import fit_logistic_at
from evaluation.online_history import BALANCED_KNN, BALANCED_LINEAR, FEATURE_STD, KNN, LINEAR, RANKME, error_of
from evaluation.quality import feature_std, rankme

_NUM_NEIGHBORS, _TEMPERATURE, _C = 20, 0.07, 1e-2
_BATCH_SIZE = 64
_NUM_TRAIN, _NUM_TEST = 2_000, 1_000  # takes seconds, and 1,000 images resolve about 3 points of accuracy
_NUM_PER_CLASS = 10  # at least, if there are many classes
_TEST_FRACTION = 0.2


@dataclass(frozen=True)
class OnlineEvaluation:
    """Measures the features of a model's encoder, without drawing random numbers or changing the model.

    Accuracies are logged with their standard errors, under other names if they are balanced.
    """

    train: StackedImages
    test: StackedImages
    num_classes: int

    def __call__(self, model: Any) -> dict[str, float]:
        """Return the metrics of a pre-training model's `exported_encoder`; empty if its features are not finite."""
        train, test = (features_of(model, split.pixel_values) for split in (self.train, self.test))
        if not (train.isfinite().all() and test.isfinite().all()):
            return {}  # training has diverged, which the trainer reports itself
        labels, truth = (split.labels.to(train.device) for split in (self.train, self.test))
        bank = torch.nn.functional.normalize(train, dim=1)
        knn = Knn(bank, labels, self.num_classes, min(_NUM_NEIGHBORS, len(bank)), _TEMPERATURE, None)
        linear = fit_logistic_at(train, labels, self.num_classes, _C)
        names = (BALANCED_LINEAR, BALANCED_KNN) if self.is_unbalanced else (LINEAR, KNN)
        metrics: dict[str, float] = {}
        for name, logits in zip(names, (linear(test), knn(test)), strict=True):
            correct = (logits.argmax(1) == truth).cpu().numpy()
            metrics[name], metrics[error_of(name)] = accuracy_with_error(correct, self.test.labels.numpy())
        return metrics | {RANKME: rankme(test), FEATURE_STD: feature_std(test)}

    @property
    def is_unbalanced(self) -> bool:
        return is_unbalanced(self.test.labels.numpy())

    def describe(self) -> str:
        return (
            f"mean of patches, {len(self.train.labels):,} training and {len(self.test.labels):,} validation images, "
            f"{self.num_classes} classes{f'; {BALANCED}' if self.is_unbalanced else ''}"
        )


@dataclass(frozen=True)
class FeatureSpread:
    """Measures how much a model's features of unlabeled images differ, as `OnlineEvaluation` does of labeled ones."""

    images: StackedImages

    def __call__(self, model: Any) -> dict[str, float]:
        features = features_of(model, self.images.pixel_values)
        return {RANKME: rankme(features), FEATURE_STD: feature_std(features)} if features.isfinite().all() else {}

    def describe(self) -> str:
        return f"RankMe and std of the mean of patches, {len(self.images):,} validation images"


def features_of(model: Any, images: Tensor) -> Tensor:
    """Return the mean of the patches (N, D) of a pre-training model's `exported_encoder`."""
    encoder = FrozenEncoder(model.exported_encoder, model.exported_encoder.config)
    batches = (model.standardize(batch.to(encoder.device)) for batch in images.split(_BATCH_SIZE))
    return torch.cat([encoder(batch).mean for batch in batches])


def open_feature_spread(samples: SourceSamples, size: tuple[int, int], num_channels: int) -> FeatureSpread:
    """Load at most 1,000 evenly spaced images into memory, cropped to `size` (height, width)."""
    positions = np.unique(np.linspace(0, len(samples) - 1, min(_NUM_TEST, len(samples))).astype(np.int64))
    images = ImageDataset(samples.select(positions), single_view(CenterCrop(size), num_channels))
    return FeatureSpread(StackedImages(images, os.cpu_count() or 1))


def open_online_evaluation(
    dataset: Sequence[str],
    size: tuple[int, int],
    num_channels: int,
    seed: int,
    label_column: str | None = None,
    measured: Measured | None = None,
) -> OnlineEvaluation:
    """Load a seeded subset of each class of a labeled dataset into memory, cropped to `size` (height, width).

    Evaluates on the validation split, or on a part of the training split if there is none, but never on the test
    split: the results influence which runs are stopped or selected.
    """
    images = open_labeled(dataset, label_column, measured)
    train, test = images.train, images.validation
    if test is None:
        kept, validation = split_stratified(train.labels, _TEST_FRACTION, seed, images.class_names)
        train, test = train.select(kept), train.select(validation)

    def load(split: LabeledSplit, num_images: int) -> StackedImages:
        num_images = max(num_images, _NUM_PER_CLASS * len(images.class_names))
        subset = split.select(labeled_subset(split.labels, fraction=min(1.0, num_images / len(split)), seed=seed))
        return StackedImages(ImageDataset(subset, single_view(CenterCrop(size), num_channels)), os.cpu_count() or 1)

    return OnlineEvaluation(load(train, _NUM_TRAIN), load(test, _NUM_TEST), len(images.class_names))

"""Accuracy of simple classifiers on frozen features, compared with raw pixels and an untrained encoder.

Everything is selected on the training images: the hyperparameters of each classifier, and which row is the headline.
Shapes: N images, Q test images, C channels, h, w height and width in pixels, D feature dimension, K classes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.attentive_probe import fit_attentive
from evaluation.class_balance import NUM_ERRORS, interval_of_share, is_unbalanced, mean_over_classes
from evaluation.features import Features
from evaluation.knn import Knn, fit_knn
from evaluation.linear_probe import fit_linear, fit_logistic
from evaluation.metrics import balanced_accuracy, bootstrap_interval
from evaluation.quality import feature_std, rankme

PROBES: dict[str, tuple[str, Callable[..., Any]]] = {  # name in the report, and the function that fits it
    "knn": ("kNN", fit_knn),
    "linear": ("linear probe", fit_linear),
    "logistic": ("logistic regression", fit_logistic),
    "attentive": ("attentive probe", fit_attentive),
}
LOGISTIC_UP_TO = 10_000  # training images: L-BFGS uses all of them in each step
TRAINED, UNTRAINED, PIXELS = "trained", "untrained", "pixels"


@dataclass(frozen=True)
class Row:
    """One classifier on one kind of features.

    `interval` is that of the accuracy. Rows are compared by their `score`: the accuracy, or the balanced accuracy if
    the classes are unbalanced.
    """

    probe: str
    features: str
    source: str  # TRAINED, or the reference UNTRAINED or PIXELS
    chosen: dict[str, float]
    validation_accuracy: float | None
    labels: np.ndarray  # int (Q,)
    predictions: np.ndarray  # int (Q,)
    interval: tuple[float, float]
    balanced_accuracy: float

    @property
    def name(self) -> str:
        of = {TRAINED: self.features, UNTRAINED: f"{self.features}, untrained", PIXELS: "raw pixels"}
        return f"{PROBES[self.probe][0]}, {of[self.source]}"

    @property
    def correct(self) -> np.ndarray:
        return self.predictions == self.labels  # bool (Q,)

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    @property
    def is_unbalanced(self) -> bool:
        return is_unbalanced(self.labels)

    @property
    def score(self) -> float:
        return self.balanced_accuracy if self.is_unbalanced else self.accuracy

    @property
    def score_interval(self) -> tuple[float, float]:
        if not self.is_unbalanced:
            return self.interval
        return interval_of_share(*mean_over_classes(self.correct, self.labels))

    @property
    def score_text(self) -> str:
        return f"{self.score:.1%}{' balanced accuracy' if self.is_unbalanced else ''}"

    def as_results(self) -> list[dict[str, Any]]:
        """Return entries of metrics.json: the accuracy, after the balanced accuracy if the classes are unbalanced."""
        entry = {
            "name": self.name,
            "metric": "accuracy",
            "value": self.accuracy,
            "interval": list(self.interval),
            "n": len(self.correct),
            "reference": self.source != TRAINED,
            "balanced_accuracy": self.balanced_accuracy,
            "probe": self.probe,
            "features": PIXELS if self.source == PIXELS else self.features,
            "chosen": self.chosen,
            "accuracy_where_chosen": self.validation_accuracy,
        }
        if not self.is_unbalanced:
            return [entry]
        score = {"metric": "balanced_accuracy", "value": self.score, "interval": list(self.score_interval)}
        return [entry | score, entry]


@dataclass(frozen=True)
class LabeledFeatures:
    """Features of the N labeled images of a split."""

    features: Mapping[str, Features]  # by source, TRAINED or UNTRAINED
    thumbnails: Tensor  # (N, C, h, w)
    labels: Tensor  # int64 (N,)


def evaluate_probes(
    train: LabeledFeatures,
    test: LabeledFeatures,
    num_classes: int,
    probes: Sequence[str],
    seed: int,
    device: torch.device | str = "cpu",
    log: Callable[[str], None] = print,
) -> tuple[list[Row], Row]:
    """Fit the probes on `train` and evaluate them on `test`.

    Returns all rows, the trained encoder's first, and the headline: the row that is best on the training images.
    """
    rows: list[Row] = []

    def add(probe: str, kind: str, source: str, train_features: Tensor, test_features: Tensor) -> None:
        classifier = PROBES[probe][1](train_features.to(device), train.labels.to(device), num_classes, seed)
        predictions, labels = classifier(test_features.to(device)).argmax(1).cpu().numpy(), test.labels.cpu().numpy()
        if isinstance(classifier, Knn):
            chosen = {"k": classifier.k, "temperature": classifier.temperature}
        else:
            chosen = {"C" if probe == "logistic" else "learning_rate": classifier.setting}
        interval, balanced = bootstrap_interval(predictions == labels, seed), balanced_accuracy(predictions, labels)
        validation_accuracy = classifier.validation_accuracy
        row = Row(probe, kind, source, chosen, validation_accuracy, labels, predictions, interval, balanced)
        rows.append(row)
        log(f"{row.name}: {row.score_text}")

    def best(candidates: Iterable[Row]) -> Row:
        return max(candidates, key=lambda row: row.validation_accuracy or 0)

    pooled_probes = [probe for probe in probes if probe != "attentive"]
    train_features, test_features = train.features[TRAINED], test.features[TRAINED]
    for kind in train_features.by_kind:
        for probe in pooled_probes:
            add(probe, kind, TRAINED, train_features.by_kind[kind], test_features.by_kind[kind])
    if "attentive" in probes:
        assert train_features.patches is not None
        assert test_features.patches is not None
        add("attentive", "patches", TRAINED, train_features.patches, test_features.patches)
    headline = best(rows)
    for probe in pooled_probes:
        kind = best(row for row in rows if row.probe == probe).features
        if UNTRAINED in train.features:
            add(probe, kind, UNTRAINED, *(split.features[UNTRAINED].by_kind[kind] for split in (train, test)))
        if probe != "linear" or "logistic" not in probes:
            add(probe, "", PIXELS, *_pixels(train.thumbnails, test.thumbnails))
    order = (TRAINED, UNTRAINED, PIXELS)
    return sorted(rows, key=lambda row: order.index(row.source)), headline


def measure_quality(test: LabeledFeatures, seed: int) -> list[dict[str, Any]]:
    """Measure each kind of features of the trained encoder without labels; returns entries of metrics.json."""
    entries = []
    for kind, features in test.features[TRAINED].by_kind.items():
        of = {"n": len(features), "features": kind, "width": features.shape[1], "reference": False}
        entries.append({"name": f"RankMe, {kind}", "metric": "effective rank", "value": rankme(features, seed), **of})
        std = feature_std(features)
        entries.append({"name": f"feature std, {kind}", "metric": "standard deviation", "value": std, **of})
    return entries


def difference(row: Row, other: Row) -> tuple[float, tuple[float, float]]:
    """Return the paired difference of the scores of `row` and `other`, with its 95 % confidence interval."""
    gains = row.correct.astype(np.float64) - other.correct  # (Q,), each -1, 0 or 1
    if row.is_unbalanced:
        gain, error = mean_over_classes(gains, row.labels, ends=(-1.0, 1.0))
    else:
        gain, error = float(gains.mean()), float(gains.std() / np.sqrt(len(gains)))
    return gain, (gain - NUM_ERRORS * error, gain + NUM_ERRORS * error)


def _pixels(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Subtract the training mean of each channel from (N, C, h, w) and flatten; of equal channels, keep one."""
    if all((images == images[:, :1]).all() for images in (train, test)):
        train, test = train[:, :1], test[:, :1]
    mean = train.mean((0, 2, 3), keepdim=True)  # (1, C, 1, 1)
    return (train - mean).flatten(1), (test - mean).flatten(1)

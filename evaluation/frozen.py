"""The table of what simple classifiers read from frozen features, with raw pixels and an untrained encoder beside it.

Everything is chosen on the training images: the settings of each classifier, and which row is the headline.
Shapes: N training images, Q test images, D width, P patches, K classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evaluation.attentive_probe import fit_attentive
from evaluation.features import Features
from evaluation.knn import Knn, fit_knn
from evaluation.linear_probe import fit_linear, fit_logistic
from evaluation.metrics import balanced_accuracy, bootstrap_interval
from evaluation.quality import feature_std, rankme

PROBES = {
    "knn": "kNN",
    "linear": "linear probe",
    "logistic": "logistic regression",
    "attentive": "attentive probe",
}
LOGISTIC_UP_TO = 10_000  # training images: L-BFGS takes all of them at once
TRAINED, UNTRAINED, PIXELS = "trained", "untrained", "pixels"
_FITS: dict[str, Callable[..., Any]] = {
    "knn": fit_knn,
    "linear": fit_linear,
    "logistic": fit_logistic,
    "attentive": fit_attentive,
}


@dataclass(frozen=True)
class Row:
    """One classifier on one kind of features. `correct` bool (Q,), `predictions` int (Q,)."""

    probe: str
    features: str
    source: str  # TRAINED, or what it is compared with
    chosen: dict[str, float]
    chosen_at: float | None
    correct: np.ndarray
    predictions: np.ndarray
    interval: tuple[float, float]
    balanced_accuracy: float

    @property
    def name(self) -> str:
        if self.source == PIXELS:
            return f"{PROBES[self.probe]}, raw pixels"
        return f"{PROBES[self.probe]}, {self.features}" + (", untrained" if self.source == UNTRAINED else "")

    @property
    def accuracy(self) -> float:
        return float(self.correct.mean())

    def as_json(self) -> dict[str, Any]:
        return {
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
            "accuracy_where_chosen": self.chosen_at,
        }


@dataclass(frozen=True)
class Part:
    """Of the same N images: features by source (TRAINED, UNTRAINED), pictures (N, C, h, w) and labels int64 (N,)."""

    features: Mapping[str, Features]
    pictures: Tensor
    labels: Tensor


def measure(
    train: Part,
    test: Part,
    num_classes: int,
    probes: Sequence[str],
    seed: int,
    device: torch.device | str = "cpu",
    log: Callable[[str], None] = print,
) -> tuple[list[Row], Row]:
    """Every row, those of the trained encoder first, and the headline: the best one by the training images.

    `say` hears of each row as it is done, on `device`.
    """
    probes = [probe for probe in probes if probe != "logistic" or len(train.labels) <= LOGISTIC_UP_TO]
    rows: list[Row] = []

    def add(probe: str, kind: str, source: str, fitted_on: Tensor, judged_on: Tensor) -> None:
        model = _FITS[probe](fitted_on.to(device), train.labels.to(device), num_classes, seed)
        rows.append(_row(probe, kind, source, model, judged_on.to(device), test.labels, seed))
        log(f"{rows[-1].name}: {rows[-1].accuracy:.1%}")

    of_train, of_test = train.features[TRAINED], test.features[TRAINED]
    for kind in of_train.by_kind:
        for probe in probes:
            if probe != "attentive":
                add(probe, kind, TRAINED, of_train.by_kind[kind], of_test.by_kind[kind])
    if "attentive" in probes:
        assert of_train.patches is not None
        assert of_test.patches is not None
        add("attentive", "patches", TRAINED, of_train.patches, of_test.patches)
    headline = max(rows, key=lambda row: row.chosen_at or 0)
    for probe in probes:
        if probe == "attentive":
            continue
        kind = max((row for row in rows if row.probe == probe), key=lambda row: row.chosen_at or 0).features
        if UNTRAINED in train.features:
            sides = (part.features[UNTRAINED].by_kind[kind] for part in (train, test))
            add(probe, kind, UNTRAINED, *sides)
        if probe != "linear" or "logistic" not in probes:
            add(probe, "", PIXELS, *_pixels(train.pictures, test.pictures))
    order = (TRAINED, UNTRAINED, PIXELS)
    return sorted(rows, key=lambda row: order.index(row.source)), headline


def quality(test: Part, seed: int) -> list[dict[str, Any]]:
    """What needs no label, for each kind of features of the trained encoder."""
    entries = []
    for kind, features in test.features[TRAINED].by_kind.items():
        of = {"n": len(features), "features": kind, "width": features.shape[1], "reference": False}
        entries.append({"name": f"RankMe, {kind}", "metric": "effective rank", "value": rankme(features, seed), **of})
        deviation = feature_std(features)
        entries.append({"name": f"feature deviation, {kind}", "metric": "deviation", "value": deviation, **of})
    return entries


def difference(row: Row, other: Row) -> tuple[float, tuple[float, float]]:
    """How much more accurate `row` is than `other` on the same images, and the 95 % interval of that."""
    gain = row.correct.astype(np.float64) - other.correct  # (Q,) in -1, 0, 1
    half = 1.96 * gain.std() / np.sqrt(len(gain))
    return float(gain.mean()), (float(gain.mean() - half), float(gain.mean() + half))


def _pixels(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C, h, w) -> (N, D), less each channel's training mean, as encoders get them; of equal channels one."""
    if all((part == part[:, :1]).all() for part in (train, test)):
        train, test = train[:, :1], test[:, :1]
    mean = train.mean((0, 2, 3), keepdim=True)  # (1, C, 1, 1)
    return (train - mean).flatten(1), (test - mean).flatten(1)


def _row(probe: str, kind: str, source: str, model: Any, features: Tensor, labels: Tensor, seed: int) -> Row:
    predictions, references = model(features).argmax(1).cpu().numpy(), labels.cpu().numpy()
    correct = predictions == references
    balanced = balanced_accuracy(predictions, references)
    if isinstance(model, Knn):
        chosen = {"k": model.k, "temperature": model.temperature}
    else:
        chosen = {"C" if probe == "logistic" else "learning_rate": model.setting}
    interval = bootstrap_interval(correct, seed)
    return Row(probe, kind, source, chosen, model.chosen_at, correct, predictions, interval, balanced)

"""Classification metrics as `evaluate.Metric` classes that need no network, and their confidence interval.

Calibration error: Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599, Sec. 2, 15 bins.
Shapes: N images, K classes.
"""

from collections.abc import Callable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from data.seeds import seeded_generator

NUM_CALIBRATION_BINS = 15
_CLASS = datasets.Value("int64")


class ClassificationMetric(evaluate.Metric):
    """Takes predicted class numbers (N,) and true ones (N,); never touches a file or the network."""

    key: str  # what the value is called in the results
    value: Callable[..., float]  # of the inputs as arrays
    predictions: Any = _CLASS
    extra_inputs: dict[str, Any] = {}  # noqa: RUF012  (a class constant)

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"keep_in_memory": True, **settings})  # else each instance writes and locks a cache file

    def _info(self) -> evaluate.MetricInfo:
        inputs = {"predictions": self.predictions, "references": _CLASS, **self.extra_inputs}
        return evaluate.MetricInfo(
            description=type(self).__doc__ or "",
            citation="",
            inputs_description="",
            features=datasets.Features(inputs),
        )

    def _compute(self, **inputs: Any) -> dict[str, float]:
        return {self.key: self.value(**{name: np.asarray(values) for name, values in inputs.items()})}


class Accuracy(ClassificationMetric):
    """Share of images whose prediction is right."""

    key = "accuracy"

    def value(self, predictions: np.ndarray, references: np.ndarray) -> float:
        return float((predictions == references).mean())


class Top5Accuracy(ClassificationMetric):
    """Share of images whose class is among their five predictions (N, 5)."""

    key = "top5_accuracy"
    predictions = datasets.Sequence(_CLASS)

    def value(self, predictions: np.ndarray, references: np.ndarray) -> float:
        return float((predictions == references[:, None]).any(axis=1).mean())


class BalancedAccuracy(ClassificationMetric):
    """Mean over the classes that occur of the share of their images whose prediction is right."""

    key = "balanced_accuracy"

    def value(self, predictions: np.ndarray, references: np.ndarray) -> float:
        counts = np.bincount(references)
        hits = np.bincount(references[predictions == references], minlength=len(counts))
        return float((hits[counts > 0] / counts[counts > 0]).mean())


class MacroF1(ClassificationMetric):
    """Mean of the classes' F1, over those that occur or are predicted."""

    key = "macro_f1"

    def value(self, predictions: np.ndarray, references: np.ndarray) -> float:
        num_classes = int(max(predictions.max(), references.max())) + 1
        hits = np.bincount(references[predictions == references], minlength=num_classes)
        total = np.bincount(references, minlength=num_classes) + np.bincount(predictions, minlength=num_classes)
        return float((2 * hits[total > 0] / total[total > 0]).mean())


class CalibrationError(ClassificationMetric):
    """Mean gap between the confidence in a prediction and how often such ones are right, over bins of confidence."""

    key = "calibration_error"
    extra_inputs = {"confidences": datasets.Value("float64")}  # noqa: RUF012  (a class constant)

    def value(self, predictions: np.ndarray, references: np.ndarray, confidences: np.ndarray) -> float:
        bins = np.ceil(confidences * NUM_CALIBRATION_BINS).astype(np.int64).clip(1, NUM_CALIBRATION_BINS)
        gaps = np.bincount(bins, (predictions == references) - confidences)  # of each bin, times its images
        return float(np.abs(gaps).sum() / len(bins))


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """All metrics of logits (N, K) and labels (N,); top-5 where there are more than five classes."""
    if len(logits) != len(labels) or not len(labels):
        raise ValueError(f"there are {len(logits)} rows of logits and {len(labels)} labels, expected equally many")
    if not np.isfinite(logits).all():
        raise ValueError("the logits hold NaN or infinity; the training has diverged")
    predictions, confidences = predictions_of(logits)
    inputs = {"predictions": predictions, "references": labels}
    values = dict(Accuracy().compute(**inputs))
    if logits.shape[1] > 5:
        best = np.argpartition(logits, -5, axis=1)[:, -5:]  # (N, 5)
        values |= Top5Accuracy().compute(predictions=best, references=labels)
    values |= BalancedAccuracy().compute(**inputs)
    values |= MacroF1().compute(**inputs)
    values |= CalibrationError().compute(**inputs, confidences=confidences)
    return values


def predictions_of(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Logits (N, K) -> predicted classes (N,) and the probabilities (N,) that the softmax gives them."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)  # the largest is 0: no overflow
    return logits.argmax(axis=1), 1 / np.exp(shifted).sum(axis=1)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """int64 (K, K): how many images of class `row` were taken for class `column`."""
    cells = np.bincount(labels * num_classes + predictions, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def bootstrap_interval(
    correct: np.ndarray, seed: int, level: float = 0.95, num_resamples: int = 10_000
) -> tuple[float, float]:
    """Percentile bootstrap interval of an accuracy, from which images (N,) were right.

    It tells how far another test set of this size would move the value, not how far another training would.
    """
    if not len(correct):
        raise ValueError("there is no image to resample")
    # Resampling N zeros and ones with replacement and counting the ones is one binomial draw.
    count, share = torch.full((num_resamples,), float(len(correct))), float(np.mean(correct))
    hits = torch.binomial(count, torch.full_like(count, share), generator=seeded_generator(seed, "bootstrap"))
    low, high = np.quantile((hits.double() / len(correct)).numpy(), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

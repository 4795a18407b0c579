"""Classification metrics as `evaluate.Metric` that needs no network, and the confidence interval of an accuracy.

Calibration error: Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599, Sec. 2, 15 bins.
Shapes: N images, K classes.
"""

import inspect
from collections.abc import Callable
from typing import Any

import evaluate
import numpy as np
import torch
from datasets import Features, Value

from data.seeds import seeded_generator

NUM_CALIBRATION_BINS = 15
_NUM_RESAMPLES = 10_000
_INPUTS = {"predictions": Value("int64"), "references": Value("int64"), "confidences": Value("float64")}


class ClassificationMetric(evaluate.Metric):
    """An `evaluate.Metric` of predicted and true class indices (N,); its result is named like `function`."""

    def __init__(self, function: Callable[..., float]) -> None:
        self.function = function
        super().__init__(keep_in_memory=True)  # otherwise every instance writes and locks a cache file

    def _info(self) -> evaluate.MetricInfo:
        features = Features({name: _INPUTS[name] for name in inspect.signature(self.function).parameters})
        return evaluate.MetricInfo(description="", citation="", inputs_description="", features=features)

    def _compute(self, **inputs: Any) -> dict[str, float]:
        value = self.function(**{name: np.asarray(values) for name, values in inputs.items()})
        return {self.function.__name__: float(value)}


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the share of correct predictions."""
    from sklearn.metrics import accuracy_score  # imported late here and below: it takes a second

    return accuracy_score(references, predictions)


def balanced_accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the mean recall of the classes that occur."""
    from sklearn.metrics import recall_score  # unlike balanced_accuracy_score, it accepts predictions of other classes

    return recall_score(references, predictions, labels=np.unique(references), average="macro")


def macro_f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """Return the mean F1 of the classes that occur or are predicted."""
    from sklearn.metrics import f1_score

    return f1_score(references, predictions, average="macro")


def calibration_error(predictions: np.ndarray, references: np.ndarray, confidences: np.ndarray) -> float:
    """Return the mean gap between confidence and accuracy over bins of confidence, weighted by their images."""
    bins = np.ceil(confidences * NUM_CALIBRATION_BINS).astype(np.int64).clip(1, NUM_CALIBRATION_BINS)
    gaps = np.bincount(bins, (predictions == references) - confidences)  # the gap of each bin times its images
    return np.abs(gaps).sum() / len(bins)


def classification_metrics(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Compute all metrics of logits (N, K) and labels (N,), with the top-5 accuracy if there are more than 5 classes.

    Raises ValueError if the lengths differ, there are no images, or the logits are not finite.
    """
    if len(logits) != len(labels) or not len(labels):
        raise ValueError(f"there are {len(logits)} rows of logits and {len(labels)} labels, expected equally many")
    if not np.isfinite(logits).all():
        raise ValueError("the logits contain NaN or infinity: the training has diverged")
    predictions, confidences = predictions_of(logits)
    inputs = {"predictions": predictions, "references": labels}
    values = dict(ClassificationMetric(accuracy).compute(**inputs))
    if logits.shape[1] > 5:
        top5 = np.argpartition(logits, -5, axis=1)[:, -5:]  # (N, 5)
        values["top5_accuracy"] = float((top5 == labels[:, None]).any(axis=1).mean())
    values |= ClassificationMetric(balanced_accuracy).compute(**inputs)
    values |= ClassificationMetric(macro_f1).compute(**inputs)
    values |= ClassificationMetric(calibration_error).compute(**inputs, confidences=confidences)
    return values


def classification_results(logits: np.ndarray, labels: np.ndarray, name: str, seed: int) -> list[dict[str, Any]]:
    """Return all metrics as entries of metrics.json; accuracies have a 95 % confidence interval."""
    hits = np.argsort(-logits, axis=1, kind="stable")[:, :5] == labels[:, None]  # (N, 5)
    correct = {"accuracy": hits[:, 0], "top5_accuracy": hits.any(axis=1)}
    return [
        {
            "name": name,
            "metric": metric,
            "value": value,
            "interval": list(bootstrap_interval(correct[metric], seed)) if metric in correct else None,
            "n": len(labels),
        }
        for metric, value in classification_metrics(logits, labels).items()
    ]


def predictions_of(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the predicted classes (N,) of logits (N, K) and their softmax probabilities (N,)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)  # the largest is 0: no overflow
    return logits.argmax(axis=1), 1 / np.exp(shifted).sum(axis=1)


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Return counts int64 (K, K): how many images of the row's class were predicted as the column's."""
    from sklearn import metrics

    return metrics.confusion_matrix(labels, predictions, labels=np.arange(num_classes))


def bootstrap_interval(correct: np.ndarray, seed: int, level: float = 0.95) -> tuple[float, float]:
    """Return the percentile bootstrap interval of an accuracy, given which images (N,) were classified correctly.

    It covers the choice of the test images, not the randomness of training. Raises ValueError if there are no images.
    """
    if not len(correct):
        raise ValueError("there are no images to resample")
    # Resampling N zeros and ones with replacement and counting the ones is one binomial draw.
    count, share = torch.full((_NUM_RESAMPLES,), float(len(correct))), float(np.mean(correct))
    hits = torch.binomial(count, torch.full_like(count, share), generator=seeded_generator(seed, "bootstrap"))
    low, high = np.quantile((hits.double() / len(correct)).numpy(), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)

"""Intersection over union of labeled pixels, from the counts of a confusion matrix.

Shapes: K classes; `...` any number of dimensions of pixels, or of confusion matrices.
"""

import numpy as np

IGNORED = 255  # the label of pixels that count neither in training nor in evaluation


def pixel_confusion(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Return counts int64 (K, K) of the pixels (...) of the row's class that are predicted as the column's."""
    counted = labels != IGNORED
    pairs = labels[counted].astype(np.int64) * num_classes + predictions[counted]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_ious(confusion: np.ndarray) -> np.ndarray:
    """Return the IoU (..., K) of confusion matrices (..., K, K): NaN if a class neither occurs nor is predicted."""
    intersection = confusion.diagonal(axis1=-2, axis2=-1)
    union = confusion.sum(-1) + confusion.sum(-2) - intersection
    return np.divide(intersection, union, out=np.full(union.shape, np.nan), where=union > 0)


def mean_iou(confusion: np.ndarray) -> np.ndarray:
    """Return the mean IoU (...) over the classes of confusion matrices (..., K, K) that occur or are predicted."""
    ious = class_ious(confusion)
    return np.nansum(ious, -1) / np.maximum((~np.isnan(ious)).sum(-1), 1)

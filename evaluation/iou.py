"""Intersection over union of labeled pixels.

Shapes: K classes; `...` any number of dimensions of pixels, of confusion matrices or of areas.
"""

import numpy as np

from data.mask_codes import IGNORED


def pixel_confusion(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Return counts int64 (K, K) of the pixels (...) of the row's class that are predicted as the column's."""
    counted = labels != IGNORED
    pairs = labels[counted].astype(np.int64) * num_classes + predictions[counted]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def class_areas(confusion: np.ndarray) -> np.ndarray:
    """Return the pixels (..., 3, K) of each class that are both, labeled and predicted, of confusions (..., K, K)."""
    return np.stack([confusion.diagonal(axis1=-2, axis2=-1), confusion.sum(-1), confusion.sum(-2)], -2)


def ious_of_areas(areas: np.ndarray) -> np.ndarray:
    """Return the IoU (..., K) of areas (..., 3, K): NaN if a class neither occurs nor is predicted."""
    intersection, labeled, predicted = np.moveaxis(areas, -2, 0)
    union = labeled + predicted - intersection
    return np.divide(intersection, union, out=np.full(union.shape, np.nan), where=union > 0)


def mean_of_areas(areas: np.ndarray) -> np.ndarray:
    """Return the mean IoU (...) over the classes of areas (..., 3, K) that occur or are predicted; 0 without any."""
    ious = ious_of_areas(areas)
    return np.nansum(ious, -1) / np.maximum((~np.isnan(ious)).sum(-1), 1)


def mean_iou(confusion: np.ndarray) -> np.ndarray:
    """Return the mean IoU (...) over the classes of confusion matrices (..., K, K) that occur or are predicted."""
    return mean_of_areas(class_areas(confusion))

"""Boundaries of labeled pixels: the share that is found, and the share of the found ones that is right.

Papers: Csurka et al. 2013, "What is a good evaluation measure for semantic segmentation?", BMVC (the score, for each
class); Perazzi et al. 2016, "A Benchmark Dataset and Evaluation Methodology for Video Object Segmentation", CVPR (the
tolerance, 0.8% of the diagonal).
Differs: the boundaries of all images are counted before a score is computed, as areas are for the IoU; the papers
average the scores of images.
Shapes: H W pixels, K classes; `...` any number of dimensions.
"""

import math

import numpy as np

from data.mask_codes import IGNORED

_TOLERANCE = 0.008  # of the diagonal; at least a pixel


def boundary_counts(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Return counts int64 (4, K) of boundary pixels of labels and predictions (H, W).

    They are the predicted ones near a labeled one, all predicted, the labeled ones near a predicted one, all labeled.
    """
    counted = labels != IGNORED
    tolerance = max(1.0, _TOLERANCE * math.hypot(*labels.shape))
    counts = np.zeros((4, num_classes), np.int64)
    for number in np.union1d(labels[counted], predictions[counted]):
        labeled, predicted = (_boundary((of == number) & counted, counted) for of in (labels, predictions))
        found = (predicted & _near(labeled, tolerance)).sum(), (labeled & _near(predicted, tolerance)).sum()
        counts[:, number] = found[0], predicted.sum(), found[1], labeled.sum()
    return counts


def f_scores(counts: np.ndarray) -> np.ndarray:
    """Return the F-score (..., K) of counts (..., 4, K): NaN if a class has no boundary, labeled or predicted."""
    right, predicted, found, labeled = np.moveaxis(counts.astype(float), -2, 0)
    precision, recall = right / np.maximum(predicted, 1), found / np.maximum(labeled, 1)
    score = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return np.where(predicted + labeled > 0, score, np.nan)


def _boundary(mask: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """Return the pixels (H, W) of a mask beside one of another class; those beside ignored pixels are none."""
    others = np.pad(counted & ~mask, 1)
    beside: np.ndarray = others[:-2, 1:-1] | others[2:, 1:-1] | others[1:-1, :-2] | others[1:-1, 2:]
    return mask & beside


def _near(boundary: np.ndarray, tolerance: float) -> np.ndarray:
    """Return the pixels (H, W) at most so far from a boundary."""
    from scipy.ndimage import distance_transform_edt  # imported late: most evaluations do not need it

    if not boundary.any():
        return boundary
    near: np.ndarray = distance_transform_edt(~boundary) <= tolerance
    return near

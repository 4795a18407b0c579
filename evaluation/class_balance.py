"""Accuracy on classes of unequal size, and its standard error.

On 343 parts of which 22 are defective, always answering "good" is 94 % accurate. Balanced accuracy, the mean recall of
the classes that occur, is then 50 %.

Error of a share: Agresti & Caffo 2000, "Simple and Effective Confidence Intervals for Proportions".
Shapes: N images.
"""

import numpy as np

BALANCED = "balanced accuracy, because the classes are unbalanced"
NUM_ERRORS = 1.96  # standard errors on either side of a value in a 95 % interval
_UNBALANCED_ABOVE = 1.5  # images of the largest class for each of the smallest


def is_unbalanced(labels: np.ndarray) -> bool:
    """Return whether the largest class is more than 1.5 times as large as the smallest class that occurs."""
    counts = np.unique(labels, return_counts=True)[1]
    return bool(counts.max() > _UNBALANCED_ABOVE * counts.min())


def accuracy_with_error(correct: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return the accuracy, balanced if the classes are unbalanced, and its standard error."""
    return mean_over_classes(correct, labels if is_unbalanced(labels) else np.zeros_like(labels))


def mean_over_classes(
    values: np.ndarray, labels: np.ndarray, ends: tuple[float, float] = (0.0, 1.0)
) -> tuple[float, float]:
    """Return the mean over classes of each class's mean of `values` (N,), and its standard error.

    The variance of a class includes another image at each of the `ends`, the smallest and largest possible value:
    otherwise two images that are both right would have no error at all.
    """
    classes = [values[labels == label] for label in np.unique(labels)]
    variances = [np.var([*of_class, *ends]) / len(of_class) for of_class in classes]
    return float(np.mean([of_class.mean() for of_class in classes])), float(np.sqrt(np.sum(variances)) / len(classes))


def interval_of_share(share: float, standard_error: float) -> tuple[float, float]:
    """Return the 95 % confidence interval of a value between 0 and 1."""
    half = NUM_ERRORS * standard_error
    return max(0.0, share - half), min(1.0, share + half)

"""Panoptic quality of segments that do not overlap.

Paper: Kirillov et al. 2019, "Panoptic Segmentation", arXiv:1801.00868, Eq. 1 and Sec. 4.2.
Code: cocodataset/panopticapi.
Shapes: H, W height and width in pixels, P predicted segments, T true ones, K classes.
"""

import numpy as np

NO_SEGMENT, VOID = -1, -2  # pixels without a segment, and true ones that do not count, such as groups of objects


def count_matches(
    predicted: np.ndarray, predicted_classes: np.ndarray, true: np.ndarray, true_classes: np.ndarray, num_classes: int
) -> np.ndarray:
    """Return for each class (K, 4) of an image: the sum of the IoUs of its matches, and the numbers of matches, of
    unmatched predicted segments and of unmatched true ones that have pixels.

    Segments match if they have the same class and their IoU is above a half. A predicted segment that is mostly void
    does not count.

    Args:
        predicted, true: Number of each pixel's segment, int (H, W), `NO_SEGMENT`, or `VOID` in `true` only.
        predicted_classes, true_classes: (P,) and (T,).
    """
    num_predicted, num_true = len(predicted_classes), len(true_classes)
    # Shifted, so that no segment is row and column 0; void is the last column.
    columns = np.where(true == VOID, num_true + 1, true + 1)
    pairs = (predicted + 1).astype(np.int64) * (num_true + 2) + columns
    shape = (num_predicted + 1, num_true + 2)
    overlap = np.bincount(pairs.ravel(), minlength=shape[0] * shape[1]).reshape(shape)
    void, intersection = overlap[1:, -1], overlap[1:, 1:-1]  # (P,), (P, T)
    predicted_areas, true_areas = overlap[1:].sum(1), overlap[:, 1:-1].sum(0)
    union = (predicted_areas - void)[:, None] + true_areas - intersection
    iou = intersection / np.maximum(union, 1)
    is_match = (iou > 0.5) & (predicted_classes[:, None] == true_classes)
    is_found, is_right = is_match.any(0), is_match.any(1)
    is_wrong = ~is_right & (void <= 0.5 * predicted_areas) & (predicted_areas > 0)
    is_missed = ~is_found & (true_areas > 0)  # one that others cover completely cannot be found
    counts = np.zeros((num_classes, 4))
    np.add.at(counts[:, 0], predicted_classes[is_right], (iou * is_match).sum(1)[is_right])
    for column, classes in enumerate(
        (predicted_classes[is_right], predicted_classes[is_wrong], true_classes[is_missed])
    ):
        counts[:, column + 1] = np.bincount(classes, minlength=num_classes)
    return counts


def panoptic_quality(counts: np.ndarray) -> dict[str, float]:
    """Return the panoptic quality, and its factors segmentation and recognition quality, given counts (K, 4).

    They are means over the classes that occur or are predicted; 0 without any.
    """
    iou, matches, wrong, missed = counts.T  # (K,)
    total = matches + (wrong + missed) / 2
    occurs = total > 0
    if not occurs.any():
        return {"panoptic_quality": 0.0, "segmentation_quality": 0.0, "recognition_quality": 0.0}
    iou, matches, total = iou[occurs], matches[occurs], total[occurs]
    return {
        "panoptic_quality": float((iou / total).mean()),
        "segmentation_quality": float((iou / np.maximum(matches, 1)).mean()),
        "recognition_quality": float((matches / total).mean()),
    }

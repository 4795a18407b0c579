"""The scores of a segmentation, over all classes and of each.

Shapes: K classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from evaluation.boundaries import f_scores
from evaluation.iou import ious_of_areas, mean_of_areas


def segmentation_metrics(areas: np.ndarray) -> dict[str, float]:
    """Return the metrics of the areas (3, K) of `evaluation.iou`, maybe with `boundary_counts` below them (7, K)."""
    correct, true, _ = areas[:3]
    occurs = true > 0
    found = {
        "mean_iou": float(mean_of_areas(areas[:3])),
        "pixel_accuracy": float(correct.sum() / max(true.sum(), 1)),
        "mean_accuracy": float((correct[occurs] / true[occurs]).mean()) if occurs.any() else 0.0,
    }
    if len(areas) > 3:
        scores = f_scores(areas[3:])
        found["mean_boundary_f"] = float(np.nansum(scores) / max(1, (~np.isnan(scores)).sum()))
    return found


def rows_of_classes(areas: np.ndarray, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """Return name, scores and labeled pixels of each class, of the same areas; a score is None if it has none."""
    scores = {"iou": ious_of_areas(areas[:3])}
    if len(areas) > 3:
        scores["boundary_f"] = f_scores(areas[3:])
    rows: list[dict[str, Any]] = []
    for number, (name, pixels) in enumerate(zip(class_names, areas[1], strict=True)):
        own = {kind: None if np.isnan(of[number]) else round(float(of[number]), 5) for kind, of in scores.items()}
        rows.append({"class": name, **own, "pixels": int(pixels)})
    return rows

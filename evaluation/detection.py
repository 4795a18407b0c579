"""Average precision of predicted boxes, as COCO defines it.

Code: cocodataset/cocoapi/PythonAPI/pycocotools/cocoeval.py; `faster-coco-eval` gives the same numbers.
Shapes: N images, P predicted boxes of an image, M boxes of the image with the most.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

PADDING = -100  # class in rows that hold no box, as Trainer pads them
METRICS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")
_STATS = ("AP_all", "AP_50", "AP_75", "AP_small", "AP_medium", "AP_large")


def require_coco_eval() -> None:
    """Raise ValueError if `faster-coco-eval` is not installed."""
    try:
        import faster_coco_eval  # noqa: F401
    except ImportError:
        raise ValueError(
            "average precision is measured with faster-coco-eval, which is not installed: pip install faster-coco-eval"
        ) from None


def detection_metrics(predictions: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, float]:
    """Return AP, AP50 and AP75, 0 without any object, and AP of small, medium and large ones if there are such.

    Args:
        predictions: (N, P, 6): left, top, right and bottom in pixels, score and class.
        labels: (N, M, 7): left, top, right and bottom in pixels, class, area and whether it is a crowd.
    """
    from faster_coco_eval import COCO, COCOeval_faster

    truth = COCO(as_coco(labels, class_names))
    found = [
        {"image_id": image, "category_id": int(row[5]), "bbox": _with_sides(row), "score": float(row[4])}
        for image, rows in enumerate(predictions)
        for row in rows
        if row[5] >= 0
    ]
    if not found:
        return dict.fromkeys(METRICS[:3], 0.0)
    evaluation = COCOeval_faster(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    values = {name: float(evaluation.stats_as_dict[stat]) for name, stat in zip(METRICS, _STATS, strict=True)}
    measured = {name: value for name, value in values.items() if value >= 0}  # -1: no such object
    return dict.fromkeys(METRICS[:3], 0.0) | measured


def as_coco(labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Return labels (N, M, 7) in COCO's json format."""
    annotations = [
        {
            "image_id": image,
            "category_id": int(row[4]),
            "bbox": _with_sides(row),
            "area": float(row[5]),
            "iscrowd": int(row[6]),
        }
        for image, rows in enumerate(labels)
        for row in rows
        if row[4] != PADDING
    ]
    return {
        "images": [{"id": image} for image in range(len(labels))],
        "annotations": [{"id": number, **each} for number, each in enumerate(annotations, start=1)],
        "categories": [{"id": number, "name": name} for number, name in enumerate(class_names)],
    }


def _with_sides(row: np.ndarray) -> list[float]:
    left, top, right, bottom = row[:4].astype(float).tolist()
    return [left, top, right - left, bottom - top]

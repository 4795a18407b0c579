"""Average precision of boxes."""

import numpy as np
import pytest

from evaluation.detection import PADDING, as_coco, detection_metrics


def random_boxes(random: np.random.RandomState, num_images: int, num_boxes: int) -> np.ndarray:
    corner, sides = random.rand(num_images, num_boxes, 2) * 200, 1 + random.rand(num_images, num_boxes, 2) ** 2 * 300
    return np.concatenate([corner, corner + sides], axis=2)


def test_metrics__equal_those_of_pycocotools():
    pytest.importorskip("faster_coco_eval")
    pycocotools = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    random, names = np.random.RandomState(0), ["a", "b", "c"]
    boxes = random_boxes(random, 30, 6)
    classes, crowds = random.randint(0, 3, (30, 6, 1)), random.rand(30, 6, 1) < 0.1
    areas = 0.8 * (boxes[..., 2:] - boxes[..., :2]).prod(2, keepdims=True)
    labels = np.concatenate([boxes, classes, areas, crowds], axis=2)
    labels[3:5] = PADDING  # images without boxes
    labels[7, 2:] = PADDING
    noise, scores = random.randn(30, 6, 4) * 8, random.rand(30, 6, 1)
    near = np.concatenate([boxes + noise, scores, np.where(random.rand(30, 6, 1) < 0.8, classes, 0)], axis=2)
    far = np.concatenate(
        [random_boxes(random, 30, 4), random.rand(30, 4, 1), random.randint(0, 3, (30, 4, 1))], axis=2
    )
    predictions = np.concatenate([near, far], axis=1)
    predictions[..., 2:4] = np.maximum(predictions[..., 2:4], predictions[..., :2] + 1)

    truth = pycocotools.COCO()
    truth.dataset = as_coco(labels, names)
    truth.createIndex()
    found = [
        {"image_id": image, "category_id": int(row[5]), "score": row[4], "bbox": [*row[:2], *(row[2:4] - row[:2])]}
        for image, rows in enumerate(predictions)
        for row in rows
    ]
    evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    ours = detection_metrics(predictions, labels, names)
    assert list(ours) == ["ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large"]
    np.testing.assert_allclose(list(ours.values()), evaluation.stats[:6], atol=1e-9)
    assert 0.05 < ours["ap"] < 0.95


def test_metrics__without_any_object_are_0():
    labels, found = np.full((2, 1, 7), PADDING, float), np.array([[[1, 1, 9, 9, 0.5, 0]]] * 2, float)
    assert detection_metrics(found, labels, ["a"]) == {"ap": 0.0, "ap50": 0.0, "ap75": 0.0}


def test_metrics__of_a_hand_computed_case():
    pytest.importorskip("faster_coco_eval")
    labels = np.array([[[0, 0, 100, 100, 0, 1e4, 0]], [[50, 50, 150, 150, 0, 1e4, 0]]], float)
    right, wrong = [0, 0, 100, 100, 0.9, 0], [0, 0, 10, 10, 0.8, 0]
    found = detection_metrics(np.array([[right], [wrong]], float), labels, ["a"])
    # One of two is found, without an error above it: precision 1 up to a recall of 0.5, that is at 51 of 101 points.
    assert found == pytest.approx({"ap": 51 / 101, "ap50": 51 / 101, "ap75": 51 / 101, "ap_large": 51 / 101})

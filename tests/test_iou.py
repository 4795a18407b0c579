"""Intersection over union: a case by hand, and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, jaccard_score

from data.mask_codes import IGNORED
from evaluation.iou import class_areas, ious_of_areas, mean_iou, pixel_confusion


def test_iou__of_six_pixels_by_hand():
    labels = np.array([[0, 0, 1], [1, 2, IGNORED]])
    predictions = np.array([[0, 1, 1], [1, 0, 2]])
    confusion = pixel_confusion(labels, predictions, 4)
    assert confusion.tolist() == [[1, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    # Class 0: 1 of {0, 0} and {0, 2}; class 1: 2 of 3; class 2 is never right; class 3 does not occur.
    np.testing.assert_allclose(ious_of_areas(class_areas(confusion)), [1 / 3, 2 / 3, 0, np.nan])
    assert mean_iou(confusion) == pytest.approx(1 / 3)


def test_iou__is_that_of_scikit_learn():
    draw = np.random.default_rng(0)
    labels, predictions = draw.integers(0, 7, (2, 3, 40, 50))
    labels[draw.random(labels.shape) < 0.1] = IGNORED
    seen = labels != IGNORED
    confusion = pixel_confusion(labels, predictions, 7)
    np.testing.assert_array_equal(confusion, confusion_matrix(labels[seen], predictions[seen]))
    np.testing.assert_allclose(
        ious_of_areas(class_areas(confusion)), jaccard_score(labels[seen], predictions[seen], average=None)
    )
    both = np.stack([confusion, pixel_confusion(labels[:1], predictions[:1], 7)])  # several matrices at once
    np.testing.assert_allclose(mean_iou(both)[0], jaccard_score(labels[seen], predictions[seen], average="macro"))
    np.testing.assert_allclose(mean_iou(both)[1], mean_iou(both[1]))


def test_iou__without_any_pixel_is_zero():
    assert mean_iou(np.zeros((3, 3), np.int64)) == 0

"""Panoptic quality: cases by hand."""

import numpy as np
import pytest

from evaluation.panoptic_quality import NO_SEGMENT, VOID, count_matches, panoptic_quality


def test_quality__of_three_segments_by_hand():
    true = np.array([[0, 0, 0, 0, 1, 1, 2, 2]])
    predicted = np.array([[0, 0, 0, NO_SEGMENT, 1, 1, 1, 2]])
    # Segment 0: IoU 3/4; segment 1: 2/3; segment 2: IoU 1/2, which is not above a half.
    counts = count_matches(predicted, np.array([0, 1, 1]), true, np.array([0, 1, 1]), 3)
    np.testing.assert_allclose(counts, [[0.75, 1, 0, 0], [2 / 3, 1, 1, 1], [0, 0, 0, 0]])
    quality = panoptic_quality(counts)
    assert quality["panoptic_quality"] == pytest.approx((0.75 + (2 / 3) / 2) / 2)
    assert quality["segmentation_quality"] == pytest.approx((0.75 + 2 / 3) / 2)
    assert quality["recognition_quality"] == pytest.approx((1 + 1 / 2) / 2)


def test_quality__another_class_is_no_match_and_void_does_not_count():
    true = np.array([[0, 0, VOID, VOID, VOID]])
    predicted = np.array([[0, 0, 0, 1, 1]])
    counts = count_matches(predicted, np.array([0, 1]), true, np.array([0]), 2)
    np.testing.assert_allclose(counts, [[1, 1, 0, 0], [0, 0, 0, 0]])  # void pixels are in no union
    counts = count_matches(predicted, np.array([1, 1]), true, np.array([0]), 2)
    np.testing.assert_allclose(counts, [[0, 0, 0, 1], [0, 0, 1, 0]])


def test_quality__a_true_segment_that_others_cover_is_not_missed():
    covered = np.zeros((2, 2), np.int64)
    counts = count_matches(covered, np.array([0]), covered + 1, np.array([0, 0]), 1)
    np.testing.assert_allclose(counts, [[1, 1, 0, 0]])


def test_quality__without_segments():
    empty, none = np.full((2, 2), NO_SEGMENT), np.zeros(0, np.int64)
    counts = count_matches(empty, none, empty, none, 2)
    assert panoptic_quality(counts)["panoptic_quality"] == 0
    assert count_matches(empty, none, np.zeros((2, 2), np.int64), np.array([1]), 2)[1].tolist() == [0, 0, 0, 1]

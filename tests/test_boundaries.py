"""The score of boundaries against cases by hand and its definition, pixel by pixel."""

import itertools
import math

import numpy as np
import pytest

from data.mask_codes import IGNORED
from evaluation.boundaries import boundary_counts, f_scores
from evaluation.iou import class_areas, pixel_confusion
from evaluation.segmentation import segmentation_metrics


def square(top: int, left: int, side: int = 6) -> np.ndarray:
    image = np.zeros((20, 20), np.uint8)
    image[top : top + side, left : left + side] = 1
    return image


def test_boundary__of_a_square_is_its_edge_from_both_sides():
    counts = boundary_counts(square(5, 5), square(5, 5), 3)
    assert counts[:, 1].tolist() == [20] * 4  # 6 x 6 pixels without the inner 4 x 4
    assert counts[:, 0].tolist() == [24] * 4
    assert counts[:, 2].tolist() == [0] * 4
    scores = f_scores(counts)
    assert scores[:2].tolist() == [1, 1]
    assert np.isnan(scores[2])


@pytest.mark.parametrize(("shift", "is_right"), [(1, True), (8, False)])
def test_boundary__is_right_within_a_pixel_of_a_small_image(shift, is_right):
    scores = f_scores(boundary_counts(square(5, 4), square(5, 4 + shift), 2))
    assert (scores[1] == 1) == is_right
    assert (scores[1] == 0) == (not is_right)


def test_boundary__of_ignored_pixels_is_none():
    labels = square(5, 5)
    labels[:, 10:] = IGNORED  # hides the right edge
    counts = boundary_counts(labels, square(5, 5, 5), 2)
    assert counts[:, 1].tolist() == [13, 13, 14, 14]  # left, top and bottom; one row more in the labels
    missed = boundary_counts(labels, np.zeros_like(labels), 2)
    assert missed[:, 1].tolist() == [0, 0, 0, 14]
    assert f_scores(missed)[1] == 0


def by_definition(labels: np.ndarray, predictions: np.ndarray, number: int) -> tuple[int, int, int, int]:
    rows, columns = labels.shape
    tolerance = max(1, 0.008 * math.hypot(rows, columns))

    def edge(of: np.ndarray) -> list[tuple[int, int]]:
        found = []
        for row, column in itertools.product(range(rows), range(columns)):
            if labels[row, column] == IGNORED or of[row, column] != number:
                continue
            for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if 0 <= r < rows and 0 <= c < columns and labels[r, c] != IGNORED and of[r, c] != number:
                    found.append((row, column))
                    break
        return found

    def near(points: list[tuple[int, int]], others: list[tuple[int, int]]) -> int:
        return sum(any(math.dist(point, other) <= tolerance for other in others) for point in points)

    labeled, predicted = edge(labels), edge(predictions)
    return near(predicted, labeled), len(predicted), near(labeled, predicted), len(labeled)


def test_counts__are_those_of_the_definition():
    rng = np.random.default_rng(0)
    labels, predictions = (np.kron(rng.integers(0, 3, (4, 50)), np.ones((5, 5), int)) for _ in range(2))  # 20 x 250
    labels[rng.random(labels.shape) < 0.02] = IGNORED
    counts = boundary_counts(labels, predictions, 3)
    for number in range(3):
        assert tuple(counts[:, number]) == by_definition(labels, predictions, number)


def test_metrics__have_the_mean_of_the_classes_with_a_boundary():
    labels, predictions = square(5, 5), np.where(square(5, 5), 2, 0).astype(np.uint8)
    areas = class_areas(pixel_confusion(labels, predictions, 4))
    assert "mean_boundary_f" not in segmentation_metrics(areas)
    both = np.concatenate([areas, boundary_counts(labels, predictions, 4)])
    metrics = segmentation_metrics(both)
    assert metrics["mean_boundary_f"] == pytest.approx(1 / 3)  # the background is right, 1 is missed, 2 is wrong
    assert {name: metrics[name] for name in segmentation_metrics(areas)} == segmentation_metrics(areas)

"""Balanced accuracy and standard errors, on classes of unequal size."""

import numpy as np
import pytest
from fashion import fashion_pixels

from evaluation.class_balance import accuracy_with_error, interval_of_share, is_unbalanced, mean_over_classes
from evaluation.knn import Knn

SHIRT, COAT = 6, 4


@pytest.mark.parametrize(
    ("counts", "expected"), [((10, 10), False), ((15, 10), False), ((16, 10), True), ((0, 15, 10), False)]
)
def test_unbalanced__begins_above_half_as_many_again(counts, expected):
    assert is_unbalanced(np.repeat(np.arange(len(counts)), counts)) is expected


def shirts_among_coats(num_shirts: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of 100 coats and a few shirts kNN on pixels gets right after 500 coats and 50 shirts, and the labels."""
    (train, labels), (test, truth) = fashion_pixels("train", 5000), fashion_pixels("test", 1000)

    def select(numbers, num_shirts):
        shirts = (numbers == SHIRT).nonzero().flatten()[:num_shirts]
        return [*(numbers == COAT).nonzero().flatten().tolist(), *shirts.tolist()]

    kept, asked = select(labels, 50), select(truth, num_shirts)
    knn = Knn(train[kept] / train[kept].norm(dim=1, keepdim=True), labels[kept], 10, 20, 0.07, None)
    found = knn(test[asked] / test[asked].norm(dim=1, keepdim=True)).argmax(1)
    return (found == truth[asked]).numpy(), truth[asked].numpy()


def test_accuracy__of_unbalanced_classes_is_the_mean_recall_with_the_error_of_its_resampling():
    correct, labels = shirts_among_coats(22)
    recalls = [correct[labels == label].mean() for label in (SHIRT, COAT)]
    accuracy, error = accuracy_with_error(correct, labels)
    assert accuracy == pytest.approx(np.mean(recalls))
    assert recalls[0] < accuracy < correct.mean() - 0.1  # plain accuracy hides how few shirts are found
    generator = np.random.default_rng(0)
    resampled = [
        np.mean(
            [generator.choice(correct[labels == label], (labels == label).sum()).mean() for label in (SHIRT, COAT)]
        )
        for _ in range(4000)
    ]
    assert np.std(resampled) < error < 1.25 * np.std(resampled)


def test_accuracy__of_balanced_classes_is_the_share_of_correct_images():
    correct, labels = shirts_among_coats(100)
    accuracy, error = accuracy_with_error(correct, labels)
    assert accuracy == correct.mean()
    assert error == pytest.approx(np.sqrt(accuracy * (1 - accuracy) / 200), rel=0.02)


def test_error__of_two_images_that_are_both_right_is_not_zero():
    labels = np.repeat([0, 1], [300, 2])
    for correct in (np.ones(302), labels == 0):
        assert mean_over_classes(correct, labels)[1] > 0.1
    assert mean_over_classes(np.zeros(302), labels, ends=(-1.0, 1.0))[1] > 0.1


def test_interval__of_a_share_stays_between_0_and_1():
    assert interval_of_share(0.5, 0.1) == pytest.approx((0.304, 0.696))
    assert interval_of_share(0.99, 0.1) == pytest.approx((0.794, 1))
    assert interval_of_share(0.01, 0.1) == pytest.approx((0, 0.206))

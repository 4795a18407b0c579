"""Classification metrics, the bootstrap interval, and the plot of the confusion matrix."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import metrics as sklearn_metrics

from evaluation.confusion import draw_confusion_matrix
from evaluation.metrics import (
    ClassificationMetric,
    accuracy,
    balanced_accuracy,
    bootstrap_interval,
    calibration_error,
    classification_metrics,
    classification_results,
    confusion_matrix,
    macro_f1,
    predictions_of,
)


def scores(num_images: int, num_classes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return logits that are correct about half the time, and labels of classes with different sizes."""
    numbers = np.random.default_rng(seed)
    labels = (numbers.beta(1, 2, num_images) * num_classes).astype(np.int64)
    logits = numbers.normal(size=(num_images, num_classes)).astype(np.float32)
    logits[np.arange(num_images), labels] += 2
    return logits, labels


@pytest.mark.parametrize(("num_images", "num_classes"), [(2000, 10), (300, 40), (500, 6), (12, 10)])
def test_metrics__agree_with_scikit_learn(num_images, num_classes):
    logits, labels = scores(num_images, num_classes)
    predictions, confidences = predictions_of(logits)
    found = classification_metrics(logits, labels)
    expected = {
        "accuracy": sklearn_metrics.accuracy_score(labels, predictions),
        "top5_accuracy": sklearn_metrics.top_k_accuracy_score(labels, logits, k=5, labels=range(num_classes)),
        "balanced_accuracy": np.mean(
            sklearn_metrics.recall_score(labels, predictions, labels=np.unique(labels), average=None)
        ),
        "macro_f1": sklearn_metrics.f1_score(labels, predictions, average="macro"),
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-12)
    np.testing.assert_allclose(confidences, torch.tensor(logits).double().softmax(1).max(1).values, rtol=1e-6)


def test_metrics__of_classes_that_only_occur_or_are_only_predicted():
    references, predictions = np.array([0, 0, 1, 3]), np.array([0, 2, 1, 1])
    assert balanced_accuracy(predictions, references) == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert macro_f1(predictions, references) == pytest.approx((2 / 3 + 2 / 3 + 0 + 0) / 4)


def test_calibration_error__is_the_weighted_gap_of_fifteen_bins():
    logits, labels = scores(1000, 8)
    predictions, confidences = predictions_of(logits)
    expected = 0.0
    for index in range(15):
        inside = (confidences > index / 15) & (confidences <= (index + 1) / 15)
        if inside.any():
            gap = (predictions[inside] == labels[inside]).mean() - confidences[inside].mean()
            expected += inside.mean() * abs(gap)
    assert classification_metrics(logits, labels)["calibration_error"] == pytest.approx(expected, abs=1e-12)


def test_calibration_error__of_known_cases():
    def error(right: list[int], confidences: list[float]) -> float:
        metric = ClassificationMetric(calibration_error)
        inputs = {"predictions": right, "references": [1] * len(right), "confidences": confidences}
        return metric.compute(**inputs)["calibration_error"]

    assert error([1, 1, 1, 0], [0.75] * 4) == pytest.approx(0)
    assert error([0, 0], [1.0, 1.0]) == pytest.approx(1)
    assert error([1, 0], [0.9, 0.2]) == pytest.approx((0.1 + 0.2) / 2)


def test_top5__is_omitted_if_it_could_not_be_wrong():
    assert "top5_accuracy" not in classification_metrics(*scores(50, 5))


def test_metrics__are_evaluate_metrics_that_accept_batches():
    logits, labels = scores(100, 10)
    metric = ClassificationMetric(accuracy)
    for start in range(0, 100, 30):
        chosen = slice(start, start + 30)
        metric.add_batch(predictions=logits[chosen].argmax(1), references=labels[chosen])
    assert metric.compute()["accuracy"] == classification_metrics(logits, labels)["accuracy"]


def test_metrics__large_logits_do_not_overflow():
    found = classification_metrics(np.array([[1e30, 0.0], [0.0, 1e30]], np.float32), np.array([0, 1]))
    assert found["accuracy"] == 1
    assert found["calibration_error"] == 0


def test_metrics__do_not_change_random_states():
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    logits, labels = scores(50, 7)
    classification_metrics(logits, labels)
    bootstrap_interval(logits.argmax(1) == labels, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_metrics__refuse_wrong_lengths_and_non_finite_logits():
    logits, labels = scores(20, 7)
    with pytest.raises(ValueError, match="20 rows of logits and 19 labels"):
        classification_metrics(logits, labels[1:])
    logits[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        classification_metrics(logits, labels)


@pytest.mark.parametrize(("share", "num_images"), [(0.8, 1000), (0.3, 50)])
def test_interval__agrees_with_resampling_images(share, num_images):
    correct = np.arange(num_images) < share * num_images
    low, high = bootstrap_interval(correct, seed=0)
    numbers = np.random.default_rng(0)
    means = correct[numbers.integers(0, num_images, (10_000, num_images))].mean(1)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])), abs=1.5 / num_images)
    assert low < share < high
    assert bootstrap_interval(correct, seed=0) == (low, high)
    narrow = bootstrap_interval(correct, seed=0, level=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_interval__refuses_an_empty_array():
    with pytest.raises(ValueError, match="no images to resample"):
        bootstrap_interval(np.array([]), seed=0)


def test_confusion_matrix__agrees_with_scikit_learn():
    logits, labels = scores(400, 9)
    found = confusion_matrix(labels, logits.argmax(1), 9)
    np.testing.assert_array_equal(found, sklearn_metrics.confusion_matrix(labels, logits.argmax(1), labels=range(9)))


@pytest.mark.parametrize("num_classes", [2, 10, 40, 200])
def test_plot__is_drawn_for_any_number_of_classes(num_classes, tmp_path):
    logits, labels = scores(1000, num_classes)
    matrix = confusion_matrix(labels, logits.argmax(1), num_classes)
    names = [f"class {index} with a name that is far too long to show" for index in range(num_classes)]
    draw_confusion_matrix(matrix, names, tmp_path / "confusion.png", "accuracy 0.5")
    with Image.open(tmp_path / "confusion.png") as picture:
        assert min(picture.size) > 400
        assert max(picture.size) < 2000
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    with pytest.raises(ValueError, match="for the class names"):
        draw_confusion_matrix(matrix, names[1:], tmp_path / "confusion.png")


def test_results__have_the_number_of_images_and_an_interval_for_accuracies():
    logits = np.random.default_rng(0).normal(size=(200, 8))
    labels = logits.argmax(axis=1)
    labels[:50] = (labels[:50] + 1) % 8
    results = {entry["metric"]: entry for entry in classification_results(logits, labels, "fine-tuned", seed=0)}
    assert results["accuracy"]["value"] == 0.75
    low, high = results["accuracy"]["interval"]
    assert 0.68 < low < 0.75 < high < 0.82
    assert results["top5_accuracy"]["value"] > 0.75
    assert results["macro_f1"]["interval"] is None
    assert {(entry["name"], entry["n"]) for entry in results.values()} == {("fine-tuned", 200)}

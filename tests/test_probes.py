"""Probes on frozen features: agreement with scikit-learn, selection of hyperparameters, and feature quality."""

import numpy as np
import pytest
import torch
from fashion import fashion_pixels
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from evaluation.attentive_probe import fit_attentive
from evaluation.folds import validation_folds
from evaluation.linear_probe import (
    fit_linear,
    fit_logistic,
    fit_logistic_at,
    solve_logistic,
    statistics,
    train_by_sgd,
)
from evaluation.quality import feature_std, rankme


def accuracy(model, features: torch.Tensor, labels: torch.Tensor) -> float:
    return (model(features).argmax(1) == labels).double().mean().item()


@pytest.mark.parametrize("c", [1e-3, 1e-2])
def test_logistic__agrees_with_scikit_learn_to_five_digits(c):
    features, labels = fashion_pixels("train", 1000)
    features = features.double()
    mean, scale = statistics(features)
    weight, bias = solve_logistic((features - mean) * scale, labels, 10, c, tolerance=1e-11)
    standardized = StandardScaler().fit_transform(features)
    theirs = LogisticRegression(C=c, solver="newton-cg", tol=1e-12, max_iter=5000).fit(
        (features - mean) * scale, labels
    )
    np.testing.assert_allclose(weight.T, theirs.coef_, rtol=0, atol=5e-6)
    # The intercepts of all classes may move together; their differences count.
    np.testing.assert_allclose(bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), rtol=0, atol=5e-6)
    is_used = scale < 100  # nearly black corners: scikit-learn has no epsilon below the root
    np.testing.assert_allclose(((features - mean) * scale)[:, is_used], standardized[:, is_used], rtol=1e-2, atol=1e-3)


def test_logistic__in_single_precision_has_the_predictions_of_scikit_learn():
    (train, labels), (test, truth) = fashion_pixels("train", 2000), fashion_pixels("test", 1000)
    ours = fit_logistic_at(train, labels, 10, 1e-2)
    mean, scale = statistics(train)
    theirs = LogisticRegression(C=1e-2, max_iter=5000).fit((train - mean) * scale, labels)
    expected = theirs.predict((test - mean) * scale)
    assert (ours(test).argmax(1).numpy() == expected).mean() >= 0.997
    assert accuracy(ours, test, truth) == pytest.approx((expected == truth.numpy()).mean(), abs=0.0025)


def test_linear__reaches_the_accuracy_of_the_unregularized_optimum():
    (train, labels), (test, truth) = fashion_pixels("train", 2500), fashion_pixels("test", 1000)
    features, queries = train[:, ::7], test[:, ::7]  # 28 channels: not separable, so there is an optimum
    mean, scale = statistics(features)
    theirs = LogisticRegression(C=1e6, max_iter=5000).fit((features - mean) * scale, labels)
    expected = theirs.score((queries - mean) * scale, truth)
    assert accuracy(fit_linear(features, labels, 10, seed=0), queries, truth) == pytest.approx(expected, abs=0.015)


def test_sgd__trains_learning_rates_in_parallel_like_each_one_alone():
    features, labels = fashion_pixels("train", 300)
    together = train_by_sgd(features, labels, 10, [1e-3, 1e-1], seed=3)
    alone = train_by_sgd(features, labels, 10, [1e-1], seed=3)
    torch.testing.assert_close(together[1][0], alone[0][0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0][0], together[1][0], atol=1e-2)


@pytest.mark.parametrize("fit", [fit_linear, fit_logistic])
def test_probes__are_invariant_to_the_scale_of_channels(fit):
    (train, labels), (test, truth) = fashion_pixels("train", 300), fashion_pixels("test", 300)
    used = train.std(0) > 0.05
    train, test = train[:, used], test[:, used]
    scales = torch.logspace(-1, 3, train.shape[1])
    plain, scaled = fit(train, labels, 10, seed=0), fit(train * scales + 5, labels, 10, seed=0)
    agree = (plain(test).argmax(1) == scaled(test * scales + 5).argmax(1)).double().mean()
    assert agree >= 0.98
    assert accuracy(scaled, test * scales + 5, truth) > 0.7


@pytest.mark.parametrize("fit", [fit_linear, fit_logistic])
def test_probes__handle_one_image_per_class_and_divergence(fit):
    features, labels = fashion_pixels("train", 200)
    first = torch.stack([(labels == label).nonzero()[0, 0] for label in range(10)])
    few = fit(features[first], labels[first], 10, seed=0)
    assert few.validation_accuracy is None
    assert accuracy(few, features[first], labels[first]) == 1
    huge = fit(features, labels, 10, seed=0)
    assert torch.isfinite(huge(features)).all()


def test_folds__validate_each_image_once_and_keep_every_class_for_training():
    labels = torch.tensor([0] * 10 + [1] * 3 + [2])
    folds = validation_folds(labels, seed=0)
    validated = torch.cat([validation for _, validation in folds])
    assert sorted(validated.tolist()) == list(range(13))  # the only image of class 2 is never validated
    for train, validation in folds:
        assert set(labels[train].tolist()) == {0, 1, 2}
        assert not set(train.tolist()) & set(validation.tolist())
    assert validation_folds(torch.arange(4), seed=0) == []
    assert len(validation_folds(torch.arange(2500) % 5, seed=0)) == 1


def test_attentive__finds_the_only_informative_patch():
    generator = torch.Generator().manual_seed(0)
    num_images, num_patches, width = 600, 16, 64
    patches = torch.randn(num_images, num_patches, width, generator=generator)
    labels = torch.arange(num_images) % 3
    position = torch.randint(num_patches, (num_images,), generator=generator)
    signal = torch.zeros(num_images, width)
    signal[:, 0] = 12.0  # marks the informative patch
    signal[torch.arange(num_images), 1 + labels] = 6.0
    patches[torch.arange(num_images), position] += signal
    train, test = slice(0, 450), slice(450, None)
    probe = fit_attentive(patches[train].half(), labels[train], 3, seed=0)
    from_mean = fit_logistic(patches[train].mean(1), labels[train], 3, seed=0)
    attentive = (probe(patches[test].half()).argmax(1) == labels[test]).double().mean()
    assert attentive > 0.97
    assert attentive > accuracy(from_mean, patches[test].mean(1), labels[test]) + 0.1
    attention = probe.pooling.attention(patches[test])
    torch.testing.assert_close(attention.sum(2), torch.ones_like(attention.sum(2)))
    assert (attention[:, 0].argmax(1) == position[test]).double().mean() > 0.9


def test_probes__do_not_change_the_global_random_state():
    features, labels = fashion_pixels("train", 100)
    before = torch.get_rng_state()
    fit_linear(features, labels, 10, seed=0)
    fit_logistic(features, labels, 10, seed=0)
    fit_attentive(features.view(100, 4, 49), labels, 10, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_rankme__counts_directions():
    generator = torch.Generator().manual_seed(0)
    orthogonal = torch.linalg.qr(torch.randn(64, 8, generator=generator)).Q
    assert rankme(orthogonal) == pytest.approx(8, rel=1e-3)
    assert rankme(orthogonal[:, :1] @ torch.ones(1, 8)) == pytest.approx(1, rel=1e-3)


def test_feature_std__is_zero_if_collapsed_and_one_if_spread():
    spread = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))
    assert feature_std(spread) == pytest.approx(1, abs=0.02)
    assert feature_std(torch.ones(10, 32)) == pytest.approx(0, abs=1e-6)

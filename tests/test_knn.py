"""Weighted kNN: the votes of scikit-learn, and selection of k on training images."""

import numpy as np
import pytest
import torch
from fashion import fashion_pixels
from sklearn.neighbors import KNeighborsClassifier

from evaluation.knn import Knn, fit_knn, neighbors


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.07), (20, 0.07), (200, 0.1)])
def test_knn__agrees_with_scikit_learn(k, temperature):
    (bank, labels), (queries, _) = fashion_pixels("train", 1000), fashion_pixels("test", 400)
    ours = Knn(torch.nn.functional.normalize(bank, dim=1), labels, 10, k, temperature, None)(queries)
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / temperature))
    expected = theirs.fit(bank, labels).predict_proba(queries)
    ours = ours / ours.sum(1, keepdim=True)
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-4)
    assert (ours.argmax(1).numpy() == expected.argmax(1)).mean() >= 0.9975  # one tie may fall either way


def test_neighbors__exclude_the_query_itself():
    bank = torch.nn.functional.normalize(fashion_pixels("train", 50)[0], dim=1)
    own = torch.arange(50)
    _, index = neighbors(bank, bank, 5, own)
    assert (index != own[:, None]).all()
    assert torch.equal(neighbors(bank, bank, 1)[1][:, 0], own)


def test_fit_knn__selects_many_neighbors_for_noisy_labels_only():
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(4, 16, generator=generator)
    labels = torch.arange(400) % 4
    features = centers[labels] + 0.05 * torch.randn(400, 16, generator=generator)
    assert fit_knn(features, labels, 4, seed=0).validation_accuracy == 1.0
    noisy = torch.where(
        torch.rand(400, generator=generator) < 0.4, torch.randint(4, (400,), generator=generator), labels
    )
    fitted = fit_knn(features, noisy, 4, seed=0)
    assert fitted.k >= 20
    assert fitted.validation_accuracy < 0.8
    assert (fitted(centers).argmax(1) == torch.arange(4)).all()


def test_fit_knn__uses_the_defaults_for_one_image_per_class():
    fitted = fit_knn(torch.eye(3), torch.arange(3), 3, seed=0)
    assert (fitted.k, fitted.validation_accuracy) == (1, None)
    assert torch.equal(fitted(torch.eye(3)).argmax(1), torch.arange(3))

"""Weighted k-nearest-neighbor classification on frozen features.

Papers: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv:1805.01978,
Sec. 3.4; Caron et al. 2021 (DINO), arXiv:2104.14294, Sec. 4.1.
Differs: k and the temperature are selected on the training images by leave-one-out, where the papers report the best
on the test images; k = 1 and 5 are tried too, for few labels.
Shapes: N training images (the bank), Q queries, D feature dimension, K classes, k neighbors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data.seeds import seeded_generator

NUM_NEIGHBORS = (1, 5, 10, 20, 100, 200)
TEMPERATURES = (0.07, 0.1)  # Wu et al. and DINO; the code of SimSiam and MoCo
_DEFAULT_TEMPERATURE = 0.07
_NUM_SELECTION_QUERIES = 2_000
_CHUNK = 1_024  # queries whose similarities to the whole bank are in memory at once


@dataclass(frozen=True)
class Knn:
    """A weighted kNN classifier with a bank of normalized features (N, D) and their labels (N,)."""

    bank: Tensor
    labels: Tensor
    num_classes: int
    k: int
    temperature: float
    validation_accuracy: float | None  # leave-one-out, on training images; None if nothing could be selected

    def __call__(self, queries: Tensor) -> Tensor:
        """Return the votes (Q, K) for queries (Q, D)."""
        similarity, index = neighbors(self.bank, queries, self.k)
        return weighted_votes(similarity, self.labels[index], self.num_classes, self.temperature)


def fit_knn(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> Knn:
    """Build a classifier with the k and temperature that have the best leave-one-out accuracy."""
    bank = F.normalize(features, dim=1)
    return Knn(bank, labels, num_classes, *_select(bank, labels, num_classes, seed))


def neighbors(bank: Tensor, queries: Tensor, k: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the k largest cosine similarities (Q, k), sorted, and their indices in the normalized `bank` (Q, k).

    `own` (Q,) is the index of each query in the bank, to exclude it from its own neighbors.
    """
    found = []
    for start in range(0, len(queries), _CHUNK):
        chunk = slice(start, start + _CHUNK)
        similarity = F.normalize(queries[chunk], dim=1) @ bank.T  # (chunk, N)
        if own is not None:
            similarity.scatter_(1, own[chunk, None], -torch.inf)
        found.append(similarity.topk(k, dim=1))
    similarities, indices = zip(*found, strict=True)
    return torch.cat(similarities), torch.cat(indices)


def weighted_votes(similarity: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Return the sum of exp(similarity / temperature) per class (Q, K), given similarities and labels (Q, k)."""
    weights = ((similarity - similarity[:, :1]) / temperature).exp()  # relative to the best, to avoid overflow
    return weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels, weights)


def _select(bank: Tensor, labels: Tensor, num_classes: int, seed: int) -> tuple[int, float, float | None]:
    order = torch.randperm(len(bank), generator=seeded_generator(seed, "knn"))
    own = order[:_NUM_SELECTION_QUERIES].to(bank.device)
    possible = [k for k in NUM_NEIGHBORS if k < len(bank)]  # each image is left out of its own neighbors
    similarity, index = neighbors(bank, bank[own], max(possible), own)
    accuracies = {}
    for k in possible:
        for temperature in TEMPERATURES:
            votes = weighted_votes(similarity[:, :k], labels[index[:, :k]], num_classes, temperature)
            accuracies[k, temperature] = (votes.argmax(1) == labels[own]).float().mean().item()
    best = max(accuracies.values())
    if best == 0:  # one image per class: no image has a neighbor of its own class
        return 1, _DEFAULT_TEMPERATURE, None
    k, temperature = next(setting for setting, accuracy in accuracies.items() if accuracy == best)
    return k, temperature, best

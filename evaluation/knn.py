"""Weighted nearest neighbors on frozen features: nothing is trained, so the distances themselves are judged.

Papers: Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", arXiv:1805.01978,
Sec. 3.4; Caron et al. 2021 (DINO), arXiv:2104.14294, Sec. 4.1.
Differs: k and the temperature are chosen on the training images, each left out of its own neighbors, where the papers
report the best on the test images; k = 1 and 5 are tried too, for few labels.
Shapes: N training images (the bank), Q queries, D width, K classes, k neighbors.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data.seeds import seeded_generator

NUM_NEIGHBORS = (1, 5, 10, 20, 100, 200)
TEMPERATURES = (0.07, 0.1)  # of Wu et al. and DINO; of the SimSiam and MoCo code
_DEFAULT_TEMPERATURE = 0.07
_NUM_QUERIES_TO_CHOOSE = 2_000
_CHUNK = 1_024  # queries whose similarities to the whole bank are held at once


@dataclass(frozen=True)
class Knn:
    """A bank of features (N, D) with labels (N,), and how its nearest members vote."""

    bank: Tensor
    labels: Tensor
    num_classes: int
    k: int
    temperature: float
    chosen_at: float | None  # accuracy on the training images that k and the temperature were chosen on, if any

    def __call__(self, queries: Tensor) -> Tensor:
        """(Q, D) -> votes (Q, K)."""
        similarity, index = neighbors(self.bank, queries, self.k)
        return _votes(similarity, self.labels[index], self.num_classes, self.temperature)


def fit_knn(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> Knn:
    """A Knn with the k and the temperature that classify best a part of these features, each without itself."""
    bank = F.normalize(features, dim=1)
    return Knn(bank, labels, num_classes, *_choose(bank, labels, num_classes, seed))


def neighbors(bank: Tensor, queries: Tensor, k: int, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Cosine similarities (Q, k) of the nearest, best first, and where they are in the normalized `bank` (Q, k).

    `own` (Q,): the place in the bank of each query itself, which is then not its neighbor.
    """
    parts = [_neighbors(bank, chunk, k, own_chunk) for chunk, own_chunk in _chunks(queries, own)]
    similarity, index = zip(*parts, strict=True)
    return torch.cat(similarity), torch.cat(index)


def _chunks(queries: Tensor, own: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    for start in range(0, len(queries), _CHUNK):
        part = slice(start, start + _CHUNK)
        yield queries[part], None if own is None else own[part]


def _neighbors(bank: Tensor, queries: Tensor, k: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    similarity = F.normalize(queries, dim=1) @ bank.T  # (Q, N)
    if own is not None:
        similarity.scatter_(1, own[:, None], -torch.inf)
    return similarity.topk(k, dim=1)


def _votes(similarity: Tensor, labels: Tensor, num_classes: int, temperature: float) -> Tensor:
    """Similarities and labels (Q, k) -> sum of exp(similarity / temperature) for each class (Q, K)."""
    weights = ((similarity - similarity[:, :1]) / temperature).exp()  # less the best one: the same order, no overflow
    return weights.new_zeros(len(weights), num_classes).scatter_add_(1, labels, weights)


def _choose(bank: Tensor, labels: Tensor, num_classes: int, seed: int) -> tuple[int, float, float | None]:
    order = torch.randperm(len(bank), generator=seeded_generator(seed, "knn"))
    own = order[:_NUM_QUERIES_TO_CHOOSE].to(bank.device)
    possible = [k for k in NUM_NEIGHBORS if k < len(bank)]  # one to spare for the image that is left out
    similarity, index = neighbors(bank, bank[own], max(possible), own)
    accuracies = {}
    for k in possible:
        for temperature in TEMPERATURES:
            votes = _votes(similarity[:, :k], labels[index[:, :k]], num_classes, temperature)
            accuracies[k, temperature] = (votes.argmax(1) == labels[own]).float().mean().item()
    best = max(accuracies.values())
    if best == 0:  # one image for each class: none has a neighbor of its own class
        return 1, _DEFAULT_TEMPERATURE, None
    k, temperature = next(setting for setting, accuracy in accuracies.items() if accuracy == best)
    return k, temperature, best

"""Validation folds of the training images, on which probes select their hyperparameters instead of the test images.

Shapes: N training images.
"""

import torch
from torch import Tensor

from data.seeds import seeded_generator

_NUM_FOLDS = 5
_CROSS_VALIDATED_UP_TO = 2_000  # images; with more, a single fold is enough


def validation_folds(labels: Tensor, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of indices (train, validation); every class occurs in each training part.

    There are five folds for few images, one for many, and none if no class has two images. The only image of a class
    is never in a validation part.
    """
    fold = torch.full(labels.shape, -1)  # (N,)
    generator, classes = seeded_generator(seed, "folds"), labels.cpu()
    for label in classes.unique():
        members = (classes == label).nonzero()[:, 0]
        first = int(torch.randint(_NUM_FOLDS, (), generator=generator))  # spreads small classes over all folds
        if len(members) > 1:
            members = members[torch.randperm(len(members), generator=generator)]
            fold[members] = (torch.arange(len(members)) + first) % _NUM_FOLDS
    num_folds = _NUM_FOLDS if len(labels) <= _CROSS_VALIDATED_UP_TO else 1
    return [
        ((fold != number).nonzero()[:, 0].to(labels.device), (fold == number).nonzero()[:, 0].to(labels.device))
        for number in range(num_folds)
        if (fold == number).any()
    ]

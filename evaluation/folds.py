"""Validation folds, on which probes select their hyperparameters instead of the test images, and training batches.

Shapes: N training images.
"""

import math
from collections.abc import Iterator

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


def shuffled_batches(
    images: Tensor, batch_size: int, num_epochs: int, min_steps: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, float]]:
    """Yield the indices of each batch of `images`, and the factor of the learning rate, which falls as a cosine."""
    steps_per_epoch = math.ceil(len(images) / batch_size)
    num_steps = max(min_steps, num_epochs * steps_per_epoch)
    for step in range(num_steps):
        if step % steps_per_epoch == 0:
            batches = torch.randperm(len(images), generator=generator).to(images.device).split(batch_size)
        yield batches[step % steps_per_epoch], 0.5 + 0.5 * math.cos(math.pi * step / num_steps)

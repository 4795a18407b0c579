"""Parts of the training images to choose a probe's settings on, so that the test images decide nothing.

Shapes: N training images.
"""

import torch
from torch import Tensor

from data.seeds import seeded_generator

_NUM_FOLDS = 5
_CROSS_VALIDATED_UP_TO = 2_000  # images; of more, one fold is enough to choose on


def folds_to_choose_on(labels: Tensor, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs of indices (fitted on, judged on); every class is among those fitted on.

    Five pairs where there are few images, which judge each image once unless it is the only one of its class; one pair
    where there are many; none where no class has two images.
    """
    fold = torch.full(labels.shape, -1)  # (N,)
    generator, classes = seeded_generator(seed, "folds"), labels.cpu()
    for label in classes.unique():
        members = (classes == label).nonzero()[:, 0]
        first = int(torch.randint(_NUM_FOLDS, (), generator=generator))  # else small classes would all miss the last
        if len(members) > 1:
            members = members[torch.randperm(len(members), generator=generator)]
            fold[members] = (torch.arange(len(members)) + first) % _NUM_FOLDS
    wanted = range(_NUM_FOLDS if len(labels) <= _CROSS_VALIDATED_UP_TO else 1)
    return [
        ((fold != number).nonzero()[:, 0].to(labels.device), (fold == number).nonzero()[:, 0].to(labels.device))
        for number in wanted
        if (fold == number).any()
    ]

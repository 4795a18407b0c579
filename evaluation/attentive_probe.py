"""A probe that chooses where to look: learned queries attend to frozen patches, a linear layer reads what they found.

Paper: El-Nouby et al. 2024 (AIM), arXiv:2401.08541, Sec. 3.2: cross-attention pooling in front of a linear layer, on
normalized patches. Features of masked image modeling are local, and their mean drowns what one patch knows.
Differs: one query for each head, and no key and value projections: one folds into the query, the other into the linear
layer, which gives the same functions at a fraction of the cost.
Shapes: N training images, B of a batch, P patches, D width, K classes, A heads.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.seeds import seeded_generator
from evaluation.folds import folds_to_choose_on

LEARNING_RATES = (3e-3, 1e-2, 3e-2)
_DEFAULT_LEARNING_RATE = 1e-2
_HEAD_WIDTH, _BATCH_SIZE, _NUM_EPOCHS, _MIN_STEPS, _WEIGHT_DECAY = 64, 64, 20, 300, 0.1
_EPS = 1e-6


class AttentivePooling(nn.Module):
    """(B, P, D) -> (B, K)."""

    def __init__(self, mean: Tensor, scale: Tensor, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        width = len(mean)
        self.mean, self.scale = mean, scale  # (D,)
        # Small: it begins near the mean of the patches. Not zero: equal queries would stay equal.
        queries = 0.1 * torch.randn(width, max(1, width // _HEAD_WIDTH), generator=generator)
        self.queries = nn.Parameter(queries.to(mean.device))  # (D, A)
        self.weight = nn.Parameter(mean.new_zeros(self.queries.shape[1] * width, num_classes))
        self.bias = nn.Parameter(mean.new_zeros(num_classes))

    def attention(self, patches: Tensor) -> Tensor:
        """(B, P, D) -> (B, A, P), each row of which sums to 1."""
        return (self._normalized(patches) @ self.queries / math.sqrt(patches.shape[2])).softmax(1).transpose(1, 2)

    def forward(self, patches: Tensor) -> Tensor:
        found = self.attention(patches) @ self._normalized(patches)  # (B, A, D)
        return found.flatten(1) @ self.weight + self.bias

    def _normalized(self, patches: Tensor) -> Tensor:
        return (patches.float() - self.mean) * self.scale


@dataclass(frozen=True)
class AttentiveClassifier:
    """A trained probe, and the learning rate that was chosen for it."""

    pooling: AttentivePooling
    setting: float
    chosen_at: float | None

    @torch.no_grad()
    def __call__(self, patches: Tensor) -> Tensor:
        """(N, P, D) -> logits (N, K)."""
        return torch.cat([self.pooling(part) for part in patches.split(_BATCH_SIZE)])


def fit_attentive(patches: Tensor, labels: Tensor, num_classes: int, seed: int) -> AttentiveClassifier:
    """The probe with the learning rate that does best on a part of the training patches (N, P, D)."""
    folds = folds_to_choose_on(labels, seed)[:1]
    setting, chosen_at = _DEFAULT_LEARNING_RATE, None
    for fitted_on, judged_on in folds:
        scores = {}
        for learning_rate in LEARNING_RATES:
            trained = _train(patches[fitted_on], labels[fitted_on], num_classes, learning_rate, seed)
            logits = AttentiveClassifier(trained, learning_rate, None)(patches[judged_on])
            scores[learning_rate] = (logits.argmax(1) == labels[judged_on]).float().mean().item()
        setting = max(scores, key=lambda rate: scores[rate])
        chosen_at = scores[setting]
    return AttentiveClassifier(_train(patches, labels, num_classes, setting, seed), setting, chosen_at)


def _train(patches: Tensor, labels: Tensor, num_classes: int, learning_rate: float, seed: int) -> AttentivePooling:
    generator, steps_per_epoch = seeded_generator(seed, "attentive probe"), math.ceil(len(patches) / _BATCH_SIZE)
    probe = AttentivePooling(*_statistics(patches), num_classes, generator)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=learning_rate, weight_decay=_WEIGHT_DECAY)
    num_steps = max(_MIN_STEPS, _NUM_EPOCHS * steps_per_epoch)
    for step in range(num_steps):
        if step % steps_per_epoch == 0:
            batches = torch.randperm(len(patches), generator=generator).to(patches.device).split(_BATCH_SIZE)
        batch = batches[step % steps_per_epoch]
        optimizer.param_groups[0]["lr"] = learning_rate * (0.5 + 0.5 * math.cos(math.pi * step / num_steps))
        with torch.enable_grad():
            loss = F.cross_entropy(probe(patches[batch]), labels[batch])
            gradients = torch.autograd.grad(loss, list(probe.parameters()))
        for parameter, gradient in zip(probe.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return probe.requires_grad_(False)


def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of each channel (D,), summed image by image: half precision would overflow."""
    count = patches.shape[0] * patches.shape[1]
    mean = torch.stack([part.float().sum((0, 1)) for part in patches.split(1024)]).sum(0) / count
    squares = torch.stack([(part.float() - mean).square().sum((0, 1)) for part in patches.split(1024)]).sum(0)
    return mean, (squares / count + _EPS).rsqrt()

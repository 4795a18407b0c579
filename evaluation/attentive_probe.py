"""Attentive probe: learned queries pool the frozen patch features, and a linear layer classifies the result.

Paper: El-Nouby et al. 2024 (AIM), arXiv:2401.08541, Sec. 3.2: cross-attention pooling in front of a linear layer, on
normalized patches. Features of masked image modeling are local, so averaging the patches loses information.
Differs: one query per head, without key and value projections. Merged into the query and the linear layer, they give
the same functions at a fraction of the cost.
Shapes: N training images, B batch size, P patches, D feature dimension, K classes, A heads.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.seeds import seeded_generator
from evaluation.folds import shuffled_batches, validation_folds

LEARNING_RATES = (3e-3, 1e-2, 3e-2)
_DEFAULT_LEARNING_RATE = 1e-2
_HEAD_WIDTH, _BATCH_SIZE, _NUM_EPOCHS, _MIN_STEPS, _WEIGHT_DECAY = 64, 64, 20, 300, 0.1
_EPS = 1e-6


class AttentivePooling(nn.Module):
    """Attention pooling and a linear classifier: (B, P, D) -> (B, K)."""

    def __init__(self, mean: Tensor, scale: Tensor, num_classes: int, generator: torch.Generator) -> None:
        super().__init__()
        width = len(mean)
        self.mean, self.scale = mean, scale  # (D,)
        # Small, to start near the mean of the patches, but not zero: identical queries would stay identical.
        queries = 0.1 * torch.randn(width, max(1, width // _HEAD_WIDTH), generator=generator)
        self.queries = nn.Parameter(queries.to(mean.device))  # (D, A)
        self.weight = nn.Parameter(mean.new_zeros(self.queries.shape[1] * width, num_classes))
        self.bias = nn.Parameter(mean.new_zeros(num_classes))

    def attention(self, patches: Tensor) -> Tensor:
        """Return the attention weights (B, A, P) of patches (B, P, D); they sum to 1 over the patches."""
        return (self._normalized(patches) @ self.queries / math.sqrt(patches.shape[2])).softmax(1).transpose(1, 2)

    def forward(self, patches: Tensor) -> Tensor:
        pooled = self.attention(patches) @ self._normalized(patches)  # (B, A, D)
        return pooled.flatten(1) @ self.weight + self.bias

    def _normalized(self, patches: Tensor) -> Tensor:
        return (patches.float() - self.mean) * self.scale


@dataclass(frozen=True)
class AttentiveClassifier:
    """A trained probe with the learning rate that was selected and its accuracy on the validation fold."""

    pooling: AttentivePooling
    setting: float
    validation_accuracy: float | None

    @torch.no_grad()
    def __call__(self, patches: Tensor) -> Tensor:
        """Return the logits (N, K) of patches (N, P, D)."""
        return torch.cat([self.pooling(part) for part in patches.split(_BATCH_SIZE)])


def fit_attentive(patches: Tensor, labels: Tensor, num_classes: int, seed: int) -> AttentiveClassifier:
    """Train a probe on patches (N, P, D) with the learning rate that is best on a validation fold of them."""
    setting, validation_accuracy = _DEFAULT_LEARNING_RATE, None
    for train, validation in validation_folds(labels, seed)[:1]:
        scores = {}
        for learning_rate in LEARNING_RATES:
            pooling = _train(patches[train], labels[train], num_classes, learning_rate, seed)
            logits = AttentiveClassifier(pooling, learning_rate, None)(patches[validation])
            scores[learning_rate] = (logits.argmax(1) == labels[validation]).float().mean().item()
        setting = max(scores, key=lambda rate: scores[rate])
        validation_accuracy = scores[setting]
    return AttentiveClassifier(_train(patches, labels, num_classes, setting, seed), setting, validation_accuracy)


def _train(patches: Tensor, labels: Tensor, num_classes: int, learning_rate: float, seed: int) -> AttentivePooling:
    generator = seeded_generator(seed, "attentive probe")
    probe = AttentivePooling(*_statistics(patches), num_classes, generator)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=learning_rate, weight_decay=_WEIGHT_DECAY)
    for batch, factor in shuffled_batches(patches, _BATCH_SIZE, _NUM_EPOCHS, _MIN_STEPS, generator):
        optimizer.param_groups[0]["lr"] = learning_rate * factor
        with torch.enable_grad():
            loss = F.cross_entropy(probe(patches[batch]), labels[batch])
            gradients = torch.autograd.grad(loss, list(probe.parameters()))
        for parameter, gradient in zip(probe.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
    return probe.requires_grad_(False)


def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and 1 / std of each channel (D,), summed in float32 because half precision would overflow."""
    count = patches.shape[0] * patches.shape[1]
    mean = torch.stack([part.float().sum((0, 1)) for part in patches.split(1024)]).sum(0) / count
    squares = torch.stack([(part.float() - mean).square().sum((0, 1)) for part in patches.split(1024)]).sum(0)
    return mean, (squares / count + _EPS).rsqrt()

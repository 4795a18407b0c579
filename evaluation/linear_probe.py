"""Linear classifiers on frozen features: SGD with a sweep of learning rates, and logistic regression by L-BFGS.

Papers: He et al. 2021 (MAE), arXiv:2111.06377, App. A.1: a batch norm without affine parameters before the linear
layer, without which features of masked image modeling look worse than they are: their channels differ in scale.
Differs: the norm's statistics are those of all training features, which its running averages only estimate; features
are computed once, from the evaluation transform, and not from new crops each epoch; SGD with a sweep of learning rates
chosen on a part of the training images takes the place of LARS with one rate for batches of 16,384.
Shapes: N training images, B of a batch, D width, K classes, R learning rates.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data.seeds import seeded_generator
from evaluation.folds import folds_to_choose_on

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
INVERSE_REGULARIZATIONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C, on standardized features
_DEFAULT_LEARNING_RATE, _DEFAULT_C = 1e-2, 1e-2  # where a class has one image, and nothing can be chosen
_NUM_EPOCHS, _BATCH_SIZE, _MOMENTUM = 90, 256, 0.9
_MIN_STEPS = 1_000
_EPS = 1e-6  # MAE's
_TOLERANCE, _TOLERANCE_TO_CHOOSE = 1e-4, 1e-3  # largest component of the gradient; the first is scikit-learn's too
_NOTHING = 1e-12  # probabilities below are 0: numbers that float32 can barely hold take a CPU a hundred times as long


@dataclass(frozen=True)
class LinearClassifier:
    """(x - mean) * scale @ weight + bias: mean and scale (D,), weight (D, K), bias (K,)."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    setting: float  # the learning rate, or the C, that was chosen
    chosen_at: float | None  # accuracy on the part of the training images that it was chosen on, if there was one

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) -> logits (N, K)."""
        return (features - self.mean) * self.scale @ self.weight + self.bias


def fit_linear(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> LinearClassifier:
    """A batch norm without affine parameters and a linear layer, with the learning rate that does best."""

    def fit(x: Tensor, y: Tensor, learning_rates: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        return train_by_sgd(x, y, num_classes, learning_rates, seed)

    return _choose_and_fit(features, labels, seed, LEARNING_RATES, _DEFAULT_LEARNING_RATE, fit)


def fit_logistic(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> LinearClassifier:
    """Logistic regression on standardized features, with the L2 regularization that does best."""

    def fit(x: Tensor, y: Tensor, settings: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        fitted: list[tuple[Tensor, Tensor]] = []
        tolerance = _TOLERANCE if len(settings) == 1 else _TOLERANCE_TO_CHOOSE
        for inverse_regularization in settings:
            start = fitted[-1] if fitted else None  # the last one's solution is near
            fitted.append(solve_logistic(x, y, num_classes, inverse_regularization, start, tolerance))
        return fitted

    return _choose_and_fit(features, labels, seed, INVERSE_REGULARIZATIONS, _DEFAULT_C, fit)


def fit_logistic_at(features: Tensor, labels: Tensor, num_classes: int, setting: float) -> LinearClassifier:
    """The same with a given C, where nothing is to be chosen."""
    mean, scale = _statistics(features)
    weight, bias = solve_logistic((features - mean) * scale, labels, num_classes, setting)
    return LinearClassifier(mean, scale, weight, bias, setting, None)


def train_by_sgd(
    x: Tensor, labels: Tensor, num_classes: int, learning_rates: Sequence[float], seed: int
) -> list[tuple[Tensor, Tensor]]:
    """Weight (D, K) and bias (K,) for each learning rate, all trained side by side on the same batches."""
    num_rates = len(learning_rates)
    rates = x.new_tensor(learning_rates).repeat_interleave(num_classes)  # (R*K,)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)  # (N, D + 1): the bias is one more weight
    weight = x.new_zeros(x.shape[1], num_rates * num_classes)  # (D + 1, R*K)
    velocity, targets = torch.zeros_like(weight), F.one_hot(labels, num_classes).to(x.dtype)[:, None]  # (N, 1, K)
    generator, steps_per_epoch = seeded_generator(seed, "linear probe"), math.ceil(len(x) / _BATCH_SIZE)
    num_steps = max(_MIN_STEPS, _NUM_EPOCHS * steps_per_epoch)
    for step in range(num_steps):
        if step % steps_per_epoch == 0:
            order = torch.randperm(len(x), generator=generator).to(x.device)
            batches = order.split(_BATCH_SIZE)
        batch = batches[step % steps_per_epoch]
        probabilities = (x[batch] @ weight).view(len(batch), num_rates, num_classes).softmax(-1)  # (B, R, K)
        probabilities.masked_fill_(probabilities < _NOTHING, 0)
        error = (probabilities - targets[batch]).view(len(batch), -1)  # (B, R*K)
        velocity.mul_(_MOMENTUM).add_(x[batch].T @ error, alpha=1 / len(batch))
        weight -= rates * (0.5 + 0.5 * math.cos(math.pi * step / num_steps)) * velocity
    return [(each[:-1], each[-1]) for each in weight.split(num_classes, dim=1)]


def solve_logistic(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    inverse_regularization: float,
    start: tuple[Tensor, Tensor] | None = None,
    tolerance: float = _TOLERANCE,
) -> tuple[Tensor, Tensor]:
    """Weight (D, K) and bias (K,) that minimize C * (sum of cross entropies) + |weight|**2 / 2, as in scikit-learn."""
    weight, bias = start or (x.new_zeros(x.shape[1], num_classes), x.new_zeros(num_classes))
    weight, bias = (tensor.clone().requires_grad_() for tensor in (weight, bias))
    decay = 1 / (2 * inverse_regularization * len(x))
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=1_000,
        history_size=20,
        tolerance_grad=tolerance,
        tolerance_change=1e-5 * tolerance,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            value = F.cross_entropy(x @ weight + bias, labels) + decay * weight.square().sum()
            value.backward()
        return value

    optimizer.step(loss)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()


def _choose_and_fit(
    features: Tensor,
    labels: Tensor,
    seed: int,
    settings: Sequence[float],
    default: float,
    fit: Callable[[Tensor, Tensor, Sequence[float]], list[tuple[Tensor, Tensor]]],
) -> LinearClassifier:
    mean, scale = _statistics(features)
    correct, num_judged = torch.zeros(len(settings)), 0
    folds = folds_to_choose_on(labels, seed)
    for fitted_on, judged_on in folds:
        fold_mean, fold_scale = _statistics(features[fitted_on])
        num_judged += len(judged_on)
        x, judged = ((features[part] - fold_mean) * fold_scale for part in (fitted_on, judged_on))
        for number, (weight, bias) in enumerate(fit(x, labels[fitted_on], settings)):
            # A rate that is too large ends in NaN, whose argmax is class 0: no better than guessing.
            correct[number] += (torch.addmm(bias, judged, weight).argmax(1) == labels[judged_on]).sum().cpu()
    setting = settings[int(correct.argmax())] if folds else default
    ((weight, bias),) = fit((features - mean) * scale, labels, [setting])
    chosen_at = correct.max().item() / num_judged if folds else None
    return LinearClassifier(mean, scale, weight, bias, setting, chosen_at)


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation of each channel (D,)."""
    variance, mean = torch.var_mean(features, dim=0, correction=0)
    return mean, (variance + _EPS).rsqrt()

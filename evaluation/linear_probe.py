"""Linear classifiers on frozen features: SGD with a learning-rate sweep, and logistic regression with L-BFGS.

Papers: He et al. 2021 (MAE), arXiv:2111.06377, App. A.1: a batch norm without affine parameters before the linear
layer. Without it, features of masked image modeling are underrated, because their channels differ in scale.
Differs: the norm uses the exact statistics of the training features instead of running averages; features are computed
once, with the evaluation transform, instead of from new crops in each epoch; SGD with a learning rate selected on
validation folds replaces LARS with a fixed learning rate and a batch size of 16,384.
Shapes: N training images, B batch size, D feature dimension, K classes, R learning rates.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data.seeds import seeded_generator
from evaluation.folds import shuffled_batches, validation_folds

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
INVERSE_REGULARIZATIONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # scikit-learn's C, on standardized features
_DEFAULT_LEARNING_RATE, _DEFAULT_C = 1e-2, 1e-2  # if every class has one image, so that nothing can be selected
_NUM_EPOCHS, _BATCH_SIZE, _MOMENTUM = 90, 256, 0.9
_MIN_STEPS = 1_000
_EPS = 1e-6  # as in MAE
_TOLERANCE, _SELECTION_TOLERANCE = 1e-4, 1e-3  # largest gradient component; scikit-learn uses the first
_MIN_PROBABILITY = 1e-12  # smaller ones become 0: denormal numbers are about a hundred times slower on CPUs


@dataclass(frozen=True)
class LinearClassifier:
    """The function (x - mean) * scale @ weight + bias, with mean, scale (D,), weight (D, K) and bias (K,)."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    setting: float  # the selected learning rate or C
    validation_accuracy: float | None  # of this setting on the validation folds, if there are any

    def __call__(self, features: Tensor) -> Tensor:
        """Return the logits (N, K) of features (N, D)."""
        return (features - self.mean) * self.scale @ self.weight + self.bias


def fit_linear(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> LinearClassifier:
    """Train a linear layer on standardized features (N, D), with the best of several learning rates."""

    def fit(x: Tensor, y: Tensor, learning_rates: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        return train_by_sgd(x, y, num_classes, learning_rates, seed)

    return _select_and_fit(features, labels, seed, LEARNING_RATES, _DEFAULT_LEARNING_RATE, fit)


def fit_logistic(features: Tensor, labels: Tensor, num_classes: int, seed: int) -> LinearClassifier:
    """Fit a logistic regression on standardized features (N, D), with the best of several L2 regularizations."""

    def fit(x: Tensor, y: Tensor, settings: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        fitted: list[tuple[Tensor, Tensor]] = []
        tolerance = _TOLERANCE if len(settings) == 1 else _SELECTION_TOLERANCE
        for inverse_regularization in settings:
            start = fitted[-1] if fitted else None  # a nearby solution
            fitted.append(solve_logistic(x, y, num_classes, inverse_regularization, start, tolerance))
        return fitted

    return _select_and_fit(features, labels, seed, INVERSE_REGULARIZATIONS, _DEFAULT_C, fit)


def fit_logistic_at(features: Tensor, labels: Tensor, num_classes: int, setting: float) -> LinearClassifier:
    """Fit a logistic regression on standardized features (N, D) with C = `setting`."""
    mean, scale = statistics(features)
    weight, bias = solve_logistic((features - mean) * scale, labels, num_classes, setting)
    return LinearClassifier(mean, scale, weight, bias, setting, None)


def train_by_sgd(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    learning_rates: Sequence[float],
    seed: int,
    num_epochs: int = _NUM_EPOCHS,
) -> list[tuple[Tensor, Tensor]]:
    """Return a weight (D, K) and bias (K,) per learning rate, trained in parallel on the same batches."""
    num_rates = len(learning_rates)
    rates = x.new_tensor(learning_rates).repeat_interleave(num_classes)  # (R*K,)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)  # (N, D + 1), to train the bias as a weight
    weight = x.new_zeros(x.shape[1], num_rates * num_classes)  # (D + 1, R*K)
    velocity, targets = torch.zeros_like(weight), F.one_hot(labels, num_classes).to(x.dtype)[:, None]  # (N, 1, K)
    generator = seeded_generator(seed, "linear probe")
    for batch, factor in shuffled_batches(x, _BATCH_SIZE, num_epochs, _MIN_STEPS, generator):
        probabilities = (x[batch] @ weight).view(len(batch), num_rates, num_classes).softmax(-1)  # (B, R, K)
        probabilities.masked_fill_(probabilities < _MIN_PROBABILITY, 0)
        error = (probabilities - targets[batch]).view(len(batch), -1)  # (B, R*K)
        velocity.mul_(_MOMENTUM).add_(x[batch].T @ error, alpha=1 / len(batch))
        weight -= rates * factor * velocity
    return [(each[:-1], each[-1]) for each in weight.split(num_classes, dim=1)]


def solve_logistic(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    inverse_regularization: float,
    start: tuple[Tensor, Tensor] | None = None,
    tolerance: float = _TOLERANCE,
) -> tuple[Tensor, Tensor]:
    """Return the weight (D, K) and bias (K,) that minimize C * (sum of cross entropies) + |weight|**2 / 2."""
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


def _select_and_fit(
    features: Tensor,
    labels: Tensor,
    seed: int,
    candidates: Sequence[float],
    default: float,
    fit: Callable[[Tensor, Tensor, Sequence[float]], list[tuple[Tensor, Tensor]]],
) -> LinearClassifier:
    mean, scale = statistics(features)
    correct, num_predictions = torch.zeros(len(candidates)), 0
    folds = validation_folds(labels, seed)
    for train, validation in folds:
        fold_mean, fold_scale = statistics(features[train])
        num_predictions += len(validation)
        x, held_out = ((features[indices] - fold_mean) * fold_scale for indices in (train, validation))
        for number, (weight, bias) in enumerate(fit(x, labels[train], candidates)):
            # A learning rate that is too large ends in NaN, whose argmax is class 0: chance accuracy.
            correct[number] += (torch.addmm(bias, held_out, weight).argmax(1) == labels[validation]).sum().cpu()
    setting = candidates[int(correct.argmax())] if folds else default
    ((weight, bias),) = fit((features - mean) * scale, labels, [setting])
    validation_accuracy = correct.max().item() / num_predictions if folds else None
    return LinearClassifier(mean, scale, weight, bias, setting, validation_accuracy)


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and 1 / std of each channel (D,)."""
    variance, mean = torch.var_mean(features, dim=0, correction=0)
    return mean, (variance + _EPS).rsqrt()

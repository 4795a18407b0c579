"""Exponential moving averages of weights, as for teachers and for the weights that are evaluated."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from torch import nn

from .processes import own_share
from .schedules import Progress, Schedule, constant

# Collapsed features have both a small std, at which two images have a cosine similarity of 0.94 on average, and a low
# effective rank. Untrained encoders have at least 0.85 and 7 on photographs and on garments, runs that learn at least
# 0.6 and 3.9.
_COLLAPSED_STD, _COLLAPSED_RANK = 0.25, 4.0


@torch.no_grad()
def update_ema_(averages: Iterable[torch.Tensor], values: Iterable[torch.Tensor], momentum: float) -> None:
    """Set each average to momentum * average + (1 - momentum) * value, in place and for all tensors at once."""
    averages = [own_share(average) for average in averages]
    values = [own_share(value.detach()).to(average.dtype) for average, value in zip(averages, values, strict=True)]
    torch._foreach_lerp_(averages, values, 1 - momentum)


def momentum_schedule(momentum: float, start: float, ramp_steps: int, num_steps: int) -> Schedule:
    """Return the momentum of a teacher: constant, or rising from `start`.

    Args:
        momentum: Final value; 0 for an average over the last 2% of the steps, and at most 0.9998, which is the
            published value for 500,000 steps.
        start: First value; 0 for a constant momentum.
        ramp_steps: Steps of a linear rise; 0 for half a cosine over all steps.
        num_steps: Optimizer steps of the training.
    """
    momentum = momentum or min(0.9998, 1 - 1 / max(2.0, 0.02 * num_steps))
    if not start:
        return constant(momentum)
    return Schedule(start, momentum, ramp_steps or num_steps, "linear" if ramp_steps else "cosine")


def rising_momentum(start: float, num_steps: int) -> Schedule:
    """Return a momentum that rises from `start` to 1; 0 for an average over 2% of the steps, at least 0.9."""
    return Schedule(start or min(0.996, 1 - 1 / max(10.0, 0.02 * num_steps)), 1.0, num_steps)


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """Return a block without autocast, if the device has autocast at all (the meta device does not)."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class EmaTeacher(nn.Module):
    """Mix-in of a pre-training model whose `teacher` is a moving average of its `encoder`.

    The teacher is a copy of the student until the first step, then follows it after each optimizer step by the
    scheduled `teacher_momentum`. It never trains, is always in eval mode, and is saved, and exported, with the model.
    """

    averages: ClassVar[dict[str, str]] = {"teacher": "encoder"}  # names of submodules: the average, what it follows
    frozen_parameters: ClassVar[tuple[str, ...]] = ("teacher",)
    can_collapse: ClassVar[bool] = True
    # In half precision, steps of 1 - momentum would be rounded away.
    _keep_in_fp32_modules_strict: set[str] | list[str] | None = ["teacher"]  # noqa: RUF012 - read by transformers

    def train(self, mode: bool = True) -> "EmaTeacher":
        super().train(mode)
        for average in self.averages:
            self.get_submodule(average).eval()
        return self

    def after_step(self, progress: Progress) -> None:
        """Let the averages follow, on every process alike and without waiting for the device."""
        for average, followed in self.averages.items():
            averages, values = (_floats(self.get_submodule(name)) for name in (average, followed))
            update_ema_(averages, values, progress.values["teacher_momentum"])

    def collapse_signs(self, logs: Mapping[str, float]) -> str | None:
        """Return whether the exported features of all images are nearly equal."""
        std, rank = logs.get("feature_std"), logs.get("rankme")
        if std is None or rank is None or not (std < _COLLAPSED_STD and rank < _COLLAPSED_RANK):
            return None
        return (
            f"the features of all images are nearly equal (std {std:.3f}, below {_COLLAPSED_STD}; RankMe {rank:.1f}, "
            f"below {_COLLAPSED_RANK:.0f}): lower the learning rate, or raise the teacher's momentum."
        )

    def after_loading_encoder(self) -> None:
        """Start the averages as copies."""
        for average, followed in self.averages.items():
            self.get_submodule(average).load_state_dict(self.get_submodule(followed).state_dict())


def _floats(module: nn.Module) -> Iterator[torch.Tensor]:
    """Yield parameters and buffers without integers, such as an index of positions, which a mean would truncate."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            yield tensor

"""Training images that grow: the transform of an item depends on its optimizer step, so that workers keep no state."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch


class Transform(Protocol):
    """Turns a sample into named views; all random choices come from `generator`."""

    def __call__(self, sample: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]: ...


@dataclass(frozen=True)
class ScheduledTransform:
    """The transforms of the stages of a training, and the first step of each, as the data set counts steps."""

    transforms: tuple[Transform, ...]
    first_steps: tuple[int, ...]

    def at(self, step: int) -> Transform:
        """Return the transform of a step."""
        return self.transforms[bisect_right(self.first_steps, step) - 1]


def first_steps_of_stages(num_stages: int, num_steps: int) -> list[int]:
    """Return the first optimizer step of each stage; stages have equally many steps, rounded."""
    return [round(stage * num_steps / num_stages) for stage in range(num_stages)]


def as_data_steps(steps: Sequence[int], steps_per_epoch: int, data_steps_per_epoch: int) -> tuple[int, ...]:
    """Convert optimizer steps to the data set's count, in which an epoch may have one more step, which is dropped."""
    return tuple(step // steps_per_epoch * data_steps_per_epoch + step % steps_per_epoch for step in steps)

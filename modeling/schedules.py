"""Numbers that change during training, as data: a value for every optimizer step."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Schedule:
    """A value that goes from `start` to `end` within `num_steps` optimizer steps and then stays there."""

    start: float
    end: float
    num_steps: int = 0
    shape: Literal["cosine", "linear"] = "cosine"

    def at(self, step: float) -> float:
        """Return the value at an optimizer step, counted from 0."""
        if step >= self.num_steps:
            return self.end
        if self.shape == "linear":
            return self.start + (self.end - self.start) * step / self.num_steps
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * step / self.num_steps)) / 2

    def describe(self) -> str:
        """Return the course of the value in words."""
        if self.start == self.end or not self.num_steps:
            return f"{self.end:.6g}"
        return f"{self.start:.6g} to {self.end:.6g} within {self.num_steps:,} steps ({self.shape})"


def constant(value: float) -> Schedule:
    """Return a schedule that never changes."""
    return Schedule(value, value)


@dataclass(frozen=True)
class Progress:
    """State of a training: `step` of `num_steps` optimizer steps are done; `values` are the schedules' at `step`."""

    step: int
    num_steps: int
    steps_per_epoch: int
    values: Mapping[str, float] = field(default_factory=dict)

    @property
    def epoch(self) -> int:
        return self.step // self.steps_per_epoch

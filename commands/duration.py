"""How long a run takes: a few timed steps, in a dry run too, and what to run instead where nobody would wait."""

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from training.callbacks import duration
from training.step_hooks import StepHooks
from training.stopping import StopOnSignal
from training.trainer import MimTrainer

_NUM_TIMED_STEPS, _MAX_SECONDS = 4, 30.0  # of an estimate
_LONG_SECONDS = 24 * 3600.0


class DurationEstimate(TrainerCallback):
    """Measure the first steps, report the seconds of a step once, and end the training if only that is wanted.

    Args:
        least_seconds: At least so long, if there is one process.
    """

    def __init__(
        self, report: Callable[[float], None], ends_training: bool = False, least_seconds: float = 0.0
    ) -> None:
        self.report, self.ends_training, self.least_seconds = report, ends_training, least_seconds

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends: list[float] | None = [time.perf_counter()]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ends is None:
            return
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()  # otherwise the queue would be measured, not the work
        self.ends.append(time.perf_counter())
        seconds = self.ends[-1] - self.ends[0]
        is_alone = args.world_size == 1  # processes end together
        goes_on = len(self.ends) <= _NUM_TIMED_STEPS or (is_alone and seconds < self.least_seconds)
        if goes_on and not (is_alone and seconds > _MAX_SECONDS) and state.global_step < state.max_steps:
            return
        first = 1 if len(self.ends) > 2 else 0  # the first step also builds and warms everything
        seconds_per_step = (self.ends[-1] - self.ends[first]) / (len(self.ends) - 1 - first)
        self.ends = None
        if state.is_world_process_zero:
            self.report(seconds_per_step)
        control.should_training_stop |= self.ends_training


def measure_seconds_per_step(trainer: MimTrainer, least_seconds: float = 0.0) -> float:
    """Time a few training steps without logs, evaluation and checkpoints; the trainer is of no use afterwards.

    Returns 0 on other processes than the main one.
    """
    measured: list[float] = []
    for callback in list(trainer.callback_handler.callbacks):
        if not isinstance(callback, DefaultFlowCallback | StepHooks | StopOnSignal):
            trainer.remove_callback(callback)
    trainer.add_callback(DurationEstimate(measured.append, True, least_seconds))
    trainer.args.save_strategy, trainer.args.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    trainer.train()
    return measured[0] if measured else 0.0


def describe_duration(seconds_per_step: float, num_steps: int, shorter: str) -> str:
    """Return how long a run takes and, if nobody would wait for it, what ends after an hour.

    Args:
        shorter: What to do for a result in minutes.
    """
    seconds = seconds_per_step * num_steps
    text = f"duration: about {duration(seconds)} for {num_steps:,} steps ({seconds_per_step:.2g} s per step)"
    if seconds < _LONG_SECONDS:
        return text
    num_steps_per_hour = max(1, round(3600 / seconds_per_step))
    return f"{text}; for one hour, add --max_steps {num_steps_per_hour}; for a result in minutes: {shorter}"

"""End a training in time: its schedules advance faster or slower than planned if the speed changes.

A run with a time budget is planned with a fixed number of steps, from a measured speed. Every schedule (learning rate,
weight decay, momentum, temperatures) is a function of the position in this plan, which normally advances by one in
each step. Other programs may come or go: as soon as the projected end leaves the allowed window, the rest of the plan
is spread over as many steps as still fit. No value jumps, and all schedules reach their ends.
"""

import math
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any

from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import TrainerCallback

GOAL = 0.95  # of the budget: where a run is planned to end
_EARLIEST, _LATEST = 0.88, 1.0  # of the budget: a projected end between them changes nothing
_NUM_CHECKS = 100  # of the speed in a run
_MEMORY = 0.1  # of the budget: the speed is that of the steps within this time
_ENTRY = "time_budget"  # in the log history, from which a run is resumed


@dataclass(frozen=True)
class Pace:
    """The position in the plan after `step` optimizer steps, and by how much each later step advances it."""

    step: int = 0
    position: float = 0.0
    rate: float = 1.0

    def at(self, step: int) -> float:
        return self.position + (step - self.step) * self.rate

    def last_step(self, num_planned: int) -> int:
        """Return the number of steps after which a plan of so many steps is complete."""
        return self.step + max(0, math.ceil((num_planned - self.position) / self.rate - 1e-6))

    def changed(self, step: int, num_left: int, num_planned: int) -> "Pace":
        """Return the pace with which the plan is complete `num_left` steps after `step`."""
        return Pace(step, self.at(step), max(num_planned - self.at(step), 1e-6) / num_left)


@dataclass(frozen=True)
class Speed:
    """Seconds of a step, of an evaluation with a checkpoint, and of all that follows the last step."""

    step: float
    interval: float
    end: float

    def num_steps(self, seconds: float, steps_per_interval: float) -> int:
        """Return how many steps end within a time, with their evaluations and the end of the run."""
        return max(0, math.floor((seconds - self.end) / (self.step + self.interval / steps_per_interval)))


class TimeBudget(TrainerCallback):
    """Measure the speed of a training, and change the trainer's `pace` and number of steps so that it ends in time.

    The main process decides for all. The checkpoints hold the time that was used and the pace.

    Args:
        seconds: The budget.
        started: `time.perf_counter()` at the start of the program.
        speed: As measured for the plan.
    """

    def __init__(self, trainer: Any, seconds: float, started: float, speed: Speed) -> None:
        self.trainer, self.seconds, self.started, self.speed = trainer, seconds, started, speed

    def used(self) -> float:
        """Return the seconds that were used so far, also before the training was resumed."""
        return time.perf_counter() - self.started

    def on_train_begin(self, args: Any, state: Any, control: Any, lr_scheduler: Any = None, **kwargs: Any) -> None:
        self.num_planned = state.max_steps
        saved = [entry for entry in state.log_history if _ENTRY in entry and entry["step"] <= state.global_step]
        if saved:
            entry = saved[-1][_ENTRY]
            self.started -= entry["used"]
            self.speed = Speed(**entry["speed"])
            pace = Pace(**entry["pace"])
            if entry["planned"] != self.num_planned:  # the plan was lost, as of a run that the Hub kept
                scale = self.num_planned / entry["planned"]
                pace = Pace(pace.step, pace.position * scale, pace.rate * scale)
            self._set_pace(state, pace)
            # Before the end of the plan, only early stopping has ended the run.
            was_stopped_early = control.should_training_stop and state.global_step < self.num_planned
            control.should_training_stop = was_stopped_early or state.global_step >= state.max_steps
        # Learning rates follow the position in the plan, as the trainer's own schedules do.
        if hasattr(lr_scheduler, "lr_lambdas"):
            lr_scheduler.lr_lambdas = [self._at_pace(factor) for factor in lr_scheduler.lr_lambdas]
        intervals = [state.eval_steps if args.eval_strategy == "steps" else 0]
        intervals.append(state.save_steps if args.save_strategy == "steps" else 0)
        self.steps_per_interval = min((steps for steps in intervals if steps), default=math.inf)
        self.check_every = max(1, self.num_planned // _NUM_CHECKS)
        self.ended: float | None = None  # the first step also builds and warms everything
        self.was_interrupted = False
        self.windows: deque[list[float]] = deque([[0.0, 0]])  # seconds and number of steps between two checks

    def _at_pace(self, factor: Any) -> Any:
        return lambda step: factor(min(self.trainer.pace.at(step), float(self.num_planned)))

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.was_interrupted = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.was_interrupted = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._measure()
        if state.global_step % self.check_every == 0 and state.global_step < state.max_steps:
            self._check(state)
        if control.should_save:
            entry = {"used": self.used(), "planned": self.num_planned, "pace": asdict(self.trainer.pace)}
            state.log_history.append({_ENTRY: {**entry, "speed": asdict(self.speed)}, "step": state.global_step})

    def _measure(self) -> None:
        before, self.ended = self.ended, time.perf_counter()
        if before is None:
            return
        seconds = self.ended - before
        if not self.was_interrupted:
            self.windows[-1][0] += seconds
            self.windows[-1][1] += 1
        else:
            interval = max(0.0, seconds - self.speed.step)
            self.speed = Speed(self.speed.step, interval, self.speed.end + interval - self.speed.interval)
        self.was_interrupted = False

    def _check(self, state: Any) -> None:
        """Spread the rest of the plan over the steps that fit into the rest of the time if the end is out of reach."""
        step = state.global_step
        seconds, number = (sum(column) for column in zip(*self.windows, strict=True))
        if number:
            self.speed = Speed(seconds / number, self.speed.interval, self.speed.end)
        self.windows.append([0.0, 0])
        while len(self.windows) > 2 and seconds - self.windows[0][0] > _MEMORY * self.seconds:
            seconds -= self.windows.popleft()[0]
        left, used = state.max_steps - step, self.used()
        rest = left * (self.speed.step + self.speed.interval / self.steps_per_interval) + self.speed.end
        chosen = left
        if not _EARLIEST * self.seconds <= used + rest <= _LATEST * self.seconds:
            chosen = max(1, self.speed.num_steps(GOAL * self.seconds - used, self.steps_per_interval))
        agreed = [chosen]
        broadcast_object_list(agreed)
        if agreed[0] == left:
            return
        before = state.max_steps
        self._set_pace(state, self.trainer.pace.changed(step, agreed[0], self.num_planned))
        if state.is_world_process_zero:
            text = f"{before:,} -> {state.max_steps:,} steps to end in time, a step takes {self.speed.step:.2g} s"
            tqdm.write(f"step {step}/{state.max_steps}  {text}", file=sys.stderr)

    def _set_pace(self, state: Any, pace: Pace) -> None:
        self.trainer.pace = pace
        state.max_steps = pace.last_step(self.num_planned)

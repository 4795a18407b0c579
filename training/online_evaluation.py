"""Every few steps, a look at the model that is no training: what is measured is handed in by the run script."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from training.trainer import MimTrainer


class EvaluateOnline(TrainerCallback):
    """Logs the numbers that `measure(model)` returns before the first step, every `every` steps and after the last.

    They are in the log history before a checkpoint of the same step is saved; if it returns none, nothing is logged.
    `describe(log_history)` is a line about them for a person. Only the first process measures. Training goes on as if
    nothing had happened, as long as `measure` draws no random numbers and leaves the model as it found it.
    """

    def __init__(
        self,
        trainer: MimTrainer,
        every: int,
        measure: Callable[[Any], dict[str, float]],
        describe: Callable[[Sequence[Mapping[str, Any]]], str],
    ) -> None:
        self.trainer, self.every, self.measure, self.describe = trainer, every, measure, describe

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._look(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self._look(state, control)

    def _look(self, state: Any, control: Any) -> None:
        if not state.is_world_process_zero:
            return
        with self.trainer.clock_stopped():
            measured = self.measure(self.trainer.model)
        if not measured:
            return
        is_loss_due = control.should_log
        self.trainer.log(measured)
        control.should_log = is_loss_due  # any log takes the loss for logged
        line = f"step {state.global_step}/{state.max_steps}  {self.describe(state.log_history)}"
        tqdm.write(line, file=sys.stderr)

"""Evaluate the encoder during training with a function of the run script."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback

from training.trainer import MimTrainer


class EvaluateOnline(TrainerCallback):
    """Log metrics before the first step, every `every` steps and after the last step.

    They are in the log history before a checkpoint of the same step is saved. Only the main process evaluates.

    Args:
        measure: Returns the metrics of a model, or none to log nothing. It must neither draw random numbers nor change
            the model, because training would then change.
        describe: Returns a line about them, given the log history.
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
            self._evaluate(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step >= state.max_steps:
            self._evaluate(state, control)

    def _evaluate(self, state: Any, control: Any) -> None:
        with self.trainer.clock_stopped(), self.trainer.whole_model():
            measured = self.measure(self.trainer.model) if state.is_world_process_zero else {}
        if not measured:
            return
        is_loss_due = control.should_log
        self.trainer.log(measured)
        control.should_log = is_loss_due  # logging anything resets it
        line = f"step {state.global_step}/{state.max_steps}  {self.describe(state.log_history)}"
        tqdm.write(line, file=sys.stderr)

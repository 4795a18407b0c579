"""What `MimTrainer` does between steps, as a callback of `Trainer`: hooks of the model, schedules, meters."""

import time
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback

from training.checkpoints import last_whole_checkpoint
from training.data_position import go_on_at_the_same_image

if TYPE_CHECKING:
    from training.trainer import MimTrainer


class StepHooks(TrainerCallback):
    """The parts of `MimTrainer` that belong between steps."""

    def __init__(self, trainer: "MimTrainer") -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        own = getattr(trainer.model, "schedules", None)
        if own is not None:
            steps_per_epoch = trainer.steps_per_scheduled_epoch(state.max_steps)
            trainer.schedules = {**own(state.max_steps, steps_per_epoch), **trainer.schedules}
        go_on_at_the_same_image(trainer)
        trainer._meter.start(state.global_step)
        before = [entry["training_seconds"] for entry in state.log_history if "training_seconds" in entry]
        trainer.began = time.perf_counter() - max(before, default=0.0)
        if args.save_strategy != "no" and last_whole_checkpoint(trainer.output_dir)[0] is None:
            trainer._save_checkpoint(trainer.model, trial=None)
        was_stopped_early = any(
            isinstance(callback, EarlyStoppingCallback)
            and callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in trainer.callback_handler.callbacks
        )
        control.should_training_stop = was_stopped_early or state.global_step >= state.max_steps

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not left to accelerate: it does not reach the sampler of a resumed, sharded loader.
        if hasattr(self.trainer, "_epoch_sampler"):
            # Not `state.epoch`, which an epoch of another number of steps left, if that has changed since.
            self.trainer._epoch_sampler.set_epoch(state.global_step // self.trainer.steps_per_epoch)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        trainer._micro_step = 0
        weight_decay = trainer.progress.values.get("weight_decay")
        if weight_decay is not None:
            for group in trainer.optimizer.param_groups:
                if group.setdefault("is_decayed", group["weight_decay"] > 0):
                    group["weight_decay"] = weight_decay
        trainer.call_hook("before_step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # `Trainer` evaluates and saves at the end, but logs only at its interval

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self.trainer.optimizer
        if not self.trainer.guard.skip_update_if_raised(getattr(optimizer, "optimizer", optimizer)):
            self.trainer.stop_if_not_finite()  # only fused optimizers can skip on the device
        self.trainer.call_hook("before_update")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.call_hook("after_step")
        if self.trainer.average:
            self.trainer.average.update(state.global_step)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._meter.start(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._meter.start(state.global_step)

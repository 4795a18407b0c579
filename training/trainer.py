"""A thin layer over `Trainer`: parameter groups, exact resume, a guard against NaN, and speed in the log.

Heads train under the stock `Trainer` too; what is added here is listed in `MimTrainer`.
Shapes: B images of a micro-batch.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from data.classification import ClassificationImages
from data.images import PretrainingImages
from data.sampling import EpochSampler
from data.seeds import seeded_generator
from training.checkpoints import last_whole_checkpoint
from training.guard import NonFiniteError, NonFiniteGuard, has_only_finite_weights
from training.layer_decay import layer_decay_groups


class MimTrainer(Trainer):
    """`Trainer` for the heads in `modeling`.

    - no weight decay on 1-D tensors, biases and the head's `no_weight_decay` (the authors' groups), decay on the rest;
    - the data's counters and a torch seed per (seed, rank, step) make a resumed run equal to an undisturbed one;
    - a non-finite loss, gradient or weight stops the run before anything is saved (`training.guard`);
    - a checkpoint is written before the first step: there always is a good one, and a full disk shows at once;
    - images per second, the share of time spent waiting for data, images seen and time left are logged with the loss;
    - a head with `update_teacher(progress)` is called after each optimizer step;
    - where images may hide unequal numbers of patches, every hidden patch of a step counts alike, however they lie in
      micro-batches and processes;
    - with `layer_decay` below 1, each layer of the encoder learns that much slower than the one above it;
    - with `lr_drop_step`, the learning rate is constant after warm-up, and a tenth of it from that step on (SimMIM);
    - `make_labels` (`training.targets`) turns the batch's `tokenizer_pixel_values` into `labels`, on the device.
    """

    model: PreTrainedModel
    train_dataset: Any
    optimizer: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.output_dir = Path(str(self.args.output_dir))
        self.guard = NonFiniteGuard(self.args.device, gradients_may_overflow=self.args.fp16)
        self.make_labels: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.lr_drop_step: int | None = None
        self.layer_decay = 1.0
        self._num_masked_in_step: torch.Tensor | None = None  # over all micro-batches and processes
        self._meter, self._accuracy = _Meter(), _AccuracyMeter()
        self._micro_step = 0
        self.add_callback(_StepHooks(self))

    # ---- data ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, (PretrainingImages, ClassificationImages)):
            return super()._get_train_sampler(train_dataset)
        self._epoch_sampler = EpochSampler(len(dataset))
        return self._epoch_sampler

    def evaluate_at_the_end(self) -> None:
        """Once more, if there is something to evaluate on and the last time was at an earlier step."""
        evaluated = {entry["step"] for entry in self.state.log_history if "eval_loss" in entry}
        if self.eval_dataset is not None and self.state.global_step not in evaluated:
            self.evaluate()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """With the last, smaller batch: dropping it is for training, `Trainer` does it here too."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._meter.seconds_waiting += time.perf_counter() - start
        self._num_masked_in_step = self._count_masked(batches)
        return batches, num_items

    def _count_masked(self, batches: list[dict[str, Any]]) -> torch.Tensor | None:
        if getattr(self.model, "needs_equal_num_masked", True) or "num_masked_patches" not in batches[0]:
            return None
        count = torch.tensor(float(sum(batch["num_masked_patches"] for batch in batches)), device=self.args.device)
        return self.accelerator.reduce(count, reduction="sum")

    # ---- one step ----

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        image_index = inputs.pop("image_index", None)  # (B,)
        inputs = self._with_labels(inputs)
        self._reseed()
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.guard.watch_loss(loss, image_index, self.state.global_step)
        return loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs.pop("image_index", None)
        return super().prediction_step(model, self._with_labels(inputs), *args, **kwargs)

    def _with_labels(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.make_labels is None or "labels" in inputs:
            return inputs
        inputs = self._prepare_inputs(inputs)
        inputs["labels"] = self.make_labels(inputs.pop("tokenizer_pixel_values"))
        return inputs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        num_masked = inputs.get("num_masked_patches")
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if outputs.get("accuracy") is not None and num_masked is not None:
            self._accuracy.add(model.training, outputs["accuracy"], num_masked, inputs)
        if model.training and self._num_masked_in_step is not None:
            # The head's mean over its own hidden patches -> this micro-batch's share of the whole step's mean; Trainer
            # and DDP will divide by the numbers of micro-batches and processes.
            num_shares = self.current_gradient_accumulation_steps * self.accelerator.num_processes
            loss = loss * (num_masked * num_shares / self._num_masked_in_step)
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        if self.layer_decay != 1 and self.optimizer is None:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rates = (self.args.learning_rate, self.args.weight_decay, self.layer_decay)
            groups = layer_decay_groups(self.model, *rates, self.get_decay_parameter_names(self.model))
            self.optimizer_cls_and_kwargs = optimizer_class, {**settings, "params": groups}
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_drop_step is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        warmup_steps, drop_step = self.args.get_warmup_steps(num_training_steps), self.lr_drop_step

        def factor(step: int) -> float:
            return min(1.0, step / max(1, warmup_steps)) * (0.1 if step >= drop_step else 1.0)

        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def _reseed(self) -> None:
        """Dropout and drop path draw from the global generator: tie it to the step, or a resumed run draws anew."""
        key = (self.args.seed, "step", self.args.process_index, self.state.global_step, self._micro_step)
        torch.manual_seed(seeded_generator(*key).initial_seed())
        self._micro_step += 1

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.fp16):
            # Trainer would clip to infinity to learn the norm, one more pass over every gradient.
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            grad_norm = torch.nn.utils.get_total_norm(gradients)
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.guard.watch_gradient(torch.as_tensor(grad_norm), self.state.global_step)
        return grad_norm

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        exempt = tuple(getattr(model, "no_weight_decay", ()))
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and not name.endswith((".bias", *exempt))
        ]

    # ---- looking at the flag ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self.stop_if_not_finite()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def stop_if_not_finite(self) -> None:
        """Waits for the device.

        Raises:
            NonFiniteError: the flag of `training.guard` is raised in some process, or a weight is not finite.
        """
        if self.guard.is_raised_anywhere():
            step, culprits, batch = self.guard.first_bad_step(), *self._bad_images()
            calmer = "lower --learning_rate, or clip with --max_grad_norm 1; under fp16 use --bf16"
            if not batch:
                cause = f"every loss was finite, the gradient was not: {calmer}."
            elif 0 < len(culprits) < len(batch):
                cause = f"the loss of these images is not finite: {', '.join(culprits)}. Repair or remove them."
            else:
                which = "every image" if culprits else "no single image"
                cause = (
                    f"{which} of its batch does it alone, so it is not the data: {calmer}. It was {', '.join(batch)}."
                )
            raise NonFiniteError(
                f"the loss or its gradient became NaN or infinite at step {step + 1}. {cause} No weight was updated "
                f"from that step on. {self._last_good()}"
            )
        if not has_only_finite_weights(self.model):
            raise NonFiniteError(
                f"weights became NaN or infinite by step {self.state.global_step}, with a learning rate of "
                f"{self._get_learning_rate():.3g}. {self._last_good()} Lower --learning_rate."
            )

    def _bad_images(self) -> tuple[list[str], list[str]]:
        """Names of the images that alone give a non-finite loss, and of the whole bad batch, over all processes."""
        dataset, indices = self.train_dataset, [i for i in self.guard.image_index.tolist() if i >= 0]
        if not isinstance(dataset, (PretrainingImages, ClassificationImages)):
            indices = []
        micro_batches_per_epoch = len(self.callback_handler.train_dataloader)
        epoch = int(self.guard.step) * self.args.gradient_accumulation_steps // micro_batches_per_epoch
        alone = [index for index in indices if not self._has_finite_loss(dataset.item(index, epoch))]
        names = [dataset.name(index) for index in alone], [dataset.name(index) for index in indices]
        return tuple(sorted(set(gather_object(part))) for part in names)  # type: ignore[return-value]

    @torch.no_grad()
    def _has_finite_loss(self, item: dict[str, Any]) -> bool:
        batch = self._with_labels(self._prepare_inputs(self.data_collator([item])))
        batch.pop("image_index", None)
        with self.compute_loss_context_manager():
            return bool(torch.isfinite(self.model(**batch).loss))

    def _last_good(self) -> str:
        checkpoint, _ = last_whole_checkpoint(self.output_dir)
        return f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was written."

    # ---- saving ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # its old trainer_state.json would make a half-overwritten checkpoint look whole
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        # It holds a Hub token and the user's paths in clear, and nothing reads it.
        (Path(output_dir or self.output_dir) / "training_args.bin").unlink(missing_ok=True)

    # ---- the log ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            images_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            steps_left = self.state.max_steps - self.state.global_step
            logs.update(self._meter.read(self.state.global_step, images_per_step, steps_left))
            logs.update(self._accuracy.read(self.accelerator, training=True))
        elif "eval_loss" in logs:
            logs.update(self._accuracy.read(self.accelerator, training=False))
        super().log(logs, *args, **kwargs)

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """For what is not training, and should not be counted in images per second."""
        start = time.perf_counter()
        yield
        self._meter.started += time.perf_counter() - start

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer counts pixels as tokens, which says nothing about a vision model


class _StepHooks(TrainerCallback):
    """What the trainer does between steps, where `Trainer` calls nobody else."""

    def __init__(self, trainer: MimTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._meter.start(state.global_step)
        if args.save_strategy != "no" and last_whole_checkpoint(self.trainer.output_dir)[0] is None:
            self.trainer._save_checkpoint(self.trainer.model, trial=None)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not left to accelerate: it does not reach the sampler of a resumed, sharded loader.
        if hasattr(self.trainer, "_epoch_sampler"):
            self.trainer._epoch_sampler.set_epoch(int(state.epoch or 0))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._micro_step = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True  # `Trainer` evaluates and saves at the end, but logs only at its interval

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = self.trainer.optimizer
        if not self.trainer.guard.skip_update_if_raised(getattr(optimizer, "optimizer", optimizer)):
            self.trainer.stop_if_not_finite()  # only fused optimizers can skip on the device

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if hasattr(model, "update_teacher"):
            model.update_teacher((state.global_step + 1) / state.max_steps)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._meter.start(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer._meter.start(state.global_step)


class _AccuracyMeter:
    """Share of hidden patches whose token was predicted; in evaluation also that of the most frequent token."""

    def __init__(self) -> None:
        self._sums: dict[bool, list[torch.Tensor]] = {True: [], False: []}  # training or not -> (2,) correct, counted
        self._histogram: torch.Tensor | None = None  # (K,) tokens of hidden patches, in evaluation

    def add(self, training: bool, accuracy: torch.Tensor, num_masked: int, inputs: dict[str, Any]) -> None:
        """Waits for nothing in training."""
        sums = torch.stack([accuracy.detach() * num_masked, torch.full_like(accuracy, num_masked)])
        self._sums[training] = [sums + before for before in self._sums[training]] or [sums]
        if not training:
            tokens = torch.bincount(inputs["labels"][inputs["bool_masked_pos"]], minlength=65536)
            self._histogram = tokens if self._histogram is None else self._histogram + tokens

    def read(self, accelerator: Any, training: bool) -> dict[str, float]:
        if not self._sums[training]:
            return {}
        correct, counted = accelerator.reduce(self._sums[training].pop(), reduction="sum").tolist()
        if training:
            return {"accuracy": correct / counted}
        assert self._histogram is not None
        tokens, self._histogram = accelerator.reduce(self._histogram, reduction="sum"), None
        return {"eval_accuracy": correct / counted, "eval_most_frequent_share": (tokens.max() / tokens.sum()).item()}


class _Meter:
    """Speed since the last reading; evaluation and saving are not counted as training."""

    def __init__(self) -> None:
        self.start(0)
        self.seconds_per_step: float | None = None

    def start(self, step: int) -> None:
        self.step, self.started, self.seconds_waiting = step, time.perf_counter(), 0.0

    def read(self, step: int, images_per_step: int, steps_left: int) -> dict[str, float]:
        seconds, steps = time.perf_counter() - self.started, step - self.step
        waiting = self.seconds_waiting
        self.start(step)
        if not steps:
            return {}
        self.seconds_per_step = seconds / steps
        return {
            "images_per_second": round(images_per_step / self.seconds_per_step, 2),
            "data_wait_share": round(waiting / seconds, 4),
            "images_seen": step * images_per_step,
            "eta_seconds": round(self.seconds_per_step * steps_left, 1),
        }

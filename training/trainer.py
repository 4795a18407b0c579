"""A thin layer over `Trainer`: parameter groups, exact resume, a guard against NaN, and speed in the log.

The models train under the stock `Trainer` too; what is added here is listed in `MimTrainer`.
Shapes: B images of a micro-batch.
"""

import inspect
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import has_length

from data.image_checks import num_cores
from data.images import NamedItems
from data.sampling import EpochSampler
from data.seeds import seeded_generator
from data.streams import StreamDataset
from modeling.schedules import Progress, Schedule
from training.checkpoints import check_fits, what_is_safe, write_checksums
from training.data_position import save_position
from training.devices import peak_flops
from training.evaluation_guard import EvaluationGuard
from training.guard import NonFiniteError, NonFiniteGuard
from training.head_warmup import HeadWarmup
from training.layer_decay import layer_decay_groups
from training.lost_process import watching_processes
from training.meters import Meter, MetricSums
from training.non_finite import find_non_finite
from training.sharding import ShardingTrainer, whole
from training.step_hooks import StepHooks
from training.stopping import StopOnSignal, init_worker
from training.time_budget import Pace, TimeBudget
from training.weight_average import WeightAverage

_DROP_FACTOR = 0.1
_SECONDS_UNTIL_STUCK = 900  # without a batch from the data workers


class MimTrainer(ShardingTrainer):
    """`Trainer` for the models in `modeling`.

    - No weight decay on 1-D tensors, biases and the model's `no_weight_decay`, as in the authors' code.
    - The data's counters and a torch seed per (seed, rank, step) make a resumed run equal to an undisturbed one.
    - A non-finite loss, gradient or weight stops the run before anything is saved (`training.guard`); non-finite
      metrics of an evaluation are warned of.
    - A checkpoint is written before the first step: there always is a good one, and a full disk shows at once.
    - Images per second, the share of time spent waiting for data, images seen and time left are logged with the loss.
    - Every item of a named loss counts alike in a step, however the items are spread over micro-batches and processes
      (`loss_counts`); metrics are summed over both.
    - The model's schedules are followed, and its hooks called around each step.

    Args:
        targets: Adds targets to a batch on the device (`training.targets`).
        schedules: Numbers that change during training, beside the model's own (`modeling.schedules`).
        layer_decay: Factor between the learning rates of a layer of the encoder and the one above it.
        num_head_steps: First steps in which the encoder keeps the weights that it was loaded with; the schedule of the
            learning rate begins after them.
        lr_drop_step: First step with a tenth of the learning rate, which is otherwise constant after warm-up (SimMIM).
        ema_decay: Decay of a moving average of the weights, which is evaluated and saved; 0 for none.
        flops_per_image: FLOPs of a training step per image, for the FLOP/s in the log; 0 if unknown.
    """

    model: PreTrainedModel
    train_dataset: Any
    optimizer: Any

    def __init__(
        self,
        *args: Any,
        targets: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
        schedules: Mapping[str, Schedule] | None = None,
        layer_decay: float = 1.0,
        num_head_steps: int = 0,
        lr_drop_step: int | None = None,
        ema_decay: float = 0.0,
        flops_per_image: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.output_dir = Path(str(self.args.output_dir))
        self.guard = NonFiniteGuard(self.args.device, gradients_may_overflow=self.args.fp16)
        self.targets, self.layer_decay, self.lr_drop_step = targets, layer_decay, lr_drop_step
        self.schedules: dict[str, Schedule] = dict(schedules or {})
        self.head_warmup = HeadWarmup(self.model, num_head_steps)
        self.pace = Pace()  # a `TimeBudget` changes it
        self.resumed_from: Path | None = None
        self.average = WeightAverage(self.model, ema_decay) if ema_decay else None
        self.flops_per_image = flops_per_image
        self._forward_arguments = frozenset(inspect.signature(self.model.forward).parameters)
        self._total_counts: dict[str, torch.Tensor] = {}  # of this step, over all micro-batches and processes
        num_threads = torch.get_num_threads() if self.args.device.type == "cpu" else 1
        num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._meter = Meter(num_threads, max(1, num_cores() // num_local_processes))
        self._metrics = {True: MetricSums(), False: MetricSums()}  # by model.training
        self._micro_step = 0
        self.began = time.perf_counter()  # of the training, less the time that it took before it was resumed
        self.add_callback(StepHooks(self))
        self._evaluation_guard = EvaluationGuard(self)
        self.add_callback(self._evaluation_guard)
        self._stop_on_signal = StopOnSignal()
        self.add_callback(self._stop_on_signal)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`.

        Raises:
            Stopped: If a signal stopped it, after a checkpoint.
        """
        with self._stop_on_signal.listening(), watching_processes(partial(what_is_safe, self.output_dir)):
            return super().train(*args, **kwargs)

    # ---- data ----

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, NamedItems):
            return super()._get_train_sampler(train_dataset)
        self._epoch_sampler = EpochSampler(len(dataset))
        return self._epoch_sampler

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As in `Trainer`, but with the last, smaller batch: `dataloader_drop_last` is meant for training."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        loader = super()._get_dataloader(*args, **kwargs)
        base = getattr(loader, "base_dataloader", loader)
        base.worker_init_fn = partial(init_worker, base.worker_init_fn)
        base.timeout = _SECONDS_UNTIL_STUCK if base.num_workers else 0
        return loader

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        self._meter.seconds_waiting += time.perf_counter() - start
        self._total_counts = self._count_losses(batches)
        return batches, num_items

    def _count_losses(self, batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        counts = [self._loss_counts(batch) for batch in batches]
        totals = {
            # Filled on the device: a copy of a number would wait for all steps before it.
            name: torch.full((), float(sum(count[name] for count in counts)), device=self.args.device)
            for name in counts[0]
        }
        return self.accelerator.reduce(totals, reduction="sum") if totals else {}

    def _loss_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        count = getattr(self.model, "loss_counts", None)
        return count(batch) if count else {}

    def set_initial_training_values(self, *args: Any, **kwargs: Any) -> Any:
        num_epochs, *values = super().set_initial_training_values(*args, **kwargs)
        may_grow = any(isinstance(callback, TimeBudget) for callback in self.callback_handler.callbacks)
        return (sys.maxsize if may_grow else num_epochs), *values

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if not self.control.should_training_stop:  # resumed after its end, `Trainer` would take one more step
            super()._run_epoch(*args, **kwargs)

    # ---- one step ----

    @property
    def progress(self) -> Progress:
        """The state of the training, with the values of the schedules."""
        position = self.pace.at(self.state.global_step)
        values = {name: schedule.at(position) for name, schedule in self.schedules.items()}
        num_steps = self.args.max_steps if self.args.max_steps > 0 else self.state.max_steps
        return Progress(int(position), num_steps, self.steps_per_scheduled_epoch(num_steps), values)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        image_index = self._take_index(inputs)
        inputs = self._with_targets(inputs)
        self._reseed()
        step = self.state.global_step
        position = int(self.pace.at(step))
        self.head_warmup.hold(position, can_skip=model is self.model and not self.is_sharded)
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.head_warmup.drop_gradients(position)
        self.guard.watch_loss(loss, image_index, step)
        return loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        image_index = self._take_index(inputs)
        outputs = super().prediction_step(model, self._with_targets(inputs), *args, **kwargs)
        self._evaluation_guard.watch_loss(outputs[0], image_index)
        return outputs

    def _take_index(self, inputs: dict[str, Any]) -> torch.Tensor | None:
        """Return the images' numbers (B,); they stay in the batch only if the model asks for them."""
        is_wanted = "image_index" in self._forward_arguments
        return inputs.get("image_index") if is_wanted else inputs.pop("image_index", None)

    def _with_targets(self, inputs: dict[str, Any]) -> dict[str, Any]:
        if self.targets is None:
            return inputs
        with self.accelerator.autocast():
            return self.targets(self._prepare_inputs(inputs))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        scheduled = self.progress.values if model.training else {}
        inputs = inputs | {name: value for name, value in scheduled.items() if name in self._forward_arguments}
        loss, outputs = self.loss_and_outputs(model, inputs)
        self._metrics[model.training].add(outputs.get("metrics") or {})
        if model.training and self._total_counts:
            loss = self._share_of_step(loss, outputs.get("losses"), self._loss_counts(inputs))
        return (loss, outputs) if return_outputs else loss

    def loss_and_outputs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, Any]:
        """Return the mean loss of a micro-batch and the outputs of the model."""
        return super().compute_loss(model, inputs, return_outputs=True)  # type: ignore[return-value]

    def _share_of_step(
        self, loss: torch.Tensor, losses: Mapping[str, torch.Tensor] | None, counts: Mapping[str, int]
    ) -> torch.Tensor:
        """Weigh each mean over this micro-batch by its share of the step's items.

        Trainer and DDP will divide by the numbers of micro-batches and processes.
        """
        num_shares = self.current_gradient_accumulation_steps * self.accelerator.num_processes
        factors = {name: counts[name] * num_shares / total for name, total in self._total_counts.items()}
        if losses is None:
            (factor,) = factors.values()
            return loss * factor
        model: Any = self.model
        return model.weighted_sum({name: value * factors[name] for name, value in losses.items()})

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        if self.layer_decay != 1 and self.optimizer is None:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rates = (self.args.learning_rate, self.args.weight_decay, self.layer_decay)
            groups = layer_decay_groups(self.model, *rates, self.get_decay_parameter_names(self.model))
            self.optimizer_cls_and_kwargs = optimizer_class, {**settings, "params": groups}
        return super().create_optimizer(model)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        num_head_steps, drop_step = self.head_warmup.num_steps, self.lr_drop_step
        if self.lr_scheduler is not None or (drop_step is None and not num_head_steps):
            return super().create_scheduler(num_training_steps, optimizer)
        warmup_steps = self.args.get_warmup_steps(num_training_steps)
        factor: Callable[[int], float]
        if drop_step is not None:

            def factor(step: int) -> float:
                is_low = step + num_head_steps >= drop_step
                return min(1.0, step / max(1, warmup_steps)) * (_DROP_FACTOR if is_low else 1.0)
        else:
            scheduler: Any = super().create_scheduler(num_training_steps - num_head_steps, optimizer)
            factor = scheduler.lr_lambdas[0]
        if num_head_steps:
            factor = self.head_warmup.restarted(factor, warmup_steps)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def _reseed(self) -> None:
        """Tie dropout and drop path, which draw from the global generator, to the step: a resumed run draws alike."""
        key = (self.args.seed, "step", self.args.process_index, self.state.global_step, self._micro_step)
        torch.manual_seed(seeded_generator(*key).initial_seed())
        self._micro_step += 1

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.fp16):
            # Trainer would clip to infinity to learn the norm, one more pass over every gradient.
            gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            grad_norm = torch.nn.utils.get_total_norm(gradients)
        grad_norm = super()._get_grad_norm(model, grad_norm)
        grad_norm = whole(grad_norm)
        self.guard.watch_gradient(torch.as_tensor(grad_norm), self.state.global_step)
        return grad_norm

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        exempt = tuple(getattr(model, "no_weight_decay", ()))
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim > 1 and not name.endswith((".bias", *exempt))
        ]

    # ---- averaged weights ----

    def averaged(self) -> AbstractContextManager[None]:
        """Give the model the averaged weights inside a block, if there are any."""
        return self.average.in_place_of_weights() if self.average else nullcontext()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.averaged():
            return super().evaluate(*args, **kwargs)

    def evaluate_at_the_end(self) -> None:
        """Evaluate once more if there are validation images and the last evaluation was at an earlier step."""
        evaluated = {entry["step"] for entry in self.state.log_history if "eval_loss" in entry}
        if self.eval_dataset is not None and self.state.global_step not in evaluated:
            self.evaluate()

    # ---- non-finite values ----

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_save or self.control.should_evaluate:
            self.stop_if_not_finite()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def stop_if_not_finite(self) -> None:
        """Check the guard and the weights; waits for the device.

        Raises:
            NonFiniteError: If the guard was raised in some process, or a weight is not finite.
        """
        if problem := find_non_finite(self):
            raise NonFiniteError(problem)

    @torch.no_grad()
    def has_finite_loss(self, item: dict[str, Any]) -> bool:
        """Return whether the loss of one image is finite."""
        batch = self._prepare_inputs(self.data_collator([item]))
        batch.pop("image_index", None)
        with self.compute_loss_context_manager():
            return bool(torch.isfinite(self.loss_and_outputs(self.model, self._with_targets(batch))[0]))

    # ---- checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save and folder.exists():
            shutil.rmtree(folder)  # its old trainer_state.json would make a half-overwritten checkpoint look whole
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes the state of its random generators
        if self.args.should_save:
            save_position(self, folder)
            write_checksums(folder)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save or not self.is_sharded:  # older versions would write on every process
            super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.output_dir)
        # It holds a Hub token and the user's paths in clear, and nothing reads it.
        (folder / "training_args.bin").unlink(missing_ok=True)
        if self.average:  # Trainer comes here in every process
            self.average.save(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        check_fits(Path(resume_from_checkpoint), self.model)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.resumed_from = Path(resume_from_checkpoint)
        if self.average:
            self.average.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.average:
            self.average.load(Path(str(self.state.best_model_checkpoint)))

    # ---- the log ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            images_per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            steps_left = self.state.max_steps - self.state.global_step
            logs.update(self._meter.read(self.state.global_step, images_per_step, steps_left))
            if self.flops_per_image and "images_per_second" in logs:
                logs.update(self._arithmetic(logs["images_per_second"] / self.args.world_size))
            logs["training_seconds"] = round(time.perf_counter() - self.began, 1)
            logs.update(self._summarize(training=True))
            last_step = max(self.state.global_step - 1, 0)
            position = self.pace.at(last_step)
            logs.update({name: schedule.at(position) for name, schedule in self.schedules.items()})
        elif "eval_loss" in logs:
            logs.update({f"eval_{name}": value for name, value in self._summarize(training=False).items()})
        super().log(logs, *args, **kwargs)

    def _arithmetic(self, images_per_second: float) -> dict[str, float]:
        """Return the achieved FLOP/s of a device, and its share of the peak where that is known (MFU)."""
        achieved = images_per_second * self.flops_per_image
        peak = peak_flops(self.args.device) if self.args.bf16 or self.args.fp16 else None
        return {"flops_per_second": achieved, **({"model_flops_utilization": achieved / peak} if peak else {})}

    def _summarize(self, training: bool) -> dict[str, float]:
        sums = self._metrics[training].read(self.accelerator)
        model: Any = self.model
        return model.summarize_metrics(sums) if sums else {}

    @contextmanager
    def clock_stopped(self) -> Iterator[None]:
        """Exclude a block that is not training from the images per second."""
        start, cpu_start = time.perf_counter(), time.process_time()
        yield
        self._meter.exclude(time.perf_counter() - start, time.process_time() - cpu_start)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer counts pixels as tokens, which is meaningless for a vision model

    @property
    def steps_per_epoch(self) -> int:
        loader = self.callback_handler.train_dataloader
        if not has_length(loader):  # a stream is one epoch
            return self.state.max_steps
        return max(1, -(-len(loader) // self.args.gradient_accumulation_steps))

    def steps_per_scheduled_epoch(self, num_steps: int) -> int:
        """Return the steps of an epoch as schedules count them: a stream is one epoch, as in the plan."""
        steps_per_epoch = self.steps_per_epoch
        return min(steps_per_epoch, num_steps) if isinstance(self.train_dataset, StreamDataset) else steps_per_epoch

    def call_hook(self, name: str) -> None:
        """Call a hook of the model, if it has it."""
        hook = getattr(self.model, name, None)
        if hook is not None:
            hook(self.progress)

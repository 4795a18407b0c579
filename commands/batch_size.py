"""The largest batch that fits: `--per_device_train_batch_size auto`.

On a GPU, training steps are tried with 1, 2, 4, ... images. On a CPU, where a program that needs too much memory is
killed, the memory is estimated. This happens before the plan is made: `auto_find_batch_size` of `Trainer`, which takes
smaller batches when training fails, would leave the learning rate and the number of steps as they were, and processes
with batches of different sizes.
"""

import copy
import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from commands.arithmetic import Hardware, precision_of
from commands.launch import first_on_main
from commands.memory import Footprint, free_bytes
from commands.output_folder import settings_of_interrupted_run
from commands.settings import TrainingSettings

_NAME = "per_device_train_batch_size"
_USABLE = 0.9  # of the free memory: that of a GPU gets fragmented, and batches differ
_USABLE_BY_ESTIMATE = 0.5  # on a CPU: other programs and the data workers need memory too
# A larger batch needs a larger learning rate, for which the linear rule was published up to here (MAE); on a CPU it is
# not faster per image, but makes fewer steps of the same time; and a small data set needs some steps in each epoch.
_MOST_IMAGES_PER_STEP, _MOST_ON_CPU, _LEAST_STEPS_PER_EPOCH = 4096, 64, 8

S = TypeVar("S", bound=TrainingSettings)


@dataclass(frozen=True)
class TrialStep:
    """A training step to try.

    Args:
        build_model: Returns a new model of the run.
        batch_of: Returns a batch of so many images on the CPU.
        targets: Adds targets to a batch on the device.
    """

    build_model: Callable[[], nn.Module]
    batch_of: Callable[[int], Mapping[str, Any]]
    targets: Any = None


def with_batch_size(
    settings: S, hardware: Hardware, num_images: int | None, footprint: Footprint, trial: TrialStep
) -> tuple[S, list[str]]:
    """Replace `auto` in the settings by the number of images, the same in all processes; returns them and notes.

    A run that is continued keeps its number.

    Raises:
        ValueError: If not even one image fits.
    """
    if settings.per_device_train_batch_size != "auto":
        return settings, []
    state = PartialState()
    size = first_on_main(state, partial(settings_of_interrupted_run, settings)).get(_NAME)
    if size is not None:
        return _replaced(settings, size), [f"{size} images per device, as before the interruption"]
    most, reason = _most_images(settings, hardware, num_images)
    free = free_bytes(state.device)
    if hardware.is_cpu:
        usable = _USABLE_BY_ESTIMATE * free / hardware.num_local_processes
        precision = precision_of(settings, hardware)
        weights = footprint.bytes_for_weights(_num_averages(settings))
        size = largest(lambda size: weights + footprint.bytes_for_activations(size, precision) <= usable, most)
    else:
        size = largest_on_device(trial, settings, hardware, state.device, most)
    (size,) = {min(gather_object([size]))}
    if not size:
        raise ValueError(
            f"--{_NAME} auto: a training step with one image does not fit into {free / 2**30:.1f} GiB of free memory; "
            "use a smaller --model or --image_size, or --gradient_checkpointing"
        )
    fitting = f"more might not fit into {free / 2**30:.1f} GiB of free memory"
    return _replaced(settings, size), [f"{size} images per device (auto): {reason if size == most else fitting}"]


def largest(fits: Callable[[int], bool], most: int) -> int:
    """Return the largest of 1, 2, 4, ..., the middle between the last two, and `most` that fits; 0 if none does."""
    if not fits(1):
        return 0
    size = 1
    while 2 * size <= most and fits(2 * size):
        size *= 2
    last = most if 2 * size > most else 3 * size // 2
    return last if last > size and fits(last) else size


def largest_on_device(
    trial: TrialStep, settings: TrainingSettings, hardware: Hardware, device: torch.device, most: int
) -> int:
    """Return the largest batch of which a training step fits into the free memory of the device, with a margin."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        usable = torch.cuda.memory_reserved(device) + _USABLE * free
        torch.cuda.set_per_process_memory_fraction(usable / total, device)
    try:
        return largest(_Steps(trial, settings, hardware, device).fits, most)
    finally:
        _free_memory()
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)


def seconds_per_step(
    trial: TrialStep, settings: TrainingSettings, hardware: Hardware, device: torch.device, size: int
) -> float:
    """Return the time of a training step on images that are there already; infinity if it does not fit into memory."""
    steps, best = _Steps(trial, settings, hardware, device), math.inf
    for _ in range(3):  # the first one also builds and warms everything
        began = time.perf_counter()
        if not steps.fits(size):
            return math.inf
        best = min(best, time.perf_counter() - began)
    return best


class _Steps:
    """Training steps with batches of any size."""

    def __init__(self, trial: TrialStep, settings: TrainingSettings, hardware: Hardware, device: torch.device) -> None:
        self.trial, self.device = trial, device
        with torch.random.fork_rng(devices=[]):  # the weights of the run are drawn later
            self.model = copy.deepcopy(trial.build_model()).to(device).train()
        if settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable()  # type: ignore[operator]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)
        # What a run has besides: averaged weights, and the buffers in which processes exchange gradients.
        num_extra = sum(parameter.numel() for parameter in self.model.parameters()) * _num_averages(settings)
        num_extra += sum(parameter.numel() for parameter in trained) * (hardware.world_size > 1)
        self.extra = torch.empty(num_extra, device=device)
        self.precision = getattr(torch, precision_of(settings, hardware))

    def fits(self, size: int) -> bool:
        try:
            self.train(size)
            return True
        except RuntimeError as error:
            if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
        finally:
            self.optimizer.zero_grad()
        _free_memory()  # after the exception, which holds tensors
        return False

    def train(self, size: int) -> None:
        batch: Mapping[str, Any] = self.trial.batch_of(size)
        batch = {name: value.to(self.device) if torch.is_tensor(value) else value for name, value in batch.items()}
        if self.trial.targets is not None:
            batch = self.trial.targets.to(self.device)(batch)
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            outputs = self.model(**batch)
        loss = outputs.get("loss")
        (outputs.logits.float().mean() if loss is None else loss).backward()
        self.optimizer.step()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _most_images(settings: TrainingSettings, hardware: Hardware, num_images: int | None) -> tuple[int, str]:
    """Return the largest batch of a device that is tried, and why no larger one is."""
    limits = {_MOST_IMAGES_PER_STEP: f"at most {_MOST_IMAGES_PER_STEP:,} per step are tried"}
    if num_images is not None:
        in_epoch = num_images * settings.crops_per_image // _LEAST_STEPS_PER_EPOCH
        limits[in_epoch] = f"an epoch should have at least {_LEAST_STEPS_PER_EPOCH} steps"
    shared = hardware.world_size * settings.gradient_accumulation_steps
    limits = {max(1, limit // shared): reason for limit, reason in limits.items()}
    if hardware.is_cpu:
        limits[_MOST_ON_CPU] = "larger batches are not faster per image on a CPU"
    return min(limits.items())


def _num_averages(settings: TrainingSettings) -> int:
    return int(getattr(settings, "ema_decay", 0) > 0)


def _replaced(settings: S, size: int) -> S:
    return replace(settings, values={**settings.values, _NAME: size}, per_device_train_batch_size=size)

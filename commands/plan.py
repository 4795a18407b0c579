"""The numbers of a run, said aloud before training; `commands.arithmetic` has the rules behind them."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commands.arithmetic import REFERENCE_BATCH, Hardware, hidden_patches, lr_drop_step, training_schedule
from commands.memory import Footprint
from commands.pretraining_settings import PretrainingSettings
from commands.settings import TrainingSettings

__all__ = ["Hardware", "Plan", "PretrainingPlan", "make_plan"]

_MIN_INTERVAL = 20  # steps between evaluations and between checkpoints, where the user gave no interval


@dataclass(frozen=True)
class Plan:
    """The numbers of a run. `images_per_step` counts all processes and all micro-batches of an optimizer step."""

    settings: TrainingSettings
    hardware: Hardware
    data: str
    num_train_images: int | None
    num_validation_images: int
    footprint: Footprint
    grid: tuple[int, int]
    batch_size: int
    accumulation: int
    steps_per_epoch: int
    num_steps: int
    learning_rate: float
    warmup_steps: int
    lr_drop_step: int | None
    precision: str
    num_workers: int
    output_dir: Path
    notes: tuple[str, ...]

    @property
    def images_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.hardware.world_size

    @property
    def bytes_for_weights(self) -> int:
        return self.footprint.bytes_for_weights(num_averages=int(getattr(self.settings, "ema_decay", 0) > 0))

    @property
    def bytes_for_activations(self) -> int:
        return self.footprint.bytes_for_activations(self.batch_size, self.precision)

    @property
    def num_epochs(self) -> float:
        return self.num_steps / self.steps_per_epoch

    def training_arguments(self) -> dict[str, Any]:
        """Keyword arguments of TrainingArguments."""
        # `Trainer` would push by itself: without our layout, with the token in a file, and fail when the Hub does.
        ours = ("push_to_hub", "hub_")
        given = {n: value for n, value in self.settings.training_arguments().items() if not n.startswith(ours)}
        every = {name: self._interval(name) for name in ("eval_steps", "save_steps")}
        workers = {
            "dataloader_num_workers": self.num_workers,
            "dataloader_persistent_workers": self.num_workers > 0,
            "dataloader_pin_memory": self.hardware.device_type == "cuda",
            "per_device_eval_batch_size": self.batch_size,
        }
        return {
            **workers,
            **given,
            **every,
            "output_dir": str(self.output_dir),
            "use_cpu": self.hardware.is_cpu,
            "eval_strategy": given["eval_strategy"] if self.num_validation_images else "no",
            "per_device_train_batch_size": self.batch_size,
            "gradient_accumulation_steps": self.accumulation,
            "max_steps": self.num_steps,
            "num_train_epochs": self.num_epochs,
            "learning_rate": self.learning_rate,
            "warmup_steps": self.warmup_steps,
            "bf16": self.precision == "bfloat16",
            "fp16": self.precision == "float16",
        }

    def as_recipe(self) -> dict[str, Any]:
        """A flat recipe with the numbers of this plan: on as many devices and images it gives the same run again."""
        recipe = self.settings.as_recipe()
        for name in ("base_learning_rate", "warmup_epochs", "num_train_epochs"):
            recipe.pop(name, None)
        names = ("learning_rate", "warmup_steps", "max_steps", "gradient_accumulation_steps", "bf16")
        computed = {name: self.training_arguments()[name] for name in names}
        return {**recipe, **computed, "per_device_train_batch_size": self.batch_size}

    def describe(self) -> str:
        """About fifteen aligned lines, then a line for each thing that was changed."""
        rows = self.rows()
        width = max(map(len, rows))
        return "\n".join(
            [f"{name:<{width}}  {text}" for name, text in rows.items()] + [f"note: {n}" for n in self.notes]
        )

    def rows(self) -> dict[str, str]:
        """What `describe` says, by name."""
        return {
            "data": self.data,
            "images": f"{_count(self.num_train_images)} for training, {self.num_validation_images:,} for validation",
            **self.task_rows(),
            "images a step": self._batch(),
            "steps": f"{self.num_steps:,} = {_plain(self.num_epochs)} x {self.steps_per_epoch:,} an epoch",
            "learning rate": self._rate()
            + (f", a tenth of it from step {self.lr_drop_step:,}" if self.lr_drop_step else ""),
            "warm-up": f"{self.warmup_steps:,} steps, {self.warmup_steps / self.num_steps:.1%} of the run",
            "device": f"{self.hardware.device_type}, {self.precision}",
            "data workers": f"{self.num_workers} on {self.hardware.num_cpus} CPU cores"
            + (" (the images are decoded between the steps)" if not self.num_workers else ""),
            "memory": f"about {_size(self.bytes_for_weights + self.bytes_for_activations)} a device: "
            f"{_size(self.bytes_for_weights)} weights, gradients and Adam, "
            f"{_size(self.bytes_for_activations)} activations",
            "output": str(self.output_dir),
        }

    def task_rows(self) -> dict[str, str]:
        """Those about the model and what it learns from."""
        raise NotImplementedError

    def _interval(self, name: str) -> int | None:
        """In steps; below 1 it is a share of the run. Ours is never so short that a tiny run saves at each step."""
        every: float | None = getattr(self.settings, name)
        if every is None or every >= 1:
            return None if every is None else int(every)
        return max(1 if self.settings.is_given(name) else _MIN_INTERVAL, round(every * self.num_steps))

    def _batch(self) -> str:
        processes = f"{self.hardware.world_size} process{'es' if self.hardware.world_size > 1 else ''}"
        return f"{self.batch_size} x {processes} x {self.accumulation} accumulation = {self.images_per_step:,}"

    def _rate(self) -> str:
        if self.settings.counts("learning_rate"):
            return f"{_scientific(self.learning_rate)}, as given"
        base = _scientific(self.learning_rate * REFERENCE_BATCH / self.images_per_step)
        return f"{base} x {self.images_per_step:,} / {REFERENCE_BATCH} = {_scientific(self.learning_rate)}"


@dataclass(frozen=True)
class PretrainingPlan(Plan):
    """`num_hidden` are the fewest and the most masked patches of an image."""

    settings: PretrainingSettings
    num_hidden: tuple[int, int]

    def task_rows(self) -> dict[str, str]:
        size = in_millions(self.footprint.num_parameters)
        return {
            "model": f"{self.settings.model} with {self.settings.method}, {size}",
            "input": self._input(),
            "mask": self._mask(),
            "standardized by": self._standardized_by(),
        }

    def _input(self) -> str:
        height, width = self.settings.image_size
        patch, channels = self.settings.patch_size, self.settings.num_channels
        grid = f"{self.grid[0]} x {self.grid[1]} = {math.prod(self.grid)} patches of {patch} x {patch}"
        return f"{height} x {width} pixels, {channels} channel{'s' if channels > 1 else ''}, {grid}"

    def _mask(self) -> str:
        low, high = self.num_hidden
        count = f"{low}" if low == high else f"{low} to {high}"
        return f"{self.settings.mask_strategy}, {count} of {math.prod(self.grid)} patches hidden"

    def _standardized_by(self) -> str:
        kind, start = self.settings.image_stats, self.settings.start
        if kind == "source" and start is not None:
            mean, std = (" ".join(f"{number:.3g}" for number in numbers) for numbers in start.image_stats.values())
            return f"mean {mean} and deviation {std}, as {self.settings.init_from} is"
        return {"preset": "ImageNet's mean and deviation", "auto": "the images' own"}[kind]


def make_plan(
    settings: PretrainingSettings,
    hardware: Hardware,
    num_train_images: int | None,
    num_validation_images: int,
    footprint: Footprint,
    data: str,
) -> PretrainingPlan:
    """Every number of the run. `data` says what was found.

    Raises:
        ValueError: fewer images than processes, a mask that cannot be, or a precision that the device has not.
    """
    notes: list[str] = []
    numbers = training_schedule(settings, hardware, num_train_images, notes)
    drop_step = lr_drop_step(settings, numbers["steps_per_epoch"], numbers["num_steps"], notes)
    if not num_validation_images and settings.eval_strategy != "no":
        notes.append("no image is held out, so nothing is evaluated during training")
    return PretrainingPlan(
        settings=settings,
        hardware=hardware,
        data=data,
        num_train_images=num_train_images,
        num_validation_images=num_validation_images,
        footprint=footprint,
        grid=settings.grid,
        num_hidden=hidden_patches(settings),
        output_dir=Path(settings.output_dir or default_output_dir(settings.model, settings.method, settings.dataset)),
        notes=tuple(notes),
        lr_drop_step=drop_step,
        **numbers,
    )


def default_output_dir(model: str, method: str, dataset: Sequence[str]) -> str:
    """Return the output folder of a run without --output_dir."""
    return f"outputs/{model}-{method}-{data_name(dataset)}"


def data_name(dataset: Sequence[str]) -> str:
    """Return the names of the data as part of the name of a folder."""
    data = "-".join(re.sub(r"[^\w.-]+", "-", Path(name).resolve().name) for name in dataset[:3])
    return data.strip("-.") or "data"


def _count(number: int | None) -> str:
    return "an unknown number" if number is None else f"{number:,}"


def _plain(number: float) -> str:
    return f"{number:,.2f}".rstrip("0").rstrip(".")


def in_millions(number: int) -> str:
    return f"{number / 1e6:,.1f} million parameters"


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.0f} MB"


def _scientific(number: float) -> str:
    """0.00015 -> 1.5e-4."""
    mantissa, exponent = f"{number:.4e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"

"""The plan of a training run, printed before training; its numbers follow the rules of `commands.arithmetic`."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from commands import arithmetic
from commands.arithmetic import REFERENCE_BATCH, Hardware
from commands.memory import Footprint
from commands.settings import Origin, TrainingSettings

_MIN_INTERVAL = 20  # steps between evaluations and between checkpoints, unless the user gives an interval


@dataclass(frozen=True)
class Plan:
    """Base class of the plan of a training run.

    Args:
        data: Description of the data that was found.
        num_train_images: None for a stream.
        grid: Rows and columns of what the model makes of an image: patches or codes.
        batch_size: Images per device and forward pass.
        accumulation: Forward passes per optimizer step.
        notes: One sentence for each number that differs from what the settings ask for.
    """

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
    precision: str
    num_workers: int
    output_dir: Path
    notes: tuple[str, ...]

    # Of a run whose settings do not give them: images per step on a CPU, and the least number of steps.
    batch_on_cpu: ClassVar = 8
    min_steps: ClassVar = 2000

    @classmethod
    def make(
        cls,
        settings: Any,
        hardware: Hardware,
        num_images: tuple[int | None, int],
        footprint: Footprint,
        data: str,
        grid: tuple[int, int],
        notes: Sequence[str] = (),
        **own: Any,
    ) -> Self:
        """Return the plan.

        Args:
            num_images: Number of training images (None for a stream) and of validation images.
            own: Fields of the subclass.

        Raises:
            ValueError: If there are fewer images than processes, a stream without max_steps, or a precision that the
                device does not support.
        """
        notes = list(notes)
        num_train_images, num_validation_images = num_images
        if num_train_images is None and not settings.counts("max_steps"):
            raise ValueError("a data set without a length needs max_steps; give the number of optimizer steps")
        available = sys.maxsize if num_train_images is None else num_train_images * settings.crops_per_image
        batch_size, accumulation = arithmetic.batch_size_and_accumulation(
            settings, hardware, available, notes, cls.batch_on_cpu
        )
        steps_per_epoch = math.ceil(arithmetic.micro_batches(settings, available, batch_size, hardware) / accumulation)
        num_steps = arithmetic.number_of_steps(settings, steps_per_epoch, notes, cls.min_steps)
        if num_train_images is None:  # the whole run is one epoch
            steps_per_epoch = min(steps_per_epoch, num_steps)
        warmup_steps = arithmetic.number_of_warmup_steps(settings, steps_per_epoch, num_steps, notes)
        own |= cls.scheduled(settings, steps_per_epoch, num_steps, notes)
        if not num_validation_images and settings.eval_strategy != "no":
            notes.append("there are no validation images, so nothing is evaluated during training")
        return cls(
            settings=settings,
            hardware=hardware,
            data=data,
            num_train_images=num_train_images,
            num_validation_images=num_validation_images,
            footprint=footprint,
            grid=grid,
            batch_size=batch_size,
            accumulation=accumulation,
            steps_per_epoch=steps_per_epoch,
            num_steps=num_steps,
            learning_rate=arithmetic.peak_learning_rate(settings, batch_size * accumulation * hardware.world_size),
            warmup_steps=warmup_steps,
            precision=arithmetic.precision_of(settings, hardware),
            num_workers=arithmetic.number_of_workers(settings, hardware),
            output_dir=Path(settings.output_dir or settings.default_output_dir()),
            notes=tuple(notes),
            **own,
        )

    @classmethod
    def scheduled(cls, settings: Any, steps_per_epoch: int, num_steps: int, notes: list[str]) -> dict[str, Any]:
        """Return the fields of a subclass that depend on the length of the run."""
        return {}

    @property
    def images_per_step(self) -> int:
        """Images of all processes and all micro-batches of an optimizer step."""
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
        """Return the keyword arguments of TrainingArguments."""
        # `Trainer` would upload by itself, in another layout, with the token in a file, and fail when the Hub fails.
        ours = ("push_to_hub", "hub_")
        given = {n: value for n, value in self.settings.training_arguments().items() if not n.startswith(ours)}
        return {
            "dataloader_num_workers": self.num_workers,
            "dataloader_persistent_workers": self.num_workers > 0,
            "dataloader_pin_memory": self.hardware.device_type == "cuda",
            # Else the copy of a batch to the GPU would wait for all steps before it.
            "accelerator_config": {"non_blocking": self.hardware.device_type == "cuda"},
            "per_device_eval_batch_size": self.batch_size,
            **given,
            "eval_steps": self._interval("eval_steps"),
            "save_steps": self._interval("save_steps"),
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
        """Return a flat recipe with the numbers of this plan; with as many devices and images it repeats the run."""
        recipe, arguments = self.settings.as_recipe(), self.training_arguments()
        for name in ("base_learning_rate", "warmup_epochs", "num_train_epochs"):
            recipe.pop(name, None)
        names = ("learning_rate", "warmup_steps", "max_steps", "gradient_accumulation_steps", "bf16")
        return {**recipe, **{name: arguments[name] for name in (*names, "per_device_train_batch_size")}}

    def describe(self) -> str:
        """Return about fifteen aligned lines, followed by the notes."""
        num_images = "an unknown number" if self.num_train_images is None else f"{self.num_train_images:,}"
        processes = f"{self.hardware.world_size} process{'es' if self.hardware.world_size > 1 else ''}"
        num_epochs = f"{self.num_epochs:,.2f}".rstrip("0").rstrip(".")
        crops = self.settings.crops_per_image
        repeated = f" (an epoch has {crops} crops of each)" if crops > 1 else ""
        rows = {
            "data": self.data,
            "images": f"{num_images} for training{repeated}, {self.num_validation_images:,} for validation",
            **self.task_rows(),
            "images per step": f"{self.batch_size} x {processes} x {self.accumulation} accumulation = "
            f"{self.images_per_step:,}",
            "steps": f"{self.num_steps:,} = {num_epochs} x {self.steps_per_epoch:,} per epoch",
            "learning rate": self.learning_rate_in_words(),
            "warm-up": f"{self.warmup_steps:,} steps, {self.warmup_steps / self.num_steps:.1%} of the run",
            "device": f"{self.hardware.device_type}, {self.precision}",
            "data workers": f"{self.num_workers} on {self.hardware.num_cpus} CPU cores"
            + (" (the images are decoded between the steps)" if not self.num_workers else ""),
            "memory": f"about {_size(self.bytes_for_weights + self.bytes_for_activations)} per device: "
            f"{_size(self.bytes_for_weights)} weights, gradients and Adam, "
            f"{_size(self.bytes_for_activations)} activations",
            "arithmetic": f"{self.footprint.flops_per_image / 1e9:.3g} GFLOP per image, forward and backward",
            "output": str(self.output_dir),
        }
        width = max(map(len, rows))
        lines = [f"{name:<{width}}  {text}" for name, text in rows.items()]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def task_rows(self) -> dict[str, str]:
        """Return the lines about the model and its inputs by name."""
        raise NotImplementedError

    def _interval(self, name: str) -> int | None:
        """Return a number of steps; a value below 1 is a fraction of the run, by default of at least 20 steps."""
        every: float | None = getattr(self.settings, name)
        if every is None or every >= 1:
            return None if every is None else int(every)
        return max(1 if self.settings.is_given(name) else _MIN_INTERVAL, round(every * self.num_steps))

    def learning_rate_in_words(self) -> str:
        if self.settings.counts("learning_rate"):
            is_by_rule = self.settings.origins["learning_rate"] == Origin.RULE
            return f"{_scientific(self.learning_rate)}, {'by --schedule auto' if is_by_rule else 'as given'}"
        base = _scientific(self.learning_rate * REFERENCE_BATCH / self.images_per_step)
        return f"{base} x {self.images_per_step:,} / {REFERENCE_BATCH} = {_scientific(self.learning_rate)}"


def in_millions(number: int) -> str:
    return f"{number / 1e6:,.1f} million parameters"


def _size(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.0f} MB"


def _scientific(number: float) -> str:
    """0.00015 -> 1.5e-4."""
    mantissa, exponent = f"{number:.4e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"

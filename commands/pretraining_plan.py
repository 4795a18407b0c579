"""The plan of a pre-training run."""

import math
from dataclasses import dataclass
from typing import Any

from commands.arithmetic import Hardware
from commands.memory import Footprint
from commands.plan import Plan, in_millions
from commands.pretraining_settings import PretrainingSettings
from data.masks import MASK_STRATEGIES
from data.seeds import seeded_generator


@dataclass(frozen=True)
class PretrainingPlan(Plan):
    """The plan of a pre-training run.

    Args:
        num_masked: Smallest and largest number of masked patches of an image.
        lr_drop_step: First step with a tenth of the learning rate.
    """

    settings: PretrainingSettings
    num_masked: tuple[int, int]
    lr_drop_step: int | None

    @classmethod
    def scheduled(
        cls, settings: PretrainingSettings, steps_per_epoch: int, num_steps: int, notes: list[str]
    ) -> dict[str, Any]:
        if settings.lr_drop_epoch is None:
            return {"lr_drop_step": None}
        step = round(settings.lr_drop_epoch * steps_per_epoch)
        if step >= num_steps:
            notes.append(
                f"the learning rate never drops: --lr_drop_epoch {settings.lr_drop_epoch:g} is after the last step"
            )
        return {"lr_drop_step": step}

    def task_rows(self) -> dict[str, str]:
        size = in_millions(self.footprint.num_parameters)
        return {
            "model": f"{self.settings.model} with {self.settings.method}, {size}",
            "input": self._input(),
            "mask": self._mask(),
            "standardized by": self._standardized_by(),
        }

    def learning_rate_in_words(self) -> str:
        drop = f", a tenth of it from step {self.lr_drop_step:,}" if self.lr_drop_step else ""
        return super().learning_rate_in_words() + drop

    def _input(self) -> str:
        height, width = self.settings.image_size
        patch, channels = self.settings.patch_size, self.settings.num_channels
        grid = f"{self.grid[0]} x {self.grid[1]} = {math.prod(self.grid)} patches of {patch} x {patch}"
        return f"{height} x {width} pixels, {channels} channel{'s' if channels > 1 else ''}, {grid}"

    def _mask(self) -> str:
        low, high = self.num_masked
        count = f"{low}" if low == high else f"{low} to {high}"
        return f"{self.settings.mask_strategy}, {count} of {math.prod(self.grid)} patches masked"

    def _standardized_by(self) -> str:
        kind, start = self.settings.image_stats, self.settings.start
        if kind == "source" and start is not None:
            mean, std = (" ".join(f"{number:.3g}" for number in numbers) for numbers in start.image_stats.values())
            return f"mean {mean} and std {std}, as {self.settings.init_from}"
        return {"preset": "mean and std of ImageNet", "auto": "mean and std of these images"}[kind]


def make_pretraining_plan(
    settings: PretrainingSettings,
    hardware: Hardware,
    num_train_images: int | None,
    num_validation_images: int,
    footprint: Footprint,
    data: str,
) -> PretrainingPlan:
    """Plan a pre-training run; `data` describes what was found.

    Raises:
        ValueError: If there are fewer images than processes, a stream has no max_steps, the mask is impossible, or
            the device does not support the precision.
    """
    num_images = (num_train_images, num_validation_images)
    num_masked = count_masked_patches(settings)
    return PretrainingPlan.make(settings, hardware, data, num_images, footprint, settings.grid, num_masked=num_masked)


def count_masked_patches(settings: PretrainingSettings) -> tuple[int, int]:
    """Return the smallest and the largest number of masked patches, counted on a mask of each ratio."""
    grid, ratio = settings.grid, settings.mask_ratio
    unit = {"unit": settings.mask_unit} if settings.mask_strategy == "random-unit" else {}
    draw = MASK_STRATEGIES[settings.mask_strategy]
    counts = [
        int(draw(grid, one, seeded_generator("plan"), **unit).sum())
        for one in (ratio if isinstance(ratio, tuple) else (ratio,))
    ]
    return counts[0], counts[-1]

"""The plan of a pre-training run."""

import math
from dataclasses import dataclass
from typing import Any

from commands.plan import Plan, in_millions
from commands.pretraining_settings import PretrainingSettings
from data.masks import MASK_STRATEGIES
from data.seeds import seeded_generator
from data.size_schedule import first_steps_of_stages
from modeling import CONFIGS


@dataclass(frozen=True)
class PretrainingPlan(Plan):
    """The plan of a pre-training run.

    Args:
        num_masked: Smallest and largest number of masked patches of an image.
        num_head_steps: First steps, which train new parts only.
        lr_drop_step: First step with a tenth of the learning rate.
        first_steps: First step of each stage of the image_size_schedule.
    """

    settings: PretrainingSettings
    num_masked: tuple[int, int]
    num_head_steps: int
    lr_drop_step: int | None
    first_steps: tuple[int, ...]

    @classmethod
    def scheduled(
        cls, settings: PretrainingSettings, steps_per_epoch: int, num_steps: int, notes: list[str]
    ) -> dict[str, Any]:
        step = None if settings.lr_drop_epoch is None else round(settings.lr_drop_epoch * steps_per_epoch)
        if step is not None and step >= num_steps:
            notes.append(
                f"the learning rate never drops: --lr_drop_epoch {settings.lr_drop_epoch:g} is after the last step"
            )
        if settings.start is None and CONFIGS[settings.method].needs_trained_encoder:
            notes.append(
                f"--method {settings.method} is meant for a trained encoder, and this one has random weights: "
                "give --init_from, such as the output folder of a run with --method mae"
            )
        num_head_steps = round(settings.head_warmup_epochs * steps_per_epoch) if settings.start is not None else 0
        if not settings.is_users("head_warmup_epochs"):
            num_head_steps = min(num_head_steps, num_steps // 2)
        if num_head_steps >= num_steps:
            raise ValueError(
                f"--head_warmup_epochs {settings.head_warmup_epochs:g} is {num_head_steps:,} steps, but the whole "
                f"training has {num_steps:,}: the encoder would not be trained; use fewer"
            )
        draw, ratio = MASK_STRATEGIES[settings.mask_strategy], settings.mask_ratio
        unit = {"unit": settings.mask_unit} if settings.mask_strategy == "random-unit" else {}
        ratios = ratio if isinstance(ratio, tuple) else (ratio, ratio)
        num_masked = tuple(int(draw(settings.grid, one, seeded_generator("plan"), **unit).sum()) for one in ratios)
        first_steps = first_steps_of_stages(len(settings.image_size_schedule or ()), num_steps)
        return {
            "num_head_steps": num_head_steps,
            "lr_drop_step": step,
            "num_masked": num_masked,
            "first_steps": tuple(first_steps),
        }

    def task_rows(self) -> dict[str, str]:
        settings, num_patches = self.settings, math.prod(self.grid)
        height, width = settings.image_size
        color = f"{settings.num_channels} channel{'s' if settings.num_channels > 1 else ''}"
        patches = f"{self.grid[0]} x {self.grid[1]} = {num_patches} patches"
        low, high = self.num_masked
        masked = f"{low}" if low == high else f"{low} to {high}"
        stages = zip(settings.image_size_schedule or (), self.first_steps, strict=True)
        growing = "".join(f", {side} from step {step:,}" for side, step in stages)
        share, num_masks = settings.prediction_ratio, settings.num_masks
        unit, of_method = settings.mask_unit * settings.patch_size, CONFIGS[settings.method].mask_probability
        probability = settings.method_settings.get("mask_probability", of_method)
        return {
            "model": f"{settings.model} with {settings.method}, {in_millions(self.footprint.num_parameters)}",
            "input": f"{height} x {width} pixels, {color}, {patches} of {settings.patch_size} x {settings.patch_size}"
            + growing,
            "mask": f"{settings.mask_strategy}, {masked} of {num_patches} patches masked"
            + (f", in squares of {unit} x {unit} pixels" if settings.mask_strategy == "random-unit" else "")
            + (f", {share:.0%} of them predicted" if share < 1 else "")
            + (f", {num_masks} masks per image" if num_masks > 1 else "")
            + (f", in {probability:.0%} of the crops" if probability < 1 else "")
            if probability
            else "none",
            "standardized by": self._standardized_by(),
        }

    def learning_rate_in_words(self) -> str:
        drop = f", a tenth of it from step {self.lr_drop_step:,}" if self.lr_drop_step else ""
        if num_steps := self.num_head_steps:
            drop += f"; for {num_steps:,} steps of new parts on the encoder as it is, then anew of all"
        if self.settings.layer_decay != 1:
            drop += f", times {self.settings.layer_decay:g} from layer to layer"
        return super().learning_rate_in_words() + drop

    def _standardized_by(self) -> str:
        kind, start = self.settings.image_stats, self.settings.start
        if kind == "source" and start is not None:
            numbers = [start.image_stats[name] for name in ("image_mean", "image_std")]
            mean, std = (" ".join(f"{number:.3g}" for number in each) for each in numbers)
            return f"mean {mean} and std {std}, as {self.settings.init_from}"
        return {"preset": "mean and std of ImageNet", "auto": "mean and std of these images"}[kind]

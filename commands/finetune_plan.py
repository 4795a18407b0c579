"""The plan of a fine-tuning run."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from commands.arithmetic import Hardware
from commands.finetune_settings import FinetuneSettings
from commands.memory import Footprint
from commands.plan import Plan, in_millions

_METRICS = ("accuracy", "top5_accuracy", "balanced_accuracy", "macro_f1", "calibration_error", "loss")
_TOP = 5


@dataclass(frozen=True)
class FinetunePlan(Plan):
    """The plan of a fine-tuning run; its validation images choose the best checkpoint."""

    settings: FinetuneSettings
    num_classes: int

    batch_on_cpu: ClassVar = 32
    min_steps: ClassVar = 1000

    def task_rows(self) -> dict[str, str]:
        settings, size = self.settings, self.settings.image_size
        what = {"finetune": "everything", "linear": "the head"}.get(
            settings.mode, f"the last {settings.num_trained_blocks} blocks and the head"
        )
        grid = f"{self.grid[0]} x {self.grid[1]} patches"
        decayed = f", each layer {settings.layer_decay:g} of the one above" if settings.layer_decay < 1 else ""
        return {
            "model": f"{Path(settings.model).name}{', random weights' if settings.from_scratch else ''}, "
            f"{in_millions(self.footprint.num_parameters)}",
            "trained": f"{what}, {in_millions(self.footprint.num_trained_parameters)}{decayed}",
            "input": f"{size} x {size} pixels, {grid}; the head reads the {settings.pooling}",
            "classes": f"{self.num_classes:,}",
            "views": self._views(),
        }

    def training_arguments(self) -> dict[str, Any]:
        arguments = super().training_arguments()
        if not self.settings.is_given("save_steps"):
            arguments["save_steps"] = arguments["eval_steps"]  # the best weights must have been saved
        metric = self.settings.metric_for_best_model
        is_chosen = "no" not in (arguments["eval_strategy"], arguments["save_strategy"])
        return {
            **arguments,
            "load_best_model_at_end": is_chosen and self.settings.load_best_model_at_end,
            "metric_for_best_model": metric,
            "greater_is_better": not metric.endswith(("loss", "error")),
            "restore_callback_states_from_checkpoint": True,  # how long early stopping has waited
        }

    def _views(self) -> str:
        settings, views = self.settings, []
        for name in ("rand_augment", "mixup", "cutmix", "label_smoothing_factor", "erasing", "drop_path"):
            if value := getattr(settings, name):
                views.append(f"{name.removesuffix('_factor').replace('_', ' ')} {value:g}")
        low, high = settings.crop_scale
        return ", ".join([f"crops of {low:g} to {high:g} of the image", "flipped half the time", *views])


def make_finetune_plan(
    settings: FinetuneSettings,
    hardware: Hardware,
    num_images: tuple[int, int],
    num_classes: int,
    footprint: Footprint,
    grid: tuple[int, int],
    data: str,
    notes: Sequence[str] = (),
) -> FinetunePlan:
    """Plan a fine-tuning run.

    Args:
        num_images: Number of training and of validation images.

    Raises:
        ValueError: If there are fewer images than processes, the device does not support the precision, or the best
            checkpoint cannot be chosen.
    """
    _check_choice(settings, num_images[1], num_classes)
    return FinetunePlan.make(settings, hardware, data, num_images, footprint, grid, notes, num_classes=num_classes)


def _check_choice(settings: FinetuneSettings, num_validation_images: int, num_classes: int) -> None:
    """Check that there are images and a metric for early stopping and for the best checkpoint."""
    if settings.early_stopping_patience and (not num_validation_images or settings.eval_strategy == "no"):
        raise ValueError(
            "--early_stopping_patience needs validation images: use --validation_fraction 0.1, or leave "
            "--early_stopping_patience out"
        )
    metric, possible = settings.metric_for_best_model.removeprefix("eval_"), list(_METRICS)
    if num_classes <= _TOP:
        possible.remove("top5_accuracy")
    if metric not in possible:
        raise ValueError(f"--metric_for_best_model is {metric}, expected one of: {', '.join(possible)}")

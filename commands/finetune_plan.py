"""The plan of a fine-tuning run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from commands.finetune_settings import FinetuneSettings
from commands.plan import Plan, in_millions


@dataclass(frozen=True)
class FinetunePlan(Plan):
    """The plan of a fine-tuning run; its validation images choose the best checkpoint.

    Args:
        metrics: Names of the metrics that may choose the best checkpoint.
        rows_of_task: Lines about the input, the labels and the views by name.
    """

    settings: FinetuneSettings
    metrics: Sequence[str]
    rows_of_task: Mapping[str, str]

    batch_on_cpu: ClassVar = 32
    min_steps: ClassVar = 1000

    def __post_init__(self) -> None:
        settings = self.settings
        if settings.early_stopping_patience and (not self.num_validation_images or settings.eval_strategy == "no"):
            raise ValueError(
                "--early_stopping_patience needs validation images: use --validation_fraction 0.1, or leave "
                "--early_stopping_patience out"
            )
        metric = settings.metric_for_best_model.removeprefix("eval_")
        if metric not in self.metrics:
            raise ValueError(f"--metric_for_best_model is {metric}, expected one of: {', '.join(self.metrics)}")

    def task_rows(self) -> dict[str, str]:
        settings = self.settings
        what = {"finetune": "everything", "linear": "the head"}.get(
            settings.mode, f"the last {settings.num_trained_blocks} blocks and the head"
        )
        decayed = f", each layer {settings.layer_decay:g} of the one above" if settings.layer_decay < 1 else ""
        return {
            "model": f"{Path(settings.model).name}{', random weights' if settings.from_scratch else ''}, "
            f"{in_millions(self.footprint.num_parameters)}",
            "trained": f"{what}, {in_millions(self.footprint.num_trained_parameters)}{decayed}",
            **self.rows_of_task,
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

"""Warn when a metric of an evaluation is not finite; training continues, as its own loss is finite (`training.guard`).

Shapes: B images of a micro-batch.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm.auto import tqdm
from transformers import TrainerCallback

from data.images import NamedItems

_MAX_CHECKED = 64  # images whose loss is computed one by one


class EvaluationGuard(TrainerCallback):
    """Warn of non-finite metrics by name, with the validation images whose loss is not finite."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def watch_loss(self, loss: torch.Tensor | None, image_index: torch.Tensor | None) -> None:
        """Keep the loss of a batch and its `image_index` (B,) until the metrics are logged."""
        if loss is not None and image_index is not None:
            self._batches.append((loss, image_index))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        names = _non_finite(logs or {})
        culprits = self._bad_images() if "eval_loss" in names else []  # it is the same on all processes
        if "eval_loss" in (logs or {}):
            self._batches.clear()
        if names and state.is_world_process_zero:
            images = f"; the loss of these images is not finite: {', '.join(culprits)}" if culprits else ""
            line = f"warning: NaN or infinite at step {state.global_step}: {', '.join(names)}{images}"
            tqdm.write(line, file=sys.stderr)

    def _bad_images(self) -> list[str]:
        trainer, dataset = self.trainer, self.trainer.eval_dataset
        indices = [i for loss, batch in self._batches if not torch.isfinite(loss).all() for i in batch.tolist()]
        culprits = []
        if isinstance(dataset, NamedItems):
            checked = [] if trainer.is_sharded else indices[:_MAX_CHECKED]  # processes would wait for each other
            culprits = [dataset.name(i) for i in checked if not trainer.has_finite_loss(dataset.item(i, epoch=0))]
        return sorted(set(gather_object(culprits)))


def describe_non_finite(history: Sequence[Mapping[str, Any]]) -> str | None:
    """Return which metrics of the evaluations in a log history are not finite, and when; None if all are finite."""
    steps: dict[str, list[str]] = {}
    for entry in history:
        for name in _non_finite(entry):
            steps.setdefault(name, []).append(f"{entry['step']:,}")
    return "; ".join(f"{name} was NaN or infinite at step {', '.join(at)}" for name, at in steps.items()) or None


def _non_finite(logs: Mapping[str, Any]) -> list[str]:
    metrics = {name: value for name, value in logs.items() if name.startswith("eval_")}
    return [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]

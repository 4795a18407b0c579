"""Trains an image tokenizer: schedules by step, averaged weights, and how much of the codebook is in use.

Shapes: B images, K codes.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from training.tokenizer_schedules import TokenizerSchedules
from training.trainer import MimTrainer
from training.weight_average import AveragesWeights, WeightAverage


def stack_items(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Items of `PretrainingImages` -> {"pixel_values" (B, C, H, W), "image_index" (B,)}."""
    return default_collate([{name: item[name] for name in ("pixel_values", "image_index")} for item in items])


@dataclass(frozen=True)
class CodebookUse:
    """Of `num_tokens` codes: how many different ones occur, and exp of the entropy of their frequencies."""

    num_tokens: int
    num_alive: int
    perplexity: float

    @classmethod
    def of(cls, histogram: torch.Tensor) -> "CodebookUse":
        """From counts (K,)."""
        num_tokens = int(histogram.sum())
        frequencies = histogram[histogram > 0].double() / num_tokens
        entropy = -(frequencies * frequencies.log()).sum().item()
        return cls(num_tokens, len(frequencies), math.exp(entropy))


class TokenizerTrainer(AveragesWeights, MimTrainer):
    """`MimTrainer` for a model whose forward takes `kl_weight` and `temperature` and returns its codes.

    Evaluation uses the moving average of the weights.
    """

    average: WeightAverage

    def __init__(self, *args: Any, schedules: TokenizerSchedules, ema_decay: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.schedules = schedules
        self.keep_average(ema_decay)
        self._sums: torch.Tensor | None = None  # (3,) reconstruction loss, divergence, micro-batches
        self._histogram: torch.Tensor | None = None  # (K,) of held-out images

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if model.training:
            inputs = {**inputs, **self.schedules.at(self.state.global_step)}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        one = torch.ones_like(outputs["kl"])
        sums = torch.stack([outputs["reconstruction_loss"], outputs["kl"], one])
        self._sums = sums if self._sums is None else self._sums + sums
        if not model.training:
            counts = torch.bincount(outputs["codes"].flatten(), minlength=self.model.config.vocab_size)
            self._histogram = counts if self._histogram is None else self._histogram + counts
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        sums_of_training, self._sums = self._sums, None
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self._sums = sums_of_training

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs.update(self._mean_losses(), **self.schedules.at(max(self.state.global_step - 1, 0)))
        elif "eval_loss" in logs and self._histogram is not None:
            logs["eval_kl"] = self._mean_losses()["kl"]
            use = CodebookUse.of(self.accelerator.reduce(self._histogram, reduction="sum"))
            self._histogram = None
            logs.update({f"eval_{name}": value for name, value in asdict(use).items()})
        super().log(logs, *args, **kwargs)

    def _mean_losses(self) -> dict[str, float]:
        if self._sums is None:
            return {}
        reconstruction_loss, kl, count = self.accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums = None
        return {"reconstruction_loss": reconstruction_loss / count, "kl": kl / count}

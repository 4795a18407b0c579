"""What SimDINO and the hybrid share: a head for class tokens that agree, and a watch on how they are spread.

Paper: Wu et al. 2025, "Simplifying DINO via Coding Rate Regularization", arXiv:2502.10385, Sec. 3.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .base import MimPreTrainedModel
from .collapse import std_between_rows
from .ema import EmaTeacher
from .self_distillation import ProjectionHead

_COLLAPSED_STD = 0.1  # as a share of that of features that are spread evenly over the sphere


class ClassTokenAgreement(EmaTeacher, MimPreTrainedModel):
    """Mix-in of a model with a teacher whose forward pass gives the `row_moments` of its features as "target".

    Its config has the sizes of the head and `coding_rate_weight`.
    """

    config: Any

    def build_heads(self) -> nn.ModuleDict:
        """Return the head of the class token."""
        config = self.config
        sizes = (config.encoder_config.hidden_size, config.head_hidden_size, config.head_bottleneck_size)
        return nn.ModuleDict({"class_token": ProjectionHead(*sizes)})

    @property
    def compares_images(self) -> bool:
        return bool(self.config.coding_rate_weight > 0)

    def summarize_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return the std of the teacher's features between crops; 1 if they are spread evenly over the sphere."""
        others = super().summarize_metrics({name: total for name, total in sums.items() if name != "target"})
        std = std_between_rows(sums["target"]).item() * self.config.head_bottleneck_size**0.5
        return {**others, "target_std": std}

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        """Return the std of the targets."""
        std = logs.get("target_std", logs.get("eval_target_std"))
        return [] if std is None else [f"target std {std:.3f}"]

    def collapse_signs(self, logs: Mapping[str, float]) -> str | None:
        """Look at the teacher's features."""
        if (std := logs.get("target_std", 1.0)) >= _COLLAPSED_STD:
            return super().collapse_signs(logs)
        return (
            f"the teacher's features of all images are nearly equal (std {std:.3f}, below {_COLLAPSED_STD}): raise "
            "coding_rate_weight or the batch size, or lower the learning rate."
        )

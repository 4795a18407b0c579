"""Hybrid: an MAE whose class token also agrees with that of a teacher, a moving average that sees whole crops.

Papers: Huang et al. 2022, "Contrastive Masked Autoencoders are Stronger Vision Learners" (CMAE), arXiv:2207.13532,
Sec. 3, for the pair of a masked student with a pixel decoder and a momentum encoder that sees everything; Wu et al.
2025 (SimDINO), arXiv:2502.10385, Sec. 3, for the loss of the class token.
Differs from CMAE: Both networks see two crops, there one, shifted by a few pixels. The class tokens of different crops
agree, through one head, and a coding rate keeps images apart, in place of the contrast of decoded features.
Shapes: as in `mae.py` with one mask for each of R = B * T crops, T = 2; F features of the head.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from .adaptive_masks import HidesHardPatches
from .base import MimOutput
from .class_token_agreement import ClassTokenAgreement
from .collapse import row_moments
from .ema import full_precision, rising_momentum
from .mae import MaeConfig, MaeForPreTraining
from .patches import patch_grid, patchify, visible_and_predicted_indices
from .reconstruction import pixel_panel
from .schedules import Progress, Schedule
from .self_distillation import ProjectionHead, agreement_loss, coding_rate
from .views import View

_CODING_RATE_EPS = 0.05  # SimDINO's


@strict
class HybridConfig(MaeConfig):
    """Configuration of an MAE with self-distillation, with the settings of `MaeConfig`.

    Args:
        distill_weight: Weight of the class token's loss beside that of the pixels; short runs gained on one set of
            images and lost on another (docs/small-data.md).
        coding_rate_weight: Weight in the class token's loss of the coding rate, which keeps images apart.
        head_hidden_size, head_bottleneck_size: Sizes of the projection head.
        teacher_momentum_start: Momentum of the teacher's average, which rises to 1; 0 for an average over 2% of the
            steps, at least 0.9 and at most 0.996.
    """

    model_type = "mim_hybrid"
    transformers_model_types: ClassVar[tuple[str, ...]] = ()
    settings_fixed_by_weights: ClassVar[tuple[str, ...]] = ("decoder", "head")
    paper = None  # nobody has published this pair of losses

    distill_weight: float = 1.0
    coding_rate_weight: float = 1.0
    head_hidden_size: int = 2048
    head_bottleneck_size: int = 256
    teacher_momentum_start: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.distill_weight <= 0:
            raise ValueError(f"distill_weight is {self.distill_weight}, expected above 0; without it this is `mae`")
        if not 0 <= self.teacher_momentum_start <= 1:
            raise ValueError(f"teacher_momentum_start is {self.teacher_momentum_start}, expected 0 to 1")

    @property
    def views(self) -> tuple[View, ...]:
        """Two crops, each with a mask."""
        return (View(num_crops=2),)


class HybridForPreTraining(ClassTokenAgreement, MaeForPreTraining):
    """A student that sees the visible patches of crops and decodes the others; a teacher that sees whole crops."""

    config: HybridConfig
    teacher: Any
    averages: ClassVar[dict[str, str]] = {"teacher": "encoder", "teacher_heads": "heads"}
    frozen_parameters: ClassVar[tuple[str, ...]] = (*MaeForPreTraining.frozen_parameters, "teacher", "teacher_heads")
    exported = "teacher"
    _keep_in_fp32_modules_strict = ["teacher", "teacher_heads"]  # noqa: RUF012 - read by transformers

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.teacher = self.build_encoder()
        self.heads, self.teacher_heads = self.build_heads(), self.build_heads()
        self.post_init()
        self.after_loading_encoder()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ProjectionHead):
            module.init_weights()

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        num_masked_patches: int | None = None,
        return_loss: bool = True,
        bool_predicted_pos: torch.Tensor | None = None,
        num_predicted_patches: int | None = None,
        mask_noise: torch.Tensor | None = None,
        hard_share: float | None = None,
    ) -> MimOutput:
        """Predict the masked patches, and what the teacher makes of the other crop.

        Args:
            pixel_values: (B, T, C, H, W), uint8 or standardized; for predictions only, (R, C, H, W) too.
            bool_masked_pos: (B, T, N) or (R, N), True = masked; equally many in every mask.
            num_masked_patches: Number of masked patches in the batch.
            bool_predicted_pos: Those masked patches that are predicted, equally many in every mask; all if None.
            num_predicted_patches: Number of predicted patches in the batch.
            mask_noise, hard_share: See `adaptive_masks.py`.
        """
        crops = pixel_values.flatten(0, -4)  # (R, C, H, W)
        masks = bool_masked_pos.flatten(0, -2)  # (R, N)
        masks = self.move_masks(crops, masks, mask_noise, hard_share, bool_predicted_pos)
        patch_size = self.config.encoder_config.patch_size
        grid = patch_grid(tuple(crops.shape[-2:]), patch_size)
        patches = patchify(crops, patch_size)  # (R, N, P)
        visible, predicted = visible_and_predicted_indices(
            masks, bool_predicted_pos, num_masked_patches, num_predicted_patches
        )  # (R, V), (R, Q)
        states = self.encoder.encode(self.take_pixels(patches, visible), visible, grid)
        logits = self.predict(states, visible, predicted, grid)  # (R, Q, P)
        if not return_loss:
            return MimOutput(logits=logits)
        targets = self.take_pixels(patches, predicted)
        pixel_loss, metrics = self.learn_losses(self.pixel_loss(logits, targets), crops, logits, targets, predicted)

        num_crops = pixel_values.shape[1]
        student = self.heads["class_token"](states[-1][:, 0]).unflatten(0, (-1, num_crops))  # (B, T, F)
        teacher = self.teacher_features(patches, grid).unflatten(0, (-1, num_crops))  # (B, T, F)
        class_loss = agreement_loss(student, teacher)
        if self.config.coding_rate_weight:
            rate = coding_rate((student.float() + teacher) / 2, _CODING_RATE_EPS)
            class_loss = class_loss - self.config.coding_rate_weight * rate
        losses = {"pixels": pixel_loss, "class_token": class_loss}
        metrics = {**(metrics or {}), "target": row_moments(teacher.flatten(0, 1))}
        return MimOutput(loss=self.weighted_sum(losses), losses=losses, logits=logits, metrics=metrics)

    @torch.no_grad()
    def teacher_features(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Return the head's features (R, F) of the teacher's class token for whole crops (R, N, P)."""
        every = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)  # (R, N)
        with full_precision(patches.device):
            tokens = self.teacher.encode(self.take_pixels(patches, every).float(), every, grid)[-1]
            features: torch.Tensor = self.teacher_heads["class_token"](tokens[:, 0])
        return features

    def loss_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """The pixels' loss is a mean over predicted patches, the class token's over images."""
        return {"pixels": super().loss_counts(batch)["loss"], "class_token": len(batch["pixel_values"])}

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {"pixels": 1.0, "class_token": self.config.distill_weight}

    def schedules(self, num_steps: int, steps_per_epoch: int) -> dict[str, Schedule]:
        """Return the teacher's momentum, and MAE's schedules."""
        momentum = rising_momentum(self.config.teacher_momentum_start, num_steps)
        return {"teacher_momentum": momentum, **super().schedules(num_steps, steps_per_epoch)}

    def after_step(self, progress: Progress) -> None:
        """Let teacher and loss map follow."""
        super().after_step(progress)
        HidesHardPatches.after_step(self, progress)

    def panel(self, batch: Mapping[str, Any], targets: Any = None) -> dict[str, torch.Tensor]:
        """Return the first crop, its masked version and the predicted pixels."""
        return pixel_panel(self, {**batch, "pixel_values": batch["pixel_values"][:, 0]})

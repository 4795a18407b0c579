"""SimDINO: DINO without prototypes; crops of an image agree, and a coding rate keeps those of all images apart.

Paper: Wu et al. 2025, "Simplifying DINO via Coding Rate Regularization", arXiv:2502.10385, Sec. 3.
Code: RobinWu218/SimDINO at 645b37d.
Differs: The encoder has no LayerScale, which a ViTModel cannot hold. As in DINO, the momentum follows the length of
the training.
Shapes: B images with T = 2 global and L local crops each, R = B * T, C channels, H W and h w pixels, D width, E width
of the head's bottleneck.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict

from .base import MimOutput, Paper
from .class_token_agreement import ClassTokenAgreement
from .collapse import row_moments
from .ema import full_precision
from .multi_crop import MultiCropConfig, MultiCropModel
from .self_distillation import agreement_loss, coding_rate


@strict
class SimdinoConfig(MultiCropConfig):
    """Configuration of SimDINO, with the settings of `MultiCropConfig`.

    Args:
        coding_rate_weight: Weight of the coding rate.
        coding_rate_eps: Squared error up to which features are coded; smaller spreads them more.
    """

    model_type = "mim_simdino"
    paper: ClassVar[Paper | None] = Paper(
        "Simplifying DINO via Coding Rate Regularization",
        "Ziyang Wu and Jingyuan Zhang and Druv Pai and XuDong Wang and Chandan Singh and Jianwei Yang and "
        "Jianfeng Gao and Yi Ma",
        2025,
        "2502.10385",
    )
    mask_probability: ClassVar[float] = 0.0

    coding_rate_weight: float = 1.0
    coding_rate_eps: float = 0.05

    def __post_init__(self, **kwargs: object) -> None:
        super().__post_init__(**kwargs)
        if self.coding_rate_eps <= 0:
            raise ValueError(f"coding_rate_eps is {self.coding_rate_eps}, expected above 0")


class SimdinoForPreTraining(ClassTokenAgreement, MultiCropModel):
    """A student that sees global and local crops, and a teacher that sees the global ones."""

    config: SimdinoConfig
    predicts_patches = False

    def __init__(self, config: SimdinoConfig):
        super().__init__(config)
        self.post_init()
        self.after_loading_encoder()

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        local_pixel_values: torch.Tensor | None = None,
        num_masked_patches: int | None = None,
        return_loss: bool = True,
    ) -> MimOutput:
        """Compare what student and teacher see in crops; nothing is masked.

        Args:
            pixel_values: (B, T, C, H, W), the global crops, uint8 or standardized.
            local_pixel_values: (B, L, C, h, w).
        """
        num_crops = pixel_values.shape[1]
        crops = self.standardize(pixel_values).flatten(0, 1)  # (R, C, H, W)
        class_tokens = self.all_class_tokens(self.encoder.tokens(crops), local_pixel_values, num_crops)
        if not return_loss:
            return MimOutput()
        student = self.heads["class_token"](class_tokens)  # (B, T+L, E)
        with torch.no_grad(), full_precision(crops.device):
            teacher = self.teacher_heads["class_token"](self.teacher.tokens(crops.float())[:, 0])  # (R, E)
        teacher = teacher.unflatten(0, (-1, num_crops))  # (B, T, E)
        losses = {"agreement": agreement_loss(student, teacher)}
        if self.config.coding_rate_weight:
            means = (student[:, :num_crops].float() + teacher) / 2  # (B, T, E)
            losses["coding_rate"] = -coding_rate(means, self.config.coding_rate_eps)
        metrics = {"target": row_moments(teacher.flatten(0, 1))}
        return MimOutput(loss=self.weighted_sum(losses), losses=losses, metrics=metrics)

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {"agreement": 1.0, "coding_rate": self.config.coding_rate_weight}

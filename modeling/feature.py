"""Predict the features of a frozen teacher, or histograms of gradients, at masked patches.

Papers: Fang et al. 2022, "EVA: Exploring the Limits of Masked Visual Representation Learning at Scale",
arXiv:2211.07636, Sec. 2; Wei et al. 2022 (MVP), arXiv:2203.05175, Sec. 3; for the histograms Wei et al. 2021
(MaskFeat), arXiv:2112.09133, Sec. 3.
Code: baaivision/EVA/EVA-01/eva at aeb2f9a; open-mmlab/mmpretrain (selfsup/maskfeat.py) at 08dc8c7.
Differs: any teacher. Its features are normalized over their width; EVA and MVP take CLIP's, projected to the space of
texts. `distill_visible` is ours.
The teacher is not part of the model: `training.targets` runs it, or the batch contains its features.
Shapes: B images, C channels, H W pixels, N patches, M masked patches in the batch, D width of the teacher (of the
histograms of a patch), h w rows and columns of the teacher's grid.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .base import MimConfig, MimOutput, MimPreTrainedModel, Paper, mean_metric
from .dino_encoders import NATIVE_TYPES, build_native_encoder
from .feature_panel import enlarged, principal_colors
from .frozen_teacher import match_grid
from .gradient_histograms import gradient_histograms, histogram_size
from .patches import in_unit_range, masked_indices, patch_grid
from .reconstruction import checkerboard

FEATURE_LOSSES = ("cosine", "smooth_l1")


@strict
class FeatureConfig(MimConfig):
    """Configuration of a model that predicts features.

    Args:
        feature_loss: What compares predictions with a teacher's features: cosine (1 - cosine similarity) or smooth_l1.
            Histograms of gradients are always compared by their squared error.
        distill_visible: Whether visible patches, and the class token if the teacher has one, are predicted too.
        drop_path_rate: Drop path of the last block, to which it rises linearly from 0; of all blocks in the encoders
            of DINOv2 and DINOv3.
        feature_size: Width of the teacher's features; 0 for histograms of gradients.
        teacher_has_class_token: Whether the teacher has a class token.
    """

    model_type = "mim_feature"
    paper = Paper(
        "EVA: Exploring the Limits of Masked Visual Representation Learning at Scale",
        "Yuxin Fang and Wen Wang and Binhui Xie and Quan Sun and Ledell Wu and Xinggang Wang and Tiejun Huang and "
        "Xinlong Wang and Yue Cao",
        2022,
        "2211.07636",
    )
    encoder_types = NATIVE_TYPES
    settings_of_targets = ("feature_size", "teacher_has_class_token")

    feature_loss: str = "cosine"
    distill_visible: bool = False
    drop_path_rate: float = 0.0
    feature_size: int = 0
    teacher_has_class_token: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if hasattr(self.encoder_config, "drop_path_rate"):
            self.encoder_config.drop_path_rate = self.drop_path_rate
        if self.feature_loss not in FEATURE_LOSSES:
            raise ValueError(f"feature_loss is {self.feature_loss!r}, expected one of {', '.join(FEATURE_LOSSES)}")
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {self.drop_path_rate}, expected 0 or more and below 1")
        if self.feature_size < 0:
            raise ValueError(f"feature_size is {self.feature_size}, expected 0 or more")

    @property
    def grid(self) -> tuple[int, int]:
        """The rows and columns of patches."""
        return patch_grid(self.encoder_config.image_size, self.encoder_config.patch_size)


class FeatureForPreTraining(MimPreTrainedModel):
    """An encoder of all patches, the masked ones replaced by a mask token, and one linear layer."""

    config: FeatureConfig
    encoder: Any
    targets = "teacher"
    panel_caption = "Features of patches as colors: input, masked, target, target with masked patches predicted"
    _no_split_modules = ["ViTLayer"]  # noqa: RUF012 - read by transformers as a class attribute
    no_weight_decay: ClassVar[tuple[str, ...]] = ("mask_token",)  # as MaskFeat

    def __init__(self, config: FeatureConfig):
        super().__init__(config)
        encoder_config = config.encoder_config
        self.encoder = build_native_encoder(encoder_config, config.drop_path_rate)
        size = config.feature_size or histogram_size(encoder_config.patch_size, encoder_config.num_channels)
        self.head = nn.Linear(encoder_config.hidden_size, size)
        if config.distill_visible and config.teacher_has_class_token:
            self.class_token_head = nn.Linear(encoder_config.hidden_size, size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
            init.zeros_(module.bias)

    def loss_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Each loss is a mean over patches, masked or visible ones, or over images."""
        if not self.config.distill_visible:
            return super().loss_counts(batch)
        num_masked = batch["num_masked_patches"]
        counts = {"masked": num_masked, "visible": batch["bool_masked_pos"].numel() - num_masked}
        return counts | ({"class_token": len(batch["bool_masked_pos"])} if self.config.teacher_has_class_token else {})

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        teacher_features: torch.Tensor | None = None,
        teacher_class_token: torch.Tensor | None = None,
        num_masked_patches: int | None = None,
        return_loss: bool = True,
    ) -> MimOutput:
        """Predict the features of the masked patches.

        Args:
            pixel_values: (B, C, H, W), uint8 or standardized.
            bool_masked_pos: (B, N), True = masked; the number may differ by image.
            teacher_features: (B, D, h, w) of the whole image, on any grid; not for histograms of gradients.
            teacher_class_token: (B, D).
            num_masked_patches: Number of masked patches in the batch.

        Raises:
            ValueError: If the teacher's features are missing for the loss, or nothing is masked.
        """
        config = self.config
        masked = masked_indices(bool_masked_pos, num_masked_patches)  # (M,)
        tokens = self.encoder.tokens(self.standardize(pixel_values), bool_masked_pos)  # (B, 1+...+N, W)
        patches = tokens[:, -bool_masked_pos.shape[1] :].flatten(0, 1)  # (B * N, W)
        if not (config.distill_visible and return_loss):
            logits = self.head(patches[masked])  # (M, D)
            if not return_loss:
                return MimOutput(logits=logits)
            targets = self.patch_targets(pixel_values, teacher_features).flatten(0, 1)[masked]
            loss = self.errors(logits, targets).mean()
            return MimOutput(loss=loss, logits=logits, metrics=_metrics(logits, targets))
        predictions = self.head(patches)  # (B * N, D)
        targets = self.patch_targets(pixel_values, teacher_features).flatten(0, 1)
        errors, visible = self.errors(predictions, targets), ~bool_masked_pos.flatten()  # (B * N,)
        visible_error = (errors * visible).sum() / visible.sum().clamp(min=1)
        losses = {"masked": errors[masked].mean(), "visible": visible_error}
        if config.teacher_has_class_token:
            if teacher_class_token is None:
                raise ValueError("the class token of the teacher is distilled: pass `teacher_class_token` (B, D)")
            target = self.normalize(teacher_class_token)
            losses["class_token"] = self.errors(self.class_token_head(tokens[:, 0]), target).mean()
        logits = predictions[masked]
        return MimOutput(
            loss=self.weighted_sum(losses), losses=losses, logits=logits, metrics=_metrics(logits, targets[masked])
        )

    @torch.no_grad()
    def patch_targets(self, pixel_values: torch.Tensor, teacher_features: torch.Tensor | None) -> torch.Tensor:
        """Return what is predicted of each patch, (B, N, D), float32."""
        config = self.config
        if not config.feature_size:
            return gradient_histograms(self._levels(pixel_values), config.encoder_config.patch_size)
        if teacher_features is None:
            raise ValueError("the features of a teacher are predicted: pass `teacher_features` (B, D, h, w)")
        return self.normalize(match_grid(teacher_features, config.grid))

    def normalize(self, features: torch.Tensor) -> torch.Tensor:
        """Give each of a teacher's features (..., D) mean 0 and variance 1; histograms stay as they are."""
        return F.layer_norm(features.float(), features.shape[-1:]) if self.config.feature_size else features.float()

    def errors(self, predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the error (R,) of each row of (R, D), in float32."""
        predictions = predictions.float()
        if not self.config.feature_size:
            return F.mse_loss(predictions, targets, reduction="none").mean(-1)
        if self.config.feature_loss == "cosine":
            return 1 - F.cosine_similarity(predictions, targets, dim=-1)
        return F.smooth_l1_loss(predictions, targets, reduction="none").mean(-1)

    def _levels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Return images in 256 levels: the gradients of uint8 images are exact, on every device."""
        if pixel_values.dtype == torch.uint8 and self.config.value_range is None:
            return pixel_values
        pixel_values = self.standardize(pixel_values)
        mean, std = (
            pixel_values.new_tensor(x).view(-1, 1, 1) for x in (self.config.image_mean, self.config.image_std)
        )
        return ((pixel_values * std + mean) * 255).round()

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        """Return how similar predictions and targets are."""
        names = (("similarity", ""), ("eval_similarity", "validation "))
        return [f"{name}similarity {logs[key]:.3f}" for key, name in names if key in logs]

    def panel_problem(self, targets: Any = None) -> str | None:
        """A teacher's features are drawn by the teacher."""
        return "the teacher is not at hand" if self.config.feature_size and targets is None else None

    @torch.no_grad()
    def panel(self, batch: Mapping[str, Any], targets: Any = None) -> dict[str, torch.Tensor]:
        """Return the image, and the principal components of the target's and of the predicted patches as colors."""
        mask, pixel_values, grid = batch["bool_masked_pos"], batch["pixel_values"], self.config.grid
        features = None if targets is None else targets(dict(batch))[targets.output]
        true = self.patch_targets(pixel_values, features)  # (B, N, D)
        logits = self.normalize(self(pixel_values, mask, return_loss=False).logits)
        pasted = torch.where(mask[..., None], self.predicted_units(logits, mask), true)
        if not pasted.isfinite().all():
            raise ValueError("the features contain NaN or infinity and cannot be drawn; check the loss of this step")
        colors = principal_colors(torch.cat([true, pasted]).unflatten(1, grid)).chunk(2)
        size, images = (
            (pixel_values.shape[2], pixel_values.shape[3]),
            in_unit_range(pixel_values.cpu(), self.config.value_range),
        )
        masked_pixels = enlarged(mask.view(-1, 1, *grid).float().cpu(), size).bool()
        return {
            "input": images,
            "masked": torch.where(masked_pixels, checkerboard(images), images),
            "target: principal components as colors": enlarged(colors[0], size),
            "target, masked patches predicted": enlarged(colors[1], size),
        }


@torch.no_grad()
def _metrics(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the cosine similarity of (M, D) predictions and targets."""
    return {"similarity": mean_metric(F.cosine_similarity(logits.float(), targets, dim=-1).mean(), len(logits))}

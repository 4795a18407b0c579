"""What DINO, iBOT, DINOv2 and SimDINO share: global and local crops of an image, a student, and a teacher.

The student sees all crops, the teacher, a moving average of the student, the global ones.
Shapes: B images with T = 2 global and L local crops each, R = B * T, C channels, H W and h w pixels, D width.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedModel

from .base import MimConfig, MimPreTrainedModel
from .dino_encoders import NATIVE_TYPES, build_native_encoder
from .ema import EmaTeacher, rising_momentum
from .feature_panel import feature_panel
from .patches import height_and_width
from .schedules import Progress, Schedule
from .self_distillation import ProjectionHead, clip_each_
from .views import Photometric, View

_BLUR, _SOLARIZE = (1.0, 0.1), (0.0, 0.2)  # probabilities for the two global crops


@strict
class CropsConfig(MimConfig):
    """Configuration of crops, drop path and heads.

    Args:
        head_hidden_size, head_bottleneck_size: Sizes of the projection head.
        num_local_crops: Local crops of an image, L.
        local_image_size: Side of a local crop in pixels; 0 for 3/7 of the image, as 96 of 224.
        min_local_crop_scale, max_local_crop_scale: Share of the image's area in a local crop.
        drop_path_rate: Drop path of the student's last block, to which it grows from the first one; of all blocks in
            the encoders of DINOv2 and DINOv3.
    """

    published_batch: ClassVar[int] = 1024
    settings_fixed_by_weights: ClassVar[tuple[str, ...]] = ("head",)

    head_hidden_size: int = 2048
    head_bottleneck_size: int = 256
    num_local_crops: int = 10
    local_image_size: int = 0
    min_local_crop_scale: float = 0.05
    max_local_crop_scale: float = 0.25
    drop_path_rate: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not 0 < self.min_local_crop_scale <= self.max_local_crop_scale <= 1:
            raise ValueError(
                f"min_local_crop_scale is {self.min_local_crop_scale} and max_local_crop_scale "
                f"{self.max_local_crop_scale}, expected 0 < smallest <= largest <= 1"
            )

    @property
    def views(self) -> tuple[View, ...]:
        """Two global crops, and the local ones; on small images the blur is as much smaller than on 224 pixels."""
        patch = self.encoder_config.patch_size
        height, width = height_and_width(self.encoder_config.image_size)
        scale = min(1.0, min(height, width) / 224)
        photometric = Photometric(blur_radius=(0.1 * scale, 2.0 * scale))
        size = tuple(max(patch, round(side * 3 / 7 / patch) * patch) for side in (height, width))
        if self.local_image_size:
            size = (self.local_image_size, self.local_image_size)
        global_photometric = photometric._replace(blur_probability=_BLUR, solarize_probability=_SOLARIZE)
        views = [View(num_crops=2, photometric=global_photometric)]
        if self.num_local_crops:
            areas = (self.min_local_crop_scale, self.max_local_crop_scale)
            views.append(View("local_pixel_values", self.num_local_crops, size, areas, photometric))
        return tuple(views)


@strict
class MultiCropConfig(CropsConfig):
    """Configuration of crops, encoders, head and schedules of a student and its teacher.

    Args:
        teacher_momentum_start: Momentum of the teacher's average, which rises to 1; 0 for an average over 2% of the
            steps, at least 0.9 and at most 0.996.
        max_tensor_norm: Largest norm of the gradient of each tensor; 0 for no limit.
        weight_decay_start, weight_decay_end: The weight decay rises with half a cosine.
        exported_weights: Which encoder users get, that of the teacher or of the student.
    """

    encoder_types: ClassVar[tuple[str, ...]] = NATIVE_TYPES
    # As in the authors' code. Steps that are too large make the features of all images alike (docs/small-data.md).
    learning_rate_is_linear: ClassVar[bool] = True

    teacher_momentum_start: float = 0.0
    max_tensor_norm: float = 3.0
    weight_decay_start: float = 0.04
    weight_decay_end: float = 0.4
    exported_weights: str = "teacher"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if hasattr(self.encoder_config, "drop_path_rate"):
            self.encoder_config.drop_path_rate = self.drop_path_rate
        if not 0 <= self.teacher_momentum_start <= 1:
            raise ValueError(f"teacher_momentum_start is {self.teacher_momentum_start}, expected 0 to 1")
        if self.exported_weights not in ("teacher", "student"):
            raise ValueError(f"exported_weights is {self.exported_weights!r}, expected 'teacher' or 'student'")


class MultiCropModel(EmaTeacher, MimPreTrainedModel):
    """Student and teacher, each with `heads`; a subclass calls `post_init` and `after_loading_encoder`."""

    config: MultiCropConfig
    encoder: Any
    teacher: Any
    averages: ClassVar[dict[str, str]] = {"teacher": "encoder", "teacher_heads": "heads"}
    panel_caption = (
        "What the teacher represents: input, attention of its class token, principal components of its patches"
    )
    frozen_parameters = ("teacher", "teacher_heads")
    _keep_in_fp32_modules_strict = ["teacher", "teacher_heads"]  # noqa: RUF012 - read by transformers
    _no_split_modules = ["ViTLayer"]  # noqa: RUF012 - read by transformers as a class attribute

    def __init__(self, config: Any):
        super().__init__(config)
        self.encoder, self.teacher = self.build_encoder(), self.build_encoder()
        self.exported = "teacher" if config.exported_weights == "teacher" else "encoder"
        self.no_weight_decay = self.encoder.no_weight_decay
        self.heads, self.teacher_heads = self.build_heads(), self.build_heads()

    def freeze(self) -> None:
        """Freeze the mask token as well if nothing is masked: encoders of DINOv2 and DINOv3 always have one."""
        super().freeze()
        if not self.sees_masked_patches and self.encoder.embeddings.mask_token is not None:
            self.encoder.embeddings.mask_token.requires_grad_(False)

    def build_encoder(self) -> PreTrainedModel:
        """Return an encoder, with a mask token if there are masks."""
        config = self.config
        encoder: PreTrainedModel
        encoder = build_native_encoder(config.encoder_config, config.drop_path_rate, self.sees_masked_patches)
        return encoder

    @property
    def sees_masked_patches(self) -> bool:
        """Whether masked patches are replaced by a mask token."""
        return False

    def build_heads(self) -> nn.ModuleDict:
        """Return the heads by the name of their loss."""
        raise NotImplementedError

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ProjectionHead):
            module.init_weights()

    def all_class_tokens(
        self, tokens: torch.Tensor, local_pixel_values: torch.Tensor | None, num_crops: int
    ) -> torch.Tensor:
        """Return the student's class tokens (B, T+L, D), given its output (R, 1+...+N, D) for the global crops.

        Args:
            local_pixel_values: (B, L, C, h, w).
            num_crops: T.
        """
        class_tokens = [tokens[:, 0].unflatten(0, (-1, num_crops))]  # (B, T, D)
        if local_pixel_values is not None:
            local_tokens = self.encoder.tokens(self.standardize(local_pixel_values).flatten(0, 1))[:, 0]
            class_tokens.append(local_tokens.unflatten(0, local_pixel_values.shape[:2]))  # (B, L, D)
        return torch.cat(class_tokens, dim=1)

    def loss_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """All losses are means over images."""
        num_images = len(batch["pixel_values"])
        return {name: num_images for name, weight in self.loss_weights.items() if weight}

    def schedules(self, num_steps: int, steps_per_epoch: int) -> dict[str, Schedule]:
        """Return the teacher's momentum and the weight decay."""
        config = self.config
        return {
            "teacher_momentum": rising_momentum(config.teacher_momentum_start, num_steps),
            "weight_decay": Schedule(config.weight_decay_start, config.weight_decay_end, num_steps),
        }

    def before_update(self, progress: Progress) -> None:
        """Clip each gradient by itself."""
        if self.config.max_tensor_norm:
            clip_each_(self.parameters(), self.config.max_tensor_norm)

    def panel(self, batch: Mapping[str, Any], targets: Any = None) -> dict[str, torch.Tensor]:
        """Draw the first global crop, where the teacher's class token looks, and the features of its patches."""
        return feature_panel(self, batch["pixel_values"][:, 0], {"teacher": self.teacher}, attends="teacher")

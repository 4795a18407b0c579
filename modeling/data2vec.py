"""data2vec for images: predict what a teacher, which sees the whole image, represents at the masked patches.

Paper: Baevski et al. 2022, "data2vec: A General Framework for Self-supervised Learning in Speech, Vision and
Language", arXiv:2202.03555, Sec. 3 and 4.1.
Code: facebookresearch/data2vec_vision at af9a363.
Differs: the authors' constant momentum is for 500,000 steps, and shorter trainings have a smaller one unless it is
given. Users get the teacher's encoder by default, not the student's.
Shapes: B images, C channels, H W pixels, N patches, M masked patches in the batch, D width.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import Data2VecVisionConfig, PreTrainedConfig
from transformers import initialization as init

from .adaptive_masks import AttentionMasksConfig, attended_masks
from .base import MimConfig, MimOutput, MimPreTrainedModel, Paper
from .collapse import row_moments, std_between_rows
from .dino_encoders import NATIVE_TYPES, build_native_encoder
from .ema import EmaTeacher, full_precision, momentum_schedule
from .encoders import BEIT_DEFAULTS, BeitEncoder, trunc_normal_at_one_std_
from .feature_panel import feature_panel
from .patches import masked_indices, patch_grid
from .schedules import Schedule

# Authors' values by depth. The paper has a drop path of 0.2 for both.
_BASE = {"layer_scale_init_value": 1e-4, "drop_path_rate": 0.25, "attention_probs_dropout_prob": 0.05}
_LARGE = {"layer_scale_init_value": 1e-5, "drop_path_rate": 0.2, "attention_probs_dropout_prob": 0.15}
_COLLAPSED_STD = 0.1  # at which fairseq, the authors' later code, ends a training
# Names of BeitModel -> Data2VecVisionModel, whose blocks are the same.
_NATIVE_NAMES = (
    (r"^layers\.", "encoder.layer."),
    (r"^shared_position_bias\.", "encoder.relative_position_bias."),
    (r"(\.\d+)\.relative_position_bias\.", r"\1.attention.attention.relative_position_bias."),
    (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."),
    (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
)


@strict
class FeatureTargetConfig(MimConfig):
    """Base class of the configurations of data2vec and data2vec 2.0.

    Args:
        num_target_layers: Last blocks of the teacher whose mean is the target; 0 to choose it by the depth.
        teacher_momentum: Momentum of the teacher at the end; 0 for an average over the last 2% of the steps, and at
            most 0.9998, which is the published value for 500,000 steps.
        teacher_momentum_start: Momentum at the start; 0 for a constant one.
        teacher_momentum_steps: Steps of a linear rise of the momentum; 0 for half a cosine over all steps.
        exported_weights: Which encoder users get, that of the teacher or of the student.
    """

    num_target_layers: int = 0
    teacher_momentum: float = 0.0
    teacher_momentum_start: float = 0.0
    teacher_momentum_steps: int = 0
    exported_weights: str = "teacher"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        num_blocks = self.encoder_config.num_hidden_layers
        self.num_target_layers = self.num_target_layers or max(1, self.published_num_target_layers(num_blocks))
        if not 1 <= self.num_target_layers <= num_blocks:
            raise ValueError(
                f"num_target_layers is {self.num_target_layers}, expected 1 to {num_blocks}, the encoder's blocks, or "
                "0 to choose it"
            )
        for name in ("teacher_momentum", "teacher_momentum_start"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1; 0 to choose it")
        if self.exported_weights not in ("teacher", "student"):
            raise ValueError(f"exported_weights is {self.exported_weights!r}, expected 'teacher' or 'student'")

    def published_num_target_layers(self, num_blocks: int) -> int:
        """Return how many of the teacher's blocks the authors average for an encoder of this depth."""
        raise NotImplementedError


@strict
class Data2VecConfig(FeatureTargetConfig, AttentionMasksConfig):
    """Configuration of a data2vec.

    Args:
        post_target_layer_norm: Whether the mean of the last blocks is normalized again.
        smooth_l1_beta: Error at which the squared loss becomes an absolute one.
    """

    model_type = "mim_data2vec"
    paper = Paper(
        "data2vec: A General Framework for Self-supervised Learning in Speech, Vision and Language",
        "Alexei Baevski and Wei-Ning Hsu and Qiantong Xu and Arun Babu and Jiatao Gu and Michael Auli",
        2022,
        "2202.03555",
    )
    encoder_defaults: ClassVar[dict[str, Any]] = {**BEIT_DEFAULTS, **_BASE}
    encoder_types = ("beit", *NATIVE_TYPES)

    post_target_layer_norm: bool = True
    smooth_l1_beta: float = 2.0

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.encoder_config if isinstance(self.encoder_config, dict) else {}
        if given.get("model_type", "beit") == "beit" and given.get("num_hidden_layers", 12) >= 24:
            self.encoder_config = {**_LARGE, **given}
        super().__post_init__(**kwargs)
        if self.smooth_l1_beta < 0:
            raise ValueError(f"smooth_l1_beta is {self.smooth_l1_beta}, expected 0 or more")

    def published_num_target_layers(self, num_blocks: int) -> int:
        """Return half of the blocks, at most 6."""
        return min(6, num_blocks // 2)


class Data2VecEncoder(BeitEncoder):
    """A BeitEncoder that is exported as a Data2VecVisionModel."""

    native_has_pooler: ClassVar[bool] = False

    def tokens(self, pixels: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Return the normalized output (B, 1+N, D), the class token first."""
        tokens: torch.Tensor = self(pixels, bool_masked_pos=bool_masked_pos).last_hidden_state
        return tokens

    def last_blocks(self, pixels: torch.Tensor, num_blocks: int) -> list[torch.Tensor]:
        """Return the outputs of the last blocks, (B, 1+N, D) each, before the final norm."""
        return self.block_outputs(pixels, range(len(self.layers) - num_blocks + 1, len(self.layers) + 1))

    def as_native(self) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
        """Return config and weights of the Data2VecVisionModel that computes the same function."""
        inherited = {setting.name for setting in fields(PreTrainedConfig)} | {"out_indices"}
        own = [
            s.name for s in fields(Data2VecVisionConfig) if s.name not in inherited and hasattr(self.config, s.name)
        ]
        config = Data2VecVisionConfig(**{name: getattr(self.config, name) for name in own})
        state = {}
        for name, tensor in self.state_dict().items():
            for pattern, replacement in _NATIVE_NAMES:
                name = re.sub(pattern, replacement, name)
            state[name] = tensor
        return config, state


class FeatureTargetModel(EmaTeacher, MimPreTrainedModel):
    """Base class of data2vec and data2vec 2.0: how the teacher follows, and what the log shows."""

    config: FeatureTargetConfig
    encoder: Any
    teacher: Any
    panel_caption = "What teacher and student represent: input, principal components of their patches"

    def __init__(self, config: FeatureTargetConfig):
        super().__init__(config)
        self.exported = "teacher" if config.exported_weights == "teacher" else "encoder"

    def schedules(self, num_steps: int, steps_per_epoch: int) -> dict[str, Schedule]:
        """Return the momentum of the teacher."""
        config = self.config
        given = config.teacher_momentum, config.teacher_momentum_start, config.teacher_momentum_steps
        return {"teacher_momentum": momentum_schedule(*given, num_steps)}

    def summarize_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return the std of targets and predictions between patches, which is 0 if all are the same (collapse)."""
        return {f"{name}_std": std_between_rows(moments).item() for name, moments in sums.items()}

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        """Return the std of the targets."""
        std = logs.get("target_std", logs.get("eval_target_std"))
        return [] if std is None else [f"target std {std:.3f}"]

    def collapse_signs(self, logs: Mapping[str, float]) -> str | None:
        """Look at the targets only: the predictions are equal until the model has learned something."""
        if (std := logs.get("target_std", 1.0)) >= _COLLAPSED_STD:
            return super().collapse_signs(logs)
        return (
            f"the targets of all patches are nearly equal (std {std:.3f}, below {_COLLAPSED_STD}): lower the learning "
            "rate, or raise teacher_momentum."
        )

    def panel(self, batch: Mapping[str, Any], targets: Any = None) -> dict[str, torch.Tensor]:
        """Draw the images, and the features of their patches in both networks."""
        return feature_panel(self, batch["pixel_values"], {"teacher": self.teacher, "student": self.encoder})


class Data2VecForPreTraining(FeatureTargetModel):
    """A student that sees the masked image, and a teacher that sees it whole and follows the student (Fig. 1)."""

    config: Data2VecConfig
    _no_split_modules = ["BeitLayer"]  # noqa: RUF012 - read by transformers as a class attribute

    def __init__(self, config: Data2VecConfig):
        super().__init__(config)
        build = Data2VecEncoder if config.encoder_config.model_type == "beit" else build_native_encoder
        self.encoder, self.teacher = (build(config.encoder_config) for _ in range(2))
        self.no_weight_decay = self.encoder.no_weight_decay
        self.lm_head = nn.Linear(config.encoder_config.hidden_size, config.encoder_config.hidden_size)
        self.post_init()
        self.after_loading_encoder()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_at_one_std_(module.weight, std=0.02)
            init.zeros_(module.bias)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        num_masked_patches: int | None = None,
        return_loss: bool = True,
        mask_noise: torch.Tensor | None = None,
    ) -> MimOutput:
        """Predict the teacher's representations of the masked patches.

        Args:
            pixel_values: (B, C, H, W), uint8 or standardized.
            bool_masked_pos: (B, N), True = masked; the number may differ by image.
            num_masked_patches: Number of masked patches in the batch.
            mask_noise: (B, U), see `adaptive_masks.py`.

        Raises:
            ValueError: If nothing is masked.
        """
        pixels = self.standardize(pixel_values)
        seen, bool_masked_pos = attended_masks(
            self, lambda: self.teacher_blocks(pixels), pixels, bool_masked_pos, mask_noise
        )
        masked = masked_indices(bool_masked_pos, num_masked_patches)  # (M,)
        num_patches = bool_masked_pos.shape[1]
        features = self.encoder.tokens(pixels, bool_masked_pos)
        logits = self.lm_head(_patches(features, num_patches)[masked])  # (M, D)
        if not return_loss:
            return MimOutput(logits=logits)
        targets = self.teacher_targets(pixels, masked, *(() if seen is None else (seen,)))
        loss = nn.functional.smooth_l1_loss(logits.float(), targets, beta=self.config.smooth_l1_beta)
        metrics = {"target": row_moments(targets), "prediction": row_moments(logits)}
        return MimOutput(loss=loss, logits=logits, metrics=metrics)

    def teacher_blocks(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """Return what the teacher's last blocks make of whole images, (B, 1+N, D) each, before its final norm."""
        blocks: list[torch.Tensor] = self.teacher.last_blocks(pixels.float(), self.config.num_target_layers)
        return blocks

    @torch.no_grad()
    def teacher_targets(self, pixels: torch.Tensor, masked: torch.Tensor, seen: Any = None) -> torch.Tensor:
        """Return the mean of the normalized outputs of the teacher's last blocks, before its final norm (Sec. 3.3).

        Args:
            pixels: (B, C, H, W), standardized; the teacher sees all of them.
            masked: (M,), indices of the masked patches.
            seen: The outputs of `teacher_blocks`, if they are known.

        Returns:
            (M, D), float32.
        """
        rows, columns = patch_grid(tuple(pixels.shape[-2:]), self.config.encoder_config.patch_size)
        with full_precision(pixels.device):
            blocks = self.teacher_blocks(pixels) if seen is None else seen
            targets = torch.stack([_normalize(_patches(block, rows * columns)[masked]) for block in blocks]).mean(0)
            return _normalize(targets) if self.config.post_target_layer_norm else targets


def _patches(tokens: torch.Tensor, num_patches: int) -> torch.Tensor:
    """(B, 1+...+N, D) -> (B * N, D), without the class token and registers."""
    return tokens[:, -num_patches:].flatten(0, 1)


def _normalize(features: torch.Tensor) -> torch.Tensor:
    """Give each row of (M, D) mean 0 and variance 1, without learned weights."""
    return nn.functional.layer_norm(features.float(), features.shape[-1:], eps=1e-5)

"""A toy method: self-distillation between two crops, with an EMA teacher, class-token and patch losses.

Paper: after Zhou et al. 2021, "iBOT: Image BERT Pre-Training with Online Tokenizer", arXiv:2111.07832, Sec. 3.
Differs: two crops, no centering, one small linear head.
Shapes: B images, V = 2 crops of each, C channels, H W pixels, N patches, M masked patches in the batch, D width,
K outputs of the head.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from .base import MimConfig, MimOutput, MimPreTrainedModel, Paper, mean_metric
from .ema import EmaTeacher
from .encoders import BEIT_DEFAULTS, BeitEncoder
from .patches import masked_indices
from .schedules import Progress, Schedule
from .views import View


@strict
class TwoCropsConfig(MimConfig):
    """Configuration of the toy; `num_outputs` is K."""

    model_type = "mim_two_crops"
    encoder_defaults: ClassVar[dict[str, Any]] = {**BEIT_DEFAULTS, "drop_path_rate": 0.0}
    encoder_types = ("beit",)
    paper = Paper(
        "iBOT: Image BERT Pre-Training with Online Tokenizer",
        "Jinghao Zhou and Chen Wei and Huiyu Wang and Wei Shen and Cihang Xie and Alan Yuille and Tao Kong",
        2021,
        "2111.07832",
    )

    num_outputs: int = 64

    @property
    def views(self) -> tuple[View, ...]:
        """Two masked crops."""
        return (View(num_crops=2, crop_scale=(0.4, 1.0)),)


class TwoCropsForPreTraining(EmaTeacher, MimPreTrainedModel):
    """A student that sees masked crops and a teacher that sees them whole; the teacher is exported."""

    config: TwoCropsConfig
    encoder: BeitEncoder
    averages: ClassVar[dict[str, str]] = {"teacher": "encoder", "teacher_head": "head"}
    frozen_parameters = ("teacher", "teacher_head")
    exported = "teacher"
    _no_split_modules = ["BeitLayer"]  # noqa: RUF012 - read by transformers as a class attribute

    def __init__(self, config: TwoCropsConfig):
        super().__init__(config)
        self.encoder, self.teacher = BeitEncoder(config.encoder_config), BeitEncoder(config.encoder_config)
        self.no_weight_decay = self.encoder.no_weight_decay
        width = config.encoder_config.hidden_size
        self.head, self.teacher_head = (nn.Linear(width, config.num_outputs, bias=False) for _ in range(2))
        self.post_init()
        self.after_loading_encoder()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.1)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        num_masked_patches: int | None = None,
        teacher_temperature: float = 0.07,
        return_loss: bool = True,
    ) -> MimOutput:
        """Compare student and teacher on crops (B, V, C, H, W) with masks (B, V, N)."""
        pixels = self.standardize(pixel_values).flatten(0, 1)  # (B*V, C, H, W)
        masks = bool_masked_pos.flatten(0, 1)  # (B*V, N)
        masked = masked_indices(masks, num_masked_patches)  # (M,)
        class_logits, logits = self._outputs(self.encoder, self.head, masked, pixels, bool_masked_pos=masks)
        if not return_loss:
            return MimOutput(logits=logits)
        with torch.no_grad():
            class_targets, targets = (
                (outputs.float() / teacher_temperature).softmax(dim=-1)
                for outputs in self._outputs(self.teacher, self.teacher_head, masked, pixels)
            )
        other = class_targets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)  # of the other crop
        losses = {"class": _cross_entropy(class_logits, other), "patch": _cross_entropy(logits, targets)}
        entropy = -(class_targets * class_targets.clamp(min=1e-9).log()).sum(dim=-1).mean()
        return MimOutput(
            loss=self.weighted_sum(losses),
            losses=losses,
            logits=logits,
            metrics={"teacher_entropy": mean_metric(entropy, len(class_targets))},
        )

    def _outputs(
        self, encoder: nn.Module, head: nn.Module, masked: torch.Tensor, pixels: torch.Tensor, **masks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the outputs of the class tokens (B*V, K) and of the masked patches (M, K)."""
        features = encoder(pixels, **masks).last_hidden_state  # (B*V, 1+N, D)
        return head(features[:, 0]), head(features[:, 1:].flatten(0, 1)[masked])

    def loss_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """The class loss is a mean over crops, the patch loss over masked patches."""
        num_images, num_crops = batch["pixel_values"].shape[:2]
        return {"class": num_images * num_crops, "patch": batch["num_masked_patches"]}

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {"patch": 0.5}

    def schedules(self, num_steps: int, steps_per_epoch: int) -> dict[str, Schedule]:
        """The teacher's temperature rises in the first half of the training, its momentum in all of it."""
        return {
            "teacher_temperature": Schedule(0.04, 0.07, num_steps // 2, "linear"),
            "teacher_momentum": Schedule(0.9, 1.0, num_steps),
        }

    def before_update(self, progress: Progress) -> None:
        """Keep the head as it is in the first half of the training."""
        if 2 * progress.step < progress.num_steps:
            self.head.weight.grad = None

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        return [f"teacher entropy {logs['teacher_entropy']:.2f}"] if "teacher_entropy" in logs else []


def _cross_entropy(logits: torch.Tensor, targets: torch.Tensor, temperature: float = 0.1) -> torch.Tensor:
    """Return the mean cross entropy of logits (n, K) with soft targets (n, K)."""
    return -(targets * (logits.float() / temperature).log_softmax(dim=-1)).sum(dim=-1).mean()

"""iBOT: predict the prototypes that a teacher sees in other crops, and in the masked patches of the same crop.

Papers: Zhou et al. 2021, "iBOT: Image BERT Pre-Training with Online Tokenizer", arXiv:2111.07832, Sec. 3; Caron et al.
2021, "Emerging Properties in Self-Supervised Vision Transformers" (DINO), arXiv:2104.14294, Sec. 3; for the loss of
Gram matrices Siméoni et al. 2025, "DINOv3", arXiv:2508.10104, Sec. 4 (there the frozen encoder sees larger crops).
Code: bytedance/ibot at da316d8; facebookresearch/dino at 7c446df.
Differs: Position embeddings of local crops are resized to an exact size, as in transformers, instead of by a factor.
Temperatures change in every step, not in every epoch. Temperature warm-up, momentum and number of prototypes follow
the length of the run and the number of images unless they are given. At first, the coding rate of SimDINO keeps the
images of a batch apart.
Shapes: B images with T = 2 global and L local crops each, R = B * T, C channels, H W and h w pixels, N patches, M
masked patches in the batch, D width, E width of the head's bottleneck, K prototypes.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from .adaptive_masks import AttentionMasksConfig, attended_masks
from .base import MimOutput, Paper
from .collapse import distribution_sums, marginal_entropy, mean_entropy
from .ema import full_precision
from .multi_crop import MultiCropConfig, MultiCropModel
from .patches import masked_indices
from .schedules import Progress, Schedule
from .self_distillation import (
    Center,
    PrototypeHead,
    class_token_loss,
    coding_rate,
    gram_loss,
    koleo_loss,
    patch_loss,
    sinkhorn_knopp,
)
from .views import View

_TEMPERATURE_STEPS = 37_500
_CODING_RATE_STEPS, _CODING_RATE_EPS = 10_000, 0.05
_COLLAPSED_GAP = 0.02  # between both entropies, as shares of ln K


@strict
class IbotConfig(MultiCropConfig, AttentionMasksConfig):
    """Configuration of iBOT, with the settings of `MultiCropConfig`.

    Args:
        num_prototypes: Learned vectors that features are compared with, K; 0 for the method's largest number, in a run
            for a power of two near a tenth of the number of images, if that is less.
        shares_heads: Whether class tokens and patches have one head.
        trains_prototype_scale: Whether a prototype's length is trained (the authors' norm_last_layer False).
        class_token_loss_weight, patch_loss_weight: 0 leaves a loss out; without the patch loss it is DINO.
        mask_probability: Share of the global crops that have masked patches.
        student_temperature, teacher_temperature, teacher_temperature_start: Divisors of the similarities; the
            teacher's rises from its start.
        teacher_temperature_warmup_epochs: Length of that rise; 0 for 37,500 steps, 30 epochs of ImageNet as published,
            of which a short training makes a part.
        centering: "mean" subtracts a running mean from the teacher's similarities, "sinkhorn" gives all prototypes the
            same share of each batch.
        center_momentum: Momentum of the running mean that `centering` mean subtracts.
        koleo_loss_weight: Of a loss that spreads the class tokens of a batch; 0 leaves it out.
        coding_rate_weight: Of a loss that keeps the class tokens of a batch apart (Wu et al. 2025, SimDINO), so that
            they do not become alike in the first steps, which may be all that a short run has; it falls to 0 within
            10,000 steps. 0 leaves it out, as published.
        gram_weight: Of a loss that keeps the similarities between the patches of an image as they are in the encoder
            that the training starts from (DINOv3, Sec. 4, has up to 2); 0 leaves it out.
        freeze_prototypes_epochs: First epochs without a change of the prototypes, at most a tenth of the training.
    """

    model_type = "mim_ibot"
    settings_fixed_by_weights = ("head", "num_prototypes", "shares_heads", "trains_prototype_scale")
    paper: ClassVar[Paper | None] = Paper(
        "iBOT: Image BERT Pre-Training with Online Tokenizer",
        "Jinghao Zhou and Chen Wei and Huiyu Wang and Wei Shen and Cihang Xie and Alan Yuille and Tao Kong",
        2021,
        "2111.07832",
    )
    max_prototypes: ClassVar[int] = 8192
    published_width: ClassVar[int] = 384

    num_prototypes: int = 0
    shares_heads: bool = True
    trains_prototype_scale: bool = False
    class_token_loss_weight: float = 1.0
    patch_loss_weight: float = 1.0
    mask_probability: float = 0.5  # type: ignore[misc]
    student_temperature: float = 0.1
    teacher_temperature: float = 0.07
    teacher_temperature_start: float = 0.04
    teacher_temperature_warmup_epochs: float = 0.0
    centering: str = "mean"
    center_momentum: float = 0.9
    koleo_loss_weight: float = 0.0
    coding_rate_weight: float = 1.0
    gram_weight: float = 0.0
    freeze_prototypes_epochs: float = 1.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.num_prototypes = self.num_prototypes or self.max_prototypes
        if not self.class_token_loss_weight and not self.patch_loss_weight:
            raise ValueError("class_token_loss_weight and patch_loss_weight are both 0: one of the losses must count")
        if self.patch_loss_weight and not self.mask_probability:
            raise ValueError(
                f"mask_probability is 0, but patch_loss_weight {self.patch_loss_weight}: the patch loss needs masks"
            )
        if self.attention_masks and not self.patch_loss_weight:
            raise ValueError("attention_masks is True, but patch_loss_weight is 0: nothing is masked")
        for name in ("student_temperature", "teacher_temperature", "teacher_temperature_start"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected above 0")
        for name in ("center_momentum", "mask_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        if self.centering not in ("mean", "sinkhorn"):
            raise ValueError(f"centering is {self.centering!r}, expected 'mean' or 'sinkhorn'")

    @classmethod
    def settings_for(cls, num_images: int) -> dict[str, Any]:
        """Return the number of prototypes; one for each image would only tell single images apart."""
        return {"num_prototypes": min(cls.max_prototypes, max(64, 2 ** (num_images // 10).bit_length() // 2))}

    @classmethod
    def segmentation_recipe(cls, encoder_config: Any) -> str:
        """Return the authors' settings for ADE20K."""
        return f"finetune_upernet_ibot_vit-{'base' if getattr(encoder_config, 'hidden_size', 0) > 384 else 'small'}"

    @property
    def views(self) -> tuple[View, ...]:
        """Without the local crops if there is no loss of the class token, which alone compares them."""
        return super().views if self.class_token_loss_weight else super().views[:1]


class IbotForPreTraining(MultiCropModel):
    """A student that sees global crops with masked patches, and local ones; a teacher that sees whole global crops."""

    config: IbotConfig
    _keep_in_fp32_modules_strict = ["teacher", "teacher_heads", "centers"]  # noqa: RUF012 - read by transformers

    def __init__(self, config: IbotConfig):
        super().__init__(config)
        centered = ("class_token", "patch") if config.centering == "mean" else ()
        self.centers = nn.ModuleDict(
            {n: Center(config.num_prototypes, config.center_momentum) for n in centered if self.loss_weights[n]}
        )
        self.post_init()
        self.after_loading_encoder()

    @property
    def sees_masked_patches(self) -> bool:
        return self.config.patch_loss_weight > 0

    def build_heads(self) -> nn.ModuleDict:
        """Return the heads of the losses that have their own; a shared one is the class token's."""
        config = self.config
        names = ["class_token"] if config.class_token_loss_weight else []
        if config.patch_loss_weight and not (names and config.shares_heads):
            names.append("patch")
        sizes = (config.head_hidden_size, config.head_bottleneck_size, config.num_prototypes)
        width, trains_scale = config.encoder_config.hidden_size, config.trains_prototype_scale
        return nn.ModuleDict({name: PrototypeHead(width, *sizes, trains_scale) for name in names})

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        local_pixel_values: torch.Tensor | None = None,
        anchor_features: torch.Tensor | None = None,
        num_masked_patches: int | None = None,
        teacher_temperature: float | None = None,
        coding_rate_weight: float | None = None,
        mask_noise: torch.Tensor | None = None,
        return_loss: bool = True,
    ) -> MimOutput:
        """Compare what student and teacher see in crops.

        Args:
            pixel_values: (B, T, C, H, W), the global crops, uint8 or standardized.
            bool_masked_pos: (B, T, N), True = masked; the number may differ by crop, and be 0.
            local_pixel_values: (B, L, C, h, w).
            anchor_features: (R, N, D), of the patches of whole global crops, from the encoder to stay close to.
            num_masked_patches: Number of masked patches in the batch.
            teacher_temperature: By default the final one.
            coding_rate_weight: By default the final one, 0.
            mask_noise: (B, T, U), see `adaptive_masks.py`.
        """
        config, num_crops = self.config, pixel_values.shape[1]
        crops = self.standardize(pixel_values).flatten(0, 1)  # (R, C, H, W)
        masks = bool_masked_pos.flatten(0, 1)  # (R, N)
        seen, masks = attended_masks(self, lambda: self.teacher.tokens(crops.float()), crops, masks, mask_noise)
        masked = _indices(masks, num_masked_patches)  # (M,)

        tokens = self.encoder.tokens(crops, masks if config.patch_loss_weight else None)
        logits = None
        if config.patch_loss_weight:
            logits = self.patch_head(self.heads)(_patches(tokens, masks).flatten(0, 1)[masked])  # (M, K)
        if not return_loss:
            return MimOutput(logits=logits)
        temperature = teacher_temperature or config.teacher_temperature
        targets = self.teacher_targets(crops, masks, masked, temperature, seen)

        losses = {}
        if config.class_token_loss_weight:
            class_tokens = self.all_class_tokens(tokens, local_pixel_values, num_crops)
            head: Any = self.heads["class_token"]
            features = head.project(class_tokens)  # (B, T+L, E)
            student = head.compare(features)  # (B, T+L, K)
            teacher = targets["class_token"].unflatten(0, (-1, num_crops))  # (B, T, K)
            losses["class_token"] = class_token_loss(student, teacher, config.student_temperature)
            if coding_rate_weight is not None:
                rate = coding_rate(features[:, :num_crops], _CODING_RATE_EPS)
                losses["coding_rate"] = -coding_rate_weight * rate
        if config.koleo_loss_weight:
            views = tokens[:, 0].unflatten(0, (-1, num_crops)).unbind(1)  # (B, D) each
            losses["koleo"] = torch.stack([koleo_loss(view) for view in views]).sum()
        if config.gram_weight and anchor_features is not None:
            losses["gram"] = gram_loss(_patches(tokens, masks), anchor_features)
        if logits is not None:
            losses["patch"] = patch_loss(logits, targets["patch"], config.student_temperature, masks, masked)
        metrics = {
            f"{name}_{kind}": sums
            for name, distributions in targets.items()
            for kind, sums in distribution_sums(distributions).items()
        }
        return MimOutput(loss=self.weighted_sum(losses), losses=losses, logits=logits, metrics=metrics)

    def patch_head(self, heads: nn.ModuleDict) -> Any:
        """Return the head of the patches among the student's or the teacher's."""
        return heads["patch" if "patch" in heads else "class_token"]

    @torch.no_grad()
    def teacher_targets(
        self, crops: torch.Tensor, masks: torch.Tensor, masked: torch.Tensor, temperature: float, seen: Any = None
    ) -> dict[str, torch.Tensor]:
        """Return the teacher's distributions over prototypes for class tokens (R, K) and masked patches (M, K).

        The teacher sees crops (R, C, H, W) whole, unless it has `seen` them, (R, 1+...+N, D); the centers take in all
        its class tokens and all its patches.
        """
        targets = {}
        with full_precision(crops.device):
            tokens = self.teacher.tokens(crops.float()) if seen is None else seen
            if self.config.class_token_loss_weight:
                similarities = self.teacher_heads["class_token"](tokens[:, 0])
                targets["class_token"] = self.assign("class_token", similarities, temperature)
                self.take_in("class_token", similarities.mean(dim=0), len(similarities))
            if self.config.patch_loss_weight:
                head, patches = self.patch_head(self.teacher_heads), _patches(tokens, masks).flatten(0, 1)
                if self.training and "patch" in self.centers:  # all patches move the center
                    features = head.project(patches)  # (R * N, E)
                    self.take_in("patch", head.compare(features.mean(dim=0)), len(features))
                    features = features[masked]
                else:
                    features = head.project(patches[masked])  # (M, E)
                targets["patch"] = self.assign("patch", head.compare(features), temperature)
        return targets

    def assign(self, name: str, similarities: torch.Tensor, temperature: float) -> torch.Tensor:
        """Turn the teacher's similarities (n, K) into distributions, in which no prototype dominates."""
        if self.config.centering == "sinkhorn":
            return sinkhorn_knopp(similarities, temperature)
        distributions: torch.Tensor = self.centers[name](similarities, temperature)
        return distributions

    def take_in(self, name: str, mean: torch.Tensor, count: int) -> None:
        """Let the mean similarity (K,) of `count` tokens move the center after the step."""
        if self.training and name in self.centers:
            center: Any = self.centers[name]
            center.add(mean, count)

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {
            "class_token": self.config.class_token_loss_weight,
            "patch": self.config.patch_loss_weight,
            "koleo": self.config.koleo_loss_weight,
            "coding_rate": float(self.has_coding_rate),
            "gram": self.config.gram_weight,
        }

    @property
    def compares_images(self) -> bool:
        config = self.config
        compares = config.centering == "sinkhorn" or config.koleo_loss_weight > 0 or config.spreads_mask_ratios
        return compares or self.has_coding_rate

    @property
    def training_loss_label(self) -> str:
        return super().training_loss_label + (", with the coding rate" if self.has_coding_rate else "")

    @property
    def has_coding_rate(self) -> bool:
        return self.config.coding_rate_weight > 0 and self.config.class_token_loss_weight > 0

    def schedules(self, num_steps: int, steps_per_epoch: int) -> dict[str, Schedule]:
        """Return the teacher's temperature and momentum, the weight decay, and the weight of the coding rate."""
        config = self.config
        rise = config.teacher_temperature_warmup_epochs * steps_per_epoch or _TEMPERATURE_STEPS
        temperatures = (config.teacher_temperature_start, config.teacher_temperature)
        shared = super().schedules(num_steps, steps_per_epoch)
        if self.has_coding_rate:
            shared["coding_rate_weight"] = Schedule(config.coding_rate_weight, 0.0, _CODING_RATE_STEPS)
        return {"teacher_temperature": Schedule(*temperatures, round(rise), "linear"), **shared}

    def summarize_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return entropies of the teacher's distributions, as shares of ln K: of a single one, and of their mean."""
        largest = math.log(self.config.num_prototypes)
        found = {}
        for name, total in sums.items():
            read, kind = (mean_entropy, "entropy") if name.endswith("_entropy") else (marginal_entropy, "spread")
            found[f"{name.rsplit('_', 1)[0]}_{kind}"] = read(total).item() / largest
        return found

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        """Return how sure the teacher is, and how many of the prototypes it uses."""
        name = "class_token" if self.config.class_token_loss_weight else "patch"
        entropy, spread = (logs.get(f"{name}_{k}", logs.get(f"eval_{name}_{k}")) for k in ("entropy", "spread"))
        if entropy is None or spread is None:
            return []
        return [f"teacher entropy {entropy:.0%}, of the mean {spread:.0%}"]

    def collapse_signs(self, logs: Mapping[str, float]) -> str | None:
        """Compare the entropy of single distributions with that of their mean: if equal, nothing is told apart."""
        for name, tokens in (("class_token", "images"), ("patch", "masked patches")):
            entropy, spread = (logs.get(f"{name}_{kind}") for kind in ("entropy", "spread"))
            if entropy is None or spread is None or spread - entropy >= _COLLAPSED_GAP:
                continue
            if entropy > 0.5:
                how, cure = "uniform over the prototypes", "lower teacher_temperature"
            else:
                how = f"in the same few of {self.config.num_prototypes} prototypes"
                cure = "raise teacher_temperature_start, lower center_momentum"
            return (
                f"the teacher's distributions for all {tokens} are nearly equal, {how} (entropy {entropy:.1%} of the "
                f"largest, {spread:.1%} for their mean): {cure}, raise teacher_momentum_start, or lower the learning "
                "rate."
            )
        return super().collapse_signs(logs)

    def before_update(self, progress: Progress) -> None:
        """Clip each gradient by itself, and keep the prototypes as they are at first."""
        super().before_update(progress)
        num_frozen = self.config.freeze_prototypes_epochs * progress.steps_per_epoch
        if progress.step < min(num_frozen, 0.1 * progress.num_steps):
            for name, parameter in self.heads.named_parameters():
                if name.endswith(("prototypes", "scale")):
                    parameter.grad = None

    def after_step(self, progress: Progress) -> None:
        """Let teacher and centers follow."""
        super().after_step(progress)
        center: Any
        for center in self.centers.values():
            center.update()


def _patches(tokens: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Return the last N of the tokens: (R, 1+...+N, D) -> (R, N, D)."""
    return tokens[:, -masks.shape[1] :]


def _indices(masks: torch.Tensor, num_masked_patches: int | None) -> torch.Tensor:
    """Return the indices of the masked patches (M,) in masks (R, N); a batch may have none."""
    if (num_masked_patches if num_masked_patches is not None else masks.any()) == 0:
        return torch.zeros(0, dtype=torch.int64, device=masks.device)
    return masked_indices(masks, num_masked_patches)

"""Masks that depend on the image: hide what a teacher attends to, or what is hard to predict.

The collator's masks say how many patches of each image are masked, its noise breaks ties; the model chooses which.
Papers: Kakogeorgiou et al. 2022, "What to Hide from Your Students: Attention-Guided Masked Image Modeling" (AttMask),
arXiv:2203.12719, Sec. 3.2; Wang et al. 2023, "Hard Patches Mining for Masked Image Modeling" (HPM), arXiv:2304.05919,
Sec. 3.2 and 3.3.
Code: gkakogeorgiou/attmask.
Differs: Hints do not lower the number of masked patches: as many less attended ones are masked instead. The attention
is that of queries and keys alone, without the position bias of a BEiT and the rotations of a DINOv3. HPM predicts the
loss by a second decoder on an average of the whole model, which sees the image once more; here a small convolutional
network does it from pixels, and its target is the loss standardized within the image, there the order of pairs.
Shapes: R masks (of one or several per image B), h w patches per column and row, N = h * w, U mask units of one or more
patches each, D width, A heads, T tokens.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from .base import MimConfig, mean_metric
from .ema import full_precision, update_ema_
from .encoders import init_like_pytorch
from .patches import coarsen_mask, patch_grid
from .schedules import Progress, Schedule, constant

_PREDICTOR_WIDTH = 64
_LARGEST_MOMENTUM = 0.999  # of HPM's average


# ---- which patches ----


def choose_masks(
    masks: torch.Tensor, scores: torch.Tensor, noise: torch.Tensor, grid: tuple[int, int], choose: Callable[..., Any]
) -> torch.Tensor:
    """Return masks (R, N) with equally many units as the given ones, chosen by scores.

    Args:
        scores: (R, h', w'), on the grid of patches or on one that divides it.
        noise: (R, U), of mask units.
        choose: Called with masks, scores and noise (R, U); returns masks (R, U).

    Raises:
        ValueError: If the noise does not fit the grid.
    """
    rows, columns = grid
    step = math.isqrt(max(1, rows * columns // noise.shape[1]))
    if noise.shape[1] * step**2 != rows * columns or rows % step or columns % step:
        raise ValueError(
            f"mask_noise has {noise.shape[1]} values, expected one for each mask unit of {rows} x {columns} patches"
        )
    units = coarsen_mask(masks, grid, step)  # (R, U)
    by_unit = F.interpolate(scores[:, None].float(), grid, mode="nearest")
    by_unit = F.avg_pool2d(by_unit, step).flatten(1)  # (R, U)
    chosen = choose(units, by_unit, noise).unflatten(1, (rows // step, columns // step))
    return chosen.repeat_interleave(step, 1).repeat_interleave(step, 2).flatten(1)  # type: ignore[no-any-return]


def highest(keys: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return the `counts` (R, 1) highest of keys (R, U), bool (R, U)."""
    ranks = keys.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return ranks < counts


def hide_attended(
    masks: torch.Tensor, attention: torch.Tensor, noise: torch.Tensor, hint_share: float
) -> torch.Tensor:
    """Hide the most attended units, but for hints (AttMask-Hint, Sec. 3.2).

    Args:
        hint_share: Number of hints for each masked unit; they are drawn from this share of all units, the most
            attended ones.
    """
    counts = masks.sum(dim=1, keepdim=True)  # (R, 1)
    num_hints = (hint_share * counts).long()
    candidates = highest(attention, (hint_share * torch.full_like(counts, masks.shape[1])).long())
    hints = highest(noise.masked_fill(~candidates, -1.0), num_hints)
    return highest(attention.masked_fill(hints, -torch.inf), counts)


def hide_hard(masks: torch.Tensor, hardness: torch.Tensor, noise: torch.Tensor, share: float) -> torch.Tensor:
    """Hide the hardest units, as `share` of those that are hidden, and random ones (HPM, Sec. 3.3)."""
    counts = masks.sum(dim=1, keepdim=True)
    hard = highest(hardness, (share * counts).long())
    return highest(noise.masked_fill(hard, 2.0), counts)


# ---- attention ----


@strict
class AttentionMasksConfig(MimConfig):
    """Settings of masks that follow the attention of a teacher.

    Args:
        attention_masks: Mask the patches to which the teacher's class token attends most (AttMask); no gain measured
            (README).
        attention_hint_share: Hints for each masked patch, which stay visible, and the share of all patches, the most
            attended ones, among which they are drawn; 0 for none.
    """

    attention_masks: bool = False
    attention_hint_share: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not 0 <= self.attention_hint_share < 1:
            raise ValueError(f"attention_hint_share is {self.attention_hint_share}, expected 0 to below 1")

    @property
    def chooses_masks(self) -> bool:  # type: ignore[override]
        return self.attention_masks


@torch.no_grad()
def attended_masks(
    model: Any, run: Callable[[], Any], pixels: torch.Tensor, masks: torch.Tensor, noise: torch.Tensor | None
) -> tuple[Any, torch.Tensor]:
    """Return what a model's teacher sees, and masks (R, N) of the patches to which its class token attends most.

    Nothing and the same masks in evaluation, without noise, or if the config does not ask for it.

    Args:
        run: Runs the teacher on the whole images.
        pixels: (R, C, H, W).
        noise: (..., U).
    """
    if not (model.config.attention_masks and model.training) or noise is None:
        return None, masks
    with full_precision(pixels.device):
        outputs, attention = with_class_attention(model.teacher, run)
    grid = patch_grid(tuple(pixels.shape[-2:]), model.config.encoder_config.patch_size)
    scores = attention[:, -masks.shape[1] :].unflatten(1, grid)
    choose = partial(hide_attended, hint_share=model.config.attention_hint_share)
    return outputs, choose_masks(masks, scores, noise.flatten(0, -2), grid, choose)


@torch.compiler.disable  # type: ignore[untyped-decorator]
@torch.no_grad()
def with_class_attention(encoder: Any, run: Callable[[], Any]) -> tuple[Any, torch.Tensor]:
    """Run an encoder, and return what `run` returns and its class token's attention (R, T), averaged over heads.

    The attention is that of the last block, from the outputs of its projections: fast kernels return none.
    """
    found: dict[str, torch.Tensor] = {}
    linears: dict[str, nn.Module] = {}
    for name, module in encoder.named_modules():  # the last block's are the last
        kind = {"q_proj": "query", "query": "query", "k_proj": "key", "key": "key"}.get(name.rpartition(".")[2])
        if kind and isinstance(module, nn.Linear):
            linears[kind] = module

    def keep(kind: str) -> Callable[..., None]:
        return lambda module, inputs, output: found.update({kind: output})

    handles = [linear.register_forward_hook(keep(kind)) for kind, linear in linears.items()]
    try:
        outputs = run()
    finally:
        for handle in handles:
            handle.remove()
    num_heads = encoder.config.num_attention_heads
    query, key = (found[kind].unflatten(-1, (num_heads, -1)).transpose(1, 2) for kind in ("query", "key"))
    scores = query[:, :, :1].float() @ key.float().transpose(2, 3) * query.shape[-1] ** -0.5  # (R, A, 1, T)
    return outputs, scores.softmax(dim=-1).mean(dim=1)[:, 0]


# ---- the loss ----


@strict
class HardPatchesConfig(MimConfig):
    """Settings of masks that follow the loss of patches.

    Args:
        hard_patch_share: Share of the masked patches, at the end of the training, that are those of the largest
            predicted loss (HPM: 0.5); it rises from 0; no gain measured (README).
    """

    hard_patch_share: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not 0 <= self.hard_patch_share <= 1:
            raise ValueError(f"hard_patch_share is {self.hard_patch_share}, expected 0 to 1")

    @property
    def chooses_masks(self) -> bool:  # type: ignore[override]
        return self.hard_patch_share > 0


class LossMap(nn.Module):
    """Predicts the loss of each patch from the image, and keeps an average of the predictor, which chooses masks."""

    def __init__(self, side: int, num_channels: int):
        super().__init__()
        width = _PREDICTOR_WIDTH
        self.predictor = nn.Sequential(
            nn.Conv2d(num_channels, width, side, stride=side),
            nn.GELU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            nn.Conv2d(width, 1, 1),
        )
        self.average = copy.deepcopy(self.predictor)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initialize the predictor as PyTorch does, and the average as a copy."""
        for layer in self.predictor:
            if isinstance(layer, nn.Conv2d):
                init_like_pytorch(layer)
        for average, followed in zip(self.average.parameters(), self.predictor.parameters(), strict=True):
            init.copy_(average, followed)

    def loss(self, pixels: torch.Tensor, losses: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error of the predictor for known losses, standardized within each mask.

        Args:
            losses, known: (R, L), of the squares that predictions cover; 1 where there is a loss, else 0.
        """
        predicted = self.predictor(pixels).flatten(1)  # (B, L)
        predicted = predicted.repeat_interleave(len(losses) // len(predicted), dim=0)
        weight = known / known.sum(dim=1, keepdim=True).clamp(min=1)
        mean = (losses * weight).sum(dim=1, keepdim=True)
        deviation = losses - mean
        std = (deviation.square() * weight).sum(dim=1, keepdim=True).sqrt().clamp(min=1e-6)
        error: torch.Tensor = ((predicted.float() - deviation / std).square() * known).sum() / known.sum()
        return error


class HidesHardPatches:
    """Mix-in of a pre-training model with a `pixel_loss`; it has a `loss_map` if its config asks for that."""

    config: Any
    loss_map: LossMap | None

    def build_loss_map(self) -> LossMap | None:
        """Return the predictor of losses, or None if masks do not follow them."""
        config = self.config
        return LossMap(config.prediction_side, config.encoder_config.num_channels) if config.chooses_masks else None

    @torch.no_grad()
    def move_masks(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        mask_noise: torch.Tensor | None,
        hard_share: float | None,
        bool_predicted_pos: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return masks (B, N) or (B, k, N) in which `hard_share` of the masked patches are hard ones.

        In evaluation, and without noise (B, U) or (B, k, U), the masks stay as they are.

        Raises:
            ValueError: If only a part of the masked patches is to be predicted.
        """
        model: Any = self
        if self.loss_map is not None and bool_predicted_pos is not None:
            raise ValueError(
                f"hard_patch_share is {self.config.hard_patch_share}: which patches are masked is chosen in training, "
                "so all of them are predicted; leave out prediction_ratio"
            )
        if self.loss_map is None or not model.training or mask_noise is None:
            return bool_masked_pos
        share = self.config.hard_patch_share if hard_share is None else hard_share
        grid = patch_grid(tuple(pixel_values.shape[-2:]), self.config.encoder_config.patch_size)
        masks, noise = bool_masked_pos.flatten(0, -2), mask_noise.flatten(0, -2)
        hardness = self.loss_map.average(model.standardize(pixel_values))[:, 0]  # (B, h', w')
        hardness = hardness.repeat_interleave(len(masks) // len(hardness), dim=0)  # (R, h', w')
        chosen = choose_masks(masks, hardness, noise, grid, partial(hide_hard, share=share))
        return chosen.view(bool_masked_pos.shape)

    def learn_losses(
        self,
        loss: torch.Tensor,
        pixel_values: torch.Tensor,
        predictions: torch.Tensor,
        targets: torch.Tensor,
        indices: torch.Tensor,
        num_masks: int = 0,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor] | None]:
        """Return the loss, whose gradient also trains the predictor of losses, and metrics.

        Args:
            predictions, targets: (..., P), the arguments of `pixel_loss`.
            indices: Of the predicted units, in each mask (R, Q), or (M,) in the flattened `num_masks` masks.
        """
        if self.loss_map is None:
            return loss, None
        model: Any = self
        pixels = model.standardize(pixel_values)
        num_units = math.prod(patch_grid(tuple(pixels.shape[-2:]), self.config.prediction_side))
        if indices.ndim == 2:
            num_masks = len(indices)
            indices = (indices + num_units * torch.arange(num_masks, device=indices.device)[:, None]).flatten()
        with torch.no_grad():
            alone = (tensor.detach().flatten(0, -2)[:, None, None] for tensor in (predictions, targets))
            losses = torch.vmap(model.pixel_loss)(*alone).float()  # (M,)
        known = torch.zeros(num_masks * num_units, device=losses.device)
        losses = known.scatter(0, indices, losses).view(num_masks, num_units)
        known = known.scatter(0, indices, 1.0).view(num_masks, num_units)
        error = self.loss_map.loss(pixels, losses, known)
        return loss + error - error.detach(), {"loss_map_error": mean_metric(error, len(indices))}

    def init_loss_map(self, module: nn.Module) -> None:
        """Initialize the module if it is the loss map, for `_init_weights`."""
        if isinstance(module, LossMap):
            module.init_weights()

    def schedules(self, num_steps: int, steps_per_epoch: int) -> dict[str, Schedule]:
        """Return the share of hard patches, which rises in proportion to the steps, and the average's momentum."""
        if self.loss_map is None:
            return {}
        momentum = min(_LARGEST_MOMENTUM, 1 - 1 / max(2.0, 0.02 * num_steps))
        share = Schedule(0.0, self.config.hard_patch_share, num_steps, "linear")
        return {"hard_share": share, "loss_map_momentum": constant(momentum)}

    def after_step(self, progress: Progress) -> None:
        """Let the average follow."""
        if self.loss_map is not None:
            average, followed = self.loss_map.average.parameters(), self.loss_map.predictor.parameters()
            update_ema_(average, followed, progress.values["loss_map_momentum"])

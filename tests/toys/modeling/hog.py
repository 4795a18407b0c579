"""A toy method: an MAE that predicts histograms of oriented gradients of the masked patches.

Paper: after Wei et al. 2021, "Masked Feature Prediction for Self-Supervised Visual Pre-Training", arXiv:2112.09133,
Sec. 3.2. Differs: gradients are computed within each patch, and a histogram covers a whole patch.
Shapes: B images, C channels, N patches, M masked patches, p side of a patch, P = p*p*C values of a patch,
O orientations.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn

from .base import Paper
from .mae import MaeConfig, MaeForPreTraining
from .patches import patchify, unpatchify

NUM_ORIENTATIONS = 9


@strict
class HogConfig(MaeConfig):
    """Configuration of an MAE with gradient histograms as targets."""

    model_type = "mim_hog"
    transformers_model_types = ()
    paper = Paper(
        "Masked Feature Prediction for Self-Supervised Visual Pre-Training",
        "Chen Wei and Haoqi Fan and Saining Xie and Chao-Yuan Wu and Alan Yuille and Christoph Feichtenhofer",
        2021,
        "2112.09133",
    )


class HogForPreTraining(MaeForPreTraining):
    """An MAE whose last layer predicts C * O values for each patch."""

    config: HogConfig

    def __init__(self, config: HogConfig):
        super().__init__(config)
        num_values = config.encoder_config.num_channels * NUM_ORIENTATIONS
        self.decoder_pred = nn.Linear(config.decoder_hidden_size, num_values)
        self.post_init()

    def pixel_loss(self, logits: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error of the histograms of masked patches (B, M, P)."""
        num_channels = self.config.encoder_config.num_channels
        return nn.functional.mse_loss(logits.float(), histograms(patches.float(), num_channels))

    def panel(self, batch: Mapping[str, Any], targets: Any = None) -> dict[str, torch.Tensor]:
        """Return the input and how much gradient there is in every patch, true and predicted."""
        mask, config = batch["bool_masked_pos"], self.config.encoder_config
        pixels = self.standardize(batch["pixel_values"])
        true = histograms(patchify(pixels, config.patch_size), config.num_channels)  # (B, N, C*O)
        predicted = self.predicted_units(self(batch["pixel_values"], mask, return_loss=False).logits, mask)
        pasted = torch.where(mask[..., None], predicted, true)
        views = {"gradients": true, "gradients, masked patches predicted": pasted}
        return {
            "input": batch["pixel_values"].cpu() / 255,
            **{label: self._as_images(view, batch["pixel_values"].shape[1]) for label, view in views.items()},
        }

    def _as_images(self, values: torch.Tensor, num_channels: int) -> torch.Tensor:
        """Fill each patch (B, N, C*O) with its strongest orientation -> (B, C, H, W) in [0, 1]."""
        size = self.config.encoder_config.patch_size
        levels = values.amax(dim=-1, keepdim=True).expand(-1, -1, size**2 * num_channels)
        return unpatchify(levels, size, self.grid).clamp(0, 1).cpu()


def histograms(patches: torch.Tensor, num_channels: int) -> torch.Tensor:
    """(B, M, P) -> (B, M, C*O): gradient magnitudes by orientation for each channel, of norm 1."""
    side = math.isqrt(patches.shape[-1] // num_channels)
    images = patches.unflatten(-1, (side, side, num_channels))  # (B, M, p, p, C)
    vertical = images[:, :, 2:, 1:-1] - images[:, :, :-2, 1:-1]
    horizontal = images[:, :, 1:-1, 2:] - images[:, :, 1:-1, :-2]
    angle = torch.atan2(vertical, horizontal) % math.pi
    bins = (angle / math.pi * NUM_ORIENTATIONS).long().clamp(max=NUM_ORIENTATIONS - 1)  # (B, M, p-2, p-2, C)
    one_hot = nn.functional.one_hot(bins, NUM_ORIENTATIONS)  # (B, M, p-2, p-2, C, O)
    magnitude = (vertical.square() + horizontal.square()).sqrt()[..., None]
    return nn.functional.normalize((magnitude * one_hot).sum(dim=(2, 3)).flatten(-2), dim=-1)

"""SimMIM: encode all patches, the masked ones replaced by a mask token, and predict their pixels by one linear layer.

Paper: Xie et al. 2021, "SimMIM: A Simple Framework for Masked Image Modeling", arXiv:2111.09886, Sec. 3 and 4.1.
Code: microsoft/SimMIM at d3e29bc.
Differs: The linear layer (there a 1 x 1 convolution and a pixel shuffle) runs on masked units only, as the loss does,
and the values of a unit are in `patchify`'s order, channel last.
Shapes: B images, C channels, H W pixels, N patches, S pixels along the side of a mask unit, the square of one output
token (ViT: a patch; Swin: 8 x 8 patches), L units, M masked units in the batch, D width, P = S*S*C values of a unit.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, SwinConfig

from .adaptive_masks import HardPatchesConfig, HidesHardPatches
from .base import FinetuneRecipe, MimOutput, MimPreTrainedModel, Paper
from .encoders import BEIT_DEFAULTS, SWIN_DEFAULTS, BeitEncoder, DeitEncoder, SwinEncoder, init_like_pytorch
from .patches import masked_indices, normalize_patches, patch_grid, patchify
from .reconstruction import pixel_panel

ENCODERS = {"beit": BeitEncoder, "deit": DeitEncoder, "swin": SwinEncoder}
PIXEL_LOSSES = {
    "l1": nn.functional.l1_loss,
    "l2": nn.functional.mse_loss,
    "smooth_l1": nn.functional.smooth_l1_loss,
}


@strict
class SimMimConfig(HardPatchesConfig):
    """Configuration of a SimMIM around a BEiT (a ViT with LayerScale and one relative position table), Swin or DeiT.

    Args:
        pixel_loss: Distance of pixels: l1, l2 or smooth_l1 (Sec. 4.1).
        norm_pix_loss: Whether the targets are pixels standardized within each unit.
    """

    model_type = "mim_simmim"
    paper = Paper(
        "SimMIM: A Simple Framework for Masked Image Modeling",
        "Zhenda Xie and Zheng Zhang and Yue Cao and Yutong Lin and Jianmin Bao and Zhuliang Yao and Qi Dai and Han Hu",
        2021,
        "2111.09886",
    )
    encoder_defaults: ClassVar[dict[str, Any]] = BEIT_DEFAULTS
    encoder_families = ("vit", "swin")
    encoder_types = tuple(ENCODERS)

    pixel_loss: str = "l1"
    norm_pix_loss: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.encoder_config, dict) and self.encoder_config.get("model_type") == "swin":
            self.encoder_config = AutoConfig.for_model(**{**SWIN_DEFAULTS, **self.encoder_config})
        super().__post_init__(**kwargs)
        if self.pixel_loss not in PIXEL_LOSSES:
            raise ValueError(f"pixel_loss is {self.pixel_loss!r}, expected one of {', '.join(PIXEL_LOSSES)}")
        patch_grid(self.encoder_config.image_size, self.prediction_side)

    @property
    def prediction_side(self) -> int:
        """S: the side of a patch, doubled by each patch merging of a Swin."""
        encoder = self.encoder_config
        merges = len(encoder.depths) - 1 if isinstance(encoder, SwinConfig) else 0
        return int(encoder.patch_size * 2**merges)

    @classmethod
    def finetune_recipe(cls, encoder_config: Any) -> FinetuneRecipe:
        """Return the paper's own settings; there are none for other sizes of a ViT than base."""
        if encoder_config.model_type == "swin":
            return super().finetune_recipe(encoder_config)
        return FinetuneRecipe("finetune_simmim_vit-base", float("inf"))


class SimMimForPreTraining(HidesHardPatches, MimPreTrainedModel):
    """An encoder and a one-layer prediction head (Sec. 3.3)."""

    config: SimMimConfig
    encoder: BeitEncoder | DeitEncoder | SwinEncoder
    frozen_parameters = ("loss_map.average",)
    _supports_flash_attn = False  # BEiT and Swin add a bias to the scores
    _no_split_modules = ["BeitLayer", "DeiTLayer", "SwinStage"]  # noqa: RUF012 - read by transformers as a class attribute

    def __init__(self, config: SimMimConfig):
        super().__init__(config)
        self.encoder = ENCODERS[config.encoder_config.model_type](config.encoder_config)
        num_pixels = config.prediction_side**2 * config.encoder_config.num_channels
        self.decoder = nn.Linear(config.encoder_config.hidden_size, num_pixels)
        self.no_weight_decay = self.encoder.no_weight_decay
        self.loss_map = self.build_loss_map()
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        self.init_loss_map(module)
        if module is self.decoder:
            init_like_pytorch(module)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        num_masked_patches: int | None = None,
        return_loss: bool = True,
        mask_noise: torch.Tensor | None = None,
        hard_share: float | None = None,
    ) -> MimOutput:
        """Predict the masked units.

        Args:
            pixel_values: (B, C, H, W), uint8 or standardized.
            bool_masked_pos: (B, N), True = masked; the number may differ by image.
            num_masked_patches: Number of masked patches in the batch.
            mask_noise, hard_share: See `adaptive_masks.py`.

        Raises:
            ValueError: If nothing is masked, or a unit is masked in part (see `coarsen_mask`).
        """
        pixels = self.standardize(pixel_values)
        bool_masked_pos = self.move_masks(pixels, bool_masked_pos, mask_noise, hard_share)
        units = self.masked_units(bool_masked_pos)  # (B, L)
        patches_per_unit = bool_masked_pos.shape[1] // units.shape[1]
        masked = masked_indices(units, num_masked_patches and num_masked_patches // patches_per_unit)  # (M,)
        features = self.encoder(pixels, bool_masked_pos=bool_masked_pos).last_hidden_state
        features = features[:, -units.shape[1] :]  # (B, L, D), without the tokens in front of the patches
        logits = self.decoder(features.flatten(0, 1)[masked])  # (M, P)
        if not return_loss:
            return MimOutput(logits=logits)
        targets = patchify(pixels, self.config.prediction_side).flatten(0, 1)[masked]  # (M, P)
        loss, metrics = self.learn_losses(
            self.pixel_loss(logits, targets), pixels, logits, targets, masked, num_masks=len(units)
        )
        return MimOutput(loss=loss, logits=logits, metrics=metrics)

    def pixel_loss(self, logits: torch.Tensor, units: torch.Tensor) -> torch.Tensor:
        """Return the error summed over masked units (M, P), per masked pixel and channel, in float32 (Sec. 3.4)."""
        targets = units.float()
        if self.config.norm_pix_loss:
            targets = normalize_patches(targets)
        error = PIXEL_LOSSES[self.config.pixel_loss](logits.float(), targets, reduction="sum")
        num_channels = self.config.encoder_config.num_channels
        num_pixels = math.prod(targets.shape) / num_channels
        loss: torch.Tensor = error / (num_pixels + 1e-5) / num_channels  # the small number as in the authors' code
        return loss

    def panel(self, batch: Mapping[str, Any], targets: Any = None) -> dict[str, torch.Tensor]:
        """Return the input, the masked input and the predicted pixels."""
        return pixel_panel(self, batch)

"""SimMIM: show the encoder every patch, the hidden ones as a mask token, and predict their pixels by one linear layer.

Paper: Xie et al. 2021, "SimMIM: A Simple Framework for Masked Image Modeling", arXiv:2111.09886, Sec. 3 and 4.1.
Code: microsoft/SimMIM at d3e29bc.
Differs: the linear layer (there a 1 x 1 convolution and a pixel shuffle) runs at hidden cells only, as the loss does;
the numbers of a cell lie in `patchify`'s order, the channel last.
Shapes: B images, C channels, H W pixels, N patches, S pixels along the side of a cell, the square of one output token
(ViT: a patch; Swin: 8 x 8 patches), L cells, M hidden cells of the whole batch, D width, P = S*S*C numbers in a cell.
"""

import math
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, SwinConfig

from .base import MimConfig, MimOutput, MimPreTrainedModel
from .encoders import BEIT_DEFAULTS, SWIN_DEFAULTS, BeitEncoder, DeitEncoder, SwinEncoder, init_like_pytorch
from .patches import masked_indices, normalize_patches, patch_grid, patchify

ENCODERS = {"beit": BeitEncoder, "deit": DeitEncoder, "swin": SwinEncoder}
PIXEL_LOSSES = {
    "l1": nn.functional.l1_loss,
    "l2": nn.functional.mse_loss,
    "smooth_l1": nn.functional.smooth_l1_loss,
}


@strict
class SimMimConfig(MimConfig):
    """`encoder_config` is a BEiT (a ViT with LayerScale and one relative position table), a Swin or a DeiT.

    `pixel_loss` is l1, l2 or smooth_l1 (Sec. 4.1); `norm_pix_loss` predicts pixels standardized within each cell.
    """

    model_type = "mim_simmim"
    encoder_defaults: ClassVar[dict[str, Any]] = BEIT_DEFAULTS
    encoder_families = ("vit", "swin")
    encoder_types = tuple(ENCODERS)

    pixel_loss: str = "l1"
    norm_pix_loss: bool = False

    def __post_init__(self, **kwargs):
        if isinstance(self.encoder_config, dict) and self.encoder_config.get("model_type") == "swin":
            self.encoder_config = AutoConfig.for_model(**{**SWIN_DEFAULTS, **self.encoder_config})
        super().__post_init__(**kwargs)
        if self.pixel_loss not in PIXEL_LOSSES:
            raise ValueError(f"pixel_loss is {self.pixel_loss!r}, expected one of {', '.join(PIXEL_LOSSES)}")
        patch_grid(self.encoder_config.image_size, self.prediction_side)

    @property
    def prediction_side(self) -> int:
        """S: a patch, doubled by each merging of a Swin."""
        encoder = self.encoder_config
        merges = len(encoder.depths) - 1 if isinstance(encoder, SwinConfig) else 0
        return encoder.patch_size * 2**merges


class SimMimForPreTraining(MimPreTrainedModel):
    """Encoder and one-layer prediction head (Sec. 3.3); `.encoder` is what users keep."""

    config: SimMimConfig
    encoder: BeitEncoder | DeitEncoder | SwinEncoder
    _supports_flash_attn = False  # BEiT and Swin add a bias to the scores
    _no_split_modules = ["BeitLayer", "DeiTLayer", "SwinStage"]  # noqa: RUF012 - read by transformers as a class attribute

    def __init__(self, config: SimMimConfig):
        super().__init__(config)
        self.encoder = ENCODERS[config.encoder_config.model_type](config.encoder_config)
        num_pixels = config.prediction_side**2 * config.encoder_config.num_channels
        self.decoder = nn.Linear(config.encoder_config.hidden_size, num_pixels)
        self.no_weight_decay = self.encoder.no_weight_decay
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if module is self.decoder:
            init_like_pytorch(module)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        num_masked_patches: int | None = None,
        return_loss: bool = True,
    ) -> MimOutput:
        """(B, C, H, W) images, uint8 or standardized; (B, N) bool, True = hidden; images may hide unequal numbers.

        Raises:
            ValueError: nothing is hidden, or a cell is hidden in part (see `coarsen_mask`).
        """
        pixels = self.standardize(pixel_values)
        cells = self.masked_units(bool_masked_pos)  # (B, L)
        patches_in_cell = bool_masked_pos.shape[1] // cells.shape[1]
        hidden = masked_indices(cells, num_masked_patches and num_masked_patches // patches_in_cell)  # (M,)
        features = self.encoder(pixels, bool_masked_pos=bool_masked_pos).last_hidden_state
        features = features[:, -cells.shape[1] :]  # (B, L, D), without the tokens that lead the patches
        logits = self.decoder(features.flatten(0, 1)[hidden])  # (M, P)
        if not return_loss:
            return MimOutput(logits=logits)
        targets = patchify(pixels, self.config.prediction_side).flatten(0, 1)[hidden]  # (M, P)
        return MimOutput(loss=self.pixel_loss(logits, targets), logits=logits)

    def pixel_loss(self, logits: torch.Tensor, cells: torch.Tensor) -> torch.Tensor:
        """Error summed over hidden cells (M, P), over hidden pixels and channels, in float32 (Sec. 3.4)."""
        targets = cells.float()
        if self.config.norm_pix_loss:
            targets = normalize_patches(targets)
        error = PIXEL_LOSSES[self.config.pixel_loss](logits.float(), targets, reduction="sum")
        num_channels = self.config.encoder_config.num_channels
        num_pixels = math.prod(targets.shape) / num_channels
        return error / (num_pixels + 1e-5) / num_channels  # the small number as in the authors' code

"""MAE: encode only the visible patches, then predict the pixels of the masked ones.

Paper: He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", arXiv:2111.06377, Sec. 3 and App. A.1.
Code: facebookresearch/mae at efb2a80.
Differs: Tokens stay in the order (visible, masked) through the decoder instead of being unshuffled. Attention does not
depend on the order, so with each token's own position added the result is the same and the unshuffling is saved.
Shapes: B images, C channels, H W pixels, N patches = V visible + M masked, D encoder width, E decoder width,
P = p*p*C values of a patch.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import ViTConfig, ViTModel
from transformers import initialization as init
from transformers.models.vit.modeling_vit import ViTLayer

from .base import InitializesEveryModule, MimConfig, MimOutput, MimPreTrainedModel, Paper
from .patches import (
    init_like_mae,
    normalize_patches,
    patch_grid,
    patchify,
    sincos_positions,
    take_tokens,
    visible_and_masked_indices,
)
from .reconstruction import pixel_panel


@strict
class MaeConfig(MimConfig):
    """Configuration of an MAE around a plain ViT; `norm_pix_loss` predicts pixels normalized per patch (Table 1d)."""

    model_type = "mim_mae"
    transformers_model_types: ClassVar[tuple[str, ...]] = ("vit_mae",)
    paper: ClassVar[Paper | None] = Paper(
        "Masked Autoencoders Are Scalable Vision Learners",
        "Kaiming He and Xinlei Chen and Saining Xie and Yanghao Li and Piotr Doll{\\'a}r and Ross Girshick",
        2021,
        "2111.06377",
    )

    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    norm_pix_loss: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        patch_grid(self.encoder_config.image_size, self.encoder_config.patch_size)

    def decoder_config(self) -> ViTConfig:
        """Return the configuration of the decoder, whose blocks are ViT blocks too."""
        return ViTConfig(
            hidden_size=self.decoder_hidden_size,
            num_hidden_layers=self.decoder_num_hidden_layers,
            num_attention_heads=self.decoder_num_attention_heads,
            intermediate_size=self.decoder_intermediate_size,
            layer_norm_eps=self.encoder_config.layer_norm_eps,
        )


class MaeEncoder(InitializesEveryModule, ViTModel):
    """A ViTModel with the same parameter names, initialized as in MAE, that can encode a part of the patches."""

    # Initialization is defined here because transformers never runs a parent's `_init_weights` on a nested model.
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_like_mae(module)
        if module is self.embeddings:
            init.normal_(module.cls_token, std=0.02)
            assert isinstance(self.config.patch_size, int)
            grid = patch_grid(self.config.image_size, self.config.patch_size)
            init.copy_(module.position_embeddings, sincos_positions(grid, self.config.hidden_size))

    def encode(self, patches: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Encode visible patches (B, V, P) with indices (B, V) to (B, 1+V, D), the class token first."""
        projection = self.embeddings.patch_embeddings.projection
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P): the order inside a patch is `patchify`'s
        positions = self.embeddings.position_embeddings[0]  # (1+N, D), fixed
        x = nn.functional.linear(patches, weight, projection.bias) + positions[visible + 1]  # (B, V, D)
        cls = (self.embeddings.cls_token + positions[0]).expand(len(x), -1, -1)  # (B, 1, D)
        x = torch.cat([cls.to(x.dtype), x], dim=1)
        for layer in self.layers:
            x = layer(x)
        latent: torch.Tensor = self.layernorm(x)
        return latent


class MaeForPreTraining(MimPreTrainedModel):
    """The asymmetric autoencoder of Sec. 3."""

    config: MaeConfig
    encoder: MaeEncoder
    decoder_positions: torch.Tensor  # (1, 1+N, E), fixed
    needs_equal_num_masked = True  # the encoder sees a rectangular batch of visible patches
    frozen_parameters = ("encoder.embeddings.position_embeddings",)
    _no_split_modules = ["ViTLayer"]  # noqa: RUF012 - read by transformers as a class attribute

    def __init__(self, config: MaeConfig):
        super().__init__(config)
        encoder_config, decoder_config = config.encoder_config, config.decoder_config()
        self.grid = patch_grid(encoder_config.image_size, encoder_config.patch_size)
        self.encoder = MaeEncoder(encoder_config, add_pooling_layer=False)
        # Bare blocks do not know which attention the model uses; unset, they fall back to eager.
        decoder_config._attn_implementation = self.encoder.config._attn_implementation
        self.decoder_embed = nn.Linear(encoder_config.hidden_size, decoder_config.hidden_size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_config.hidden_size))
        num_positions = 1 + self.grid[0] * self.grid[1]
        self.register_buffer("decoder_positions", torch.zeros(1, num_positions, decoder_config.hidden_size))
        self.decoder_layers = nn.ModuleList(ViTLayer(decoder_config) for _ in range(decoder_config.num_hidden_layers))
        self.decoder_norm = nn.LayerNorm(decoder_config.hidden_size, eps=decoder_config.layer_norm_eps)
        self.decoder_pred = nn.Linear(
            decoder_config.hidden_size, encoder_config.patch_size**2 * encoder_config.num_channels
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_like_mae(module)
        if module is self:
            init.normal_(self.mask_token, std=0.02)
            init.copy_(self.decoder_positions, sincos_positions(self.grid, self.config.decoder_hidden_size))

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        num_masked_patches: int | None = None,
        return_loss: bool = True,
    ) -> MimOutput:
        """Predict the masked patches.

        Args:
            pixel_values: (B, C, H, W), uint8 or standardized.
            bool_masked_pos: (B, N), True = masked; equally many in every image.
            num_masked_patches: Number of masked patches in the batch.
        """
        patches = patchify(self.standardize(pixel_values), self.config.encoder_config.patch_size)  # (B, N, P)
        visible, masked = visible_and_masked_indices(bool_masked_pos, num_masked_patches)  # (B, V), (B, M)
        latent = self.encoder.encode(take_tokens(patches, visible), visible)  # (B, 1+V, D)
        logits = self.decode(latent, visible, masked)[:, -masked.shape[1] :]  # (B, M, P)
        loss = self.pixel_loss(logits, take_tokens(patches, masked)) if return_loss else None
        return MimOutput(loss=loss, logits=logits)

    def decode(self, latent: torch.Tensor, visible: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Decode (B, 1+V, D) to predictions (B, V+M, P), the visible patches first, then the masked ones."""
        x = self.decoder_embed(latent)  # (B, 1+V, E)
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(*masked.shape, -1)], dim=1)  # (B, 1+N, E)
        indices = torch.cat([torch.zeros_like(visible[:, :1]), visible + 1, masked + 1], dim=1)  # (B, 1+N)
        x = x + self.decoder_positions[0, indices]
        for layer in self.decoder_layers:
            x = layer(x)
        logits: torch.Tensor = self.decoder_pred(self.decoder_norm(x[:, 1:]))  # (B, N, P)
        return logits

    def pixel_loss(self, logits: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """Return the mean squared error of the masked patches (B, M, P), in float32 (Sec. 3)."""
        target = patches.float()
        if self.config.norm_pix_loss:
            target = normalize_patches(target)
        return nn.functional.mse_loss(logits.float(), target)

    def panel(self, batch: Mapping[str, Any], targets: Any = None) -> dict[str, torch.Tensor]:
        """Return the input, the masked input and the predicted pixels."""
        return pixel_panel(self, batch)


@strict
class SimMimAsymmetricConfig(MaeConfig):
    """Configuration of an MAE with raw pixels as targets; its recipe masks 40 % of the patches."""

    model_type = "mim_simmim_asymmetric"
    transformers_model_types = ()
    paper = None  # nobody has published it

    norm_pix_loss: bool = False


class SimMimAsymmetricForPreTraining(MaeForPreTraining):
    """The asymmetric variant that some overviews call SimMIM. It is NOT the published SimMIM (`modeling/simmim.py`):
    this encoder sees the visible patches only, a transformer decodes, and there are no published results.

    It is an MAE whose mask token is initialized from N(0, 1/E) and whose targets are raw pixels. Its description sums
    the squared error over a batch; `pixel_loss` is that sum divided by its B * M * P terms (ViT-B/16 at 40 %: 79 * 768
    per image), so that the learning rate depends on neither batch nor image size.
    """

    config: SimMimAsymmetricConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self:
            init.normal_(self.mask_token, std=self.config.decoder_hidden_size**-0.5)

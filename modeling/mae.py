"""MAE: encode only the visible patches, then predict the pixels of the masked ones.

Papers: He et al. 2021, "Masked Autoencoders Are Scalable Vision Learners", arXiv:2111.06377, Sec. 3 and App. A.1; for
the cross decoder Fu et al. 2024, "Rethinking Patch Dependence for Masked Autoencoders", arXiv:2401.14391, Sec. 3.
Code: facebookresearch/mae at efb2a80; the cross decoder follows its paper only.
Differs: Tokens stay in the order (visible, masked) through the decoder instead of being unshuffled. Attention does not
depend on the order, so with each token's own position added the result is the same and the unshuffling is saved.
Shapes: B images with k masks each (R = B * k; one mask unless said otherwise), C channels, H W pixels, h w patches per
column and row, N = h * w patches = V visible + M masked, of which Q are predicted (all by default), S = 1 + registers
of the encoder, D encoder width, E decoder width, P = p*p*C values of a patch.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import ViTConfig, ViTModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.vit.modeling_vit import ViTLayer, ViTMLP

from .adaptive_masks import HardPatchesConfig, HidesHardPatches
from .base import InitializesEveryModule, MimOutput, MimPreTrainedModel, Paper
from .block_by_block import BlockByBlock, fixed_positions
from .dino_encoders import DINO_ENCODERS, NATIVE_TYPES
from .patches import (
    init_like_mae,
    normalize_patches,
    patch_grid,
    patchify,
    sincos_positions,
    take_tokens,
    visible_and_predicted_indices,
)
from .reconstruction import pixel_panel


@strict
class MaeConfig(HardPatchesConfig):
    """Configuration of an MAE around a plain ViT.

    Args:
        decoder: "self" (MAE: all tokens attend to all) or "cross" (CrossMAE: masked patches attend to the encoder's).
        decoder_hidden_size: Width of the decoder.
        decoder_num_hidden_layers: Blocks of the decoder.
        decoder_num_attention_heads: Attention heads of the decoder's blocks.
        decoder_intermediate_size: Width of the decoder's feed-forward networks.
        norm_pix_loss: Whether the targets are pixels standardized per patch (Table 1d).
    """

    model_type = "mim_mae"
    encoder_types: ClassVar[tuple[str, ...]] = NATIVE_TYPES
    transformers_model_types: ClassVar[tuple[str, ...]] = ("vit_mae",)
    published_batch: ClassVar[int] = 4096
    paper: ClassVar[Paper | None] = Paper(
        "Masked Autoencoders Are Scalable Vision Learners",
        "Kaiming He and Xinlei Chen and Saining Xie and Yanghao Li and Piotr Doll{\\'a}r and Ross Girshick",
        2021,
        "2111.06377",
    )

    decoder: str = "self"
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    norm_pix_loss: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        patch_grid(self.encoder_config.image_size, self.encoder_config.patch_size)
        if self.decoder not in ("self", "cross"):
            raise ValueError(f"`decoder` is {self.decoder!r}, expected self or cross")

    @property
    def resizes_positions(self) -> bool:
        """Sines and cosines, and rotations, exist for every size; learned positions are resized."""
        return True

    def get_text_config(self, *args: Any, **kwargs: Any) -> "MaeConfig":
        """Return this config: transformers would take the setting `decoder` for the config of a text decoder."""
        return self

    def decoder_config(self) -> ViTConfig:
        """Return the configuration of the decoder, whose blocks are ViT blocks too."""
        return ViTConfig(
            hidden_size=self.decoder_hidden_size,
            num_hidden_layers=self.decoder_num_hidden_layers,
            num_attention_heads=self.decoder_num_attention_heads,
            intermediate_size=self.decoder_intermediate_size,
            layer_norm_eps=self.encoder_config.layer_norm_eps,
        )


class MaeEncoder(InitializesEveryModule, BlockByBlock, ViTModel):
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


class CrossLayer(GradientCheckpointingLayer):
    """A decoder block in which queries attend to the encoder's tokens and not to each other (CrossMAE, Sec. 3.2)."""

    def __init__(self, config: ViTConfig, context_width: int):
        super().__init__()
        width, eps, self.num_heads = config.hidden_size, config.layer_norm_eps, config.num_attention_heads
        self.layernorm_before = nn.LayerNorm(width, eps=eps)
        self.layernorm_context = nn.LayerNorm(context_width, eps=eps)
        self.q_proj, self.o_proj = (nn.Linear(width, width) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(context_width, width) for _ in range(2))
        self.layernorm_after = nn.LayerNorm(width, eps=eps)
        self.mlp = ViTMLP(config)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Update queries (R, Q, E) by what they find in the context (R, 1+V, D)."""
        context = self.layernorm_context(context)
        pairs = ((self.q_proj, self.layernorm_before(x)), (self.k_proj, context), (self.v_proj, context))
        heads = [linear(y).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for linear, y in pairs]
        attended = nn.functional.scaled_dot_product_attention(*heads)  # (R, heads, Q, E / heads)
        x = x + self.o_proj(attended.transpose(1, 2).flatten(2))
        updated: torch.Tensor = x + self.mlp(self.layernorm_after(x))
        return updated


class MaeForPreTraining(HidesHardPatches, MimPreTrainedModel):
    """The asymmetric autoencoder of Sec. 3."""

    config: MaeConfig
    encoder: Any
    decoder_positions: torch.Tensor  # (1, 1+N, E), fixed
    needs_equal_num_masked = True  # the encoder sees a rectangular batch of visible patches
    decodes_masked_patches = True
    no_weight_decay = ("decoder_mix",)
    # The encoder sees no masked patches, and DINOv2's and DINOv3's always have a mask token.
    frozen_parameters: ClassVar[tuple[str, ...]] = (
        "encoder.embeddings.position_embeddings",
        "encoder.embeddings.mask_token",
        "loss_map.average",
    )
    _no_split_modules = ["ViTLayer", "CrossLayer"]  # noqa: RUF012 - read by transformers as a class attribute

    def __init__(self, config: MaeConfig):
        super().__init__(config)
        encoder_config, decoder_config = config.encoder_config, config.decoder_config()
        self.grid = patch_grid(encoder_config.image_size, encoder_config.patch_size)
        self.encoder = self.build_encoder()
        # Bare blocks do not know which attention the model uses; unset, they fall back to eager.
        decoder_config._attn_implementation = self.encoder.config._attn_implementation
        width, num_layers = encoder_config.hidden_size, decoder_config.num_hidden_layers
        if config.decoder == "self":
            self.decoder_embed = nn.Linear(width, decoder_config.hidden_size)
        else:
            self.decoder_mix = nn.Parameter(torch.zeros(num_layers, 1 + encoder_config.num_hidden_layers))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_config.hidden_size))
        num_positions = 1 + self.grid[0] * self.grid[1]
        self.register_buffer("decoder_positions", torch.zeros(1, num_positions, decoder_config.hidden_size))
        self.decoder_layers = nn.ModuleList(
            ViTLayer(decoder_config) if config.decoder == "self" else CrossLayer(decoder_config, width)
            for _ in range(num_layers)
        )
        self.decoder_norm = nn.LayerNorm(decoder_config.hidden_size, eps=decoder_config.layer_norm_eps)
        self.decoder_pred = nn.Linear(
            decoder_config.hidden_size, encoder_config.patch_size**2 * encoder_config.num_channels
        )
        self.loss_map = self.build_loss_map()
        self.post_init()

    def build_encoder(self) -> Any:
        """Return an encoder, initialized as in MAE if it is a plain ViT."""
        encoder_config = self.config.encoder_config
        if (build := DINO_ENCODERS.get(encoder_config.model_type)) is not None:
            return build(encoder_config)
        return MaeEncoder(encoder_config, add_pooling_layer=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        init_like_mae(module)
        self.init_loss_map(module)
        if module is self:
            init.normal_(self.mask_token, std=0.02)
            init.copy_(self.decoder_positions, sincos_positions(self.grid, self.config.decoder_hidden_size))
            if self.config.decoder == "cross":  # each block begins with the encoder's output
                last = torch.zeros_like(self.decoder_mix)
                last[:, -1] = 1
                init.copy_(self.decoder_mix, last)  # unless it was loaded

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        num_masked_patches: int | None = None,
        return_loss: bool = True,
        bool_predicted_pos: torch.Tensor | None = None,
        num_predicted_patches: int | None = None,
        mask_noise: torch.Tensor | None = None,
        hard_share: float | None = None,
    ) -> MimOutput:
        """Predict the masked patches.

        Args:
            pixel_values: (B, C, H, W), uint8 or standardized.
            bool_masked_pos: (B, N) or (B, k, N), True = masked; equally many in every mask.
            num_masked_patches: Number of masked patches in the batch.
            bool_predicted_pos: Those masked patches that are predicted, equally many in every mask; all if None.
            num_predicted_patches: Number of predicted patches in the batch.
            mask_noise, hard_share: See `adaptive_masks.py`.
        """
        bool_masked_pos = self.move_masks(pixel_values, bool_masked_pos, mask_noise, hard_share, bool_predicted_pos)
        patch_size = self.config.encoder_config.patch_size
        grid = patch_grid(tuple(pixel_values.shape[-2:]), patch_size)
        patches = patchify(pixel_values, patch_size)  # (B, N, P), not yet float32: most are needed only once
        visible, predicted = visible_and_predicted_indices(
            bool_masked_pos, bool_predicted_pos, num_masked_patches, num_predicted_patches
        )  # (R, V), (R, Q)
        states = self.encoder.encode(self.take_pixels(patches, visible), visible, grid)  # (R, S+V, D) each
        logits = self.predict(states, visible, predicted, grid)  # (R, Q, P)
        if not return_loss:
            return MimOutput(logits=logits)
        targets = self.take_pixels(patches, predicted)
        loss, metrics = self.learn_losses(self.pixel_loss(logits, targets), pixel_values, logits, targets, predicted)
        return MimOutput(loss=loss, logits=logits, metrics=metrics)

    def take_pixels(self, patches: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Return the standardized patches (R, K, P) at indices (R, K) of patches (B, N, P)."""
        taken = take_tokens(patches, indices.reshape(len(patches), -1)).view(*indices.shape, patches.shape[-1])
        num_channels = self.config.encoder_config.num_channels
        images = taken.unflatten(-1, (-1, 1, num_channels)).movedim(-1, -3)  # (R, K, C, p*p, 1)
        return self.standardize(images).movedim(-3, -1).flatten(-3)

    def predict(
        self, states: list[torch.Tensor], visible: torch.Tensor, predicted: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor:
        """Decode the encoder's states to predictions (R, Q, P) for the predicted patches."""
        if self.config.decoder == "self":
            return self.decode(states[-1], visible, predicted, grid)[:, -predicted.shape[1] :]
        return self.cross_decode(states, predicted, grid)

    def decode(
        self,
        latent: torch.Tensor,
        visible: torch.Tensor,
        masked: torch.Tensor,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """Decode (R, S+V, D) to predictions (R, V+Q, P), the visible patches first, then the masked ones."""
        num_patches = visible.shape[1]
        if latent.shape[1] > 1 + num_patches:  # registers belong to no patch
            latent = torch.cat([latent[:, :1], latent[:, -num_patches:]], dim=1)
        x = self.decoder_embed(latent)  # (R, 1+V, E)
        x = torch.cat([x, self.mask_token.to(x.dtype).expand(*masked.shape, -1)], dim=1)  # (R, 1+V+Q, E)
        indices = torch.cat([torch.zeros_like(visible[:, :1]), visible + 1, masked + 1], dim=1)  # (R, 1+V+Q)
        x = x + self.positions(grid)[indices]
        for layer in self.decoder_layers:
            x = layer(x)
        predictions: torch.Tensor = self.decoder_pred(self.decoder_norm(x[:, 1:]))
        return predictions

    def cross_decode(
        self, states: list[torch.Tensor], predicted: torch.Tensor, grid: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Predict patches (R, Q, P) from a learned mix of the encoder's layers (R, S+V, D) for each block."""
        contexts = torch.einsum("kl,lbvd->kbvd", self.decoder_mix.to(states[0].dtype), torch.stack(states))
        x = self.mask_token.to(states[0].dtype) + self.positions(grid)[predicted + 1]  # (R, Q, E)
        for layer, context in zip(self.decoder_layers, contexts, strict=True):
            x = layer(x, context)
        predictions: torch.Tensor = self.decoder_pred(self.decoder_norm(x))
        return predictions

    def positions(self, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Return the decoder's fixed positions (1+N, E) of a grid of patches."""
        return fixed_positions(self, self.decoder_positions, self.grid, grid)

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

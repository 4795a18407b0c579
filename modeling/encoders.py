"""Native encoders of all patches, with masked ones replaced by a mask token, initialized as by the papers' authors.

Papers: Bao et al. 2021 (BEiT), arXiv:2106.08254, Sec. 2.5; Xie et al. 2021 (SimMIM), arXiv:2111.09886, Sec. 4.1.
Code: microsoft/unilm/beit at 768a3c8; microsoft/SimMIM at d3e29bc.
Differs from transformers: only as the classes below document. Parameters keep their names, so that a trained encoder
opens as a `BeitModel`, `ViTModel`, `DeiTModel` or `SwinModel`.
Shapes: B images, N tokens, D width, h w patches per column and row.
"""

import math
from collections.abc import Collection, Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import BeitConfig, BeitModel, DeiTConfig, DeiTModel, SwinConfig, SwinModel, ViTConfig, ViTModel
from transformers import initialization as init
from transformers.models.beit.modeling_beit import BeitEmbeddings, BeitRelativePositionBias
from transformers.models.deit.modeling_deit import DeiTEmbeddings
from transformers.models.swin.modeling_swin import (
    SwinDropPath,
    SwinEmbeddings,
    SwinMLP,
    SwinRelativePositionBias,
)
from transformers.models.swin.modeling_swin import SwinEncoder as NativeSwinStages
from transformers.models.vit.modeling_vit import ViTEmbeddings

from .base import InitializesEveryModule
from .block_by_block import BlockByBlock
from .patches import patch_grid
from .positions import resize_positions

# Defaults of an encoder_config for pre-training: the authors' values where transformers has others.
BEIT_DEFAULTS: dict[str, Any] = {
    "model_type": "beit",
    "layer_norm_eps": 1e-6,
    "use_mask_token": True,
    "use_shared_relative_position_bias": True,
    "use_mean_pooling": False,
    "layer_scale_init_value": 0.1,
    "drop_path_rate": 0.1,
}
SWIN_DEFAULTS: dict[str, Any] = {"model_type": "swin", "layer_norm_eps": 1e-5, "drop_path_rate": 0.0}


class BeitEncoder(InitializesEveryModule, BeitModel):
    """A BeitModel with the authors' initialization that does not interpolate its position bias.

    From scratch, positions come from one learned bias table for all blocks, which starts at zero: until the first
    update, all masked patches of an image get the same prediction.
    """

    # The mask token and the bias tables have weight decay.
    no_weight_decay: ClassVar[tuple[str, ...]] = ("cls_token", "position_embeddings")

    def __init__(self, config: BeitConfig, add_pooling_layer: bool = False):
        if not config.use_mask_token:
            raise ValueError("use_mask_token is False, expected True: the encoder replaces masked patches")
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        for module in (self, *self.layers):
            name = "shared_position_bias" if module is self else "relative_position_bias"
            if getattr(module, name) is not None:
                setattr(module, name, PositionBias(config))
        self.post_init()

    @property
    def native_root_problem(self) -> str | None:
        """Why transformers' own class cannot compute the same function, or None if it can."""
        bias = next((module for module in self.modules() if isinstance(module, PositionBias)), None)
        if bias is None or len(set(bias.window_size)) == 1:
            return None
        rows, columns = bias.window_size
        return (
            "transformers' BeitModel swaps the rows and columns of the position table of a rectangular image "
            f"({rows} x {columns} patches); only square images can be exported"
        )

    def attention_bias(self, pixels: torch.Tensor) -> torch.Tensor | None:
        """Return what all blocks add to their attention scores, (1, heads, 1+N, 1+N); None without a shared table."""
        patch_size: Any = self.config.patch_size
        grid = patch_grid(pixels.shape[2:], patch_size)
        return None if self.shared_position_bias is None else self.shared_position_bias(grid)

    def block_outputs(
        self, pixels: torch.Tensor, numbers: Collection[int], bool_masked_pos: torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Return the outputs of blocks, numbered from 1, (B, 1+N, D) each, before the final norm.

        Unlike `output_hidden_states`, this compiles at the first call, and keeps no other outputs in memory.
        """
        resolution, scores = pixels.shape[2:], self.attention_bias(pixels)
        tokens, outputs = self.embeddings(pixels, bool_masked_pos), []
        for number, layer in enumerate(self.layers, start=1):
            tokens = layer(tokens, attention_mask=scores, resolution=resolution)
            if number in numbers:
                outputs.append(tokens)
        return outputs

    # Initialization is defined here because transformers never runs a parent's `_init_weights` on a nested model.
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            trunc_normal_at_one_std_(module.weight, 0.02 / shrink_factor(self.layers, module))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, BeitEmbeddings):
            trunc_normal_at_one_std_(module.cls_token, 0.02)
            if module.mask_token is not None:
                trunc_normal_at_one_std_(module.mask_token, 0.02)
            if module.position_embeddings is not None:
                trunc_normal_at_one_std_(module.position_embeddings, 0.02)
        else:
            super()._init_weights(module)  # type: ignore[no-untyped-call]  # LayerNorm, zero tables, LayerScale


class ResizedPositions:
    """Mix-in of native embeddings that resizes positions to the grid of any image; the native ones need squares."""

    antialias: ClassVar[bool] = False
    patch_embeddings: Any
    position_embeddings: Any

    def interpolate_pos_encoding(self, embeddings: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Return the positions (1, 1+N, D) of an image."""
        patch = self.patch_embeddings.patch_size[0]
        old, new = patch_grid(self.patch_embeddings.image_size, patch), patch_grid((height, width), patch)
        return resize_positions(self.position_embeddings, old, new, antialias=self.antialias)


class AnySizeEmbeddings(ResizedPositions, ViTEmbeddings):
    """ViTEmbeddings for crops of any size."""


class AnyShapeEmbeddings(ResizedPositions, BeitEmbeddings):
    """BeitEmbeddings with absolute positions for rectangular images."""


class VitEncoder(InitializesEveryModule, BlockByBlock, ViTModel):
    """A ViTModel with drop path that takes crops of any size, initialized as in DINO and iBOT."""

    # All have weight decay.
    no_weight_decay: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: ViTConfig, drop_path_rate: float = 0.0, use_mask_token: bool = True):
        super().__init__(config, add_pooling_layer=False)
        self.embeddings = AnySizeEmbeddings(config, use_mask_token)
        rates = torch.linspace(0, drop_path_rate, len(self.layers), device="cpu").tolist()
        layer: Any
        for layer, rate in zip(self.layers, rates, strict=True):
            if rate:  # this dropout is the last operation of both branches
                layer.dropout = nn.Sequential(layer.dropout, SwinDropPath(rate))
        self.post_init()

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the input of the first block (B, 1+N, D)."""
        tokens: torch.Tensor = self.embeddings(pixels, interpolate_pos_encoding=True)
        return tokens

    def tokens(self, pixels: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Return the normalized output (B, 1+N, D), the class token first."""
        outputs = self(pixels, bool_masked_pos=bool_masked_pos, interpolate_pos_encoding=True)
        tokens: torch.Tensor = outputs.last_hidden_state
        return tokens

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]  # LayerNorm; tokens and positions
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Conv2d):
            init_like_pytorch(module)


class DeitEncoder(InitializesEveryModule, DeiTModel):
    """A DeiTModel, to start from released weights; a class and a distillation token precede the patches."""

    no_weight_decay: ClassVar[tuple[str, ...]] = ("cls_token", "distillation_token", "position_embeddings")

    def __init__(self, config: DeiTConfig, add_pooling_layer: bool = False):
        super().__init__(config, add_pooling_layer=add_pooling_layer, use_mask_token=True)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[arg-type]
        if isinstance(module, DeiTEmbeddings):  # all zero in transformers
            for name in ("cls_token", "distillation_token", "mask_token", "position_embeddings"):
                init.trunc_normal_(getattr(module, name), std=0.02)


class PositionBias(BeitRelativePositionBias):
    """The attention bias between all pairs of tokens.

    At each step the native class interpolates its table to the same size, and copies the index from the CPU.
    """

    def forward(self, window_size: tuple[int, int], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the bias (1, heads, 1+N, 1+N)."""
        if tuple(window_size) != tuple(self.window_size):
            return super().forward(window_size, *args, **kwargs)
        index = relative_position_index(self.window_size, self.relative_position_bias_table.device)  # (1+N, 1+N)
        bias = self.relative_position_bias_table[index.flatten()]  # ((1+N) * (1+N), heads)
        return bias.view(*index.shape, -1).permute(2, 0, 1).contiguous().unsqueeze(0)


def relative_position_index(grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Return the row of the bias table for each query and key, (1+N, 1+N).

    The last three rows of the table are for class token to patch, patch to class token, and the class token itself.
    """
    h, w = grid
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    row_steps = (rows[:, None] - rows + h - 1) * (2 * w - 1)  # (h, h)
    column_steps = columns[:, None] - columns + w - 1  # (w, w)
    index = (row_steps[:, None, :, None] + column_steps[None, :, None, :]).reshape(h * w, h * w)  # (N, N)
    num_offsets = (2 * h - 1) * (2 * w - 1)
    index = nn.functional.pad(index, (1, 0, 0, 0), value=num_offsets + 1)
    index = nn.functional.pad(index, (0, 0, 1, 0), value=num_offsets)
    index[0, 0].fill_(num_offsets + 2)  # assigned to, the number would be copied to the device, which waits for it
    return index


class SwinMlpWithDropPath(SwinMLP):
    """A SwinMLP with drop path; the native block has it on its attention branch only."""

    def __init__(self, config: SwinConfig, width: int, drop_path_rate: float):
        super().__init__(config, width)
        self.drop_path = SwinDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dropped: torch.Tensor = self.drop_path(super().forward(hidden_states))
        return dropped


class SwinStages(InitializesEveryModule, NativeSwinStages):
    """The stages, with drop path on both branches of a block, and windows no larger than the feature map.

    `native_problem`: Why transformers' own class cannot compute the same function, or None if it can.
    """

    def __init__(self, config: SwinConfig, grid_size: tuple[int, int]):
        super().__init__(config, grid_size)
        smaller: list[str] = []
        h, w = grid_size
        stage: Any
        for stage, num_heads in zip(self.layers, config.num_heads, strict=True):
            window = min(h, w, config.window_size)
            if window < config.window_size:
                smaller.append(f"{h} x {w}")
            for block in stage.blocks:
                if window < config.window_size:
                    block.window_size, block.shift_size = window, 0
                    block.attention.relative_position_bias = SwinRelativePositionBias(num_heads, (window, window))
                if isinstance(block.drop_path, SwinDropPath):
                    width = block.mlp.fc1.in_features
                    block.mlp = SwinMlpWithDropPath(config, width, block.drop_path.drop_prob)
            h, w = (h + 1) // 2, (w + 1) // 2
        self.native_problem: str | None = None
        if smaller:
            self.native_problem = (
                f"a window of {config.window_size} is larger than the map of stages with {', '.join(smaller)} tokens, "
                "which transformers' Swin cannot run"
            )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        _init_like_swin(super()._init_weights, module)


class SwinEncoder(InitializesEveryModule, SwinModel):
    """A SwinModel with the authors' initialization and the stages above."""

    encoder: SwinStages
    no_weight_decay: ClassVar[tuple[str, ...]] = ("mask_token", "relative_position_bias_table")

    def __init__(self, config: SwinConfig, add_pooling_layer: bool = False):
        super().__init__(config, add_pooling_layer=add_pooling_layer, use_mask_token=True)
        self.encoder = SwinStages(config, self.embeddings.patch_grid)
        self.post_init()

    @property
    def native_root_problem(self) -> str | None:
        """Why transformers' own class cannot compute the same function, or None if it can."""
        return self.encoder.native_problem

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        _init_like_swin(super()._init_weights, module)


def _init_like_swin(native_init: Any, module: nn.Module) -> None:
    native_init(module)  # LayerNorm and the table's index
    if isinstance(module, nn.Linear):
        init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        init_like_pytorch(module)
    elif isinstance(module, SwinEmbeddings) and module.mask_token is not None:
        init.trunc_normal_(module.mask_token, std=0.02)
    elif isinstance(module, SwinRelativePositionBias):
        init.trunc_normal_(module.relative_position_bias_table, std=0.02)


def shrink_factor(blocks: Iterable[Any], linear: nn.Module) -> float:
    """Return sqrt(2 l) for the last layers of both branches of block l (from 1), whose initial std is smaller."""
    for number, block in enumerate(blocks, start=1):
        if linear is block.attention.o_proj or linear is block.mlp.fc2:
            return math.sqrt(2 * number)
    return 1.0


def init_like_pytorch(module: nn.Linear | nn.Conv2d) -> None:
    """Initialize weight and bias as PyTorch's constructors do, instead of transformers' N(0, 0.02)."""
    bound = 1 / math.sqrt(module.weight[0].numel())
    for tensor in (module.weight, module.bias):
        if tensor is not None:
            init.uniform_(tensor, -bound, bound)


def trunc_normal_at_one_std_(tensor: torch.Tensor, std: float) -> None:
    """Truncate at one std, as in the authors' code; by default the limit is 2, whatever the std."""
    init.trunc_normal_(tensor, std=std, a=-std, b=std)

"""Native encoders that see every patch, the hidden ones as a mask token, and start as the papers' authors start them.

Papers: Bao et al. 2021 (BEiT), arXiv:2106.08254, Sec. 2.5; Xie et al. 2021 (SimMIM), arXiv:2111.09886, Sec. 4.1.
Code: microsoft/unilm/beit at 768a3c8; microsoft/SimMIM at d3e29bc.
Differs from transformers: only where `BeitEncoder` and `SwinEncoder` say so; every weight keeps its name, so what is
trained here opens as a `BeitModel` or a `SwinModel`.
Shapes: B images, N tokens, D width, h w patches per column and row.
"""

import math
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import BeitConfig, BeitModel, DeiTConfig, DeiTModel, SwinConfig, SwinModel
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

from .base import InitializesEveryModule

# What a pre-training encoder_config leaves out: values of the authors where transformers has others.
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
    """A BeitModel, name for name: drawn as the authors draw it, its position bias looked up without interpolation.

    From scratch, position comes from one bias table for all blocks, and is wholly learned: until the first update, all
    hidden patches of an image get the same prediction.
    """

    # The mask token and the bias tables are decayed.
    no_weight_decay: ClassVar[tuple[str, ...]] = ("cls_token", "position_embeddings")

    def __init__(self, config: BeitConfig, add_pooling_layer: bool = False):
        if not config.use_mask_token:
            raise ValueError("use_mask_token is False, expected True: hidden patches are shown as the mask token")
        super().__init__(config, add_pooling_layer=add_pooling_layer)
        for module in (self, *self.layers):
            name = "shared_position_bias" if module is self else "relative_position_bias"
            if getattr(module, name) is not None:
                setattr(module, name, PositionBias(config))
        self.post_init()

    @property
    def native_root_problem(self) -> str | None:
        """Why transformers' own class would not compute what this one does, if so."""
        bias = next((module for module in self.modules() if isinstance(module, PositionBias)), None)
        if bias is None or len(set(bias.window_size)) == 1:
            return None
        rows, columns = bias.window_size
        return (
            f"transformers' BeitModel reads the position table of a rectangular image ({rows} x {columns} patches) "
            "with rows and columns swapped; only square images can be exported"
        )

    # Initialization lives here because transformers never runs a parent's `_init_weights` on a nested model.
    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            trunc_normal_at_one_std_(module.weight, 0.02 / self._shrink_factor(module))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, BeitEmbeddings):
            trunc_normal_at_one_std_(module.cls_token, 0.02)
            if module.mask_token is not None:
                trunc_normal_at_one_std_(module.mask_token, 0.02)
            if module.position_embeddings is not None:
                trunc_normal_at_one_std_(module.position_embeddings, 0.02)
        else:
            super()._init_weights(module)  # LayerNorm 1 and 0, tables 0, LayerScale as configured

    def _shrink_factor(self, linear: nn.Module) -> float:
        """The last layers of both branches of block l (from 1) start smaller, by sqrt(2 l)."""
        block: Any
        for number, block in enumerate(self.layers, start=1):
            if linear is block.attention.o_proj or linear is block.mlp.fc2:
                return math.sqrt(2 * number)
        return 1.0


class DeitEncoder(InitializesEveryModule, DeiTModel):
    """A DeiTModel, name for name, to continue from: two tokens, class and distillation, lead the patches."""

    no_weight_decay: ClassVar[tuple[str, ...]] = ("cls_token", "distillation_token", "position_embeddings")

    def __init__(self, config: DeiTConfig, add_pooling_layer: bool = False):
        super().__init__(config, add_pooling_layer=add_pooling_layer, use_mask_token=True)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, DeiTEmbeddings):  # all zero in transformers
            tokens = (module.cls_token, module.distillation_token, module.mask_token, module.position_embeddings)
            for tensor in tokens:
                init.trunc_normal_(tensor, std=0.02)


class PositionBias(BeitRelativePositionBias):
    """The bias between all pairs of tokens.

    At each step the native class resizes its table to the size it has, and brings the index from the CPU.
    """

    def forward(self, window_size, interpolate_pos_encoding: bool = False, dim_size=None) -> torch.Tensor:
        """-> (1, heads, 1+N, 1+N)."""
        if tuple(window_size) != tuple(self.window_size):
            return super().forward(window_size, interpolate_pos_encoding, dim_size)
        index = relative_position_index(self.window_size, self.relative_position_bias_table.device)  # (1+N, 1+N)
        bias = self.relative_position_bias_table[index.flatten()]  # ((1+N) * (1+N), heads)
        return bias.view(*index.shape, -1).permute(2, 0, 1).contiguous().unsqueeze(0)


def relative_position_index(grid: tuple[int, int], device: torch.device) -> torch.Tensor:
    """(1+N, 1+N): the table's row for a query and a key; the last three: class->patch, patch->class, class->class."""
    h, w = grid
    rows, columns = torch.arange(h, device=device), torch.arange(w, device=device)
    row_steps = (rows[:, None] - rows + h - 1) * (2 * w - 1)  # (h, h)
    column_steps = columns[:, None] - columns + w - 1  # (w, w)
    index = (row_steps[:, None, :, None] + column_steps[None, :, None, :]).reshape(h * w, h * w)  # (N, N)
    num_offsets = (2 * h - 1) * (2 * w - 1)
    index = nn.functional.pad(index, (1, 0, 0, 0), value=num_offsets + 1)
    index = nn.functional.pad(index, (0, 0, 1, 0), value=num_offsets)
    index[0, 0] = num_offsets + 2
    return index


class SwinMlpWithDropPath(SwinMLP):
    """The native block drops the path of its attention branch only."""

    def __init__(self, config: SwinConfig, width: int, drop_path_rate: float):
        super().__init__(config, width)
        self.drop_path = SwinDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.drop_path(super().forward(hidden_states))


class SwinStages(InitializesEveryModule, NativeSwinStages):
    """The four stages. `clamped_stages`: sizes (h, w) of the maps that are smaller than the window."""

    def __init__(self, config: SwinConfig, grid_size: tuple[int, int]):
        super().__init__(config, grid_size)
        self.clamped_stages: list[tuple[int, int]] = []
        h, w = grid_size
        stage: Any
        for stage, num_heads in zip(self.layers, config.num_heads, strict=True):
            window = min(h, w, config.window_size)
            if window < config.window_size:
                self.clamped_stages.append((h, w))
            for block in stage.blocks:
                if window < config.window_size:
                    block.window_size, block.shift_size = window, 0
                    block.attention.relative_position_bias = SwinRelativePositionBias(num_heads, (window, window))
                if isinstance(block.drop_path, SwinDropPath):
                    width = block.mlp.fc1.in_features
                    block.mlp = SwinMlpWithDropPath(config, width, block.drop_path.drop_prob)
            h, w = (h + 1) // 2, (w + 1) // 2
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        _init_like_swin(super()._init_weights, module)


class SwinEncoder(InitializesEveryModule, SwinModel):
    """A SwinModel, name for name: drawn as the authors draw it, with drop path on both branches of a block, and with
    windows as small as the map where the map is smaller than the window.
    """

    encoder: SwinStages
    no_weight_decay: ClassVar[tuple[str, ...]] = ("mask_token", "relative_position_bias_table")

    def __init__(self, config: SwinConfig, add_pooling_layer: bool = False):
        super().__init__(config, add_pooling_layer=add_pooling_layer, use_mask_token=True)
        self.encoder = SwinStages(config, self.embeddings.patch_grid)
        self.post_init()

    @property
    def native_root_problem(self) -> str | None:
        """Why transformers' own class would not compute what this one does, if so."""
        if not (stages := self.encoder.clamped_stages):
            return None
        sizes = ", ".join(f"{h} x {w}" for h, w in stages)
        return (
            f"a window of {self.config.window_size} is larger than the map of stages with {sizes} tokens, which "
            "transformers' SwinModel cannot run: it makes their position tables for the full window"
        )

    @torch.no_grad()
    def _init_weights(self, module):
        _init_like_swin(super()._init_weights, module)


def _init_like_swin(native_init: Any, module: nn.Module) -> None:
    native_init(module)  # LayerNorm 1 and 0, and the table's index
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


def init_like_pytorch(module: nn.Linear | nn.Conv2d) -> None:
    """What PyTorch's constructors draw; transformers would draw N(0, 0.02) in its place."""
    bound = 1 / math.sqrt(module.weight[0].numel())
    for tensor in (module.weight, module.bias):
        if tensor is not None:
            init.uniform_(tensor, -bound, bound)


def trunc_normal_at_one_std_(tensor: torch.Tensor, std: float) -> None:
    """Cut at one deviation, as in the authors' code; the usual cut is at 2, whatever the deviation."""
    init.trunc_normal_(tensor, std=std, a=-std, b=std)

"""An estimate of the memory that a training step takes on one device.

Shapes: N patches.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

BYTES_PER_PARAMETER = 16  # weight, gradient and Adam's two moments in float32

# Numbers that a ViT block keeps for its backward pass, per token: two inputs and outputs of LayerNorm, q, k, v and the
# output of attention are 8 widths; GELU's input and output are 2 of the MLP.
_WIDTHS_PER_TOKEN, _INTERMEDIATES_PER_TOKEN = 8, 2
# LayerScale and drop path after both branches; measured on SimMIM ViT-S/16.
_WIDTHS_OF_LAYER_SCALE = 5
# Measured on SimMIM Swin-T and our swin-nano, the masks of shifted windows included.
_WIDTHS_PER_SWIN_TOKEN = 18
# Measured on MAE ViT-B/16: 4.12 and 2.60 bytes; under autocast the residual stream stays float32.
_BYTES_PER_NUMBER, _BYTES_PER_NUMBER_AUTOCAST = 4.1, 2.6


def activation_bytes(
    encoder: Mapping[str, Any], head: Mapping[str, Any], num_patches: int, num_hidden: int, is_autocast: bool
) -> int:
    """What all blocks keep for one image; without gradient checkpointing, and without attention that keeps N x N.

    An encoder with a decoder behind it sees the visible patches only.
    """
    if "decoder_num_hidden_layers" in head:
        numbers = _kept(encoder, "", num_patches - num_hidden) + _kept(head, "decoder_", num_patches)
    elif "depths" in encoder:
        numbers = _kept_by_swin(encoder, num_patches)
    else:
        numbers = _kept(encoder, "", num_patches)
        numbers += (1 + num_patches) * encoder["num_hidden_layers"] * _WIDTHS_OF_LAYER_SCALE * encoder["hidden_size"]
    return round(numbers * (_BYTES_PER_NUMBER_AUTOCAST if is_autocast else _BYTES_PER_NUMBER))


def kept_bytes(model: nn.Module, inputs: torch.Tensor) -> int:
    """What a forward pass keeps for its backward pass beside the weights, by looking."""
    kept = {id(parameter): 0 for parameter in model.parameters()}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # or an id could be used again
        kept.setdefault(id(tensor), tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs)
    return sum(kept.values())


def _kept(size: Mapping[str, Any], prefix: str, num_patches: int) -> int:
    per_token = _WIDTHS_PER_TOKEN * size[f"{prefix}hidden_size"]
    per_token += _INTERMEDIATES_PER_TOKEN * size[f"{prefix}intermediate_size"]
    return (1 + num_patches) * size[f"{prefix}num_hidden_layers"] * per_token


def _kept_by_swin(size: Mapping[str, Any], num_patches: int) -> int:
    """Each stage has a quarter of the tokens of the one before it, at double the width."""
    return sum(
        num_patches // 4**stage * depth * _WIDTHS_PER_SWIN_TOKEN * size["embed_dim"] * 2**stage
        for stage, depth in enumerate(size["depths"])
    )

"""What the shapes of an encoder's weights say about its sizes, as keyword arguments of transformers' config.

`num_attention_heads` and `image_size` are asked for only where the weights do not say them.
Shapes: D width, N patches.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch

State = Mapping[str, torch.Tensor]
SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
BLOCK_TABLE = "blocks.0.attn.relative_position_bias_table"


def vit_settings(state: State, num_attention_heads: int | None, image_size: list[int] | None = None) -> dict[str, Any]:
    """Of a plain ViT, with learned or fixed absolute positions."""
    settings = _transformer_settings(state, num_attention_heads)
    side = image_size_from_positions(state)
    return {
        "model_type": "vit",
        **settings,
        "image_size": _as_setting(image_size) or side or _no_square(state),
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
    }


def beit_settings(
    state: State, num_attention_heads: int | None = None, image_size: list[int] | None = None
) -> dict[str, Any]:
    """Of a BEiT: absolute positions, one position table for all blocks, or one in each; with LayerScale or without."""
    table = state.get(SHARED_TABLE, state.get(BLOCK_TABLE))
    settings = _transformer_settings(state, num_attention_heads if table is None else table.shape[1])
    if table is None:
        side = image_size_from_positions(state)
    else:
        num_offsets = _root(len(table) - 3, "rows of the relative position table, less three,")
        side = (num_offsets + 1) // 2 * settings["patch_size"]
    return {
        "model_type": "beit",
        **settings,
        "image_size": _as_setting(image_size) or side or _no_square(state),
        "use_absolute_position_embeddings": "pos_embed" in state,
        "use_relative_position_bias": BLOCK_TABLE in state,
        "use_shared_relative_position_bias": SHARED_TABLE in state,
        "use_mask_token": "mask_token" in state,
        "use_mean_pooling": "fc_norm.weight" in state,
        # Only whether there is one: its values are weights.
        "layer_scale_init_value": 0.1 if "blocks.0.gamma_1" in state else 0.0,
    }


def swin_settings(state: State, image_size: int | None) -> dict[str, Any]:
    """Of a Swin; `image_size` counts where the file holds no mask of shifted windows, which tells it."""
    stages = range(count(state, r"^layers\.(\d+)\."))
    tables = [need(state, f"layers.{s}.blocks.0.attn.relative_position_bias_table") for s in stages]
    embed_dim, num_channels, patch_size, _ = need(state, "patch_embed.proj.weight").shape
    return {
        "model_type": "swin",
        "embed_dim": embed_dim,
        "depths": [count(state, rf"^layers\.{s}\.blocks\.(\d+)\.") for s in stages],
        "num_heads": [table.shape[1] for table in tables],
        # the map of a late stage may be smaller than the window, and its table with it
        "window_size": (_root(len(tables[0]), "rows of the relative position table") + 1) // 2,
        "mlp_ratio": need(state, "layers.0.blocks.0.mlp.fc1.weight").shape[0] / embed_dim,
        "image_size": swin_image_size(state) or image_size or _ask("--image_size: no shifted windows tell it"),
        "patch_size": patch_size,
        "num_channels": num_channels,
        "layer_norm_eps": 1e-5,
    }


def swin_image_size(state: State) -> int | None:
    """The mask of shifted windows (windows, w*w, w*w) has as many tokens as the first stage's map."""
    if (mask := state.get("layers.0.blocks.1.attn_mask")) is None:
        return None
    side = _root(mask.shape[0] * mask.shape[1], "tokens of the first stage")
    return side * need(state, "patch_embed.proj.weight").shape[-1]


def image_size_from_positions(state: State) -> int | None:
    """Of a square image: the table has a row for each patch and one for the class token. None if it is not square."""
    if (positions := state.get("pos_embed")) is None:
        return None
    num_patches = positions.shape[1] - 1
    side = math.isqrt(num_patches)
    return side * need(state, "patch_embed.proj.weight").shape[-1] if side * side == num_patches else None


def need(state: State, key: str) -> torch.Tensor:
    if key not in state:
        raise ValueError(f"the file lacks {key}, which tells the sizes; it begins with {list(state)[:5]}")
    return state[key]


def count(state: State, pattern: str) -> int:
    """How many blocks or stages there are."""
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)


def _transformer_settings(state: State, num_attention_heads: int | None) -> dict[str, Any]:
    hidden_size, num_channels, patch_size, _ = need(state, "patch_embed.proj.weight").shape
    if num_attention_heads is None:
        _ask("--num_attention_heads")
    elif hidden_size % num_attention_heads:
        raise ValueError(f"--num_attention_heads {num_attention_heads} does not divide the width {hidden_size}")
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": count(state, r"^blocks\.(\d+)\."),
        "num_attention_heads": num_attention_heads,
        "intermediate_size": need(state, "blocks.0.mlp.fc1.weight").shape[0],
        "patch_size": patch_size,
        "num_channels": num_channels,
        "layer_norm_eps": 1e-6,  # not in any file; so in the code of all these methods and in timm
    }


def _as_setting(image_size: list[int] | None) -> int | list[int] | None:
    return image_size[0] if image_size and len(set(image_size)) == 1 else image_size


def _no_square(state: State) -> Any:
    positions = need(state, "pos_embed").shape[1]
    raise ValueError(f"{positions} positions (one of them the class token's) are no square grid: give --image_size")


def _ask(flag: str) -> Any:
    raise ValueError(f"the file does not say it: give {flag}")


def _root(number: int, what: str) -> int:
    root = math.isqrt(max(number, 0))
    if root * root != number:
        raise ValueError(f"{number} {what} are no square; the authors' code has square images only")
    return root

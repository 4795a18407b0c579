"""Read an encoder's sizes from the shapes of its weights, as keyword arguments of transformers' config.

`num_attention_heads` and `image_size` are only needed where the weights do not determine them.
"""

import math
import re
from typing import Any

import torch

from hub.convert.weight_file import State

SHARED_TABLE = "rel_pos_bias.relative_position_bias_table"
BLOCK_TABLE = "blocks.0.attn.relative_position_bias_table"
_GATED = "blocks.0.mlp.w3.weight"


def vit_settings(state: State, num_attention_heads: int | None, image_size: list[int] | None = None) -> dict[str, Any]:
    """Return the settings of a plain ViT with learned or fixed absolute positions."""
    settings = _transformer_settings(state, num_attention_heads, image_size)
    return {"model_type": "vit", **settings, "qkv_bias": "blocks.0.attn.qkv.bias" in state}


def beit_settings(
    state: State, num_attention_heads: int | None = None, image_size: list[int] | None = None
) -> dict[str, Any]:
    """Return the settings of a BEiT: absolute or relative positions (shared or per block), LayerScale or not."""
    return {
        "model_type": "beit",
        **_transformer_settings(state, num_attention_heads, image_size),
        "use_absolute_position_embeddings": "pos_embed" in state,
        "use_relative_position_bias": BLOCK_TABLE in state,
        "use_shared_relative_position_bias": SHARED_TABLE in state,
        "use_mask_token": "mask_token" in state,
        "use_mean_pooling": "fc_norm.weight" in state,
        # Only tells whether there is LayerScale; its values are weights.
        "layer_scale_init_value": 0.1 if "blocks.0.gamma_1" in state else 0.0,
    }


def dinov2_settings(state: State, num_attention_heads: int | None) -> dict[str, Any]:
    """Return the settings of a DINOv2, with registers or without; its MLPs may be gated."""
    settings = _transformer_settings(state, num_attention_heads, None)
    size, hidden_size, is_gated = settings.pop("intermediate_size"), settings["hidden_size"], _GATED in state
    sizes = {ratio: ratio * hidden_size for ratio in range(1, 17)}
    if is_gated:  # two thirds, rounded up to a multiple of 8
        sizes = {ratio: (int(full * 2 / 3) + 7) // 8 * 8 for ratio, full in sizes.items()}
    ratio = next((ratio for ratio, expected in sizes.items() if expected == size), None)
    if ratio is None:
        raise ValueError(f"transformers' DINOv2 has no MLP of {size} for a hidden size of {hidden_size}")
    registers = state.get("register_tokens")
    own = (
        {"model_type": "dinov2", "use_mask_token": "mask_token" in state}
        if registers is None
        else {"model_type": "dinov2_with_registers", "num_register_tokens": registers.shape[1]}
    )
    bias = {"qkv_bias": "blocks.0.attn.qkv.bias" in state}
    return {**own, **settings, **bias, "mlp_ratio": ratio, "use_swiglu_ffn": is_gated}


def swin_settings(state: State, image_size: int | None) -> dict[str, Any]:
    """Return the settings of a Swin; `image_size` is for files without the masks of shifted windows."""
    stages = range(count_blocks(state, r"^layers\.(\d+)\."))
    tables = [_require(state, f"layers.{s}.blocks.0.attn.relative_position_bias_table") for s in stages]
    embed_dim, num_channels, patch_size, _ = _require(state, "patch_embed.proj.weight").shape
    return {
        "model_type": "swin",
        "embed_dim": embed_dim,
        "depths": [count_blocks(state, rf"^layers\.{s}\.blocks\.(\d+)\.") for s in stages],
        "num_heads": [table.shape[1] for table in tables],
        # the feature map of a late stage, and with it its table, may be smaller than the window
        "window_size": (_root(len(tables[0]), "rows of the relative position table") + 1) // 2,
        "mlp_ratio": _require(state, "layers.0.blocks.0.mlp.fc1.weight").shape[0] / embed_dim,
        "image_size": swin_image_size(state) or image_size or _ask_for("--image_size"),
        "patch_size": patch_size,
        "num_channels": num_channels,
        "layer_norm_eps": 1e-5,
    }


def swin_image_size(state: State) -> int | None:
    """Read the image size from the mask of shifted windows (num_windows, w*w, w*w), which covers the first stage."""
    if (mask := state.get("layers.0.blocks.1.attn_mask")) is None:
        return None
    side = _root(mask.shape[0] * mask.shape[1], "tokens of the first stage")
    return side * _require(state, "patch_embed.proj.weight").shape[-1]


def image_size_from_positions(state: State) -> int | None:
    """Return the side of a square image from its position table (1, 1+N, D); None if it is not square."""
    if (positions := state.get("pos_embed")) is None:
        return None
    num_patches = positions.shape[1] - 1
    side = math.isqrt(num_patches)
    return side * _require(state, "patch_embed.proj.weight").shape[-1] if side * side == num_patches else None


def count_blocks(state: State, pattern: str) -> int:
    return 1 + max((int(match[1]) for key in state if (match := re.match(pattern, key))), default=-1)


def _require(state: State, key: str) -> torch.Tensor:
    if key not in state:
        raise ValueError(f"{key}, which determines sizes, is missing; the first keys are {list(state)[:5]}")
    return state[key]


def _transformer_settings(
    state: State, num_attention_heads: int | None, image_size: list[int] | None
) -> dict[str, Any]:
    hidden_size, num_channels, patch_size, _ = _require(state, "patch_embed.proj.weight").shape
    table, side = state.get(SHARED_TABLE, state.get(BLOCK_TABLE)), image_size_from_positions(state)
    if table is not None:
        num_attention_heads = table.shape[1]
        side = (_root(len(table) - 3, "rows of the relative position table (minus 3)") + 1) // 2 * patch_size
    if num_attention_heads is None:
        _ask_for("--num_attention_heads")
    elif hidden_size % num_attention_heads:
        raise ValueError(f"--num_attention_heads {num_attention_heads} does not divide the hidden size {hidden_size}")
    sides = image_size or ([side] if side else [])
    if not sides:
        num_positions = _require(state, "pos_embed").shape[1]
        raise ValueError(f"{num_positions} positions (class token included) are not a square grid: add --image_size")
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": count_blocks(state, r"^blocks\.(\d+)\."),
        "num_attention_heads": num_attention_heads,
        "intermediate_size": (
            state[_GATED].T if _GATED in state else _require(state, "blocks.0.mlp.fc1.weight")
        ).shape[0],
        "image_size": sides[0] if len(set(sides)) == 1 else sides,
        "patch_size": patch_size,
        "num_channels": num_channels,
        "layer_norm_eps": 1e-6,  # in no file, but in the code of all these methods and of timm
    }


def _ask_for(flag: str) -> Any:
    raise ValueError(f"the file does not store this setting: add {flag}")


def _root(number: int, what: str) -> int:
    root = math.isqrt(max(number, 0))
    if root * root != number:
        raise ValueError(f"{number} {what} are not a square number; the authors' code only has square images")
    return root

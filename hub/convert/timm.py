"""Convert ViT, BEiT and Swin files of timm (huggingface/pytorch-image-models), bare or with classifier, to native."""

import argparse
import math
import re

import torch

from hub.convert.key_names import move_downsampling
from hub.convert.native_models import Converted, convert_beit, convert_swin, convert_vit
from hub.convert.simmim import is_swin
from hub.convert.sizes import BLOCK_TABLE, SHARED_TABLE, image_size_from_positions
from hub.convert.weight_file import State, suggested_num_heads

_UNSUPPORTED = {
    r"^reg_token$": "register tokens",
    r"^dist_token$": "a distillation token",
    r"^norm_pre\.": "a norm before the blocks",
    r"^attn_pool\.": "attention pooling",
    r"\.attn\.[qk]_norm\.": "norms of queries and keys",
    r"\.mlp\.(w12|w3|fc1_g)\.|\.mlp\.norm\.": "gated MLPs",
    r"^head_dist\.": "two classifiers",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_attention_heads", type=int, help="for a ViT: 3 for Ti, 6 for S, 12 for B, 16 for L, H")
    parser.add_argument("--image_size", type=int, nargs="+", help="for a Swin, or HEIGHT WIDTH for a rectangular ViT")


def required_flags(state: State) -> dict[str, str]:
    """Refuse models with parts that no native class has."""
    for pattern, part in _UNSUPPORTED.items():
        if keys := [key for key in state if re.search(pattern, key)]:
            raise ValueError(f"transformers' ViT, BEiT and Swin do not have {part} ({', '.join(keys[:4])})")
    flags = {"image_stats": "imagenet|half"}
    if is_swin(state):
        return {**flags, "image_size": "224"}
    if not _is_beit(state):
        flags["num_attention_heads"] = suggested_num_heads(state)
    if "pos_embed" in state and image_size_from_positions(state) is None and not _omits_class_position(state):
        flags["image_size"] = _likeliest_rectangle(state)
    return flags


def image_stats(state: State) -> None:
    """Return None: models of timm differ, so `required_flags` lists it."""


def convert(state: State, options: argparse.Namespace) -> Converted:
    state = {key.replace("head.fc.", "head."): tensor for key, tensor in state.items()}
    if is_swin(state):
        return convert_swin(move_downsampling(state, -1), options.image_size[0])
    if _is_beit(state):
        return convert_beit(state)
    if options.image_size is not None or not _omits_class_position(state):
        return convert_vit(state, options.num_attention_heads, options.image_size)
    positions = state["pos_embed"]
    state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    converted = convert_vit(state, options.num_attention_heads)
    converted.notes.append(
        f"its {positions.shape[1]} positions are read as a square of patches without a class token; if one is the "
        "class token's and the image is rectangular, add --image_size HEIGHT WIDTH"
    )
    return converted


def _likeliest_rectangle(state: State) -> str:
    """Return the height and width closest to a square."""
    num_patches, patch_size = state["pos_embed"].shape[1] - 1, state["patch_embed.proj.weight"].shape[-1]
    rows = max(number for number in range(1, math.isqrt(num_patches) + 1) if num_patches % number == 0)
    return f"{rows * patch_size} {num_patches // rows * patch_size}"


def _omits_class_position(state: State) -> bool:
    """Return whether the class token has no position (timm's `no_embed_class`), which equals a zero position."""
    num_positions = state["pos_embed"].shape[1] if "pos_embed" in state else 0
    return num_positions > 0 and math.isqrt(num_positions) ** 2 == num_positions


def _is_beit(state: State) -> bool:
    """Return whether there are relative position tables, which also determine the number of heads."""
    return SHARED_TABLE in state or BLOCK_TABLE in state

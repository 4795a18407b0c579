"""Files of timm (huggingface/pytorch-image-models): ViT, BEiT and Swin, bare or with classifier -> native."""

import argparse
import math
import re

import torch

from hub.convert.native_models import Converted, State, beit_from, swin_from, vit_from
from hub.convert.simmim import is_swin
from hub.convert.sizes import BLOCK_TABLE, SHARED_TABLE, image_size_from_positions
from hub.convert.weight_file import suggested_num_heads

_STAGE = re.compile(r"^layers\.(\d+)\.downsample\.")
_UNSUPPORTED = {
    r"^reg_token$": "register tokens",
    r"^dist_token$": "a distillation token",
    r"^norm_pre\.": "a norm in front of the blocks",
    r"^attn_pool\.": "attention pooling",
    r"\.attn\.[qk]_norm\.": "norms of queries and keys",
    r"\.mlp\.(w12|w3|fc1_g)\.|\.mlp\.norm\.": "gated MLPs",
    r"^head_dist\.": "two classifiers",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_attention_heads", type=int, help="of a ViT: 3 for Ti, 6 for S, 12 for B, 16 for L, H")
    parser.add_argument("--image_size", type=int, nargs="+", help="of a Swin, or HEIGHT WIDTH of a rectangular ViT")


def asks(state: State) -> dict[str, str]:
    """Flags that the file cannot answer, with what is usual.

    Raises:
        ValueError: it has parts that no native class has; they are named.
    """
    for pattern, part in _UNSUPPORTED.items():
        if keys := [key for key in state if re.search(pattern, key)]:
            raise ValueError(f"no native ViT, BEiT or Swin of transformers has {part} ({', '.join(keys[:4])})")
    asked = {"image_stats": "imagenet|half"}
    if is_swin(state):
        return {**asked, "image_size": "224"}
    if not _is_beit(state):
        asked["num_attention_heads"] = suggested_num_heads(state)
    if "pos_embed" in state and image_size_from_positions(state) is None and not _leaves_out_class(state):
        asked["image_size"] = _likeliest_rectangle(state)
    return asked


def image_stats(state: State) -> None:
    """Not in the file, and models of timm differ in it: `asks` does."""


def convert(state: State, options: argparse.Namespace) -> Converted:
    """Raises ValueError if the weights do not fit; the keys that say so are named."""
    state = {key.replace("head.fc.", "head."): tensor for key, tensor in state.items()}
    if is_swin(state):
        # timm merges patches at the beginning of a stage, the others at the end of the one before
        state = {_STAGE.sub(lambda m: f"layers.{int(m[1]) - 1}.downsample.", key): t for key, t in state.items()}
        return swin_from(state, options.image_size[0])
    if _is_beit(state):
        return beit_from(state)
    if options.image_size is not None or not _leaves_out_class(state):
        return vit_from(state, options.num_attention_heads, options.image_size)
    positions = state["pos_embed"]
    state["pos_embed"] = torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)
    converted = vit_from(state, options.num_attention_heads)
    converted.remarks.append(
        f"its {positions.shape[1]} positions are taken for a square of patches, with none for the class token; if one "
        "is the class token's, of a rectangular image, give --image_size HEIGHT WIDTH"
    )
    return converted


def _likeliest_rectangle(state: State) -> str:
    """The one nearest to a square."""
    num_patches, patch_size = state["pos_embed"].shape[1] - 1, state["patch_embed.proj.weight"].shape[-1]
    rows = max(number for number in range(1, math.isqrt(num_patches) + 1) if num_patches % number == 0)
    return f"{rows * patch_size} {num_patches // rows * patch_size}"


def _leaves_out_class(state: State) -> bool:
    """Some ViTs of timm (`no_embed_class`) give their class token no position, which is a position of zero."""
    num_positions = state["pos_embed"].shape[1] if "pos_embed" in state else 0
    return num_positions > 0 and math.isqrt(num_positions) ** 2 == num_positions


def _is_beit(state: State) -> bool:
    """Its positions are tables of relative ones, which say the number of heads too."""
    return SHARED_TABLE in state or BLOCK_TABLE in state

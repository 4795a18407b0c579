"""The authors' SimMIM checkpoints (microsoft/SimMIM, ViT and Swin) -> `SimMimForPreTraining`.

Shapes: D width, S side of a cell in pixels, C channels.
"""

import argparse
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from modeling.simmim import PIXEL_LOSSES, SimMimConfig, SimMimForPreTraining

State = Mapping[str, torch.Tensor]

# Keys of the encoder after "encoder."; those of the ViT are BEiT's too.
_BLOCK_RENAMES = (
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"^norm\.", "layernorm."),
    (r"^mask_token$", "embeddings.mask_token"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embeddings.projection."),
)
_BEIT_RENAMES = (
    *_BLOCK_RENAMES,
    (r"^blocks\.", "layers."),
    (r"\.gamma_([12])$", r".lambda_\1"),
    (r"\.attn\.([qv])_bias$", r".attention.\1_proj.bias"),
    (r"^cls_token$", "embeddings.cls_token"),
    (r"^rel_pos_bias\.relative_position_bias_table$", "shared_position_bias.relative_position_bias_table"),
)
_SWIN_RENAMES = (
    *_BLOCK_RENAMES,
    (r"^layers\.", "encoder.layers."),
    (r"\.attn\.(relative_position_bias_table)$", r".attention.relative_position_bias.\1"),
    (r"^patch_embed\.norm\.", "embeddings.norm."),
)
# Constants that follow from the sizes, and are not weights.
_DERIVED = re.compile(r"\.(relative_position_index|attn_mask)$")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image_size", type=int, help="of a Swin without shifted windows, where the file does not say"
    )
    parser.add_argument("--pixel_loss", choices=list(PIXEL_LOSSES), default="l1", help="l1 in every released file")
    parser.add_argument("--norm_pix_loss", choices=["true", "false"], default="false", help="false in released files")


def convert(state: State, options: argparse.Namespace) -> SimMimForPreTraining:
    """A full SimMIM (encoder and prediction layer) from the authors' state dict.

    Raises:
        ValueError: the file has no decoder, or is not a SimMIM; the keys that say so are named.
    """
    needed = ("encoder.patch_embed.proj.weight", "encoder.mask_token", "decoder.0.weight", "decoder.0.bias")
    if missing := [key for key in needed if key not in state]:
        raise ValueError(f"no SimMIM checkpoint: it lacks {', '.join(missing)}; it begins with {list(state)[:5]}")
    encoder = {key.removeprefix("encoder."): tensor for key, tensor in state.items() if key.startswith("encoder.")}
    is_swin = any(key.startswith("layers.") for key in encoder)
    config = SimMimConfig(
        encoder_config=swin_settings(encoder, options.image_size) if is_swin else beit_settings(encoder),
        pixel_loss=options.pixel_loss,
        norm_pix_loss=options.norm_pix_loss == "true",
    )
    model = SimMimForPreTraining(config)
    renamed = {f"encoder.{name}": tensor for name, tensor in (rename_swin if is_swin else rename_beit)(encoder)}
    for part in ("weight", "bias"):
        renamed[f"decoder.{part}"] = _channels_last(state[f"decoder.0.{part}"], config)
    others = [key for key in state if not key.startswith(("encoder.", "decoder.0."))]
    missing_keys, unexpected = model.load_state_dict(renamed, strict=False)
    if missing_keys or unexpected or others:
        raise ValueError(
            f"the file does not fit a SimMIM: missing {missing_keys}, not understood {unexpected + others}"
        )
    return model.eval()


def rename_beit(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """The authors' keys of a BEiT encoder -> those of a BeitModel; the fused qkv matrix (3D, D) becomes q, k and v."""
    return _renamed(state, _BEIT_RENAMES)


def rename_swin(state: State) -> Iterator[tuple[str, torch.Tensor]]:
    """The authors' keys of a Swin -> those of a SwinModel."""
    return _renamed(state, _SWIN_RENAMES)


def beit_settings(state: State) -> dict[str, Any]:
    """Everything that the tensors' shapes say about a BEiT encoder; the authors' code has square grids only."""
    if (table := state.get("rel_pos_bias.relative_position_bias_table")) is None:
        raise ValueError(
            "the file has no rel_pos_bias.relative_position_bias_table, expected one table for all blocks"
        )
    num_offsets, num_heads = table.shape[0] - 3, table.shape[1]
    side = (_root(num_offsets, "rows of the relative position table, less three,") + 1) // 2
    hidden_size, num_channels, patch_size, _ = state["patch_embed.proj.weight"].shape
    return {
        "model_type": "beit",
        "hidden_size": hidden_size,
        "num_hidden_layers": _count(state, r"^blocks\.(\d+)\."),
        "num_attention_heads": num_heads,
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "num_channels": num_channels,
        # Only whether there is one: its values are weights.
        "layer_scale_init_value": 0.1 if "blocks.0.gamma_1" in state else 0.0,
    }


def swin_settings(state: State, image_size: int | None) -> dict[str, Any]:
    """Everything that the tensors' shapes say about a Swin; `image_size` counts where the file holds none."""
    stages = range(_count(state, r"^layers\.(\d+)\."))
    tables = [state[f"layers.{s}.blocks.0.attn.relative_position_bias_table"] for s in stages]
    embed_dim, num_channels, patch_size, _ = state["patch_embed.proj.weight"].shape
    return {
        "model_type": "swin",
        "embed_dim": embed_dim,
        "depths": [_count(state, rf"^layers\.{s}\.blocks\.(\d+)\.") for s in stages],
        "num_heads": [table.shape[1] for table in tables],
        "window_size": (_root(len(tables[0]), "rows of the relative position table") + 1) // 2,
        "mlp_ratio": state["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        "image_size": _swin_image_size(state, patch_size) or image_size or _ask_for_image_size(),
        "patch_size": patch_size,
        "num_channels": num_channels,
    }


def _swin_image_size(state: State, patch_size: int) -> int | None:
    """The mask of shifted windows (windows, w*w, w*w) has as many tokens as the first stage's map."""
    mask = state.get("layers.0.blocks.1.attn_mask")
    return None if mask is None else patch_size * _root(mask.shape[0] * mask.shape[1], "tokens of the first stage")


def _ask_for_image_size() -> int:
    raise ValueError("the file does not say its image size (no shifted windows): give --image_size")


def _renamed(state: State, renames: tuple[tuple[str, str], ...]) -> Iterator[tuple[str, torch.Tensor]]:
    for key, tensor in state.items():
        if _DERIVED.search(key):
            continue
        name = key
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield name.replace(".attn.qkv.", f".attention.{letter}_proj."), part.clone()
        else:
            yield name, tensor


def _channels_last(tensor: torch.Tensor, config: SimMimConfig) -> torch.Tensor:
    """(C*S*S, D, 1, 1) or (C*S*S,), a pixel shuffle's order -> (S*S*C, D) or (S*S*C,), `patchify`'s order."""
    side, num_channels = config.prediction_side, config.encoder_config.num_channels
    if tensor.shape[0] != num_channels * side**2:
        raise ValueError(f"decoder.0 predicts {tensor.shape[0]} numbers, expected {num_channels} x {side} x {side}")
    return tensor.view(num_channels, side * side, -1).transpose(0, 1).reshape(tensor.shape[:2]).clone()


def _count(state: State, pattern: str) -> int:
    return 1 + max(int(match[1]) for key in state if (match := re.match(pattern, key)))


def _root(number: int, what: str) -> int:
    root = math.isqrt(number)
    if root * root != number:
        raise ValueError(f"{number} {what} are no square; the authors' code has square images only")
    return root

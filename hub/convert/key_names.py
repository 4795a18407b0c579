"""Rename weights between the papers' authors or timm and transformers.

There is one table per kind of encoder. The converters read it forwards; the timm export, and messages that name a
missing weight as the file would, read it backwards.
Shapes: D hidden size.
"""

import re
from collections.abc import Iterator

import torch

from hub.convert.weight_file import State

# (theirs, ours); "^" stands for the start of the name.
Table = tuple[tuple[str, str], ...]

_BLOCK: Table = (
    (".norm1.", ".layernorm_before."),
    (".norm2.", ".layernorm_after."),
    (".attn.proj.", ".attention.o_proj."),
    ("^mask_token", "^embeddings.mask_token"),
    ("^patch_embed.proj.", "^embeddings.patch_embeddings.projection."),
    ("^norm.", "^layernorm."),
    ("^head.", "^classifier."),
)
VIT: Table = (
    *_BLOCK,
    ("^blocks.", "^layers."),
    ("^cls_token", "^embeddings.cls_token"),
    ("^pos_embed", "^embeddings.position_embeddings"),
)
BEIT: Table = (
    *VIT,
    (".gamma_1", ".lambda_1"),
    (".gamma_2", ".lambda_2"),
    (".attn.q_bias", ".attention.q_proj.bias"),
    (".attn.v_bias", ".attention.v_proj.bias"),
    ("^rel_pos_bias.", "^shared_position_bias."),
    (".attn.relative_position_bias_table", ".relative_position_bias.relative_position_bias_table"),
    ("^fc_norm.", "^pooler.layernorm."),
)
SWIN: Table = (
    *_BLOCK,
    ("^layers.", "^encoder.layers."),
    (".attn.relative_position_bias_table", ".attention.relative_position_bias.relative_position_bias_table"),
    ("^patch_embed.norm.", "^embeddings.norm."),
)
TABLES: dict[str, Table] = {"vit": VIT, "beit": BEIT, "swin": SWIN}
# A whole MAE: the mask token belongs to the decoder, whose blocks are like the encoder's.
MAE: Table = (
    *(pair for pair in VIT if pair[0] != "^mask_token"),
    ("^decoder_blocks.", "^decoder_layers."),
    ("^decoder_pos_embed", "^decoder_positions"),
)

DINOV2: Table = (
    (".attn.proj.", ".attention.o_proj."),
    (".ls1.gamma", ".layer_scale1.lambda1"),
    (".ls2.gamma", ".layer_scale2.lambda1"),
    (".mlp.w12.", ".mlp.gate_proj."),  # both matrices of a gated MLP in one
    (".mlp.w12.", ".mlp.up_proj."),
    (".mlp.w3.", ".mlp.down_proj."),
    ("^cls_token", "^embeddings.cls_token"),
    ("^mask_token", "^embeddings.mask_token"),
    ("^register_tokens", "^embeddings.register_tokens"),
    ("^pos_embed", "^embeddings.position_embeddings"),
    ("^patch_embed.proj.", "^embeddings.patch_embeddings.projection."),
    ("^norm.", "^layernorm."),
    ("^blocks.", "^encoder.layer."),
)

_QKV = re.compile(r"\.attn\.qkv\.(weight|bias)$")
_PROJECTION = re.compile(r"\.attention\.[qkv]_proj\.(weight|bias)$")


def to_native(state: State, table: Table) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Yield (their key, our key, tensor) for each tensor; the fused qkv matrix (3D, D) is split into q, k and v."""
    for key, tensor in state.items():
        if match := _QKV.search(key):
            name = _rename(key.removesuffix(match[0]), table)
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield key, f"{name}.attention.{letter}_proj.{match[1]}", part.clone()
        else:
            yield key, _rename(key, table), tensor


def from_native(state: State, table: Table) -> dict[str, torch.Tensor]:
    """Invert `to_native`: fuse q, k and v again. BEiT's q and v biases stay separate, because its k has none."""
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        if (match := _PROJECTION.search(key)) is None or (table is BEIT and match[1] == "bias"):
            renamed[native_to_theirs(key, table)] = tensor
        elif ".q_proj." in key:
            parts = [state[key.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            renamed[native_to_theirs(key, table)] = torch.cat(parts)
    return renamed


def native_to_theirs(key: str, table: Table) -> str:
    """Return the key in the authors' file of the tensor that contains this one."""
    name = _rename(key, tuple((theirs, ours) for ours, theirs in table))
    return _PROJECTION.sub(r".attn.qkv.\1", name)


def move_downsampling(state: State, stages: int) -> dict[str, torch.Tensor]:
    """Renumber where a Swin merges patches: timm at the start of a stage, the others at the end of the one before."""
    pattern = r"^layers\.(\d+)\.downsample\."
    return {re.sub(pattern, lambda m: f"layers.{int(m[1]) + stages}.downsample.", key): t for key, t in state.items()}


def _rename(key: str, table: Table) -> str:
    name = "^" + key
    for old, new in table:
        name = name.replace(old, new)
    return name.removeprefix("^")

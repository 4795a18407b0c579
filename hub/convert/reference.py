"""Run a ViT, BEiT or DINOv2 directly on the authors' weights; the converter compares its result with this.

It uses neither transformers nor renamed keys, so that a misplaced weight cannot go unnoticed.
Code: facebookresearch/mae at efb2a80, microsoft/unilm/beit at 768a3c8, facebookresearch/dinov2 at e1277af (all
reimplemented).
Shapes: B images, N patches, D hidden size, A heads.
"""

import torch
from torch.nn import functional as F

from hub.convert.recognize import CODES
from hub.convert.sizes import BLOCK_TABLE, SHARED_TABLE, count_blocks
from hub.convert.weight_file import State
from modeling.encoders import relative_position_index


@torch.no_grad()
def reference_output(state: State, pixel_values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return all tokens after the final norm, if there is one, or the logits of a classifier.

    Tokens are (B, 1+N, D), with registers after the class token.
    """
    weight = state["patch_embed.proj.weight"]
    x = F.conv2d(pixel_values, weight, state["patch_embed.proj.bias"], stride=weight.shape[-1])
    grid = (x.shape[2], x.shape[3])
    x = torch.cat([state["cls_token"].expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1)  # (B, 1+N, D)
    if "pos_embed" in state:
        x = x + state["pos_embed"]
    if "register_tokens" in state:
        x = torch.cat([x[:, :1], state["register_tokens"].expand(len(x), -1, -1), x[:, 1:]], dim=1)
    shared = _bias(state[SHARED_TABLE], grid) if SHARED_TABLE in state else 0.0
    for block in range(count_blocks(state, r"^blocks\.(\d+)\.")):
        prefix = f"blocks.{block}."
        weights = {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}
        table = weights.get(BLOCK_TABLE.removeprefix("blocks.0."))
        bias = shared if table is None else shared + _bias(table, grid)
        first, second = (weights.get(f"gamma_{i}", weights.get(f"ls{i}.gamma", 1.0)) for i in (1, 2))
        x = x + first * _attention(weights, _norm(weights, "norm1", x), bias, num_heads)
        x = x + second * _mlp(weights, _norm(weights, "norm2", x))
    if "norm.weight" in state:
        x = _norm(state, "norm", x)
    if "head.weight" not in state:
        return x
    mean_or_class = _norm(state, "fc_norm", x[:, 1:].mean(1)) if "fc_norm.weight" in state else x[:, 0]
    return _linear(state, "head", mean_or_class)


@torch.no_grad()
def reference_features(state: State, pixel_values: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return the features (B, N, F) that a tokenizer of BEiT v2 rebuilds of images in [0, 1]."""
    patches = reference_output(part(state, "encoder."), 2 * pixel_values - 1, num_heads)[:, 1:]
    features, codes = F.normalize(_task_layer(state, "encode_task_layer", patches), dim=-1), state[CODES]
    nearest = codes[torch.cdist(features, codes).argmin(-1)]
    grid = [side // state["encoder.patch_embed.proj.weight"].shape[-1] for side in pixel_values.shape[2:]]
    decoded = reference_output(part(state, "decoder."), nearest.mT.unflatten(2, grid), num_heads)[:, 1:]
    return _task_layer(state, "decode_task_layer", decoded)


def _task_layer(state: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return _linear(state, f"{name}.2", _linear(state, f"{name}.0", x).tanh())


def part(state: State, prefix: str) -> dict[str, torch.Tensor]:
    """Return one of a tokenizer's networks, with the name of a BEiT's final norm."""
    found = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    return {key.replace("fc_norm.", "norm."): tensor for key, tensor in found.items()}


def _attention(weights: State, x: torch.Tensor, bias: torch.Tensor | float, num_heads: int) -> torch.Tensor:
    qkv_bias = weights.get("attn.qkv.bias")
    if "attn.q_bias" in weights:
        q_bias = weights["attn.q_bias"]
        qkv_bias = torch.cat([q_bias, torch.zeros_like(q_bias), weights["attn.v_bias"]])
    qkv = F.linear(x, weights["attn.qkv.weight"], qkv_bias)  # (B, 1+N, 3D)
    q, k, v = qkv.view(*x.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4)  # (B, A, 1+N, D/A) each
    scores = (q @ k.mT) * q.shape[-1] ** -0.5 + bias
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)  # (B, 1+N, D)
    return _linear(weights, "attn.proj", mixed)


def _mlp(weights: State, x: torch.Tensor) -> torch.Tensor:
    if "mlp.w12.weight" in weights:
        gate, values = _linear(weights, "mlp.w12", x).chunk(2, dim=-1)
        return _linear(weights, "mlp.w3", F.silu(gate) * values)
    return _linear(weights, "mlp.fc2", F.gelu(_linear(weights, "mlp.fc1", x)))


def _bias(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    return table[relative_position_index(grid, table.device)].permute(2, 0, 1)  # (A, 1+N, 1+N)


def _norm(weights: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def _linear(weights: State, name: str, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

"""Compute names and shapes of the weights of timm's ViT, BEiT and Swin (1.0.31) from the sizes alone.

An export is verified against these, since timm cannot be imported without torchvision.
"""

from typing import Any

from transformers import PreTrainedModel

from modeling.patches import height_and_width


def timm_shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the weights that `export_timm` writes for `model`."""
    config: Any = model.config
    shapes = _swin_shapes(config) if config.model_type == "swin" else _vit_shapes(config)
    if hasattr(model, "classifier"):
        head = "head.fc" if config.model_type == "swin" else "head"
        width = config.hidden_size
        shapes |= {f"{head}.weight": (config.num_labels, width), f"{head}.bias": (config.num_labels,)}
    return shapes


def _vit_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    width, heads, is_beit = config.hidden_size, config.num_attention_heads, config.model_type == "beit"
    height, breadth = height_and_width(config.image_size)
    rows, columns = height // config.patch_size, breadth // config.patch_size
    table = ((2 * rows - 1) * (2 * columns - 1) + 3, heads)
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, width)}
    if not is_beit or config.use_absolute_position_embeddings:
        shapes["pos_embed"] = (1, rows * columns + 1, width)
    shapes |= _patch_embed_shapes(config, width)
    if is_beit and config.use_shared_relative_position_bias:
        shapes["rel_pos_bias.relative_position_bias_table"] = table
    for layer in range(config.num_hidden_layers):
        block = _block_shapes(width, config.intermediate_size)
        if is_beit:
            del block["attn.qkv.bias"]
            block |= {"attn.q_bias": (width,), "attn.v_bias": (width,)}
            if config.layer_scale_init_value:
                block |= {"gamma_1": (width,), "gamma_2": (width,)}
            if config.use_relative_position_bias:
                block["attn.relative_position_bias_table"] = table
        elif not config.qkv_bias:
            del block["attn.qkv.bias"]
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    norm = "fc_norm" if is_beit and config.use_mean_pooling else "norm"
    return {**shapes, f"{norm}.weight": (width,), f"{norm}.bias": (width,)}


def _swin_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    width = config.embed_dim
    shapes = _patch_embed_shapes(config, width)
    shapes |= {"patch_embed.norm.weight": (width,), "patch_embed.norm.bias": (width,)}
    for stage, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
        if stage:
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
            shapes |= {f"layers.{stage}.downsample.norm.{part}": (4 * width,) for part in ("weight", "bias")}
            width *= 2
        for layer in range(depth):
            block = _block_shapes(width, int(config.mlp_ratio * width))
            if not config.qkv_bias:
                del block["attn.qkv.bias"]
            block["attn.relative_position_bias_table"] = ((2 * config.window_size - 1) ** 2, heads)
            shapes |= {f"layers.{stage}.blocks.{layer}.{name}": shape for name, shape in block.items()}
    return {**shapes, "norm.weight": (width,), "norm.bias": (width,)}


def _patch_embed_shapes(config: Any, width: int) -> dict[str, tuple[int, ...]]:
    weight = (width, config.num_channels, config.patch_size, config.patch_size)
    return {"patch_embed.proj.weight": weight, "patch_embed.proj.bias": (width,)}


def _block_shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (outputs, inputs) in {
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
    }.items():
        shapes |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    for name in ("norm1", "norm2"):
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes

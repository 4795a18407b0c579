"""Compute names and shapes of the weights of timm's ViT, BEiT and Swin (1.0.31) from the sizes alone.

An export is verified against these, since timm cannot be imported without torchvision.
"""

from typing import Any

from transformers import PreTrainedModel

from modeling.patches import height_and_width

Shapes = dict[str, tuple[int, ...]]


def timm_shapes(model: PreTrainedModel) -> Shapes:
    """Return names and shapes of the weights that `export_timm` writes for `model`."""
    config: Any = model.config
    shapes = _swin_shapes(config) if config.model_type == "swin" else _vit_shapes(config)
    if hasattr(model, "classifier"):
        shapes |= _layer("head.fc" if config.model_type == "swin" else "head", config.num_labels, config.hidden_size)
    return shapes


def _vit_shapes(config: Any) -> Shapes:
    width, is_beit = config.hidden_size, config.model_type == "beit"
    rows, columns = (side // config.patch_size for side in height_and_width(config.image_size))
    table = ((2 * rows - 1) * (2 * columns - 1) + 3, config.num_attention_heads)
    shapes: Shapes = {"cls_token": (1, 1, width), **_patch_embedding(config, width)}
    if not is_beit or config.use_absolute_position_embeddings:
        shapes["pos_embed"] = (1, rows * columns + 1, width)
    if is_beit and config.use_shared_relative_position_bias:
        shapes["rel_pos_bias.relative_position_bias_table"] = table
    block = _block(width, config.intermediate_size, has_qkv_bias=not is_beit and config.qkv_bias)
    if is_beit:
        block |= {"attn.q_bias": (width,), "attn.v_bias": (width,)}
        if config.layer_scale_init_value:
            block |= {"gamma_1": (width,), "gamma_2": (width,)}
        if config.use_relative_position_bias:
            block["attn.relative_position_bias_table"] = table
    for layer in range(config.num_hidden_layers):
        shapes |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | _layer("fc_norm" if is_beit and config.use_mean_pooling else "norm", width)


def _swin_shapes(config: Any) -> Shapes:
    width = config.embed_dim
    shapes = _patch_embedding(config, width) | _layer("patch_embed.norm", width)
    for stage, (depth, heads) in enumerate(zip(config.depths, config.num_heads, strict=True)):
        if stage:
            shapes[f"layers.{stage}.downsample.reduction.weight"] = (2 * width, 4 * width)
            shapes |= _layer(f"layers.{stage}.downsample.norm", 4 * width)
            width *= 2
        block = _block(width, int(config.mlp_ratio * width), config.qkv_bias)
        block["attn.relative_position_bias_table"] = ((2 * config.window_size - 1) ** 2, heads)
        for layer in range(depth):
            shapes |= {f"layers.{stage}.blocks.{layer}.{name}": shape for name, shape in block.items()}
    return shapes | _layer("norm", width)


def _patch_embedding(config: Any, width: int) -> Shapes:
    return _layer("patch_embed.proj", width, config.num_channels, config.patch_size, config.patch_size)


def _block(width: int, hidden: int, has_qkv_bias: bool) -> Shapes:
    shapes = _layer("norm1", width) | _layer("norm2", width)
    shapes |= _layer("attn.qkv", 3 * width, width) | _layer("attn.proj", width, width)
    shapes |= _layer("mlp.fc1", hidden, width) | _layer("mlp.fc2", width, hidden)
    if not has_qkv_bias:
        del shapes["attn.qkv.bias"]
    return shapes


def _layer(name: str, *shape: int) -> Shapes:
    """Return the shapes of a weight and of its bias, which has one value per output."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

"""Encoder sizes by name, with the keys of the native configs: `ViTConfig` and `BeitConfig`, or `SwinConfig`.

vit-small to vit-large: Dosovitskiy et al. 2020 (ViT), arXiv:2010.11929, Table 1, and Touvron et al. 2020 (DeiT),
arXiv:2012.12877, Table 1, which also has vit-tiny.  vit-huge has patches of 14 as in He et al. 2021 (MAE),
arXiv:2111.06377.  swin-tiny to swin-large: Liu et al. 2021 (Swin), arXiv:2103.14030, Sec. 3.3, at 192 pixels with the
windows of Xie et al. 2021 (SimMIM), arXiv:2111.09886, Sec. 4.1.  vit-nano and swin-nano are ours: small enough to
train on two CPU cores in minutes.
"""

from collections.abc import Sequence
from typing import Any


def _vit(width: int, num_blocks: int, num_heads: int, patch_size: int = 16, image_size: int = 224) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": num_heads,
        "intermediate_size": 4 * width,
        "patch_size": patch_size,
        "image_size": image_size,
    }


def _swin(
    width: int, depths: list[int], num_heads: list[int], window_size: int = 6, image_size: int = 192
) -> dict[str, Any]:
    return {
        "model_type": "swin",
        "embed_dim": width,
        "depths": depths,
        "num_heads": num_heads,
        "window_size": window_size,
        "patch_size": 4,
        "image_size": image_size,
    }


ENCODER_SIZES: dict[str, dict[str, Any]] = {
    "vit-nano": _vit(192, 4, 3, patch_size=8, image_size=64),
    "vit-tiny": _vit(192, 12, 3),
    "vit-small": _vit(384, 12, 6),
    "vit-base": _vit(768, 12, 12),
    "vit-large": _vit(1024, 24, 16),
    "vit-huge": _vit(1280, 32, 16, patch_size=14),
    "swin-nano": _swin(48, [2, 2, 2, 2], [2, 4, 8, 16], window_size=4, image_size=128),
    "swin-tiny": _swin(96, [2, 2, 6, 2], [3, 6, 12, 24]),
    "swin-small": _swin(96, [2, 2, 18, 2], [3, 6, 12, 24]),
    "swin-base": _swin(128, [2, 2, 18, 2], [4, 8, 16, 32]),
    "swin-large": _swin(192, [2, 2, 18, 2], [6, 12, 24, 48], window_size=12),
}


def _decoder(width: int, num_blocks: int) -> dict[str, int]:
    return {
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": num_blocks,
        "decoder_num_attention_heads": width // 32,  # as wide as the published decoder's
        "decoder_intermediate_size": 4 * width,
    }


# Settings of a method that depend on the encoder's size, for methods that have them; the others keep their default
# (MAE: width 512, 8 blocks and 16 heads for every published encoder). Beside a small encoder that decoder would take
# most of the time, with vit-tiny 95% (benchmarks/decoder_quality.py compares decoders at equal time; results are
# beside it).
# Beside the smallest encoders the same is true of the heads of iBOT, DINO and DINOv2.
METHOD_SIZES: dict[str, dict[str, int]] = {
    "vit-nano": _decoder(128, 2) | {"head_hidden_size": 512},
    "vit-tiny": _decoder(192, 2) | {"head_hidden_size": 1024},
    "vit-small": _decoder(256, 4),
}

_NUM_UNITS = 6  # on each side of an image, which a mask unit of the published size must leave: 32 pixels of 192


def mask_unit_of(sides: Sequence[int], patch_size: int, published: int) -> int:
    """Return the side of a mask unit in pixels: the published one, or less for a small image."""
    fitting = [side for side in range(patch_size, published + 1, patch_size) if not any(n % side for n in sides)]
    return max((side for side in fitting if min(sides) >= _NUM_UNITS * side), default=patch_size)

"""Encoder sizes by name, with the keys of `ViTConfig`.

vit-small to vit-large: Dosovitskiy et al. 2020 (ViT), arXiv:2010.11929, Table 1, and Touvron et al. 2020 (DeiT),
arXiv:2012.12877, Table 1, which also has vit-tiny.  vit-huge has patches of 14 as in He et al. 2021 (MAE),
arXiv:2111.06377.  vit-nano is ours: small enough to learn something on two CPU cores in minutes.
"""


def _encoder(
    width: int, num_blocks: int, num_heads: int, patch_size: int = 16, image_size: int = 224
) -> dict[str, int]:
    return {
        "hidden_size": width,
        "num_hidden_layers": num_blocks,
        "num_attention_heads": num_heads,
        "intermediate_size": 4 * width,
        "patch_size": patch_size,
        "image_size": image_size,
    }


ENCODER_SIZES: dict[str, dict[str, int]] = {
    "vit-nano": _encoder(192, 4, 3, patch_size=8, image_size=64),
    "vit-tiny": _encoder(192, 12, 3),
    "vit-small": _encoder(384, 12, 6),
    "vit-base": _encoder(768, 12, 12),
    "vit-large": _encoder(1024, 24, 16),
    "vit-huge": _encoder(1280, 32, 16, patch_size=14),
}

# Sizes of a head that go with an encoder, for heads that have these settings; what is not here is the head's default
# (MAE: 512 wide, 8 blocks, 16 heads beside every published encoder).
HEAD_SIZES: dict[str, dict[str, int]] = {
    "vit-nano": {
        "decoder_hidden_size": 128,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 512,
    },
}

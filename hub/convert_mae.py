"""The authors' MAE checkpoints (facebookresearch/mae) -> `MaeForPreTraining`.

Shapes: D encoder width.
"""

import argparse
import re
from collections.abc import Iterator

import torch

from modeling.mae import MaeConfig, MaeForPreTraining


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_attention_heads", type=int, required=True, help="of the encoder: 12 for B, 16 for L, H")
    parser.add_argument("--decoder_num_attention_heads", type=int, default=16, help="16 in every released file")
    parser.add_argument(
        "--norm_pix_loss",
        choices=["true", "false"],
        required=True,
        help="true for `_full`, false for `visualize` files",
    )


def convert(state: dict[str, torch.Tensor], options: argparse.Namespace) -> MaeForPreTraining:
    return convert_mae(
        state, options.num_attention_heads, options.decoder_num_attention_heads, options.norm_pix_loss == "true"
    )


MAE_RENAMES = (
    (r"^blocks\.(\d+)\.", r"encoder.layers.\1."),
    (r"^decoder_blocks\.(\d+)\.", r"decoder_layers.\1."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.attn\.proj\.", ".attention.o_proj."),
    (r"^norm\.", "encoder.layernorm."),
    (r"^cls_token$", "encoder.embeddings.cls_token"),
    (r"^pos_embed$", "encoder.embeddings.position_embeddings"),
    (r"^patch_embed\.proj\.", "encoder.embeddings.patch_embeddings.projection."),
    (r"^decoder_pos_embed$", "decoder_positions"),
)


def rename_mae(state: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The authors' keys -> ours; the fused qkv matrix (3D, D) becomes q, k and v."""
    for key, tensor in state.items():
        name = key
        for pattern, replacement in MAE_RENAMES:
            name = re.sub(pattern, replacement, name)
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield name.replace(".attn.qkv.", f".attention.{letter}_proj."), part.clone()
        else:
            yield name, tensor


def mae_config(
    state: dict[str, torch.Tensor], num_attention_heads: int, decoder_num_attention_heads: int, norm_pix_loss: bool
) -> MaeConfig:
    """Everything that the tensors' shapes say; a square grid, as the authors' code has no other."""
    hidden_size, num_channels, patch_size, _ = state["patch_embed.proj.weight"].shape
    num_patches = state["pos_embed"].shape[1] - 1
    side = round(num_patches**0.5)
    if side * side != num_patches:
        raise ValueError(f"{num_patches} positions are no square grid; the authors' MAE has square images only")
    for name, width, heads in (
        ("num_attention_heads", hidden_size, num_attention_heads),
        ("decoder_num_attention_heads", state["decoder_embed.weight"].shape[0], decoder_num_attention_heads),
    ):
        if width % heads:
            raise ValueError(f"--{name} {heads} does not divide the width {width} found in the file")
    encoder = {
        "hidden_size": hidden_size,
        "num_hidden_layers": count_blocks(state, r"^blocks\.(\d+)\."),
        "num_attention_heads": num_attention_heads,
        "intermediate_size": state["blocks.0.mlp.fc1.weight"].shape[0],
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "num_channels": num_channels,
    }
    return MaeConfig(
        encoder_config=encoder,
        decoder_hidden_size=state["decoder_embed.weight"].shape[0],
        decoder_num_hidden_layers=count_blocks(state, r"^decoder_blocks\.(\d+)\."),
        decoder_num_attention_heads=decoder_num_attention_heads,
        decoder_intermediate_size=state["decoder_blocks.0.mlp.fc1.weight"].shape[0],
        norm_pix_loss=norm_pix_loss,
    )


def convert_mae(
    state: dict[str, torch.Tensor], num_attention_heads: int, decoder_num_attention_heads: int, norm_pix_loss: bool
) -> MaeForPreTraining:
    """A full MAE (encoder and decoder) from the authors' state dict.

    Raises:
        ValueError: the file has no decoder, or is not an MAE; the keys that say so are named.
    """
    needed = ("patch_embed.proj.weight", "pos_embed", "blocks.0.mlp.fc1.weight")
    if missing := [key for key in needed if key not in state]:
        raise ValueError(f"no MAE checkpoint: it lacks {', '.join(missing)}; it begins with {list(state)[:5]}")
    if "decoder_embed.weight" not in state:
        raise ValueError(
            "this file holds the encoder only (no decoder_embed.weight): the whole model needs the decoder too; "
            "use the authors' `_full` or `visualize` file"
        )
    model = MaeForPreTraining(mae_config(state, num_attention_heads, decoder_num_attention_heads, norm_pix_loss))
    missing_keys, unexpected = model.load_state_dict(dict(rename_mae(state)), strict=False)
    if missing_keys or unexpected:
        raise ValueError(f"the file does not fit an MAE: missing {missing_keys}, not understood {unexpected}")
    return model.eval()


def count_blocks(state: dict[str, torch.Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for key in state if (match := re.match(pattern, key)))

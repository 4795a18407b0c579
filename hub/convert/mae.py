"""Convert the authors' MAE files (facebookresearch/mae): with decoder -> `MaeForPreTraining`, others -> native."""

import argparse

from hub.convert.key_names import MAE
from hub.convert.native_models import Converted, convert_vit, load_weights, rename
from hub.convert.sizes import count_blocks, vit_settings
from hub.convert.weight_file import State, suggested_num_heads
from modeling.mae import MaeConfig, MaeForPreTraining

_REASONS = {
    r"^decoder_|^mask_token$": "part of the decoder, which is incomplete in the file",
    r"^head\.[01]\.": "a linear probe; no native classifier has its batch norm",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_attention_heads", type=int, help="encoder: 12 for B, 16 for L, H")
    parser.add_argument("--decoder_num_attention_heads", type=int, default=16, help="16 in every released file")
    parser.add_argument(
        "--norm_pix_loss",
        choices=["true", "false"],
        help="for a file with decoder: true for `_full`, false for `visualize`",
    )


def required_flags(state: State) -> dict[str, str]:
    flags = {"num_attention_heads": suggested_num_heads(state)}
    return {**flags, "norm_pix_loss": "true|false"} if "decoder_embed.weight" in state else flags


def convert(state: State, options: argparse.Namespace) -> Converted:
    if "decoder_embed.weight" not in state:
        return convert_vit(state, options.num_attention_heads, reasons=_REASONS)
    width, heads = state["decoder_embed.weight"].shape[0], options.decoder_num_attention_heads
    if width % heads:
        raise ValueError(f"--decoder_num_attention_heads {heads} does not divide the decoder's hidden size {width}")
    config = MaeConfig(
        encoder_config=vit_settings(state, options.num_attention_heads),
        image_mean=options.image_mean,
        image_std=options.image_std,
        decoder_hidden_size=width,
        decoder_num_hidden_layers=count_blocks(state, r"^decoder_blocks\.(\d+)\."),
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=state["decoder_blocks.0.mlp.fc1.weight"].shape[0],
        norm_pix_loss=options.norm_pix_loss == "true",
    )
    model = MaeForPreTraining(config)
    load_weights(model, rename(state, MAE), MAE)
    encoder = {key: tensor for key, tensor in state.items() if not key.startswith(("decoder_", "mask_token"))}
    return Converted(model.eval(), encoder)

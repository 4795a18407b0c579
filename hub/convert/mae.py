"""The authors' MAE files (facebookresearch/mae): with decoder -> `MaeForPreTraining`; encoder or fine-tuned -> native.

Shapes: D encoder width.
"""

import argparse

from hub.convert.key_names import MAE
from hub.convert.native_models import Converted, State, fill, renamed, vit_from
from hub.convert.sizes import count, vit_settings
from hub.convert.weight_file import suggested_num_heads
from modeling.mae import MaeConfig, MaeForPreTraining

_REASONS = {
    r"^decoder_|^mask_token$": "a part of the decoder, which the file does not hold whole",
    r"^head\.[01]\.": "a linear probe: no native classifier has its batch norm",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_attention_heads", type=int, help="of the encoder: 12 for B, 16 for L, H")
    parser.add_argument("--decoder_num_attention_heads", type=int, default=16, help="16 in every released file")
    parser.add_argument(
        "--norm_pix_loss",
        choices=["true", "false"],
        help="of a file with decoder: true for `_full`, false for `visualize`",
    )


def asks(state: State) -> dict[str, str]:
    """Flags that the file cannot answer, with what is usual."""
    asked = {"num_attention_heads": suggested_num_heads(state)}
    return {**asked, "norm_pix_loss": "true|false"} if "decoder_embed.weight" in state else asked


def image_stats(state: State) -> str:
    return "imagenet"


def convert(state: State, options: argparse.Namespace) -> Converted:
    """Raises ValueError if the file is not an MAE; the keys that say so are named."""
    if "decoder_embed.weight" not in state:
        return vit_from(state, options.num_attention_heads, reasons=_REASONS)
    model = MaeForPreTraining(_config(state, options))
    fill(model, renamed(state, MAE), MAE)
    encoder = {key: tensor for key, tensor in state.items() if not key.startswith(("decoder_", "mask_token"))}
    return Converted(model.eval(), encoder)


def _config(state: State, options: argparse.Namespace) -> MaeConfig:
    """Everything that the tensors' shapes say; a square grid, as the authors' code has no other."""
    width, heads = state["decoder_embed.weight"].shape[0], options.decoder_num_attention_heads
    if width % heads:
        raise ValueError(f"--decoder_num_attention_heads {heads} does not divide the width {width} found in the file")
    return MaeConfig(
        encoder_config=vit_settings(state, options.num_attention_heads),
        image_mean=options.image_mean,
        image_std=options.image_std,
        decoder_hidden_size=width,
        decoder_num_hidden_layers=count(state, r"^decoder_blocks\.(\d+)\."),
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=state["decoder_blocks.0.mlp.fc1.weight"].shape[0],
        norm_pix_loss=options.norm_pix_loss == "true",
    )

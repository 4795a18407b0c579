"""Convert the authors' iBOT files (bytedance/ibot).

A ViT's student and teacher with their heads become an `IbotForPreTraining`; other files, and Swins, a native encoder.
"""

import argparse

from hub.convert.key_names import VIT
from hub.convert.native_models import NO_MASK_TOKEN, Converted, convert_swin, convert_vit
from hub.convert.self_distillation import HEAD, WEIGHTS, Layout, convert_whole
from hub.convert.simmim import is_swin
from hub.convert.sizes import vit_settings
from hub.convert.weight_file import State, suggested_num_heads
from modeling.ibot import IbotConfig, IbotForPreTraining

__all__ = ["WEIGHTS", "add_flags", "convert", "required_flags"]

_LAYOUT = Layout(
    IbotConfig,
    IbotForPreTraining,
    VIT,
    heads={"class_token": "head"},
    centers={"class_token": ("ibot_loss", "center"), "patch": ("ibot_loss", "center2")},
)
_REASONS = {r"^head\.(mlp|last_layer)": HEAD, r"^masked_embed$": NO_MASK_TOKEN}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_attention_heads", type=int, help="for a ViT: 6 for S, 12 for B, 16 for L")
    parser.add_argument("--image_size", type=int, help="for a Swin: 224 in the released files")


def required_flags(state: State) -> dict[str, str]:
    return {"image_size": "224"} if is_swin(state) else {"num_attention_heads": suggested_num_heads(state)}


def convert(state: State, options: argparse.Namespace) -> Converted:
    if not is_swin(state):
        settings = vit_settings(state, options.num_attention_heads)
        return convert_whole(_LAYOUT, settings, options) or convert_vit(
            state, options.num_attention_heads, reasons=_REASONS
        )
    converted = convert_swin(state, options.image_size, reasons=_REASONS)
    converted.notes.append(
        "features are close to iBOT's, not equal: its LayerNorms have eps 1e-6, whereas SwinModel always uses 1e-5 in "
        "its embeddings and between its stages"
    )
    return converted

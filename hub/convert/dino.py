"""Convert the authors' DINO files (facebookresearch/dino).

Student and teacher with their heads become a `DinoForPreTraining`, other files a native encoder.
"""

import argparse

from hub.convert.key_names import VIT
from hub.convert.native_models import Converted, convert_vit
from hub.convert.self_distillation import HEAD, WEIGHTS, Layout, convert_whole
from hub.convert.sizes import vit_settings
from hub.convert.weight_file import State, suggested_num_heads
from modeling.dino import DinoConfig, DinoForPreTraining

__all__ = ["WEIGHTS", "add_flags", "convert", "required_flags"]

_LAYOUT = Layout(
    DinoConfig,
    DinoForPreTraining,
    VIT,
    heads={"class_token": "head"},
    centers={"class_token": ("dino_loss", "center")},
)
_REASONS = {r"^head\.(mlp|last_layer)": HEAD}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_attention_heads", type=int, help="3 for Ti, 6 for S, 12 for B")


def required_flags(state: State) -> dict[str, str]:
    return {"num_attention_heads": suggested_num_heads(state)}


def convert(state: State, options: argparse.Namespace) -> Converted:
    settings = vit_settings(state, options.num_attention_heads)
    return convert_whole(_LAYOUT, settings, options) or convert_vit(
        state, options.num_attention_heads, reasons=_REASONS
    )

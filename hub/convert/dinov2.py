"""Convert the authors' DINOv2 files (facebookresearch/dinov2), with registers or without.

Student and teacher with their heads become a `Dinov2ForPreTraining`, other files a native encoder.
"""

import argparse

from hub.convert.key_names import DINOV2
from hub.convert.native_models import Converted, build_native, drop
from hub.convert.self_distillation import HEAD, WEIGHTS, Layout, convert_whole
from hub.convert.sizes import dinov2_settings
from hub.convert.weight_file import State, suggested_num_heads
from modeling.dinov2 import Dinov2Config, Dinov2ForPreTraining

__all__ = ["WEIGHTS", "add_flags", "convert", "required_flags"]

_LAYOUT = Layout(
    Dinov2Config,
    Dinov2ForPreTraining,
    DINOV2,
    heads={"class_token": "dino_head", "patch": "ibot_head"},
    centers={"class_token": ("dino_loss", "center"), "patch": ("ibot_patch_loss", "center")},
)
_REASONS = {r"^(dino|ibot)_head\.": HEAD}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_attention_heads", type=int, help="6 for S, 12 for B, 16 for L, 24 for g")


def required_flags(state: State) -> dict[str, str]:
    return {"num_attention_heads": suggested_num_heads(state)}


def convert(state: State, options: argparse.Namespace) -> Converted:
    settings = dinov2_settings(state, options.num_attention_heads)
    number = {"num_register_tokens": settings.get("num_register_tokens", 0)}
    own = {name: value for name, value in settings.items() if name != "use_mask_token"}
    own |= {"model_type": "dinov2_with_registers", **number}
    if (whole := convert_whole(_LAYOUT, own, options, **number)) is not None:
        return whole
    state, dropped = drop(state, _REASONS)
    return build_native(state, settings, dropped)

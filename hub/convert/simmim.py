"""Convert the authors' SimMIM files (microsoft/SimMIM): pre-training -> `SimMimForPreTraining`, others -> native.

Shapes: D hidden size, S side of a mask unit in pixels, C channels.
"""

import argparse

import torch

from hub.convert.key_names import BEIT, SWIN
from hub.convert.native_models import Converted, convert_beit, convert_swin, drop, load_weights, rename
from hub.convert.sizes import beit_settings, swin_image_size, swin_settings
from hub.convert.weight_file import State
from modeling.simmim import PIXEL_LOSSES, SimMimConfig, SimMimForPreTraining


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image_size", type=int, help="for a Swin without shifted windows")
    parser.add_argument("--pixel_loss", choices=list(PIXEL_LOSSES), default="l1", help="l1 in every released file")
    parser.add_argument("--norm_pix_loss", choices=["true", "false"], default="false", help="false in released files")


def required_flags(state: State) -> dict[str, str]:
    encoder = {key.removeprefix("encoder."): tensor for key, tensor in state.items()}
    return {"image_size": "192|224"} if is_swin(encoder) and not swin_image_size(encoder) else {}


def is_swin(state: State) -> bool:
    return any(key.startswith("layers.") for key in state)


def convert(state: State, options: argparse.Namespace) -> Converted:
    if not any(key.startswith("decoder.0.") for key in state):
        return convert_swin(state, options.image_size) if is_swin(state) else convert_beit(state)
    needed = ("encoder.patch_embed.proj.weight", "encoder.mask_token", "decoder.0.weight", "decoder.0.bias")
    if missing := [key for key in needed if key not in state]:
        raise ValueError(f"incomplete SimMIM: {', '.join(missing)} missing; its first keys are {list(state)[:5]}")
    encoder = {key.removeprefix("encoder."): tensor for key, tensor in state.items() if key.startswith("encoder.")}
    swin = is_swin(encoder)
    config = SimMimConfig(
        encoder_config=swin_settings(encoder, options.image_size) if swin else beit_settings(encoder),
        image_mean=options.image_mean,
        image_std=options.image_std,
        pixel_loss=options.pixel_loss,
        norm_pix_loss=options.norm_pix_loss == "true",
    )
    model = SimMimForPreTraining(config)
    table = SWIN if swin else BEIT
    state, dropped = drop(state)
    encoder, _ = drop(encoder)
    weights = [(f"encoder.{theirs}", ours, tensor) for theirs, ours, tensor in rename(encoder, table)]
    for part in ("weight", "bias"):
        weights.append((f"decoder.0.{part}", f"decoder.{part}", _channels_last(state[f"decoder.0.{part}"], config)))
    others = [key for key in state if not key.startswith(("encoder.", "decoder.0."))]
    load_weights(model, [*weights, *((key, key, state[key]) for key in others)], table, their_prefix="encoder.")
    return Converted(model.eval(), encoder, dropped)


def _channels_last(tensor: torch.Tensor, config: SimMimConfig) -> torch.Tensor:
    """Reorder (C*S*S, D, 1, 1) or (C*S*S,), as pixel shuffle has it, to (S*S*C, D) or (S*S*C,), as `patchify`."""
    side, num_channels = config.prediction_side, config.encoder_config.num_channels
    if tensor.shape[0] != num_channels * side**2:
        raise ValueError(f"decoder.0 has {tensor.shape[0]} outputs, expected {num_channels} x {side} x {side}")
    return tensor.view(num_channels, side * side, -1).transpose(0, 1).reshape(tensor.shape[:2]).clone()

"""Read the weights that a training starts from, under the names and in the shapes of a pre-training model.

Parts that the source lacks keep their random initialization; these, and unused weights, are logged.
"""

import copy
import inspect
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from transformers import MODEL_MAPPING, BeitForMaskedImageModeling, ViTMAEForPreTraining

from hub.encoder_states import State, as_host, has_final_norm, native_state
from hub.init_from import StartingModel, grid_of
from hub.open_model import NO_POSITIONS, open_model
from modeling import MODELS, MimPreTrainedModel
from modeling.encoders import ResizedPositions
from modeling.patches import PATCH_PROJECTION, adapt_channels, sincos_positions
from modeling.positions import resize_positions, resize_relative_bias

_TABLES = ("position_embeddings", "decoder_positions", "relative_position_bias_table")


class Weights(NamedTuple):
    """Weights by the names of the pre-training model, and notes for the log."""

    state: State
    notes: list[str]


def read_weights(
    start: StartingModel, head: MimPreTrainedModel, repair_positions: bool = False, channel_init: str | None = None
) -> Weights:
    """Read the weights for a model, of which only names and shapes matter: it may be on the meta device.

    Args:
        channel_init: How the patch projection is adapted to the model's channels (`modeling.patches.adapt_channels`).

    Raises:
        ValueError: If the encoder cannot be read, its position tables are all zero, or its grid does not fit.
    """
    config = head.config.encoder_config
    grid = grid_of(config)
    needs_squares = not isinstance(getattr(head.encoder, "embeddings", None), ResizedPositions)
    if getattr(config, "use_absolute_position_embeddings", False) and grid[0] != grid[1] and needs_squares:
        raise ValueError(
            f"`method` {start.method} holds the absolute positions of {start.name} in a BeitModel, which reads "
            f"square images only; got {grid[0]} x {grid[1]} patches: give `image_size` one number"
        )
    encoder, kept_head, unused = _read_state(start, config.model_type)
    notes = _repair(start, encoder, kept_head, repair_positions)
    encoder, changes = as_host(encoder, config.model_type, getattr(config, "qkv_bias", True))
    wanted, state, has_resized = head.state_dict(), {}, False
    antialias = getattr(head.encoder, "antialias", False)  # as the native class does at other sizes
    for name, tensor in {**{f"encoder.{key}": value for key, value in encoder.items()}, **kept_head}.items():
        resized = _resized(name, tensor, start.grid, grid, wanted.get(name), antialias)
        if name.endswith(PATCH_PROJECTION) and channel_init is not None:
            tensor = resized = adapt_channels(tensor, config.num_channels, channel_init)
        if name in wanted and resized.shape == wanted[name].shape:
            state[name], has_resized = resized, has_resized or resized is not tensor
        else:
            unused.append(name)
    missing = [name for name, tensor in wanted.items() if name not in state and tensor.numel()]
    strange = [name for name in missing if name.startswith("encoder.") and not name.endswith("mask_token")]
    assert not strange, f"{start.family} is said to fit, and lacks {strange}"
    kept = [name for name in state if not name.startswith("encoder.")]
    lines = [f"begins from {start.name} ({start.family}): {', '.join(['encoder', *_parts(kept)])}"]
    if channel_init is not None:
        old, new = start.fixed["num_channels"], config.num_channels
        lines.append(f"patch projection adapted from {old} to {new} channels ({channel_init})")
    if has_resized:
        lines.append("position tables resized from {} x {} to {} x {} patches".format(*start.grid, *grid))
    if not kept:  # frozen weights, such as a teacher's, will be copies (`after_loading_encoder`)
        frozen = tuple(f"{prefix}." for prefix in head.frozen_parameters)
        missing = [name for name in missing if not f"{name}.".startswith(frozen)]
    if missing:
        lines.append(f"new, since the source has none that fits: {', '.join(_parts(missing))}")
    if unused or changes:
        lines.append(f"not taken over: {', '.join([*_parts(unused), *changes])}")
    return Weights(state, [*lines, *notes])


def _read_state(start: StartingModel, host: str) -> tuple[State, State, list[str]]:
    """Return the encoder, the other weights if the method continues them, and the names of unused weights."""
    if start.own_method is not None:
        model = open_model(
            start.name, "init_from", model_class=MODELS[start.own_method], subfolder=start.subfolder
        ).model
        head = model.state_dict()
        # Another method starts from the encoder that this one exports, such as a teacher and not its student.
        prefix = "encoder." if start.keeps_head else f"{model.exported}."
        encoder = {name.removeprefix(prefix): head.pop(name) for name in list(head) if name.startswith(prefix)}
        unused = [re.sub(r"^encoder\..*", "student", name) for name in head]
        return (encoder, head, []) if start.keeps_head else (encoder, {}, unused)
    config: Any = copy.deepcopy(start.config)
    model_class: Any = MODEL_MAPPING[type(config)]
    if config.model_type == "vit_mae":
        model_class = ViTMAEForPreTraining
    elif BeitForMaskedImageModeling.__name__ in (config.architectures or ()):
        model_class = BeitForMaskedImageModeling
    # With these, nothing but a mask token is initialized at random.
    options = {"add_pooling_layer": False, "use_mask_token": True}
    options = {name: options[name] for name in options.keys() & inspect.signature(model_class).parameters}
    if hasattr(config, "use_mask_token"):
        config.use_mask_token = True  # otherwise the file's would not be read
    model, absent, unused = open_model(
        start.name, "init_from", model_class=model_class, optional=("mask_token", "decoder."), config=config, **options
    )
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in absent}
    encoder, head = native_state(state, config.model_type, has_final_norm(config), host)
    if not start.keeps_head:
        unused, head = [*unused, *head], {}
    return encoder, head, [name.removeprefix(f"{model.base_model_prefix}.") for name in unused]


def _repair(start: StartingModel, encoder: State, head: State, repair_positions: bool) -> list[str]:
    """Replace position tables of zeros by sine-cosine tables; transformers initializes ViTMAE with frozen zeros."""
    tables = [(encoder, "embeddings.position_embeddings"), (head, "decoder_positions")]
    empty = [(state, name) for state, name in tables if name in state and not state[name].any()]
    if start.config.model_type not in ("vit", "vit_mae") or not empty:
        return []
    if not repair_positions:
        raise ValueError(
            f"`init_from` {start.name}: {NO_POSITIONS}. Use `repair_positions` to replace them by the sine-cosine "
            "embeddings of MAE, or start from another model"
        )
    for state, name in empty:
        state[name] = sincos_positions(start.grid, state[name].shape[-1])
    return ["position tables that were all zero are filled with sines and cosines"]


def _resized(
    name: str,
    tensor: torch.Tensor,
    old: tuple[int, int],
    new: tuple[int, int],
    wanted: torch.Tensor | None,
    antialias: bool,
) -> torch.Tensor:
    """Resize a position table to the new grid, or to the new window of a Swin; return other weights unchanged."""
    if not name.endswith(_TABLES) or wanted is None:
        return tensor
    if not name.endswith("relative_position_bias_table"):
        return resize_positions(tensor, old, new, antialias=antialias)
    if ".blocks." in name:
        window, new_window = ((math.isqrt(len(table)) + 1) // 2 for table in (tensor, wanted))
        old, new = (window, window), (new_window, new_window)
    return resize_relative_bias(tensor, old, new)


def _parts(names: Iterable[str]) -> list[str]:
    """Return the parts of a model that weights belong to: decoder_layers.0.mlp.fc1.bias -> decoder."""
    parts = []
    for name in names:
        top = name.removeprefix("encoder.").split(".")[0]
        part = name if top in ("embeddings", "layers") else re.sub(r"^decoder_.*", "decoder", top)
        parts.append("mask token" if part.endswith("mask_token") else part)
    return list(dict.fromkeys(parts))

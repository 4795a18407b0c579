"""Build whole models of DINO, iBOT and DINOv2 from files that have student, teacher, their heads, and centers."""

import argparse
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from hub.convert.key_names import Table
from hub.convert.native_models import Converted, drop, load_weights, rename
from hub.convert.weight_file import State, without_prefixes
from modeling.ibot import IbotConfig, IbotForPreTraining

# The keys of the file that hold them. The authors evaluate the teacher.
WEIGHTS = {"teacher": ("teacher", "state_dict", "model", ""), "student": ("student", "state_dict", "model", "")}
HEAD = (
    "the projection head of pre-training, which needs both networks, their heads without batch norm, and the centers"
)
_OURS = {"student": ("", "heads."), "teacher": ("teacher.", "teacher_heads.")}  # prefixes of encoder and heads
_LAST_LAYER = {
    "last_layer.weight_g": "scale",
    "last_layer.weight_v": "prototypes",
    "last_layer.parametrizations.weight.original0": "scale",
    "last_layer.parametrizations.weight.original1": "prototypes",
}
_HEAD = {*(f"mlp.{number}.{kind}" for number in (0, 2, 4) for kind in ("weight", "bias")), "scale", "prototypes"}
Head = dict[str, tuple[str, torch.Tensor]]  # (key in the file, weight) by the name in a `PrototypeHead`


class Layout(NamedTuple):
    """Where a program keeps the parts of a model.

    Args:
        heads: Prefix of a head, by our name; without a patch head, patches share the class token's.
        centers: Key of the file and name of a center, by our name.
    """

    config_class: type[IbotConfig]
    model_class: type[IbotForPreTraining]
    table: Table
    heads: Mapping[str, str]
    centers: Mapping[str, tuple[str, str]]


def convert_whole(
    layout: Layout, encoder_settings: dict[str, Any], options: argparse.Namespace, **settings: Any
) -> Converted | None:
    """Convert all that a training needs to continue, or return None if the file lacks a part of it.

    Args:
        options: `states` and `losses` of the file, the `weights` to export, and the statistics of the images.
        settings: Settings of the config that do not follow from the weights.
    """
    networks = {name: without_prefixes(options.states[name]) for name in _OURS if name in options.states}
    heads = {name: _read_heads(state, layout.heads) for name, state in networks.items()}
    stored = {ours: options.losses.get(key, {}).get(name) for ours, (key, name) in layout.centers.items()}
    centers = {ours: center.flatten() for ours, center in stored.items() if center is not None}
    if len(networks) < 2 or len(centers) < len(layout.centers) or not _are_equal(list(heads.values())):
        return None
    # DINOv2 has centers with Sinkhorn-Knopp too, which stay zero.
    centering = "mean" if any(center.any() for center in centers.values()) else layout.config_class.centering
    head = {name: tensor for name, (_, tensor) in heads["student"]["class_token"].items()}
    scales = [head["scale"][1] for of_network in heads.values() for head in of_network.values()]
    config = layout.config_class(
        encoder_config=encoder_settings,
        image_mean=options.image_mean,
        image_std=options.image_std,
        num_prototypes=head["prototypes"].shape[0],
        head_hidden_size=head["mlp.0.weight"].shape[0],
        head_bottleneck_size=head["prototypes"].shape[1],
        shares_heads="patch" not in heads["student"],
        trains_prototype_scale=any(bool((scale != 1).any()) for scale in scales),
        centering=centering,
        exported_weights=options.weights,
        **settings,
    )
    weights = [
        (f"{key}.{name}", f"centers.{ours}.mean", centers[ours])
        for ours, (key, name) in layout.centers.items()
        if centering == "mean"
    ]
    dropped: dict[str, str] = {}
    encoders = {name: _encoder_of(state, layout) for name, state in networks.items()}
    exported = dict(encoders[options.weights])
    if (token := encoders["student"].get("mask_token")) is not None:  # iBOT's teacher never uses one
        encoders["teacher"].setdefault("mask_token", token)
    for name, (of_encoder, of_heads) in _OURS.items():
        encoder, unused = drop(encoders[name])
        weights += [
            (f"{name}.{theirs}", f"{of_encoder}{ours}", t) for theirs, ours, t in rename(encoder, layout.table)
        ]
        for kind, head_weights in heads[name].items():
            weights += [
                (f"{name}.{theirs}", f"{of_heads}{kind}.{ours}", t) for ours, (theirs, t) in head_weights.items()
            ]
        dropped |= {f"{name}.{key}": reason for key, reason in unused.items()}
    model = layout.model_class(config)
    load_weights(model, weights, layout.table)
    others = [name for name in networks if name != options.weights]
    losses = dict.fromkeys(key for key, _ in layout.centers.values())
    return Converted(model.eval(), exported, dropped, also_read=(*others, *losses))


def _encoder_of(state: State, layout: Layout) -> dict[str, torch.Tensor]:
    prefixes = tuple(f"{prefix}." for prefix in layout.heads.values())
    encoder = {key: tensor for key, tensor in state.items() if not key.startswith(prefixes)}
    if "masked_embed" in encoder:
        encoder["mask_token"] = encoder.pop("masked_embed").view(1, 1, -1)
    return encoder


def _read_heads(state: State, prefixes: Mapping[str, str]) -> dict[str, Head]:
    """Return the heads of a network by our names; none if one of them is not a `PrototypeHead`."""
    heads = {}
    for ours, prefix in prefixes.items():
        theirs = {key.removeprefix(f"{prefix}."): key for key in state if key.startswith(f"{prefix}.")}
        for key in [key for key in theirs if key.startswith("last_layer2.")]:  # iBOT stores a shared layer twice
            shared = theirs.get(key.replace("last_layer2.", "last_layer."))
            if shared is not None and torch.equal(state[shared], state[theirs[key]]):
                del theirs[key]
        if theirs:
            heads[ours] = {_LAST_LAYER.get(key, key): (name, state[name]) for key, name in theirs.items()}
    return heads if all(head.keys() == _HEAD for head in heads.values()) else {}


def _are_equal(heads: list[dict[str, Head]]) -> bool:
    """Return whether both networks have the same heads, and all heads the same sizes."""
    shapes = [
        {name: tensor.shape for name, (_, tensor) in head.items()}
        for of_network in heads
        for head in of_network.values()
    ]
    return bool(shapes) and heads[0].keys() == heads[1].keys() and all(shape == shapes[0] for shape in shapes)

"""Build native transformers models from the authors' weights: an encoder, or a classifier from a fine-tuned file."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers.models.dinov2 import modeling_dinov2

from hub.convert.key_names import BEIT, DINOV2, TABLES, VIT, Table, native_to_theirs, to_native
from hub.convert.sizes import beit_settings, swin_settings, vit_settings
from hub.convert.weight_file import State
from modeling.encoders import SwinEncoder

Reasons = Mapping[str, str]  # why keys are not used, by a regular expression
_DERIVED = {r"relative_position_index$|attn_mask$": "computed from the sizes"}
NO_MASK_TOKEN = "AutoModel builds this encoder without a mask token"
_LAYER_SCALE = re.compile(r"\.ls([12])\.gamma$")
# DINOv2's names in transformers 5.17.
_OLDER_DINOV2 = {
    ".q_proj.": ".attention.query.",
    ".k_proj.": ".attention.key.",
    ".v_proj.": ".attention.value.",
    ".o_proj.": ".output.dense.",
    ".gate_proj.": ".weights_in.",
    ".down_proj.": ".weights_out.",
}
_HAS_OLDER_DINOV2 = hasattr(modeling_dinov2, "Dinov2SelfAttention")
_KEY_BIAS = "its key part adds the same number to all scores of a query, which cancels in the softmax"


@dataclass
class Converted:
    """A converted model, and what the report says about it."""

    model: PreTrainedModel
    weights: State  # of its encoder, under the authors' names
    dropped: dict[str, str] = field(default_factory=dict)  # the reason, by unused key of the file
    also_read: tuple[str, ...] = ()  # keys of the file under which there are other weights that the model holds
    notes: list[str] = field(default_factory=list)


def drop(state: State, reasons: Reasons = _DERIVED) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Remove derived keys and those that match `reasons`; return the rest, and the reason by removed key."""
    reasons = {**_DERIVED, **reasons}
    dropped = {key: reason for key in state for pattern, reason in reasons.items() if re.search(pattern, key)}
    return {key: tensor for key, tensor in state.items() if key not in dropped}, dropped


def convert_vit(
    state: State, num_attention_heads: int | None, image_size: list[int] | None = None, reasons: Reasons = _DERIVED
) -> Converted:
    """Convert a plain ViT to a ViTModel or ViTForImageClassification.

    With LayerScale, without key bias, or with its norm after mean pooling, it becomes a BEiT with absolute positions,
    which computes the same function.
    """
    state, dropped = drop(state, reasons)
    state = {_LAYER_SCALE.sub(r".gamma_\1", key): tensor for key, tensor in state.items()}
    if not {"fc_norm.weight", "blocks.0.gamma_1", "blocks.0.attn.q_bias"} & state.keys():
        if "mask_token" in state:
            dropped["mask_token"] = NO_MASK_TOKEN
            del state["mask_token"]
        return build_native(state, vit_settings(state, num_attention_heads, image_size), dropped)
    if "mask_token" in state:
        state["mask_token"] = state["mask_token"].view(1, 1, -1)
    dropped |= {key: _KEY_BIAS for key in state if key.endswith(".attn.qkv.bias")}
    arguments = beit_settings(state, num_attention_heads, image_size)
    if not isinstance(arguments["image_size"], int):
        raise ValueError(f"these weights need a BeitModel, which only accepts square images, not {image_size}")
    return build_native(state, arguments, dropped)


def convert_beit(state: State, num_attention_heads: int | None = None, reasons: Reasons = _DERIVED) -> Converted:
    """Convert the ViT of BEiT, SimMIM or data2vec to a BeitModel or BeitForImageClassification."""
    state, dropped = drop(state, reasons)
    return build_native(state, beit_settings(state, num_attention_heads), dropped)


def convert_swin(state: State, image_size: int | None, reasons: Reasons = _DERIVED) -> Converted:
    """Convert a Swin to a SwinModel or SwinForImageClassification."""
    arguments = swin_settings(state, image_size)
    state, dropped = drop(state, {**reasons, r"^mask_token$": NO_MASK_TOKEN})
    config: Any = AutoConfig.for_model(**arguments)
    with torch.device("meta"):
        problem = SwinEncoder(config).native_root_problem
    if problem:
        raise ValueError(f"transformers' Swin cannot hold these weights: {problem}")
    return build_native(state, arguments, dropped)


def build_native(state: State, arguments: dict[str, Any], dropped: dict[str, str]) -> Converted:
    """Build an encoder, or a classifier if the weights have a head, from its settings and the authors' weights."""
    table = TABLES.get(arguments["model_type"], DINOV2)
    if "head.weight" in state:
        config = AutoConfig.for_model(**arguments, num_labels=len(state["head.weight"]))
        model = AutoModelForImageClassification.from_config(config)
    else:
        options = {"add_pooling_layer": False} if table is VIT else {}
        model = AutoModel.from_config(AutoConfig.for_model(**arguments), **options)
    load_weights(model, rename(state, table), table)
    return Converted(model.eval(), state, dropped)


def rename(state: State, table: Table) -> Iterable[tuple[str, str, torch.Tensor]]:
    """Apply `to_native`, without the key biases that a BEiT cannot have, and with gated MLPs split."""
    for theirs, ours, tensor in to_native(state, table):
        if table is DINOV2 and _HAS_OLDER_DINOV2:
            for name, older in _OLDER_DINOV2.items():
                ours = ours.replace(name, older)
            yield theirs, ours, tensor
        elif ".mlp.gate_proj." in ours:
            for name, part in zip(("gate_proj", "up_proj"), tensor.chunk(2), strict=True):
                yield theirs, ours.replace("gate_proj", name), part.clone()
        elif not (table is BEIT and ours.endswith(".k_proj.bias")):
            yield theirs, ours, tensor


def load_weights(
    model: Any, weights: Iterable[tuple[str, str, torch.Tensor]], table: Table, their_prefix: str = ""
) -> None:
    """Load all weights of `model` from (key in the file, key in the model or in its encoder, tensor).

    Raises ValueError if weights are missing, unexpected or of another shape, with their names in the file, where
    `their_prefix` precedes the encoder's.
    """
    expected = model.state_dict()
    prefix = getattr(model, "base_model_prefix", "") + "."
    found = {name: tensor for name, tensor in expected.items() if not tensor.numel()}  # no file has an empty tensor
    unexpected, mismatched = [], []
    for theirs, ours, tensor in weights:
        name = next((name for name in (prefix + ours, ours) if name in expected), None)
        if name is None:
            unexpected.append(theirs)
        elif tensor.shape != expected[name].shape:
            mismatched.append(f"{theirs} {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
        else:
            found[name] = tensor
    missing = [their_prefix + native_to_theirs(name.removeprefix(prefix), table) for name in expected.keys() - found]
    missing = sorted(set(missing) - {word.split(" ")[0] for word in mismatched})
    problems = {"missing": missing, "unexpected": list(dict.fromkeys(unexpected)), "mismatched shape": mismatched}
    if report := "; ".join(f"{problem} {_shortened(keys)}" for problem, keys in problems.items() if keys):
        raise ValueError(f"the file does not fit a {type(model).__name__}: {report}")
    model.load_state_dict(found)


def _shortened(keys: list[str], most: int = 8) -> str:
    shown = ", ".join(keys[:most])
    return f"{shown} and {len(keys) - most} more" if len(keys) > most else shown

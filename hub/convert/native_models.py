"""From the authors' weights to transformers' own classes: a bare encoder, or, from a fine-tuned file, a classifier."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    BeitForImageClassification,
    BeitModel,
    PreTrainedModel,
    SwinForImageClassification,
    SwinModel,
    ViTForImageClassification,
    ViTModel,
)

from hub.convert.key_names import BEIT, TABLES, Table, native_to_theirs, to_native
from hub.convert.sizes import beit_settings, swin_settings, vit_settings
from modeling.encoders import SwinEncoder

State = Mapping[str, torch.Tensor]
DERIVED = {r"relative_position_index$|attn_mask$": "follows from the sizes"}
_MODELS: dict[str, tuple[type[PreTrainedModel], type[PreTrainedModel]]] = {
    "vit": (ViTModel, ViTForImageClassification),
    "beit": (BeitModel, BeitForImageClassification),
    "swin": (SwinModel, SwinForImageClassification),
}
_LAYER_SCALE = re.compile(r"\.ls([12])\.gamma$")
_KEY_BIAS = "its part for the keys adds the same to all scores of a query, which the softmax takes out"
_NO_MASK_TOKEN = "AutoModel builds this encoder without a mask token"


@dataclass
class Converted:
    """`model`: a head of ours, an encoder or a classifier. `weights`: the authors' names of what its encoder got.

    `dropped`: key of the file -> why the model does without it. `remarks` are for the user to know.
    """

    model: PreTrainedModel
    weights: State
    dropped: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def open_native(folder: str | Path, **how: Any) -> PreTrainedModel:
    """The encoder in a folder, or the classifier if it is one."""
    architectures = AutoConfig.from_pretrained(folder).architectures or [""]
    auto_class = AutoModelForImageClassification if "ImageClassification" in architectures[0] else AutoModel
    return auto_class.from_pretrained(folder, dtype=torch.float32, **how).eval()


def drop(state: State, reasons: Mapping[str, str]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What is left of the file, and why each other key is not; `reasons` by regular expression."""
    dropped = {}
    for key in state:
        for pattern, reason in reasons.items():
            if re.search(pattern, key):
                dropped[key] = reason
    return {key: tensor for key, tensor in state.items() if key not in dropped}, dropped


def vit_from(
    state: State, num_attention_heads: int | None, image_size: list[int] | None = None, reasons: Any = None
) -> Converted:
    """From a plain ViT.

    A ViTModel, or with a final norm and a classifier a ViTForImageClassification. What has LayerScale, no bias of the
    keys, or its norm behind the mean of the patches becomes a BEiT with absolute positions, which computes the same.
    """
    state, dropped = drop(state, {**DERIVED, **(reasons or {})})
    state = {_LAYER_SCALE.sub(r".gamma_\1", key): tensor for key, tensor in state.items()}
    if not {"fc_norm.weight", "blocks.0.gamma_1", "blocks.0.attn.q_bias"} & state.keys():
        if "mask_token" in state:
            dropped["mask_token"] = _NO_MASK_TOKEN
            del state["mask_token"]
        return _build(state, vit_settings(state, num_attention_heads, image_size), dropped)
    if "mask_token" in state:
        state["mask_token"] = state["mask_token"].view(1, 1, -1)
    dropped |= {key: _KEY_BIAS for key in state if key.endswith(".attn.qkv.bias")}
    settings = beit_settings(state, num_attention_heads, image_size)
    if not isinstance(settings["image_size"], int):
        raise ValueError(f"only a BeitModel can hold these weights, and it reads square images only, not {image_size}")
    return _build(state, settings, dropped)


def beit_from(state: State, num_attention_heads: int | None = None, reasons: Any = None) -> Converted:
    """From what BEiT, SimMIM or data2vec call a ViT: a BeitModel or a BeitForImageClassification."""
    state, dropped = drop(state, {**DERIVED, **(reasons or {})})
    return _build(state, beit_settings(state, num_attention_heads), dropped)


def swin_from(state: State, image_size: int | None, reasons: Any = None) -> Converted:
    """From a Swin: a SwinModel or a SwinForImageClassification."""
    settings = swin_settings(state, image_size)
    state, dropped = drop(state, {**DERIVED, **(reasons or {}), r"^mask_token$": _NO_MASK_TOKEN})
    config: Any = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        problem = SwinEncoder(config).native_root_problem
    if problem:
        raise ValueError(f"no native Swin can hold these weights: {problem}")
    return _build(state, settings, dropped)


def _build(state: State, settings: dict[str, Any], dropped: dict[str, str]) -> Converted:
    family = settings["model_type"]
    is_classifier = "head.weight" in state
    if is_classifier:
        settings["num_labels"] = len(state["head.weight"])
    model_class = _MODELS[family][is_classifier]
    config: Any = AutoConfig.for_model(**settings)
    model = ViTModel(config, add_pooling_layer=False) if model_class is ViTModel else model_class(config)
    fill(model, renamed(state, TABLES[family]), TABLES[family])
    return Converted(model.eval(), state, dropped)


def renamed(state: State, table: Table) -> Iterable[tuple[str, str, torch.Tensor]]:
    """As `to_native`; a BEiT's keys have no bias, so one that the file has is left out."""
    for theirs, ours, tensor in to_native(state, table):
        if not (table is BEIT and ours.endswith(".k_proj.bias")):
            yield theirs, ours, tensor


def fill(
    model: PreTrainedModel, weights: Iterable[tuple[str, str, torch.Tensor]], table: Table, their_prefix: str = ""
) -> None:
    """Give `model` all its weights: (key of the file, key of the encoder or of what is around it, tensor).

    `their_prefix` is what stands before the encoder's keys in the file, so that messages name them in full.

    Raises:
        ValueError: there is one too few or too many, or one has another shape; in the names of the file.
    """
    expected = model.state_dict()
    prefix = model.base_model_prefix + "."
    found: dict[str, torch.Tensor] = {}
    unknown, misshapen = [], []
    for theirs, ours, tensor in weights:
        name = next((name for name in (prefix + ours, ours) if name in expected), None)
        if name is None:
            unknown.append(theirs)
        elif tensor.shape != expected[name].shape:
            misshapen.append(f"{theirs} {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}")
        else:
            found[name] = tensor
    lacking = [their_prefix + native_to_theirs(name.removeprefix(prefix), table) for name in expected.keys() - found]
    lacking = sorted(set(lacking) - {word.split(" ")[0] for word in misshapen})
    if unknown or misshapen or lacking:
        problems = {"missing": lacking, "not understood": list(dict.fromkeys(unknown)), "of another shape": misshapen}
        told = "; ".join(f"{what} {_shortened(keys)}" for what, keys in problems.items() if keys)
        raise ValueError(f"the file does not fit a {type(model).__name__}: {told}")
    model.load_state_dict(found)


def _shortened(keys: list[str], most: int = 8) -> str:
    shown = ", ".join(keys[:most])
    return f"{shown} and {len(keys) - most} more" if len(keys) > most else shown

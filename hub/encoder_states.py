"""Express an encoder as another class that computes the same function, and rename its weights accordingly.

The results are exact: a key bias adds the same number to all scores of a query, which cancels in the softmax, and
LayerScale is a diagonal matrix after a linear layer, into which it can be folded.
"""

import re
from typing import Any

import torch
from transformers import BeitConfig, BeitForMaskedImageModeling, BeitModel, PreTrainedConfig, PreTrainedModel

State = dict[str, torch.Tensor]

# Model types of transformers that training can start from.
FAMILIES = {
    "vit": "ViT",
    "vit_mae": "ViTMAE",
    "deit": "DeiT",
    "beit": "BEiT",
    "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2 with registers",
    "dinov3_vit": "DINOv3",
    "data2vec-vision": "Data2VecVision",
    "swin": "Swin",
}
# The models that an encoder of ours can represent, by its model type.
FAMILIES_OF = {
    "vit": ("ViT", "ViTMAE", "DINOv2 without SwiGLU", "BEiT and Data2VecVision with absolute positions only"),
    "beit": ("BEiT", "Data2VecVision", "ViT", "ViTMAE", "DINOv2 without SwiGLU"),
    "dinov2": ("DINOv2",),
    "dinov2_with_registers": ("DINOv2 with registers",),
    "dinov3_vit": ("DINOv3",),
    "deit": ("DeiT",),
    "swin": ("Swin",),
}
# These represent their own type only, under the names of the native class.
_SELF_ONLY = ("dinov2", "dinov2_with_registers", "dinov3_vit", "deit", "swin")
_OF_DINOV2 = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "hidden_act", "layer_norm_eps"),
    *("qkv_bias", "layerscale_value", "use_swiglu_ffn"),
)
_SHARED = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
    *("hidden_act", "layer_norm_eps", "qkv_bias"),
)
_SETTINGS = {
    "vit": _SHARED,
    "deit": _SHARED,
    "dinov2": _OF_DINOV2,
    "dinov2_with_registers": (*_OF_DINOV2, "num_register_tokens"),
    "dinov3_vit": (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
        *("layer_norm_eps", "layerscale_value", "use_gated_mlp", "num_register_tokens", "rope_theta"),
        *("query_bias", "key_bias", "value_bias", "proj_bias", "mlp_bias"),
        *("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"),
    ),
    "beit": tuple(name for name in _SHARED if name != "qkv_bias"),
    "swin": (
        *("embed_dim", "depths", "num_heads", "window_size", "mlp_ratio"),
        *("hidden_act", "layer_norm_eps", "qkv_bias", "use_absolute_embeddings"),
    ),
}
_ONLY_AS_THEMSELVES = {
    "swin": "it merges patches from stage to stage, in windows",
    "deit": "it has a distillation token",
    "dinov2_with_registers": "it has registers",
    "dinov3_vit": "it rotates queries and keys by their positions (RoPE)",
}
_RELATIVE_KINDS = ("use_relative_position_bias", "use_shared_relative_position_bias")
# Regularization is not part of the function: it is only kept when the same method continues.
_REGULARIZERS = ("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob")
# Names of DINOv2 and Data2VecVision, current and of transformers 5.17 -> those of ViT and BEiT.
_RENAMES = (
    (r"^encoder\.layer\.", "layers."),
    (r"^encoder\.relative_position_bias\.", "shared_position_bias."),
    (r"\.attention\.attention\.relative_position_bias\.", ".relative_position_bias."),
    (r"\.attention\.attention\.(q|k|v)(?:uery|ey|alue)\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(layers\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.layer_scale([12])\.lambda1$", r".lambda_\1"),
)


def obstacle(config: PreTrainedConfig, host: str) -> str | None:
    """Return why our encoder of type `host` cannot represent a model with this config, or None if it can."""
    family = config.model_type
    if family == host:
        return None
    if family in _ONLY_AS_THEMSELVES:
        return _ONLY_AS_THEMSELVES[family]
    if host in _SELF_ONLY:
        return f"it is not a {FAMILIES[host]}"
    if getattr(config, "use_swiglu_ffn", False):
        return "its MLPs are gated (SwiGLU)"
    if host == "vit":
        if any(getattr(config, kind, False) for kind in _RELATIVE_KINDS):
            return "it has relative position biases, which a ViT does not"
        if not _absolute_positions(config):
            return "it has no position embeddings"
        if not has_final_norm(config):
            return "it has no LayerNorm after its last block"
    return None


def encoder_settings(config: PreTrainedConfig, host: str, is_own: bool) -> dict[str, Any]:
    """Return the arguments of our encoder's native config, except sizes of image, patch and channels."""
    names = (*_SETTINGS[host], *(_REGULARIZERS if is_own else ()))
    arguments = {name: getattr(config, name) for name in names if hasattr(config, name)}
    if config.model_type == "dinov2" != host:
        arguments["intermediate_size"] = int(config.hidden_size * config.mlp_ratio)
    if host == "beit":
        for kind in _RELATIVE_KINDS:
            arguments[kind] = getattr(config, kind, False)
        arguments["use_absolute_position_embeddings"] = _absolute_positions(config)
        arguments["use_mean_pooling"] = not has_final_norm(config)
        # Only tells whether there is LayerScale (0: no); its values are weights.
        in_dinov2 = getattr(config, "layerscale_value", 0.0) or 1.0
        own = getattr(config, "layer_scale_init_value", 0.0)
        arguments["layer_scale_init_value"] = in_dinov2 if config.model_type == "dinov2" else own
    return {"model_type": host, **arguments}


def has_final_norm(config: PreTrainedConfig) -> bool:
    """Return whether a LayerNorm follows the last block; BEiT and Data2VecVision may have it in the pooler instead."""
    in_head = BeitForMaskedImageModeling.__name__ in (config.architectures or ())
    return in_head or not getattr(config, "use_mean_pooling", False)


def native_state(state: State, family: str, has_norm: bool, host: str = "") -> tuple[State, State]:
    """Split a transformers model into its encoder, under the names of ViT and BEiT (or of `host`), and the rest."""
    if family == host in _SELF_ONLY and family != "deit":
        return state, {}
    if family == "vit_mae":
        encoder = {name.removeprefix("vit."): tensor for name, tensor in state.items() if name.startswith("vit.")}
        rest = {name.removeprefix("decoder."): tensor for name, tensor in state.items() if name.startswith("decoder.")}
        if "decoder_pos_embed" in rest:
            rest["decoder_positions"] = rest.pop("decoder_pos_embed")
        return encoder, rest
    if "lm_head.weight" in state:  # BeitForMaskedImageModeling
        encoder = {name.removeprefix("beit."): tensor for name, tensor in state.items() if name.startswith("beit.")}
        rest = {name: tensor for name, tensor in state.items() if not name.startswith("beit.")}
        if has_norm and "layernorm.weight" not in encoder:
            encoder |= {name: rest.pop(name) for name in list(rest) if name.startswith("layernorm.")}
        return encoder, rest
    encoder = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        encoder[name] = tensor.unsqueeze(0) if name.endswith("mask_token") and tensor.ndim == 2 else tensor
    return encoder, {}


def as_host(state: State, host: str, qkv_bias: bool) -> tuple[State, list[str]]:
    """Convert an encoder to our type `host`; return its weights, and descriptions of the weights folded or removed."""
    if host == "vit":
        return _as_vit(state, qkv_bias)
    if host == "beit":
        return _as_beit(state)
    return state, []


def as_beit_model(encoder: PreTrainedModel) -> BeitModel:
    """Return an encoder as a BeitModel that computes the same.

    Raises:
        ValueError: If no BEiT does.
    """
    config: Any = encoder.config
    if (problem := obstacle(config, "beit")) is not None:
        raise ValueError(f"`model` {config.name_or_path} cannot become a BEiT: {problem}")
    settings = encoder_settings(config, "beit", is_own=False)
    settings |= {name: getattr(config, name) for name in ("image_size", "patch_size", "num_channels")}
    del settings["model_type"]
    model = BeitModel(BeitConfig(**settings), add_pooling_layer=False)
    state, _ = native_state(encoder.state_dict(), config.model_type, has_final_norm(config), "beit")
    missing, unexpected = model.load_state_dict(as_host(state, "beit", qkv_bias=True)[0], strict=False)
    left = [name for name in unexpected if not name.startswith(("embeddings.mask_token", "pooler."))]
    assert not missing, f"a BEiT has weights that the encoder lacks: {missing}"
    assert all("position_index" in name for name in left), f"a BEiT has no weights of these names: {left}"
    return model


def _as_vit(state: State, qkv_bias: bool) -> tuple[State, list[str]]:
    scales = {name: tensor for name, tensor in state.items() if name.endswith(("lambda_1", "lambda_2"))}
    state = {name: tensor for name, tensor in state.items() if name not in scales}
    for name, scale in scales.items():
        layer = name.replace("lambda_1", "attention.o_proj").replace("lambda_2", "mlp.fc2")
        state[f"{layer}.weight"] = scale[:, None] * state[f"{layer}.weight"]
        state[f"{layer}.bias"] = scale * state[f"{layer}.bias"]
    for key in [name for name in state if name.endswith("k_proj.weight")]:
        bias = key.replace("weight", "bias")
        if qkv_bias and bias not in state:
            state[bias] = torch.zeros(len(state[key]))
    return state, ["LayerScale (folded into the preceding layers)"] if scales else []


def _as_beit(state: State) -> tuple[State, list[str]]:
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("k_proj.bias")}
    for key in [name for name in kept if name.endswith(("q_proj.weight", "v_proj.weight"))]:
        kept.setdefault(key.replace("weight", "bias"), torch.zeros(len(kept[key])))
    return kept, ["key biases (they cancel in the softmax)"] if len(kept) < len(state) else []


def _absolute_positions(config: PreTrainedConfig) -> bool:
    return getattr(config, "use_absolute_position_embeddings", True)

"""Recognize which program wrote a file of weights, and which part of a model it holds, by the names in it."""

from typing import NamedTuple

from hub.convert.sizes import BLOCK_TABLE, SHARED_TABLE, image_size_from_positions
from hub.convert.weight_file import State, WeightFile


class Kind(NamedTuple):
    """What a file is, the `methods` that read it (likeliest first), and the `keys` by which it was recognized."""

    form: str
    methods: tuple[str, ...]
    keys: tuple[str, ...]


_PROJECTION_HEAD = "head.mlp.0.weight"
CODES = "quantize.embedding.weight"  # of a tokenizer
_LOSSES = {"ibot_loss": "iBOT", "dino_loss": "DINO"}  # beside both networks


def recognize(file: WeightFile, state: State) -> Kind | None:
    """Return the kind of `file`, given its weights without prefixes, or None if the converter cannot read it."""
    form = "fine-tuned classifier" if {"head.weight", "head.fc.weight"} & state.keys() else "encoder only"
    if "decoder_embed.weight" in state:
        return Kind("MAE, encoder and decoder", ("mae",), ("decoder_embed.weight",))
    if simmim := [key for key in state if key.startswith("decoder.0.")]:
        return Kind("SimMIM, encoder and prediction layer", ("simmim",), tuple(simmim))
    if CODES in state:
        return Kind("tokenizer of BEiT v2 (VQ-KD)", ("beit2",), (CODES,))
    if "patch_embed.proj.weight" not in state:
        return None
    if "layers.0.blocks.0.attn.qkv.weight" in state:
        return _recognize_swin(file, state, form)
    if "blocks.0.attn.qkv.weight" not in state:
        return None
    if SHARED_TABLE in state or BLOCK_TABLE in state:
        return _recognize_beit(file, state, form)
    if "blocks.0.attn.q_bias" in state:
        return Kind(f"BEiT with absolute positions, {form}", ("beit", "ibot", "timm"), ("blocks.0.attn.q_bias",))
    return _recognize_vit(file, state, form)


def _recognize_swin(file: WeightFile, state: State, form: str) -> Kind:
    if "masked_embed" in state or _PROJECTION_HEAD in state or {"teacher", "student"} <= set(file.states):
        return Kind("Swin, encoder only", ("ibot",), _present(state, "masked_embed", _PROJECTION_HEAD))
    if "layers.0.downsample.norm.weight" not in state:  # it is at the start of the next stage
        return Kind(f"Swin, {form}", ("timm",), ("layers.1.downsample.norm.weight",))
    return Kind(f"Swin, {form}", ("simmim", "ibot"), ("layers.0.downsample.norm.weight",))


def _recognize_beit(file: WeightFile, state: State, form: str) -> Kind:
    tables = _present(state, SHARED_TABLE, BLOCK_TABLE)
    if "lm_head.weight" in state:
        num_outputs, hidden_size = state["lm_head.weight"].shape
        if any(key.startswith("cls_pt_layers.") for key in state):
            return Kind("BEiT v2 in pre-training", ("beit2", "beit"), ("lm_head.weight", "cls_pt_layers.0..."))
        if "model_ema" in file.states:
            return Kind("data2vec in pre-training", ("data2vec",), ("lm_head.weight", "model_ema"))
        if num_outputs == hidden_size:  # a vocabulary of exactly this size would be a coincidence
            return Kind("data2vec in pre-training", ("data2vec", "beit"), ("lm_head.weight", *tables))
        return Kind("BEiT in pre-training", ("beit",), ("lm_head.weight", *tables))
    if "head.weight" in state:
        per_block = ("beit", "beit2", "simmim", "data2vec", "timm")
        methods = ("data2vec", "beit", "timm") if SHARED_TABLE in state else per_block
        return Kind(f"BEiT, {form}", methods, ("head.weight", *tables))
    return Kind(f"BEiT, {form}", ("beit", "beit2", "simmim", "data2vec", "timm"), tables)


def _recognize_vit(file: WeightFile, state: State, form: str) -> Kind:
    if "dino_head.mlp.0.weight" in state or ("mask_token" in state and "blocks.0.ls1.gamma" in state):
        keys = _present(state, "dino_head.mlp.0.weight", "mask_token", "register_tokens", "blocks.0.ls1.gamma")
        return Kind(f"DINOv2, {_networks(file)}", ("dinov2", "timm"), keys)
    if "masked_embed" in state or _PROJECTION_HEAD in state or {"teacher", "student"} & set(file.states):
        keys = _present(state, "masked_embed", _PROJECTION_HEAD, "pos_embed")
        names = [name for loss, name in _LOSSES.items() if loss in file.others]
        names = names or (["iBOT"] if "masked_embed" in state else ["iBOT", "DINO"])
        return Kind(f"{' or '.join(names)}, {_networks(file)}", tuple(map(str.lower, names)), keys)
    if "pos_embed" in state and image_size_from_positions(state) is None:
        return Kind(f"ViT, {form}, whose positions are not a square grid and a class token", ("timm",), ("pos_embed",))
    if "blocks.0.ls1.gamma" in state or "state_dict_ema" in file.states:
        return Kind(f"ViT, {form}", ("timm",), _present(state, "blocks.0.ls1.gamma", "head.weight"))
    if "fc_norm.weight" in state or "head.weight" in state:
        return Kind(f"ViT, {form}", ("mae", "timm", "ibot", "dino"), _present(state, "fc_norm.weight", "head.weight"))
    return Kind(f"ViT, {form}", ("mae", "ibot", "dino", "timm"), _present(state, "pos_embed", "norm.weight"))


def _networks(file: WeightFile) -> str:
    return "student and teacher" if {"teacher", "student"} <= set(file.states) else "encoder only"


def _present(state: State, *keys: str) -> tuple[str, ...]:
    return tuple(key for key in keys if key in state)

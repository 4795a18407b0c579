"""Convert the authors' BEiT v2 files (microsoft/unilm/beit2): whole models, tokenizers, encoders and classifiers."""

import argparse

import torch

from hub.convert.key_names import BEIT
from hub.convert.native_models import Converted, convert_beit, drop, load_weights, rename
from hub.convert.recognize import CODES
from hub.convert.reference import part
from hub.convert.sizes import beit_settings, count_blocks
from hub.convert.weight_file import State, suggested_num_heads
from modeling.beit2 import Beit2Config, Beit2ForPreTraining
from modeling.vqkd import VqkdConfig, VqkdModel

_OF_TRAINING = {
    r"^teacher_model\.|^scaling_layer\.": "the frozen teacher, which the tokenizer does not need",
    r"^quantize\.embedding\.": "for the training of the codebook",
}
_REASONS = {r"^lm_head\.": "it belongs to the second branch, which the file lacks"}
_EXTRA = "cls_pt_layers."


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_attention_heads", type=int, help="for a tokenizer: 12 in the released ones")
    parser.add_argument("--aggregation_layer", type=int, default=0, help="default: 9 for ViT-B, 21 for ViT-L")


def required_flags(state: State) -> dict[str, str]:
    return {"num_attention_heads": suggested_num_heads(part(state, "encoder."))} if CODES in state else {}


def image_stats(state: State) -> str | None:
    return None if CODES in state else "imagenet"  # a tokenizer maps pixels to [-1, 1] by itself


def convert(state: State, options: argparse.Namespace) -> Converted:
    if CODES in state:
        return _convert_tokenizer(state, options.num_attention_heads)
    if not any(key.startswith(_EXTRA) for key in state):
        return convert_beit(state, reasons=_REASONS)
    if missing := [key for key in ("mask_token", "lm_head.weight", "lm_head.bias") if key not in state]:
        raise ValueError(f"not a pre-trained BEiT v2: {', '.join(missing)} missing; its first keys: {list(state)[:5]}")
    state, dropped = drop(state)
    blocks = {f"blocks.{key.removeprefix(_EXTRA)}": t for key, t in state.items() if key.startswith(_EXTRA)}
    encoder = {key: tensor for key, tensor in state.items() if not key.startswith((_EXTRA, "lm_head."))}
    config = Beit2Config(
        encoder_config=beit_settings(state),
        image_mean=options.image_mean,
        image_std=options.image_std,
        vocab_size=state["lm_head.weight"].shape[0],
        num_aggregation_blocks=count_blocks(blocks, r"^blocks\.(\d+)\."),
        aggregation_layer=options.aggregation_layer,
    )
    model = Beit2ForPreTraining(config)
    load_weights(model.encoder, rename(encoder, BEIT), BEIT)
    extra = [(f"{_EXTRA}{theirs[7:]}", ours.removeprefix("layers."), t) for theirs, ours, t in rename(blocks, BEIT)]
    load_weights(model.aggregation_blocks, extra, BEIT, _EXTRA)
    head = {key: tensor for key, tensor in state.items() if key.startswith("lm_head.")}
    model.lm_head.load_state_dict({key.removeprefix("lm_head."): tensor for key, tensor in head.items()})
    return Converted(model.eval(), encoder, dropped)


def _convert_tokenizer(state: State, num_attention_heads: int | None) -> Converted:
    kept = {CODES: state[CODES]}
    rest, dropped = drop({key: tensor for key, tensor in state.items() if key != CODES}, _OF_TRAINING)
    weights = kept | rest
    encoder, decoder = (part(weights, prefix) for prefix in ("encoder.", "decoder."))
    if missing := [name for name in ("encode_task_layer", "decode_task_layer") if f"{name}.2.weight" not in weights]:
        raise ValueError(f"not a VQ-KD tokenizer: {', '.join(missing)} missing; its first keys: {list(state)[:5]}")
    num_codes, code_size = state[CODES].shape
    config = VqkdConfig(
        encoder_config=beit_settings(encoder, num_attention_heads),
        vocab_size=num_codes,
        code_size=code_size,
        feature_size=len(state["decode_task_layer.2.weight"]),
        decoder_num_hidden_layers=count_blocks(decoder, r"^blocks\.(\d+)\."),
    )
    model = VqkdModel(config)
    load_weights(model.encoder, rename(encoder, BEIT), BEIT, "encoder.")
    load_weights(model.decoder, rename(decoder, BEIT), BEIT, "decoder.")
    others = {
        name.replace("encode_task_layer.", "to_code.").replace("decode_task_layer.", "to_features."): tensor
        for name, tensor in weights.items()
        if not name.startswith(("encoder.", "decoder."))
    }
    others["codebook.codes"] = others.pop(CODES)
    others["codebook.counts"] = others.pop("quantize.cluster_size", torch.zeros(num_codes))
    if unexpected := [name for name in others if name not in model.state_dict()]:
        raise ValueError(f"the file does not fit a VqkdModel: unexpected {', '.join(unexpected)}")
    model.load_state_dict(others, strict=False)
    return Converted(model.eval(), weights, dropped)

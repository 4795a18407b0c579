"""Convert the authors' BEiT files (microsoft/unilm/beit): pre-training -> `BeitForPreTraining`, others -> native."""

import argparse

from hub.convert.key_names import BEIT
from hub.convert.native_models import Converted, convert_beit, drop, load_weights, rename
from hub.convert.sizes import BLOCK_TABLE, SHARED_TABLE, beit_settings
from hub.convert.weight_file import State, suggested_num_heads
from modeling.beit import BeitForPreTraining, BeitMimConfig

_SECOND_BRANCH = "the second branch of BEiT v2, or the head that it shares, which need the tokenizer of BEiT v2"
_REASONS = {r"^cls_pt_layers\.|^lm_head\.": _SECOND_BRANCH}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_attention_heads", type=int, help="for a file without relative position tables")


def required_flags(state: State) -> dict[str, str]:
    has_table = SHARED_TABLE in state or BLOCK_TABLE in state
    return {} if has_table else {"num_attention_heads": suggested_num_heads(state)}


def image_stats(state: State) -> str:
    return "half"  # in every released file; the authors' flag for ImageNet's is for training on ImageNet-1k


def convert(state: State, options: argparse.Namespace) -> Converted:
    if "lm_head.weight" not in state or any(key.startswith("cls_pt_layers.") for key in state):
        return convert_beit(state, options.num_attention_heads, reasons=_REASONS)
    if missing := [key for key in ("mask_token", "lm_head.bias") if key not in state]:
        raise ValueError(f"not a pre-trained BEiT: {', '.join(missing)} missing; its first keys are {list(state)[:5]}")
    state, dropped = drop(state)
    config = BeitMimConfig(
        encoder_config=beit_settings(state, options.num_attention_heads),
        image_mean=options.image_mean,
        image_std=options.image_std,
        vocab_size=state["lm_head.weight"].shape[0],
    )
    model = BeitForPreTraining(config)
    load_weights(model, rename(state, BEIT), BEIT)
    encoder = {key: tensor for key, tensor in state.items() if not key.startswith("lm_head.")}
    return Converted(model.eval(), encoder, dropped)

"""Convert the authors' iBOT files (bytedance/ibot): teacher, student or backbone, ViT or Swin -> native encoder."""

import argparse

from hub.convert.native_models import NO_MASK_TOKEN, Converted, convert_swin, convert_vit
from hub.convert.simmim import is_swin
from hub.convert.weight_file import State, suggested_num_heads

# The keys of the file that hold them. The authors evaluate the teacher.
WEIGHTS = {"teacher": ("teacher", "state_dict", "model", ""), "student": ("student", "state_dict", "model", "")}
_REASONS = {
    r"^head\.(mlp|last_layer)": "the projection head of pre-training",
    r"^masked_embed$": NO_MASK_TOKEN,
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_attention_heads", type=int, help="for a ViT: 6 for S, 12 for B, 16 for L")
    parser.add_argument("--image_size", type=int, help="for a Swin: 224 in the released files")


def required_flags(state: State) -> dict[str, str]:
    return {"image_size": "224"} if is_swin(state) else {"num_attention_heads": suggested_num_heads(state)}


def convert(state: State, options: argparse.Namespace) -> Converted:
    if not is_swin(state):
        return convert_vit(state, options.num_attention_heads, reasons=_REASONS)
    converted = convert_swin(state, options.image_size, reasons=_REASONS)
    converted.notes.append(
        "features are close to iBOT's, not equal: its LayerNorms have eps 1e-6, whereas SwinModel always uses 1e-5 in "
        "its embeddings and between its stages"
    )
    return converted

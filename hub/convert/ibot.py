"""The authors' iBOT files (bytedance/ibot): teacher, student or bare backbone, ViT or Swin -> native encoder."""

import argparse

from hub.convert.native_models import Converted, State, swin_from, vit_from
from hub.convert.simmim import is_swin
from hub.convert.weight_file import suggested_num_heads

# Where the file has them. The authors evaluate the teacher.
WEIGHTS = {"teacher": ("teacher", "state_dict", "model", ""), "student": ("student", "state_dict", "model", "")}
_REASONS = {
    r"^head\.(mlp|last_layer)": "the projection head of pre-training",
    r"^masked_embed$": "AutoModel builds this encoder without a mask token",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--num_attention_heads", type=int, help="of a ViT: 6 for S, 12 for B, 16 for L")
    parser.add_argument("--image_size", type=int, help="of a Swin: 224 in the released files")


def asks(state: State) -> dict[str, str]:
    """Flags that the file cannot answer, with what is usual."""
    return {"image_size": "224"} if is_swin(state) else {"num_attention_heads": suggested_num_heads(state)}


def image_stats(state: State) -> str:
    return "imagenet"


def convert(state: State, options: argparse.Namespace) -> Converted:
    """Raises ValueError if the file is not an iBOT; the keys that say so are named."""
    if not is_swin(state):
        return vit_from(state, options.num_attention_heads, reasons=_REASONS)
    converted = swin_from(state, options.image_size, reasons=_REASONS)
    converted.remarks.append(
        "iBOT's Swin has LayerNorm eps 1e-6; SwinModel has 1e-5 in its embeddings and between its stages, whatever "
        "its config says: its features are near, not equal"
    )
    return converted

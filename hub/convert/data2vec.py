"""The authors' data2vec files for images (facebookresearch/data2vec_vision): student, teacher or fine-tuned -> native.

The encoder is a BEiT's in all but its keys' names, so it opens as a BeitModel.
"""

import argparse

from hub.convert.native_models import Converted, State, beit_from

# Where the file has them; fine-tuning starts from the student.
WEIGHTS = {"student": ("model", "module", ""), "teacher": ("model_ema",)}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """`--weights` is all there is to choose."""


def asks(state: State) -> dict[str, str]:
    return {}


def image_stats(state: State) -> str:
    return "half" if "fc_norm.weight" in state else "imagenet"  # so the authors' commands for either stage


def convert(state: State, options: argparse.Namespace) -> Converted:
    """Raises ValueError if the file is not a data2vec; the keys that say so are named."""
    head = state.get("lm_head.weight")
    if head is not None and head.shape[0] != head.shape[1]:
        raise ValueError(
            f"lm_head.weight predicts {head.shape[0]} codes, so this is a BEiT (--from beit): data2vec's predicts "
            f"as many numbers as the encoder is wide, {head.shape[1]}"
        )
    return beit_from(state, reasons={r"^lm_head\.": "the layer that predicts the teacher's features"})

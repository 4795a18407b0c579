"""Convert the authors' data2vec files for images (facebookresearch/data2vec_vision) to a native encoder or classifier.

The encoder differs from BEiT's in the names of its keys only, so it opens as a BeitModel.
"""

import argparse

from hub.convert.native_models import Converted, convert_beit
from hub.convert.weight_file import State

# The keys of the file that hold them; fine-tuning starts from the student.
WEIGHTS = {"student": ("model", "module", ""), "teacher": ("model_ema",)}


def image_stats(state: State) -> str:
    return "half" if "fc_norm.weight" in state else "imagenet"  # as in the authors' commands for either stage


def convert(state: State, options: argparse.Namespace) -> Converted:
    head = state.get("lm_head.weight")
    if head is not None and head.shape[0] != head.shape[1]:
        raise ValueError(
            f"lm_head.weight has {head.shape[0]} outputs, so this is a BEiT (use --from beit): data2vec's has as many "
            f"as the encoder's hidden size, {head.shape[1]}"
        )
    return convert_beit(state, reasons={r"^lm_head\.": "the layer that predicts the teacher's features"})

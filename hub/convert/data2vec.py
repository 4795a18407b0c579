"""Convert the authors' data2vec files for images (facebookresearch/data2vec_vision).

A file with student and teacher becomes a `Data2VecForPreTraining`, other files a native encoder or classifier: a BEiT,
as the encoder differs from BEiT's in the names of its keys only.
"""

import argparse

import torch

from hub.convert.key_names import BEIT
from hub.convert.native_models import Converted, convert_beit, drop, load_weights, rename
from hub.convert.sizes import beit_settings
from hub.convert.weight_file import State, without_prefixes
from modeling.data2vec import Data2VecConfig, Data2VecForPreTraining

# The keys of the file that hold them; the authors fine-tune the student.
WEIGHTS = {"student": ("model", "module", ""), "teacher": ("model_ema",)}
_UNUSED_HEAD = {r"^lm_head\.": "the layer that predicts the teacher's features"}


def image_stats(state: State) -> str:
    return "half" if "fc_norm.weight" in state else "imagenet"  # as in the authors' commands for either stage


def convert(state: State, options: argparse.Namespace) -> Converted:
    head = state.get("lm_head.weight")
    if head is not None and head.shape[0] != head.shape[1]:
        raise ValueError(
            f"lm_head.weight has {head.shape[0]} outputs, so this is a BEiT (use --from beit): data2vec's has as many "
            f"as the encoder's hidden size, {head.shape[1]}"
        )
    names = {kind: next((key for key in keys if key in options.states), None) for kind, keys in WEIGHTS.items()}
    if head is None or None in names.values():
        return convert_beit(state, reasons=_UNUSED_HEAD)
    states = {kind: without_prefixes(options.states[str(name)]) for kind, name in names.items()}
    other = next(name for kind, name in names.items() if kind != options.weights)
    return _convert_whole(states["student"], states["teacher"], options, str(other))


def _convert_whole(student: State, teacher: State, options: argparse.Namespace, other: str) -> Converted:
    """Convert both networks; the authors' settings are read from the sizes (`Data2VecConfig`)."""
    config = Data2VecConfig(
        encoder_config=beit_settings(student),
        image_mean=options.image_mean,
        image_std=options.image_std,
        exported_weights=options.weights,
    )
    model = Data2VecForPreTraining(config)
    (student, dropped), (teacher, _) = drop(student), drop(teacher, _UNUSED_HEAD)
    teacher_weights = [
        (f"model_ema.{theirs}", f"teacher.{ours}", tensor) for theirs, ours, tensor in rename(teacher, BEIT)
    ]
    load_weights(model, [*rename(student, BEIT), *teacher_weights], BEIT)
    dropped |= {
        f"model_ema.{key}": "the average of a layer that the teacher does not use"
        for key in student
        if key.startswith("lm_head.")
    }
    encoder: dict[str, torch.Tensor] = dict(teacher)
    if options.weights == "student":
        encoder = {key: tensor for key, tensor in student.items() if not key.startswith("lm_head.")}
    return Converted(model.eval(), encoder, dropped, also_read=(other,))

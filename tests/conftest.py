"""Small heads and real images that many tests share. A new head adds one entry to TINY_HEADS."""

import atexit
import gc
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported
os.environ["HF_ASSETS_CACHE"] = tempfile.mkdtemp(prefix="assets-")  # where scans of the tests' images are kept

import numpy as np
import pytest
import torch
import transformers
from transformers import TrainerCallback, TrainingArguments, ViTConfig, ViTModel

from data.augmentations import build_views
from data.collators import MaskingCollator
from data.images import ImageDataset, SourceSamples
from data.sources import open_source
from hub.model_card import write_model_card
from modeling import MODELS, MimConfig, MimPreTrainedModel
from modeling.dvae import DvaeConfig, DvaeModel
from modeling.frozen_teacher import FrozenTeacher
from modeling.patches import patch_grid
from training.checkpoints import last_whole_checkpoint
from training.targets import Targets, TeacherTargets, TokenizerTargets
from training.trainer import MimTrainer

atexit.register(shutil.rmtree, os.environ["HF_ASSETS_CACHE"], ignore_errors=True)
ROOT = Path(__file__).parent.parent
# In 5.17 AutoImageProcessor cannot be used without torchvision, whatever the folder holds.
OLDEST = transformers.__version__.startswith("5.17.")
IMAGE_PROCESSOR = getattr(transformers, "ViTImageProcessorPil" if OLDEST else "AutoImageProcessor")
SIZE, PATCH = 32, 8

_ENCODER = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": PATCH,
}
_MAE = {
    "encoder_config": _ENCODER,
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}
_BEIT = {**_ENCODER, "drop_path_rate": 0.0}  # batches that are split otherwise would drop other paths
_PROTOTYPES = {
    "num_prototypes": 24,
    "head_hidden_size": 32,
    "head_bottleneck_size": 16,
    "num_local_crops": 2,
    "drop_path_rate": 0.0,
}
_SWIN = {
    "model_type": "swin",
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "image_size": SIZE,
    "patch_size": PATCH // 2,  # two stages: one prediction fills PATCH x PATCH pixels here too
}
_DINOV2 = {**_ENCODER, "model_type": "dinov2", "mlp_ratio": 2}
_REGISTERS = {**_DINOV2, "model_type": "dinov2_with_registers", "num_register_tokens": 3, "use_swiglu_ffn": True}
# Scaled in training by default, as other numbers for each micro-batch.
_DINOV3 = {**_ENCODER, "model_type": "dinov3_vit", "num_register_tokens": 3, "pos_embed_rescale": None}
# By method, or by "method+variant" where one method has several kinds of encoders.
TINY_MODELS: dict[str, dict[str, Any]] = {
    "mae": _MAE,
    "mae+cross": {**_MAE, "decoder": "cross", "decoder_num_hidden_layers": 2},
    "mae+dinov3": {**_MAE, "encoder_config": _DINOV3},
    "mae+hard": {**_MAE, "hard_patch_share": 0.5},
    "simmim": {"encoder_config": _BEIT},
    "simmim+hard": {"encoder_config": _BEIT, "hard_patch_share": 0.5},
    "simmim+swin": {"encoder_config": _SWIN},
    "simmim+deit": {"encoder_config": {**_ENCODER, "model_type": "deit"}},
    "simmim-asymmetric": _MAE,
    "beit": {"encoder_config": _BEIT, "vocab_size": 16},
    "beit2": {"encoder_config": _BEIT, "vocab_size": 16},
    "beit3": {"encoder_config": _BEIT, "vocab_size": 16},
    "data2vec": {"encoder_config": {**_BEIT, "attention_probs_dropout_prob": 0.0}},
    "data2vec+registers": {"encoder_config": _REGISTERS},
    "data2vec+attention": {
        "encoder_config": {**_BEIT, "attention_probs_dropout_prob": 0.0},
        "attention_masks": True,
        "attention_hint_share": 0.25,
    },
    "data2vec2": {
        "encoder_config": _ENCODER,
        "decoder_num_convolutions": 2,
        "decoder_num_groups": 4,
        "mask_noise_std": 0.0,  # the same batch, split otherwise, would get other noise
    },
    "feature": {"encoder_config": _ENCODER},
    "feature+teacher": {
        "encoder_config": _ENCODER,
        "feature_size": 16,
        "teacher_has_class_token": True,
        "distill_visible": True,
    },
    "ibot": {"encoder_config": _ENCODER, **_PROTOTYPES, "coding_rate_weight": 0.0},
    "ibot+dinov2": {"encoder_config": _DINOV2, **_PROTOTYPES, "coding_rate_weight": 0.0},
    "ibot+attention": {"encoder_config": _ENCODER, **_PROTOTYPES, "attention_masks": True},
    "dino": {"encoder_config": _ENCODER, **_PROTOTYPES, "coding_rate_weight": 0.0},
    "dinov2": {"encoder_config": _ENCODER, **_PROTOTYPES},
    "dinov2+dinov3": {"encoder_config": _DINOV3, **_PROTOTYPES},
    "simdino": {"encoder_config": _ENCODER, **{k: v for k, v in _PROTOTYPES.items() if k != "num_prototypes"}},
}
TINY_MODELS["hybrid"] = {**_MAE, "head_hidden_size": 32, "head_bottleneck_size": 16}
TINY_MODELS["refine"] = {
    "encoder_config": _ENCODER,
    **{k: v for k, v in _PROTOTYPES.items() if k != "num_prototypes"},
    "queue_size": 64,
    "num_candidates": 1,  # otherwise each process would draw others
    "temperature": 5.0,  # batch statistics of similar class tokens magnify rounding, and 0.2 would do so again
}
# The methods of tests/toys, in a tree where they were added.
_TOYS = {"hog": _MAE, "two-crops": {"encoder_config": _BEIT, "num_outputs": 16}}
TINY_MODELS |= {method: settings for method, settings in _TOYS.items() if method in MODELS}
VARIANTS = os.environ.get("TINY_VARIANTS", " ".join(sorted(TINY_MODELS))).split()  # test_toys.py wants the toys only


def model_class(variant: str) -> type[MimPreTrainedModel]:
    return MODELS[variant.split("+")[0]]


def tiny_config(variant: str, **encoder: Any) -> MimConfig:
    """The smallest config of a variant; `encoder` overrides the encoder's settings."""
    settings = dict(TINY_MODELS[variant])
    settings["encoder_config"] = {**settings["encoder_config"], **encoder}
    return model_class(variant).config_class(**settings)


def tiny_model(variant: str, **encoder: Any) -> MimPreTrainedModel:
    """The smallest model of a variant, the same weights at each call; `encoder` overrides the encoder's settings."""
    config = tiny_config(variant, **encoder)
    torch.manual_seed(0)
    return model_class(variant)(config)


def tiny_images(
    num_images: int = 48, images_per_step: int = 8, train: bool = True, variant: str = "mae"
) -> ImageDataset:
    """Bundled photographs as training items of 32 px, with the views of the method."""
    source = open_source("sample")
    samples = SourceSamples(source, np.linspace(0, len(source) - 1, num_images).astype(np.int64))
    views = tiny_config(variant).views
    transform = build_views(views, image_size=(SIZE, SIZE), crop_scale=(0.2, 1.0), num_channels=3, train=True)
    return ImageDataset(samples, transform, train=train, images_per_step=images_per_step)


def tiny_tokenizer() -> DvaeModel:
    """A small, untrained image tokenizer of ours with one code for each patch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_groups": 4, "num_blocks_per_group": 1, "decoder_input_size": 16}
        return DvaeModel(DvaeConfig(image_size=SIZE, vocab_size=16, **sizes)).eval()


def tiny_teacher() -> FrozenTeacher:
    """A small, untrained ViT with another grid than the models here."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        model = ViTModel(ViTConfig(image_size=24, patch_size=8, **sizes), add_pooling_layer=False)
        return FrozenTeacher(model, (0.5,) * 3, (0.5,) * 3, 24)


def tiny_targets(variant: str) -> Targets | None:
    if model_class(variant).targets == "tokenizer":
        return TokenizerTargets(tiny_tokenizer(), (SIZE // PATCH, SIZE // PATCH))
    if "feature_size" in TINY_MODELS[variant]:
        return TeacherTargets(tiny_teacher(), (SIZE, SIZE), 3)
    return None


class SeenByTeacher:
    """A collator's batch with the features of `tiny_teacher`."""

    def __init__(self, collator: MaskingCollator) -> None:
        self.collator, self.teacher = collator, tiny_teacher()

    def __call__(self, features: Any) -> dict[str, Any]:
        batch = self.collator(features)
        seen = self.teacher(batch["pixel_values"])
        return batch | {"teacher_features": seen.patches, "teacher_class_token": seen.class_token}


class LabeledByTokenizer:
    """A collator's batch with the `labels` of `tiny_tokenizer`."""

    def __init__(self, collator: MaskingCollator) -> None:
        self.collator = collator
        # Not `tokenizer`: Trainer would save that into every checkpoint, over the model's own weights.
        self.image_tokenizer = tiny_tokenizer()

    def __call__(self, features: Any) -> dict[str, Any]:
        batch = self.collator(features)
        return batch | {"labels": self.image_tokenizer.get_codebook_indices(batch["pixel_values"]).flatten(1)}


def tiny_collator(variant: str = "mae", with_image_index: bool = False) -> Any:
    """Masks of the 16 squares of PATCH x PATCH pixels: 12 of them, or 8 to 14 where the numbers may differ.

    With labels, or features of a teacher, where the method needs them.
    """
    needs_equal, config = model_class(variant).needs_equal_num_masked, tiny_config(variant)
    patch_size = TINY_MODELS[variant]["encoder_config"]["patch_size"]
    collator = MaskingCollator(
        patch_grid(SIZE, patch_size),
        0.75 if needs_equal else (0.5, 0.9),
        strategy="random" if patch_size == PATCH else "random-unit",
        mask_unit=PATCH // patch_size,
        equal_num_masked=needs_equal,
        num_masks=config.views[0].num_crops,
        mask_probability=config.mask_probability,
        spreads_ratios=config.spreads_mask_ratios,
        with_noise=config.chooses_masks,
        with_image_index=with_image_index,
    )
    if model_class(variant).targets == "tokenizer":
        return LabeledByTokenizer(collator)
    return SeenByTeacher(collator) if "feature_size" in TINY_MODELS[variant] else collator


def tiny_batch(variant: str = "mae", num_images: int = 8) -> dict[str, Any]:
    images = tiny_images(variant=variant)
    return tiny_collator(variant)([images[index] for index in range(num_images)])


def write_card(folder: Path, **changes) -> None:
    facts = {"recipe": {"a": 1}, "data_summary": {}, "metrics": {}, "versions": {}, "panel": None, "curve": None}
    write_model_card(folder, command="python run.py", method="mae", model_name="tiny", **{**facts, **changes})


def tiny_arguments(output_dir: Path, **changes: Any) -> TrainingArguments:
    """Eight steps on the CPU, as the run script would set them up."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        "learning_rate": 1e-3,
        "weight_decay": 0.05,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_drop_last": True,
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(output_dir), **{**settings, **changes})


class Interrupted(TrainerCallback):
    """In the middle of a step after the last checkpoint; test_trainer kills the whole process instead."""

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


def train_whole_and_resumed(
    make_trainer: Callable[[Path, list[TrainerCallback]], MimTrainer], folder: Path
) -> tuple[MimTrainer, MimTrainer]:
    """Return a trainer that trained at once, and one that went on after another was interrupted."""
    whole = make_trainer(folder / "whole", [])
    whole.train()
    end_data_workers()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(folder / "interrupted", [Interrupted()]).train()
    end_data_workers()
    resumed = make_trainer(folder / "interrupted", [])
    resumed.train(resume_from_checkpoint=str(last_whole_checkpoint(folder / "interrupted")[0]))
    end_data_workers()
    return whole, resumed


def end_data_workers() -> None:
    """End the persistent workers of trainers that train no more; a garbage collection would wait 5 s for each."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.terminate()


def pytest_collection_finish() -> None:
    """Exempt what was imported from garbage collection, which training starts often, for up to a second each time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_data_workers() -> Iterator[None]:
    yield
    end_data_workers()


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture
def nan_in_evaluation(monkeypatch) -> None:
    """The loss of a validation batch is NaN, that of a training batch is not."""
    compute_loss = MimTrainer.compute_loss

    def poisoned(trainer: MimTrainer, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = compute_loss(trainer, model, *args, **kwargs)
        return result if model.training else (result[0] * float("nan"), result[1])

    monkeypatch.setattr(MimTrainer, "compute_loss", poisoned)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of our own that this process talks to."""
    from hubstub import HubStub, connect

    with HubStub() as stub:
        connect(monkeypatch, stub, tmp_path)
        yield stub

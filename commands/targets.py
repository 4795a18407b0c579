"""Open the frozen model whose outputs a method predicts, as the command line names it."""

import shlex
from collections.abc import Callable
from typing import Any

from accelerate import PartialState
from transformers import AutoModel

from commands.launch import printer
from commands.pretraining_settings import HOG, PretrainingSettings
from hub.image_stats import processor_image_size, processor_stats
from hub.open_model import open_config, open_model
from modeling import TOKENIZERS, MimPreTrainedModel
from modeling.base import IMAGENET_MEAN, IMAGENET_STD
from modeling.frozen_teacher import FrozenTeacher
from modeling.patches import height_and_width
from training.targets import Targets, TeacherTargets, TokenizerTargets

CHOICES = """{method} needs an image tokenizer, and none is chosen for you. Give --tokenizer one of
  1. your own, trained on your images:
       python run_tokenizer.py {flags}--dataset {dataset} --output_dir tokenizer
       accelerate launch run_pretraining.py --method {method} --tokenizer tokenizer ...
  2. the public DALL-E encoder (8,192 tokens of 8 x 8 pixels), from the Hub or a folder:
       --tokenizer facebook/flava-image-codebook
  3. any model with get_codebook_indices(pixel_values) -> (B, h, w) by folder or Hub id
"""


TEACHERS = """{method} needs a teacher, and none is chosen for you. Give --teacher one of
  1. a trained encoder of images by folder or Hub id: a ViT, DINOv2 or DINOv3, CLIP, BEiT, Swin or a convolutional
     network, such as facebook/dinov2-small, or the output folder of a run
  2. hog: histograms of oriented gradients (MaskFeat), which need no model
"""
TOKENIZER_TEACHERS = """VQ-KD needs a teacher, whose features its codes must rebuild, and none is chosen for you. Give
--teacher a trained encoder of images by folder or Hub id, such as openai/clip-vit-base-patch16 (published),
facebook/dinov2-small, or the output folder of a run
"""
_DEFAULT_IMAGE_SIZE = 224  # of teachers that name none
_LARGEST_STRIDE = 32  # of convolutional networks: pixels for each feature of the last map
# Flags of each kind of `MimPreTrainedModel.targets`.
_FLAGS = {
    "tokenizer": ("tokenizer", "trust_remote_code", "cache_tokens"),
    "teacher": ("teacher", "teacher_image_size", "cache_tokens"),
}


def open_targets(
    settings: PretrainingSettings, model_class: type[MimPreTrainedModel], grid: tuple[int, int]
) -> Targets | None:
    """Return the targets that the method needs, or None; raises ValueError if their source is missing or unfit."""
    for kind, flags in _FLAGS.items():
        for flag in flags if kind != model_class.targets else ():
            if getattr(settings, flag) and flag not in _FLAGS.get(model_class.targets or "", ()):
                raise ValueError(f"--{flag} has no effect with --method {settings.method}; leave it out")
    return None if model_class.targets is None else _OPENERS[model_class.targets](settings, grid)


def _open_tokenizer(settings: PretrainingSettings, grid: tuple[int, int]) -> Targets:
    name = settings.tokenizer
    if not name:
        flags = "".join(
            f"--method {kind} {'--teacher ENCODER ' if getattr(model, 'targets', None) else ''}"
            for kind, model in TOKENIZERS.items()
            if getattr(model, "used_by", None) == settings.method
        )
        raise ValueError(CHOICES.format(dataset=shlex.join(settings.dataset), method=settings.method, flags=flags))
    tokenizer = open_model(name, "tokenizer", trust_remote_code=settings.trust_remote_code).model
    read = getattr(tokenizer.config, "num_channels", getattr(tokenizer.config, "input_channels", None))
    if read not in (None, settings.num_channels):
        raise ValueError(
            f"--tokenizer {name} reads images of {read} channels, but num_channels is {settings.num_channels}: use "
            f"num_channels {read}, or a tokenizer that was trained with num_channels {settings.num_channels}"
        )
    return TokenizerTargets(tokenizer, grid, f"--tokenizer {name}")


def _open_teacher(settings: Any, grid: Any) -> Targets | None:
    """Return the targets of a teacher; None for histograms of gradients, which the model computes itself."""
    name = settings.teacher
    if not name:
        raise ValueError(TEACHERS.format(method=settings.method))
    if name == HOG:
        for flag in ("teacher_image_size", "cache_tokens"):
            if getattr(settings, flag):
                raise ValueError(f"--{flag} has no effect with --teacher {HOG}; leave it out")
        return None
    log = printer(PartialState())
    config = open_config(name, "teacher")
    if (vision := getattr(config, "vision_config", None)) is not None:  # of images and texts, such as CLIP
        model = open_model(name, "teacher", model_class=AutoModel, config=vision).model
    else:
        model = open_model(name, "teacher").model
    stats = processor_stats(name, getattr(model.config, "num_channels", 3))
    if "value_range" in stats:
        raise ValueError(f"--teacher {name} takes measurements, expected an encoder of photographs")
    if not stats:
        stats = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
        log(f"note: --teacher {name} has no preprocessor_config.json with mean and std: ImageNet's are used")
    own_size: Any = processor_image_size(name) or getattr(model.config, "image_size", _DEFAULT_IMAGE_SIZE)
    size = settings.teacher_image_size or height_and_width(own_size)
    teacher = FrozenTeacher(model, **stats, image_size=size, name=f"--teacher {name}")
    if teacher.is_convolutional and settings.teacher_image_size is None:
        # Larger copies of small images cost time only: the features of EfficientNet-Lite0 for images of 64 pixels are
        # worse at 64, and equally good at 96, 128, 160 and 224 (5 nearest neighbors 32, 48, 45, 47 and 48 %, +- 3).
        smaller = [-(-2 * side // _LARGEST_STRIDE) * _LARGEST_STRIDE for side in settings.image_size]
        size = (min(size[0], smaller[0]), min(size[1], smaller[1]))
        teacher = FrozenTeacher(model, **stats, image_size=size, name=f"--teacher {name}")
    (height, width), (rows, columns) = teacher.image_size, teacher.grid
    log(f"teacher: {rows} x {columns} features of {teacher.feature_size:,} numbers for {height} x {width} pixels")
    return TeacherTargets(teacher, settings.image_size, settings.num_channels)


def open_tokenizer_targets(settings: Any, model_class: Any) -> Targets | None:
    """Return the targets of a tokenizer's training, or None; raises ValueError if their source is missing or unfit."""
    if getattr(model_class, "targets", None) is None:
        return None
    if settings.teacher is None:
        raise ValueError(TOKENIZER_TEACHERS)
    if settings.teacher == HOG:
        raise ValueError(f"--teacher is {HOG}, expected an encoder of images. {TOKENIZER_TEACHERS}")
    return _open_teacher(settings, ())


_OPENERS: dict[str, Callable[[PretrainingSettings, tuple[int, int]], Targets | None]] = {
    "tokenizer": _open_tokenizer,
    "teacher": _open_teacher,
}

"""Pre-train an image encoder without labels: `accelerate launch run_pretraining.py --dataset ./photos`.

Settings -> images -> plan -> Trainer -> two artifacts: the root of the output folder is a native encoder that
`AutoModel.from_pretrained` opens, its `pretraining/` the whole model. `--help` lists the flags.
"""

import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from transformers import AutoModelForPreTraining, PreTrainedModel, TrainingArguments, set_seed

from commands.artifacts import Artifacts
from commands.hub_settings import bring_back, build_hub_push, open_repository
from commands.launch import find_hardware, first_on_main, join, printer, run, set_by
from commands.output_folder import BAD_IMAGES_FILE, PANELS, interrupted_run, logging_into, prepare_output_dir
from commands.parsing import build_parser
from commands.plan import Plan, default_output_dir, make_plan
from commands.settings import Settings, load_settings
from data.augmentations import CenterCrop, Transform, TwoViews, random_crop
from data.collators import MaskingCollator
from data.images import PretrainingImages, measure_image_stats
from data.pretraining_splits import PretrainingSplits, open_pretraining_splits
from data.sources import ImageSource
from evaluation.online import OnlineEvaluation, open_online_evaluation
from evaluation.online_history import summary as features_in_words
from evaluation.panels import pixel_panel_drawer, token_panel_drawer
from evaluation.pictures import panel_indices
from hub.export.native import PRETRAINING, native_root_problem
from hub.init_from import StartingModel, open_starting_model
from hub.init_weights import read_weights
from modeling import CONFIGS, MODELS, MimConfig, MimPreTrainedModel
from modeling.patches import patch_grid
from training.callbacks import show_panels, show_progress
from training.online_evaluation import EvaluateOnline
from training.targets import CHOICES as TOKENIZER_CHOICES
from training.targets import TokenizerLabels, load_tokenizer, tokenizer_view
from training.token_cache import cached_tokens
from training.trainer import MimTrainer

WRITTEN_LAST = f"{PRETRAINING}/config.json"  # of a finished run
QUICKSTART = "accelerate launch run_pretraining.py --config recipes/quickstart.yaml"


def main(argv: list[str]) -> None:
    settings = load_settings(argv, CONFIGS, starting_point)
    state, log = join(settings["use_cpu"])
    repository = open_repository(settings)
    tokenizer = open_tokenizer(settings)
    flags = {name: settings[name] for name in ("validation_fraction", "max_bad_fraction", "seed")}
    parts = first_on_main(state, lambda: open_pretraining_splits(settings["dataset"], **flags))
    config = model_config(settings, parts, tokenizer)
    collator = build_collator(settings, config)
    blank = without_weights(config)
    numbers = (len(parts.train), len(parts.validation), blank.num_parameters())
    plan = make_plan(settings, find_hardware(state), *numbers, f"{parts.source.describe()}: {parts.summary}")
    output_dir = plan.output_dir
    log(f"settings\n{settings.describe()}\n\n{plan.describe()}")
    for name, reason in parts.bad[:10]:
        log(f"note: left out {name}: {reason}")
    if problem := native_root_problem(blank):
        log(f"note: only {PRETRAINING}/ will be written, and no encoder for AutoModel: {problem}")
    weights = initial_weights(settings, blank, log)
    online_evaluation = open_evaluation(settings, state)
    if settings["dry_run"]:
        return

    def prepare() -> Path | None:
        if repository is not None:
            bring_back(repository, settings, output_dir, WRITTEN_LAST, log)
        return prepare_output_dir(output_dir, settings, parts.bad, log, WRITTEN_LAST)

    checkpoint = first_on_main(state, prepare)
    with logging_into(output_dir):
        trainer = build_trainer(settings, plan, config, collator, parts, tokenizer)
    trainer.model.load_state_dict(weights, strict=False)
    artifacts, hub_push = Artifacts(trainer, settings, parts, argv), None
    if repository is not None:
        hub_push = build_hub_push(repository, artifacts, settings, log)
        trainer.add_callback(hub_push)
    if online_evaluation is not None:
        log(f"features watched: {online_evaluation.describe()}")
        every = int(plan.training_arguments()["eval_steps"])
        trainer.add_callback(EvaluateOnline(trainer, every, online_evaluation, features_in_words))
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    artifacts.finish()
    log(
        f"{output_dir}: {'' if problem else 'encoder for AutoModel.from_pretrained, '}whole model in {PRETRAINING}/, "
        f"pictures in {PANELS}/, card in README.md"
    )
    if hasattr(trainer, "end"):  # absent in transformers 5.17
        trainer.end()
    if hub_push is not None and state.is_main_process:
        hub_push.finish()


# ---- what it begins from ----


def starting_point(chosen: Mapping[str, Any]) -> StartingModel:
    """What `--init_from` names; an interrupted run's own checkpoint tells as much, and the rest may be gone by now."""
    checkpoint = interrupted_run(Path(chosen.get("output_dir") or default_output_dir(chosen)), chosen)
    name = str(checkpoint or chosen["init_from"])
    return open_starting_model(name, chosen["method"], sizes_only=checkpoint is not None)


def initial_weights(
    settings: Settings, head: MimPreTrainedModel, log: Callable[[str], None]
) -> Mapping[str, torch.Tensor]:
    """Of the model that the run begins from, by the names of `head`; nothing from scratch or for a continued run.

    Raises:
        ValueError: they cannot be read, or would not do.
    """
    start = settings.start
    if not isinstance(start, StartingModel) or start.sizes_only:
        return {}
    weights = read_weights(start, head, settings["repair_positions"])
    for note in weights.notes:
        log(f"note: {note}")
    return weights.state


# ---- images ----


def open_evaluation(settings: Settings, state: PartialState) -> OnlineEvaluation | None:
    """What `--eval_dataset` names, in the first process, which does the looking; a mistake is told to all."""
    opened: list[OnlineEvaluation] = []
    if (dataset := settings["eval_dataset"]) is not None:
        wanted = (settings.image_size, settings["num_channels"], settings["seed"], settings["eval_label_column"])
        with set_by(label_column="eval_label_column"):
            first_on_main(state, lambda: opened.append(open_online_evaluation(dataset, *wanted)))
    return opened[0] if opened else None


@dataclass
class Tokenizer:
    """An image tokenizer with the view that it wants: one token per patch."""

    model: PreTrainedModel
    view_size: tuple[int, int]
    vocab_size: int


def open_tokenizer(settings: Settings) -> Tokenizer | None:
    """What `--tokenizer` names, checked against the patches; never a substitute.

    Raises:
        ValueError: the method needs one and none is given, or the other way round, or it does not fit.
    """
    name, needed = settings["tokenizer"], MODELS[settings["method"]].needs_tokenizer
    if not needed:
        for flag in ("tokenizer", "cache_tokens"):
            if settings[flag]:
                raise ValueError(f"--{flag} has no effect with --method {settings['method']}; leave it out")
        return None
    if not name:
        raise ValueError(TOKENIZER_CHOICES.format(dataset=shlex.join(settings["dataset"])))
    model = load_tokenizer(name)
    view_size, vocab_size = tokenizer_view(model, name, patch_grid(settings.image_size, settings["patch_size"]))
    return Tokenizer(model, view_size, vocab_size)


def model_config(settings: Settings, parts: PretrainingSplits, tokenizer: Tokenizer | None = None) -> MimConfig:
    """The method's own config: the encoder's sizes, the head's settings, and how pixels are standardized."""
    stats: dict[str, Any] = {}
    if settings["image_stats"] == "source" and settings.start is not None:
        stats = dict(settings.start.image_stats)
    if settings["image_stats"] == "auto":
        crop = CenterCrop(settings.image_size)
        measured = PretrainingImages(
            parts.source, parts.train, crop, settings["num_channels"], settings["seed"], 1, None, train=False
        )
        stats = dict(zip(("image_mean", "image_std"), measure_image_stats(measured), strict=True))
    if tokenizer is not None:
        if settings.is_given("vocab_size") and settings["vocab_size"] != tokenizer.vocab_size:
            raise ValueError(
                f"--vocab_size {settings['vocab_size']}: the tokenizer has {tokenizer.vocab_size} codes; leave it out"
            )
        stats["vocab_size"] = tokenizer.vocab_size
    return CONFIGS[settings["method"]](
        encoder_config=settings.encoder_settings(), **{**settings.method_settings(), **stats}
    )


def without_weights(config: MimConfig) -> MimPreTrainedModel:
    """The head, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForPreTraining.from_config(config)


# ---- training ----


def build_collator(settings: Settings, config: MimConfig) -> MaskingCollator:
    """Masks for the encoder's patches.

    Raises:
        ValueError: the masks would hide a part of what the encoder merges into one token.
    """
    side = config.prediction_side
    if settings.mask_unit * settings["patch_size"] % side:
        raise ValueError(
            f"--model {settings['model']} makes one token of {side} x {side} pixels, which a mask must hide whole: "
            f"use --mask_strategy random-unit with a --mask_unit of {side} or a multiple"
        )
    return MaskingCollator(
        grid=patch_grid(config.encoder_config.image_size, config.encoder_config.patch_size),
        mask_ratio=settings.mask_ratio,
        strategy=settings["mask_strategy"],
        seed=settings["seed"],
        mask_unit=settings.mask_unit,
        equal_num_masked=MODELS[settings["method"]].needs_equal_num_masked,
        with_image_index=True,
    )


def build_trainer(
    settings: Settings,
    plan: Plan,
    config: MimConfig,
    collator: MaskingCollator,
    parts: PretrainingSplits,
    tokenizer: Tokenizer | None = None,
) -> MimTrainer:
    """Everything of the run as objects: data, masks, head, trainer and what a person sees."""
    output_dir = plan.output_dir
    arguments = TrainingArguments(**plan.training_arguments())
    set_seed(settings["seed"])
    head = AutoModelForPreTraining.from_config(config)
    resampling = Image.Resampling[settings["interpolation"].upper()]
    crop = random_crop(settings.image_size, tuple(settings["crop_scale"]), resampling, settings["color_jitter"])

    def dataset(source: ImageSource, indices: np.ndarray, train: bool) -> PretrainingImages:
        is_fixed = settings["cache_tokens"] or not train
        view = CenterCrop(settings.image_size, resampling) if is_fixed else crop
        transform: Transform = view if tokenizer is None else TwoViews(view, tokenizer.view_size)
        bad_images = output_dir / BAD_IMAGES_FILE
        return PretrainingImages(
            *(
                source,
                indices,
                transform,
                settings["num_channels"],
                settings["seed"],
                plan.images_per_step,
                bad_images,
            ),
            train=train,
        )

    train = dataset(parts.source, parts.train, train=True)
    validation = dataset(parts.validation_source, parts.validation, train=False) if len(parts.validation) else None
    trainer = MimTrainer(
        model=head, args=arguments, train_dataset=train, eval_dataset=validation, data_collator=collator
    )
    trainer.lr_drop_step = plan.lr_drop_step
    trainer.layer_decay = settings["layer_decay"]
    show_progress(trainer, output_dir / BAD_IMAGES_FILE, parts.bad, settings["max_bad_fraction"], QUICKSTART)
    shown = validation if validation is not None else train.at_center()
    batch = collator([shown[index] for index in panel_indices(len(shown))])
    draw = pixel_panel_drawer(settings["method"])
    if tokenizer is not None:
        trainer.make_labels = TokenizerLabels(tokenizer.model, arguments.device)
        if settings["cache_tokens"]:
            keep_tokens(trainer)
        draw = token_panel_drawer(settings["method"], trainer.make_labels, collator.grid)
    if tokenizer is not None and not hasattr(tokenizer.model, "decode"):
        printer(PartialState())("note: this tokenizer has no decoder, so there are no reconstruction panels")
        return trainer
    show_panels(trainer, output_dir / PANELS, batch, draw)
    return trainer


def keep_tokens(trainer: MimTrainer) -> None:
    """The training images' tokens from a file, which the main process makes first; then one view of each is enough."""
    images = trainer.train_dataset
    state, labels = PartialState(), trainer.make_labels
    assert isinstance(labels, TokenizerLabels)
    file = first_on_main(state, lambda: cached_tokens(images, labels, trainer.output_dir, printer(state)))
    images.labels = np.load(file, mmap_mode="r")  # which the workers share
    images.transform = images.transform.crop


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], main, partial(build_parser, CONFIGS)))

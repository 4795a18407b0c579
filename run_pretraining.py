"""Pre-train an image encoder without labels: `accelerate launch run_pretraining.py --dataset ./photos`.

Settings -> images -> plan -> Trainer -> two artifacts: the root of the output folder is a native encoder that
`AutoModel.from_pretrained` opens, its `pretraining/` the whole model. `--help` lists the flags.
"""

import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from transformers import AutoModelForPreTraining, TrainingArguments, set_seed

from commands.artifacts import Artifacts
from commands.hub_settings import bring_back, build_hub_push, open_repository
from commands.launch import find_hardware, first_on_main, join, printer, run, set_by
from commands.memory import Footprint, measure_footprint
from commands.output_folder import BAD_IMAGES_FILE, PANELS, interrupted_run, logging_into, prepare_output_dir
from commands.parsing import make_parser
from commands.pretraining_plan import PretrainingPlan, make_pretraining_plan
from commands.pretraining_settings import PretrainingSettings, default_output_dir, load_pretraining_settings
from commands.targets import open_targets
from data.augmentations import CenterCrop, OtherSize, Views, build_views, single_view
from data.collators import MaskingCollator
from data.images import ImageDataset, Samples, SamplesWithTargets, Transform, measure_image_stats
from data.splits import PretrainingSplits, open_pretraining_splits
from evaluation.online import OnlineEvaluation, open_online_evaluation
from evaluation.online_history import summarize
from evaluation.panels import panel_drawer
from evaluation.pictures import panel_indices
from hub.export.native import PRETRAINING, native_root_problem
from hub.init_from import StartingModel, open_starting_model
from hub.init_weights import read_weights
from modeling import CONFIGS, MODELS, MimConfig, MimPreTrainedModel
from modeling.patches import patch_grid
from training.callbacks import show_panels, show_progress
from training.online_evaluation import EvaluateOnline
from training.targets import Targets
from training.token_cache import cached_targets
from training.trainer import MimTrainer

WRITTEN_LAST = f"{PRETRAINING}/config.json"  # of a finished run
QUICKSTART = "accelerate launch run_pretraining.py --config recipes/quickstart.yaml"


def main(argv: list[str]) -> None:
    settings = load_pretraining_settings(argv, CONFIGS, starting_point)
    state, log = join(settings.use_cpu)
    repository = open_repository(settings)
    grid = patch_grid(settings.image_size, settings.patch_size)
    targets = open_targets(settings, MODELS[settings.method], grid)
    parts = first_on_main(
        state,
        lambda: open_pretraining_splits(
            settings.dataset,
            validation_fraction=settings.validation_fraction,
            max_bad_fraction=settings.max_bad_fraction,
            seed=settings.seed,
        ),
    )
    config = model_config(settings, parts, targets)
    collator = build_collator(settings, config)
    blank = without_weights(config)
    numbers = (len(parts.train), len(parts.validation), model_footprint(settings, config, collator))
    plan = make_pretraining_plan(settings, find_hardware(state), *numbers, parts.describe())
    output_dir = plan.output_dir
    log(f"settings\n{settings.describe()}\n\n{plan.describe()}")
    if parts.bad:
        log(f"note: {len(parts.bad)} unreadable images are left out:\n  " + parts.bad.describe("\n  "))
    if problem := native_root_problem(blank):
        log(f"note: only {PRETRAINING}/ will be written, and no encoder for AutoModel: {problem}")
    weights = initial_weights(settings, blank, log)
    online_evaluation = open_evaluation(settings, state)
    if settings.dry_run:
        return

    def prepare() -> Path | None:
        if repository is not None:
            bring_back(repository, settings, output_dir, WRITTEN_LAST, log)
        return prepare_output_dir(output_dir, settings, parts.bad, log, WRITTEN_LAST)

    checkpoint = first_on_main(state, prepare)
    with logging_into(output_dir):
        trainer = build_trainer(settings, plan, config, collator, parts, targets)
    trainer.model.load_state_dict(weights, strict=False)
    if weights and all(name.startswith("encoder.") for name in weights):
        model: Any = trainer.model
        model.after_loading_encoder()
    artifacts, hub_push = Artifacts(trainer, settings, parts, argv), None
    if repository is not None:
        hub_push = build_hub_push(repository, artifacts, settings, log)
        trainer.add_callback(hub_push)
    if online_evaluation is not None:
        log(f"online evaluation: {online_evaluation.describe()}")
        every = int(plan.training_arguments()["eval_steps"])
        trainer.add_callback(EvaluateOnline(trainer, every, online_evaluation, summarize))
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
    names = (chosen["model"], chosen["method"], chosen["dataset"])
    checkpoint = interrupted_run(Path(chosen.get("output_dir") or default_output_dir(*names)), chosen)
    name = str(checkpoint or chosen["init_from"])
    return open_starting_model(name, chosen["method"], sizes_only=checkpoint is not None)


def initial_weights(
    settings: PretrainingSettings, head: MimPreTrainedModel, log: Callable[[str], None]
) -> Mapping[str, torch.Tensor]:
    """Of the model that the run begins from, by the names of `head`; nothing from scratch or for a continued run.

    Raises:
        ValueError: they cannot be read, or would not do.
    """
    start = settings.start
    if not isinstance(start, StartingModel) or start.sizes_only:
        return {}
    weights = read_weights(start, head, settings.repair_positions)
    for note in weights.notes:
        log(f"note: {note}")
    return weights.state


# ---- images ----


def open_evaluation(settings: PretrainingSettings, state: PartialState) -> OnlineEvaluation | None:
    """What `--eval_dataset` names, in the first process, which does the looking; a mistake is told to all."""
    opened: list[OnlineEvaluation] = []
    if (dataset := settings.eval_dataset) is not None:
        wanted = (settings.image_size, settings.num_channels, settings.seed, settings.eval_label_column)
        with set_by(label_column="eval_label_column"):
            first_on_main(state, lambda: opened.append(open_online_evaluation(dataset, *wanted)))
    return opened[0] if opened else None


def model_config(settings: PretrainingSettings, parts: PretrainingSplits, targets: Targets | None = None) -> MimConfig:
    """Return the method's config: the encoder's sizes, the method's settings, and how pixels are standardized."""
    derived: dict[str, Any] = dict(targets.config_settings) if targets is not None else {}
    for name, value in derived.items():
        if settings.is_given(name) and settings.values[name] != value:
            raise ValueError(f"--{name} {settings.values[name]}: the source of the targets has {value}; leave it out")
    if settings.image_stats == "source" and settings.start is not None:
        derived |= settings.start.image_stats
    if settings.image_stats == "auto":
        transform = single_view(CenterCrop(settings.image_size), settings.num_channels)
        images = ImageDataset(parts.train, transform, seed=settings.seed)
        derived |= zip(("image_mean", "image_std"), measure_image_stats(images), strict=True)
    return CONFIGS[settings.method](
        encoder_config=settings.encoder_settings(), **{**settings.method_settings, **derived}
    )


def without_weights(config: MimConfig) -> MimPreTrainedModel:
    """Return the model on the meta device."""
    with torch.device("meta"):
        return AutoModelForPreTraining.from_config(config)


def model_footprint(settings: PretrainingSettings, config: MimConfig, collator: MaskingCollator) -> Footprint:
    """Return the memory that the model needs; computes nothing."""
    model = without_weights(config).train()
    item = {
        view.name: torch.zeros(
            *(() if view.num_crops is None else (view.num_crops,)),
            config.encoder_config.num_channels,
            *(view.image_size or settings.image_size),
            dtype=torch.uint8,
        )
        for view in config.views
    }
    batch = collator([{**item, "epoch": 0, "step": 0, "image_index": 0}])
    batch.pop("image_index")
    batch = {key: value.to("meta") if torch.is_tensor(value) else value for key, value in batch.items()}
    return measure_footprint(model, {**batch, "return_loss": model.targets is None})


# ---- training ----


def build_collator(settings: PretrainingSettings, config: MimConfig) -> MaskingCollator:
    """Return the collator that draws masks for the encoder's patches.

    Raises:
        ValueError: If masks could cover a part of what the encoder merges into one token.
    """
    side = config.prediction_side
    if settings.mask_unit * settings.patch_size % side:
        raise ValueError(
            f"--model {settings.model} makes one token of {side} x {side} pixels, which must be masked as a whole: "
            f"use --mask_strategy random-unit with a --mask_unit of {side} or a multiple"
        )
    return MaskingCollator(
        grid=patch_grid(config.encoder_config.image_size, config.encoder_config.patch_size),
        mask_ratio=settings.mask_ratio,
        strategy=settings.mask_strategy,
        seed=settings.seed,
        mask_unit=settings.mask_unit,
        equal_num_masked=MODELS[settings.method].needs_equal_num_masked,
        num_masks=config.views[0].num_crops,
        with_image_index=True,
    )


def build_trainer(
    settings: PretrainingSettings,
    plan: PretrainingPlan,
    config: MimConfig,
    collator: MaskingCollator,
    parts: PretrainingSplits,
    targets: Targets | None = None,
) -> MimTrainer:
    """Create the data sets, the model, the trainer and its callbacks."""
    output_dir = plan.output_dir
    arguments = TrainingArguments(**plan.training_arguments())
    if targets is not None:
        targets = targets.to(arguments.device)
    set_seed(settings.seed)
    model = AutoModelForPreTraining.from_config(config)

    def dataset(samples: Samples, transform: Transform, train: bool = False) -> ImageDataset:
        return ImageDataset(
            samples,
            transform,
            seed=settings.seed,
            train=train,
            images_per_step=plan.images_per_step,
            bad_images_file=output_dir / BAD_IMAGES_FILE,
        )

    samples: Samples = parts.train
    fixed = transform_of(settings, config, targets, train=False)
    train_transform = fixed if settings.cache_tokens else transform_of(settings, config, targets, train=True)
    central = dataset(samples, fixed)
    if targets is not None and settings.cache_tokens:
        state = PartialState()
        file = first_on_main(state, lambda: cached_targets(central, targets, output_dir, printer(state)))
        samples = SamplesWithTargets(samples, targets.output, np.load(file, mmap_mode="r"))  # shared by the workers
        train_transform = transform_of(settings, config, None, train=False)
    validation = dataset(parts.validation, fixed) if len(parts.validation) else None
    trainer = MimTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset(samples, train_transform, train=True),
        eval_dataset=validation,
        data_collator=collator,
        targets=targets,
        lr_drop_step=plan.lr_drop_step,
        layer_decay=settings.layer_decay,
    )
    show_progress(trainer, output_dir / BAD_IMAGES_FILE, parts.bad, settings.max_bad_fraction, QUICKSTART)
    if problem := model.panel_problem(targets):
        printer(PartialState())(f"note: there are no reconstruction panels: {problem}")
        return trainer
    shown = central if validation is None else validation
    batch = collator([shown[index] for index in panel_indices(len(shown))])
    draw = panel_drawer(settings.method, lambda model, batch: model.panel(batch, targets))
    show_panels(trainer, output_dir / PANELS, batch, draw)
    return trainer


def transform_of(settings: PretrainingSettings, config: MimConfig, targets: Targets | None, train: bool) -> Views:
    """Return the transform to the method's views, and to the one that the targets need."""
    other_size = None if targets is None or targets.view is None else OtherSize(*targets.view)
    return build_views(
        config.views,
        image_size=settings.image_size,
        crop_scale=settings.crop_scale,
        num_channels=settings.num_channels,
        train=train,
        interpolation=Image.Resampling[settings.interpolation.upper()],
        color_jitter=settings.color_jitter,
        other_size=other_size,
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], main, partial(make_parser, PretrainingSettings, CONFIGS)))

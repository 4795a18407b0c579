"""Pre-train an image encoder without labels: `accelerate launch run_pretraining.py --dataset ./photos`.

Settings -> images -> plan -> Trainer -> two artifacts: the root of the output folder is a native encoder that
`AutoModel.from_pretrained` opens, its `pretraining/` the whole model. `--help` lists the flags.
"""

import commands  # noqa: F401  # isort: skip  (before torch: it chooses how threads wait)

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForPreTraining, TrainerCallback, TrainingArguments, set_seed

from commands.advice import advise, check_advisable
from commands.anchor import keep_anchor, open_anchor
from commands.artifacts import Artifacts
from commands.batch_size import TrialStep, seconds_per_step, with_batch_size
from commands.cache import describe_cache, with_cache
from commands.channels import describe_values, shown_channels
from commands.encoder_choice import choose_encoder, shortest_side
from commands.job import open_images, train
from commands.launch import find_hardware, first_on_main, join, printer, run, set_by
from commands.output_folder import (
    BAD_IMAGES_FILE,
    PANELS,
    STREAM,
    interrupted_run,
    refuse_finished,
    settings_of_interrupted_run,
)
from commands.parsing import make_parser
from commands.pretraining_batches import build_collator, transform_of
from commands.pretraining_model import (
    black_images,
    model_config,
    model_footprint,
    settings_for_images,
    without_weights,
)
from commands.pretraining_plan import PretrainingPlan
from commands.pretraining_settings import PretrainingSettings, load_pretraining_settings
from commands.small_data import (
    config_rules,
    keep_schedule,
    with_batch_rule,
    with_schedule_rules,
    with_validation_rule,
)
from commands.targets import open_targets
from commands.texts import TextSplits, open_text_splits
from commands.time_budget import fit_to_budget
from data.collators import MaskingCollator
from data.images import ImageDataset, Samples, SamplesWithTargets
from data.size_schedule import ScheduledTransform, Transform, as_data_steps
from data.splits import PretrainingSplits
from data.streams import Origin, StreamDataset
from data.text_batches import MixedCollator, MixedDataset
from evaluation.online import FeatureSpread, OnlineEvaluation, open_feature_spread, open_online_evaluation
from evaluation.online_history import summarize, summarize_spread
from evaluation.pictures import panel_drawer, panel_indices
from hub.export.native import PRETRAINING, native_root_problem
from hub.init_from import StartingModel, open_starting_model
from hub.init_weights import Weights, read_weights
from modeling import CONFIGS, MODELS, MimConfig
from modeling.patches import patch_grid
from training.callbacks import show_panels, show_progress
from training.collapse import WatchForCollapse
from training.online_evaluation import EvaluateOnline
from training.targets import AnchorTargets, Targets
from training.token_cache import cached_targets
from training.trainer import MimTrainer

WRITTEN_LAST = f"{PRETRAINING}/config.json"  # of a finished run
QUICKSTART = "accelerate launch run_pretraining.py --config recipes/quickstart.yaml"


def main(argv: list[str]) -> None:
    settings = load_pretraining_settings(argv, CONFIGS, starting_point)
    state, _ = join(settings.use_cpu)
    if settings.advise:
        check_advisable(settings)
        printer(state)(advice_for(settings, state))
        return
    first_on_main(state, partial(refuse_finished, settings, WRITTEN_LAST))
    settings = keep_schedule(settings)
    targets = open_targets(settings, MODELS[settings.method], settings.grid)
    splits, texts = open_images(settings, state), open_text_splits(settings, state)
    encoder_notes: list[str] = []
    if settings.fits_encoder:
        settings, encoder_notes = with_fitting_encoder(settings, splits, argv, state)
    grid = patch_grid(settings.image_size, settings.patch_size)
    config = model_config(settings, splits, targets, texts)
    targets = targets or open_anchor(settings, config)
    collator = build_collator(settings, config, texts)
    footprint = model_footprint(settings, config, collator)
    hardware = find_hardware(state)
    splits, validation_notes = with_validation_rule(settings, hardware, splits)
    num_images = (None if splits.stream is not None else len(splits.train), len(splits.validation))
    trial = TrialStep(
        partial(AutoModelForPreTraining.from_config, config),
        lambda size: black_images(settings, config, collator, size, targets),
        targets,
    )
    sizes = (hardware, splits.num_train_images, footprint.flops_per_image)
    settings, batch_notes = with_batch_rule(settings, *sizes)
    settings, size_notes = with_batch_size(settings, hardware, splits.num_train_images, footprint, trial)
    notes = [*splits.summary.notes, *encoder_notes, *validation_notes, *batch_notes, *size_notes]

    def make_plan(settings: PretrainingSettings) -> PretrainingPlan:
        return PretrainingPlan.make(settings, hardware, num_images, footprint, splits.describe(), grid, notes)

    settings, rules = with_schedule_rules(settings, *sizes, make_plan(settings).images_per_step)
    notes += rules

    blank = without_weights(config)
    weights, start = Weights({}, []), settings.start
    if start is not None and not start.sizes_only:
        weights = read_weights(start, blank, settings.repair_positions, settings.channel_init)
    evaluation = open_evaluation(settings, splits, state)
    callbacks: list[Callable[[MimTrainer], TrainerCallback]] = []
    if evaluation is not None:
        describe: Callable[..., str] = summarize_spread
        if settings.eval_dataset is not None:
            describe = partial(summarize, start=None if settings.init_from is None else "the initial weights")
        callbacks.append(
            lambda trainer: EvaluateOnline(trainer, int(trainer.args.eval_steps or 1), evaluation, describe)
        )
    if blank.can_collapse:
        callbacks.append(lambda trainer: WatchForCollapse(trainer, settings.stop_on_collapse))
    views = transform_of(settings, config, targets, train=True)

    def build(settings: PretrainingSettings, plan: PretrainingPlan) -> MimTrainer:
        cached = with_cache(settings, views, splits)
        return build_trainer(settings, plan, config, collator, cached, targets, weights.state, texts)

    tried = replace(settings, dry_run=True)
    fitted = fit_to_budget(settings, make_plan, partial(build, tried), callbacks)
    settings, notes = fitted.settings, [*notes, *fitted.notes]
    plan = make_plan(settings)
    lines = [f"note: {note}" for note in weights.notes]
    lines += describe_cache(settings, views)
    if (measured := splits.train.source.measured) is not None:
        lines.append(f"values: {describe_values(settings, measured.dtype, config.value_range or ())}")
        if settings.color_jitter or any(view.photometric for view in config.views):
            lines.append("note: crops are flipped, but keep their colors: changes of colors are for photographs")
    elif splits.summary.num_sixteen_bit:
        lines.append("note: --value_range percentile keeps all 16 bits of the images")
    lines += texts.lines if texts is not None else ()
    chosen = settings_for_images(settings, splits.num_train_images)
    lines += [f"{name}: {value:,}, chosen for the number of images" for name, value in chosen.items()]
    by_rule = config_rules(settings, splits.num_train_images)
    lines += [f"{name}: {value}, chosen for {reason}" for name, (value, reason) in by_rule.items()]
    if blank.compares_images and plan.accumulation > 1:
        lines.append(
            f"note: {settings.method} compares the images of a batch with each other: those of {plan.batch_size} at a "
            f"time, not of all {plan.images_per_step:,} of a step"
        )
    schedules = blank.schedules(plan.num_steps, plan.steps_per_epoch)
    lines += [f"{name.replace('_', ' ')}: {schedule.describe()}" for name, schedule in schedules.items()]
    if problem := native_root_problem(blank):
        lines.insert(0, f"note: only {PRETRAINING}/ will be written, and no encoder for AutoModel: {problem}")
    if evaluation is not None:
        lines.append(f"online evaluation: {evaluation.describe()}")
    artifacts = Artifacts(settings, splits, argv, texts.tokens.tokenizer if texts is not None else None)
    train(
        plan,
        splits.bad,
        WRITTEN_LAST,
        build_trainer=lambda plan, _: build(settings, plan),
        finish=artifacts.finish,
        shorter=QUICKSTART,
        lines=lines,
        stage=artifacts.stage,
        callbacks=[*fitted.callbacks, *callbacks],
    )


def starting_point(chosen: PretrainingSettings) -> StartingModel:
    """Open what --init_from names, or the checkpoint of an interrupted run, which has the same sizes."""
    checkpoint = interrupted_run(chosen)
    name = str(checkpoint or chosen.init_from)
    return open_starting_model(name, chosen.method, sizes_only=checkpoint is not None)


def advice_for(settings: PretrainingSettings, state: PartialState) -> str:
    """Return what is worth running on these images; models are timed on the device."""
    splits, hardware = open_images(settings, state), find_hardware(state)

    def measure(sizes: dict[str, Any]) -> float:
        one = load_pretraining_settings(["--num_channels", str(settings.num_channels)], CONFIGS, fitting=sizes)
        return images_per_second(one, splits, state)

    side = shortest_side(settings, splits.summary)
    return advise(settings, splits.describe(), len(splits.train), side, hardware, measure)


def with_fitting_encoder(
    settings: PretrainingSettings, splits: PretrainingSplits, argv: Sequence[str], state: PartialState
) -> tuple[PretrainingSettings, list[str]]:
    """Choose the encoder by --time_budget, with a note; a run that is continued keeps its own."""
    saved = first_on_main(state, lambda: settings_of_interrupted_run(settings))
    if "model" in saved:
        kept = {name: saved[name] for name in ("model", "image_size", "patch_size")}
        return load_pretraining_settings(argv, CONFIGS, fitting=kept), []

    def measure(sizes: dict[str, Any]) -> float:
        return images_per_second(load_pretraining_settings(argv, CONFIGS, fitting=sizes), splits, state)

    side, is_cpu = shortest_side(settings, splits.summary), state.device.type == "cpu"
    wanted = settings.image_size if settings.is_users("image_size") else None
    choice = choose_encoder(len(splits.train), side, settings.seconds or 0.0, is_cpu, measure, wanted)
    choice = first_on_main(state, lambda: choice)  # each process has measured another speed
    note = (
        f"{choice.sizes['model']}, chosen by --time_budget {settings.time_budget}: it sees about "
        f"{choice.num_seen:,.0f} images in this time ({choice.images_per_second:,.3g} images/s); --model, "
        "--image_size and --patch_size choose others"
    )
    return load_pretraining_settings(argv, CONFIGS, fitting=choice.sizes), [note]


def images_per_second(settings: PretrainingSettings, splits: PretrainingSplits, state: PartialState) -> float:
    """Measure training steps on images that are there already; 0 if they do not fit into memory."""
    hardware = find_hardware(state)
    size = 16 if hardware.is_cpu else 64
    config = model_config(settings, splits)
    collator = build_collator(settings, config)
    trial = TrialStep(
        partial(AutoModelForPreTraining.from_config, config),
        lambda size: black_images(settings, config, collator, size),
    )
    return size * hardware.world_size / seconds_per_step(trial, settings, hardware, state.device, size)


# ---- images ----


def open_evaluation(
    settings: PretrainingSettings, splits: PretrainingSplits, state: PartialState
) -> OnlineEvaluation | FeatureSpread | None:
    """Open what --eval_dataset names on the main process, which evaluates; errors are raised on all processes.

    Without it, features that can collapse are measured on validation images.
    """
    opened: list[OnlineEvaluation | FeatureSpread] = []
    wanted = (settings.image_size, settings.num_channels)
    if (dataset := settings.eval_dataset) is not None:
        own = (settings.seed, settings.eval_label_column)
        with set_by(label_column="eval_label_column"):
            measured = settings.measured and replace(settings.measured, tile=None)
            first_on_main(state, lambda: opened.append(open_online_evaluation(dataset, *wanted, *own, measured)))
    elif MODELS[settings.method].can_collapse and len(splits.validation) and settings.eval_strategy != "no":
        first_on_main(state, lambda: opened.append(open_feature_spread(splits.validation, *wanted)))
    return opened[0] if opened else None


# ---- training ----


def build_trainer(
    settings: PretrainingSettings,
    plan: PretrainingPlan,
    config: MimConfig,
    collator: MaskingCollator | MixedCollator,
    splits: PretrainingSplits,
    targets: Targets | None,
    weights: Mapping[str, torch.Tensor],
    texts: TextSplits | None = None,
) -> MimTrainer:
    """Create the data sets, the model, the trainer and its callbacks."""
    output_dir = plan.output_dir
    arguments = TrainingArguments(**plan.training_arguments())
    if targets is not None:
        targets = targets.to(arguments.device)
    set_seed(settings.seed)
    model: Any = AutoModelForPreTraining.from_config(config)
    if weights:
        model.load_state_dict(weights, strict=False)
        if all(name.startswith("encoder.") for name in weights):  # else a teacher is among them
            model.after_loading_encoder()

    def dataset(samples: Samples, transform: Transform | ScheduledTransform, train: bool = False) -> ImageDataset:
        return ImageDataset(
            samples,
            transform,
            seed=settings.seed,
            train=train,
            images_per_step=plan.images_per_step,
            crops_per_image=settings.repeated_aug,
            bad_images_file=output_dir / BAD_IMAGES_FILE,
        )

    def mixed(images: ImageDataset, train: bool) -> ImageDataset | MixedDataset:
        """Return the images with texts and pairs of the same split, if there are any."""
        if texts is None:
            return images
        transform = transform_of(settings, config, targets, train=train)
        return texts.mixed_with(images, lambda samples: dataset(samples, transform, train), settings.seed, train)

    if texts is not None and PartialState().is_main_process:
        texts.save_tokenizer(output_dir)
    samples: Samples = splits.train
    fixed = transform_of(settings, config, targets, train=False)
    train_transform: Transform | ScheduledTransform
    train_transform = fixed if settings.cache_tokens else transform_of(settings, config, targets, train=True)
    if sides := settings.image_size_schedule:
        transforms = [transform_of(settings, config, targets, train=True, image_size=(side, side)) for side in sides]
        data_steps_per_epoch = -(-len(samples) * settings.repeated_aug // plan.images_per_step)
        first_steps = as_data_steps(plan.first_steps, plan.steps_per_epoch, data_steps_per_epoch)
        train_transform = ScheduledTransform(tuple(transforms), first_steps)
    central = dataset(samples, fixed)
    if isinstance(targets, AnchorTargets) and not settings.dry_run:
        keep_anchor(targets, output_dir)
    if targets is not None and settings.cache_tokens and not settings.dry_run:
        state = PartialState()
        files = first_on_main(state, lambda: cached_targets(central, targets, output_dir, printer(state)))
        samples = SamplesWithTargets(samples, files)
        train_transform = transform_of(settings, config, None, train=False)
    validation = dataset(splits.validation, fixed) if len(splits.validation) else None
    train_dataset: Any
    if splits.stream is None:
        train_dataset = mixed(dataset(samples, train_transform, train=True), train=True)
    else:
        division = (arguments.world_size, plan.num_workers, plan.batch_size)
        train_dataset = StreamDataset(
            splits.stream,
            transform_of(settings, config, targets, train=True),
            seed=settings.seed,
            images_per_step=plan.images_per_step,
            origin=Origin(0, 0, *division),
            folder=output_dir / STREAM,
            bad_images_file=output_dir / BAD_IMAGES_FILE,
        )
    trainer = MimTrainer(
        model=model,
        args=arguments,
        train_dataset=train_dataset,
        eval_dataset=validation and mixed(validation, train=False),
        data_collator=collator,
        targets=targets,
        num_head_steps=plan.num_head_steps,
        lr_drop_step=plan.lr_drop_step,
        layer_decay=settings.layer_decay,
        flops_per_image=plan.footprint.flops_per_image,
    )
    show_progress(trainer, output_dir / BAD_IMAGES_FILE, splits.bad, settings.max_bad_fraction)
    if problem := model.panel_problem(targets):
        printer(PartialState())(f"note: there are no reconstruction panels: {problem}")
        return trainer
    shown = central if validation is None else validation
    batch = collator([shown[index] for index in panel_indices(len(shown))])
    draw = panel_drawer(settings.method, lambda model, batch: model.panel(batch, targets), shown_channels(settings))
    show_panels(trainer, output_dir / PANELS, batch, draw)
    return trainer


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], main, partial(make_parser, PretrainingSettings, CONFIGS)))

"""Fine-tune an encoder on labeled images: `accelerate launch run_finetune.py --model out --dataset ./labeled`.

Settings (the encoder's own published recipe) -> labeled images -> classifier -> plan -> Trainer -> a folder that
`pipeline("image-classification", model=folder)` opens, with metrics.json and a card. `--help` lists the flags.
"""

import itertools
import json
import os
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import EarlyStoppingCallback, PreTrainedConfig, PreTrainedModel, TrainingArguments, set_seed

from commands.arithmetic import Hardware
from commands.finetune_plan import FinetunePlan, make_finetune_plan
from commands.finetune_settings import EncoderFacts, FinetuneSettings, load_finetune_settings
from commands.hub_settings import open_repository
from commands.launch import find_hardware, first_on_main, join, launcher, run, set_by, software_and_hardware
from commands.memory import measure_footprint
from commands.output_folder import (
    BAD_IMAGES_FILE,
    CONFUSION_FILE,
    CURVE_FILE,
    METRICS_FILE,
    SUBSET_FILE,
    logging_into,
    prepare_output_dir,
)
from commands.parsing import make_parser
from data.augmentations import single_view
from data.bad_images import BadImages
from data.classification import (
    EvalView,
    eval_view,
    train_view,
)
from data.collators import stack_items
from data.images import ImageDataset, StackedImages
from data.labeled import LabeledSplit, write_subset
from data.randaugment import RandAugment
from data.splits import LabeledSplits, open_labeled_splits
from evaluation.confusion import draw_confusion_matrix
from evaluation.metrics import classification_metrics, confusion_matrix
from evaluation.pictures import training_curve
from evaluation.results import classification_results
from hub.export.native import export_native
from hub.image_stats import image_stats
from hub.model_card import write_model_card
from hub.open_model import open_config, open_model
from hub.redaction import shorten_paths
from modeling import CONFIGS, MimConfig
from modeling.image_classification import (
    POOLINGS,
    add_batch_norm,
    build_classifier,
    check_family,
    native_classifier,
    random_encoder,
)
from modeling.patches import patch_grid
from training.callbacks import show_progress
from training.finetune_trainer import FinetuneTrainer, balanced_weights, freeze
from training.hub_push import HubPush
from training.mixing import Mixing

_WRITTEN_LAST = "config.json"
_SHORTER = "--max_steps with a smaller number, a smaller encoder, or --mode linear"
_MOST_KEPT_BYTES = 2**28  # of decoded images for evaluation; more are decoded anew each time
_UNWRITTEN_LABELS = {"0": "LABEL_0", "1": "LABEL_1"}  # transformers leaves its default out of config.json
_IN_WORDS = {
    "finetune": "fine-tuned",
    "linear": "linear classifier on frozen features",
    "partial": "last blocks tuned",
}


def main(argv: list[str]) -> None:
    settings = load_finetune_settings(argv, lambda name: facts_of(encoder_config(name)))
    state, log = join(settings.use_cpu)
    repository = open_repository(settings)
    config = encoder_config(settings.model)
    stats, notes = image_stats(settings.model)
    parts = first_on_main(state, lambda: find_parts(settings))
    notes += channel_notes(config, parts)
    set_seed(settings.seed)
    classifier = make_classifier(settings, config, parts.images.class_names)
    plan = plan_run(settings, classifier, parts, find_hardware(state), notes)
    output_dir = plan.output_dir
    log(f"settings\n{settings.describe()}\n\n{plan.describe()}")
    if parts.bad:
        log(f"note: {len(parts.bad)} unreadable images are left out:\n  " + parts.bad.describe("\n  "))
    if settings.dry_run:
        return

    def prepare() -> Path | None:
        check = partial(check_classes, class_names=parts.images.class_names)
        return prepare_output_dir(output_dir, settings, parts.bad, log, _WRITTEN_LAST, check)

    checkpoint = first_on_main(state, prepare)
    with logging_into(output_dir):
        trainer = build_trainer(settings, plan, classifier, parts, stats)
    hub_push = None
    if repository is not None:
        hub_push = HubPush(repository, output_dir, lambda folder, name: None, log, at_saves=False)
        trainer.add_callback(hub_push)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    finish(trainer, settings, config, parts, stats, argv, log)
    log(f'{output_dir}: pipeline("image-classification", model="{output_dir}") opens it; card in README.md')
    if hasattr(trainer, "end"):  # absent in transformers 5.17
        trainer.end()
    if hub_push is not None and state.is_main_process:
        hub_push.finish()


# ---- the encoder and what follows from it ----


def encoder_config(name: str) -> PreTrainedConfig:
    config = open_config(name, accepts_whole_model=False)
    check_family(config)
    return config


def facts_of(config: PreTrainedConfig) -> EncoderFacts:
    size, method = config.image_size, getattr(config, "mim_method", "")
    recipe = CONFIGS.get(method, MimConfig).finetune_recipe(config)
    return EncoderFacts(
        recipe.name,
        image_size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        poolings=POOLINGS[config.model_type],
        has_drop_path=config.model_type != "deit",
        largest_with_margin=recipe.largest_cropped_size,
    )


def make_classifier(
    settings: FinetuneSettings, config: PreTrainedConfig, class_names: tuple[str, ...]
) -> PreTrainedModel:
    """With what is to stay as it is frozen."""
    encoder = random_encoder(config) if settings.from_scratch else open_model(settings.model).model
    with set_by(drop_path_rate="drop_path"):
        classifier = build_classifier(
            encoder,
            class_names,
            image_size=settings.image_size,
            pooling=settings.pooling,
            drop_path_rate=settings.drop_path,
        )
    if settings.mode == "linear":
        add_batch_norm(classifier)
    freeze(classifier, settings.mode, settings.num_trained_blocks)
    return classifier


def check_classes(checkpoint: Path, class_names: tuple[str, ...]) -> None:
    """Raises: ValueError if the run that wrote `checkpoint` had other classes."""
    saved = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    names = saved.get("id2label", _UNWRITTEN_LABELS)
    before = tuple(names[str(number)] for number in range(len(names)))
    if before != class_names:
        pairs = itertools.zip_longest(before, class_names, fillvalue="none")
        number, (old, new) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(
            f"{checkpoint.parent} holds an unfinished run with other classes (number {number} was {old!r} and is now "
            f"{new!r}): give it its own data again, add --overwrite, or give another --output_dir"
        )


def channel_notes(config: PreTrainedConfig, parts: LabeledSplits) -> list[str]:
    if config.num_channels == 1:
        return ["the encoder's one channel becomes three: it sees a color image as its gray version, to begin with"]
    if parts.num_gray:
        return [f"{parts.num_gray:,} gray images are shown to the encoder in three equal channels"]
    return []


# ---- images ----


def find_parts(settings: FinetuneSettings) -> LabeledSplits:
    return open_labeled_splits(
        settings.dataset,
        settings.label_column,
        num_per_class=settings.labels_per_class,
        label_fraction=settings.label_fraction,
        validation_fraction=settings.validation_fraction,
        max_bad_fraction=settings.max_bad_fraction,
        seed=settings.seed,
    )


def plan_run(
    settings: FinetuneSettings, classifier: PreTrainedModel, parts: LabeledSplits, hardware: Hardware, notes: list[str]
) -> FinetunePlan:
    size, by_name = settings.image_size, parts.images.splits
    sizes = ", ".join(f"{len(part):,} {name}" for name, part in by_name.items())
    return make_finetune_plan(
        settings,
        hardware,
        num_images=(len(by_name["train"]), len(by_name.get("validation", ()))),
        num_classes=len(parts.images.class_names),
        footprint=measure_footprint(classifier.eval(), {"pixel_values": torch.zeros(1, 3, size, size)}),
        grid=patch_grid(size, classifier.config.patch_size),
        data=f"{by_name['train'].source.describe()}: {sizes}; {parts.summary.describe()}",
        notes=notes,
    )


# ---- training ----


def build_trainer(
    settings: FinetuneSettings,
    plan: FinetunePlan,
    classifier: PreTrainedModel,
    parts: LabeledSplits,
    stats: dict[str, list[float]],
) -> FinetuneTrainer:
    """Everything of the run as objects: views, mixing, trainer and what a person sees."""
    output_dir, images = plan.output_dir, parts.images
    arguments = TrainingArguments(**plan.training_arguments())
    size, magnitude = (settings.image_size,) * 2, settings.rand_augment
    augment = RandAugment(tuple(stats["image_mean"]), magnitude) if magnitude else None
    view = train_view(size, augment, settings.crop_scale, _resampling(settings))
    bad_images = output_dir / BAD_IMAGES_FILE
    num_classes = len(images.class_names)
    trainer = FinetuneTrainer(
        model=classifier,
        args=arguments,
        train_dataset=ImageDataset(
            images.train, single_view(view, 3), seed=settings.seed, train=True, bad_images_file=bad_images
        ),
        eval_dataset=None if images.validation is None else evaluated(images.validation, settings, bad_images),
        data_collator=stack_items,
        compute_metrics=lambda outputs: classification_metrics(outputs.predictions, outputs.label_ids),
        mixing=Mixing(
            num_classes,
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            label_smoothing=settings.label_smoothing_factor,
            erasing_prob=settings.erasing,
            seed=settings.seed,
        ),
        layer_decay=settings.layer_decay,
        ema_decay=settings.ema_decay,
        class_weights=balanced_weights(images.train.labels) if settings.class_weights == "balanced" else None,
        **stats,
    )
    show_progress(trainer, bad_images, parts.bad, settings.max_bad_fraction, _SHORTER)
    if settings.early_stopping_patience:
        trainer.add_callback(EarlyStoppingCallback(settings.early_stopping_patience))
    if parts.has_subset and trainer.is_world_process_zero():
        write_subset(output_dir / SUBSET_FILE, images.train, images.class_names)
    return trainer


def evaluated(part: LabeledSplit, settings: FinetuneSettings, bad_images: Path) -> ImageDataset | StackedImages:
    """A part as the image processor of the result will show it; kept in memory where it is small."""
    transform = single_view(evaluation_view(settings), 3)
    images = ImageDataset(part, transform, seed=settings.seed, bad_images_file=bad_images)
    if len(images) * 3 * settings.image_size**2 > _MOST_KEPT_BYTES:
        return images
    return StackedImages(images, num_threads=min(8, os.cpu_count() or 1))


def evaluation_view(settings: FinetuneSettings) -> EvalView:
    return eval_view((settings.image_size,) * 2, settings.eval_crop_share, _resampling(settings))


def _resampling(settings: FinetuneSettings) -> Image.Resampling:
    return Image.Resampling[settings.interpolation.upper()]


# ---- the end ----


def finish(
    trainer: FinetuneTrainer,
    settings: FinetuneSettings,
    config: PreTrainedConfig,
    parts: LabeledSplits,
    stats: dict[str, list[float]],
    argv: list[str],
    log: Callable[[str], None],
) -> None:
    """Measure the final weights, and write results, pictures, card and classifier."""
    trainer.stop_if_not_finite()
    trainer.save_state()
    output_dir, (name, measured) = trainer.output_dir, parts.measured
    with trainer.averaged():
        if measured is not None:
            outputs = trainer.predict(evaluated(measured, settings, output_dir / BAD_IMAGES_FILE))
            logits, labels = np.asarray(outputs.predictions), np.asarray(outputs.label_ids)
            how = _IN_WORDS[settings.mode] + (", from random weights" if settings.from_scratch else "")
            results = classification_results(logits, labels, how, settings.seed)
            values = "  ".join(f"{entry['metric'].replace('_', ' ')} {entry['value']:.4f}" for entry in results)
            log(f"{name} part, {len(measured):,} images: {values}")
            if trainer.is_world_process_zero():
                write_results(trainer, settings, parts, results, logits, labels)
        if trainer.is_world_process_zero():
            method, own_recipe = getattr(config, "mim_method", None), getattr(config, "mim_recipe", {})
            if settings.from_scratch:
                method, own_recipe = None, {}
            write_card(trainer, settings, method or config.model_type, parts, argv)
            export_native(
                native_classifier(trainer.accelerator.unwrap_model(trainer.model)),
                output_dir,
                method=method,
                recipe=own_recipe,
                **stats,
                resize_to=evaluation_view(settings).resize_to,
                resample=_resampling(settings),
            )
    trainer.accelerator.wait_for_everyone()


def write_results(
    trainer: FinetuneTrainer,
    settings: FinetuneSettings,
    parts: LabeledSplits,
    results: list[dict[str, Any]],
    logits: np.ndarray,
    labels: np.ndarray,
) -> None:
    """metrics.json and the picture of the confusion matrix."""
    name, class_names = parts.measured[0], parts.images.class_names
    chose = trainer.args.load_best_model_at_end
    content = {
        "dataset": shorten_paths(" + ".join(settings.dataset)),
        "part": name,
        "num_labels": len(parts.images.train),
        "seed": settings.seed,
        "weights": f"best {trainer.args.metric_for_best_model} on the validation part" if chose else "last step",
        "results": results,
    }
    (trainer.output_dir / METRICS_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    matrix = confusion_matrix(labels, logits.argmax(axis=1), len(class_names))
    title = f"{name} part, {len(labels):,} images"
    draw_confusion_matrix(matrix, class_names, trainer.output_dir / CONFUSION_FILE, title)


def write_card(
    trainer: FinetuneTrainer, settings: FinetuneSettings, method: str, parts: LabeledSplits, argv: list[str]
) -> None:
    folder, history = trainer.output_dir, trainer.state.log_history
    if any("loss" in entry or "eval_loss" in entry for entry in history):
        training_curve(history, folder / CURVE_FILE)
    write_model_card(
        folder,
        command=shlex.join([*launcher(), "run_finetune.py", *argv]),
        method=method,
        model_name=settings.hub_model_id or folder.name,
        base_model=None if settings.from_scratch else settings.model,
        recipe=settings.as_recipe(),
        data_summary={
            "dataset": parts.images.train.source.describe(),
            **{f"{name} images": len(part) for name, part in parts.images.splits.items()},
            "sizes": parts.summary.describe(),
            "unreadable images left out": len(BadImages.read(folder / BAD_IMAGES_FILE)),
        },
        metrics={},
        versions=software_and_hardware(trainer),
        panel=CONFUSION_FILE if (folder / CONFUSION_FILE).is_file() else None,
        curve=CURVE_FILE if (folder / CURVE_FILE).is_file() else None,
        license=settings.license,
        datasets=settings.dataset,
        classes=parts.images.class_names,
        from_scratch=settings.from_scratch,
    )


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], main, partial(make_parser, FinetuneSettings)))

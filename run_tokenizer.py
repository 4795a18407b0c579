"""Train an image tokenizer on unlabeled images: `accelerate launch run_tokenizer.py --dataset ./photos`.

Settings -> images -> plan -> Trainer -> a folder that `AutoModel.from_pretrained` opens with its own code, and that
`run_pretraining.py --tokenizer` takes. `--help` lists the flags, `--method vqkd --help` those of another tokenizer.
"""

import commands  # noqa: F401  # isort: skip  (before torch: it chooses how threads wait)

import json
import math
import shlex
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from huggingface_hub import ModelCardData
from transformers import PreTrainedConfig, TrainingArguments, set_seed

from commands.artifacts import copy_panel, draw_curve
from commands.batch_size import TrialStep, with_batch_size
from commands.cache import describe_cache, with_cache
from commands.job import open_images, train
from commands.launch import find_hardware, first_on_main, join, run
from commands.memory import measure_footprint
from commands.output_folder import BAD_IMAGES_FILE, PANELS, refuse_finished
from commands.parsing import make_parser
from commands.targets import open_tokenizer_targets
from commands.time_budget import fit_to_budget
from commands.tokenizer_plan import TokenizerPlan
from commands.tokenizer_settings import TokenizerSettings, chosen_settings, load_tokenizer_settings
from data.augmentations import CenterCrop, Crop, CropView, OtherSize, Views, random_crop, single_view
from data.collators import stack_items
from data.images import ImageDataset, Samples
from data.seeds import seeded_generator
from data.splits import PretrainingSplits
from evaluation.pictures import panel_drawer, panel_indices
from hub.export.native import replacing
from hub.markdown import escape
from hub.redaction import shorten_command
from modeling import TOKENIZERS
from modeling.dvae import CodebookUse, map_pixels
from training.callbacks import show_panels, show_progress
from training.codebook_start import NUM_IMAGES, start_from_images
from training.collapse import describe_collapse
from training.evaluation_guard import describe_non_finite
from training.targets import Targets
from training.trainer import MimTrainer

QUICKSTART = "accelerate launch run_tokenizer.py --config recipes/dvae_nano_sample.yaml"
CODEBOOK_FILE = "codebook.json"
# Tokens of validation images on which the use of the codebook is counted; with fewer, rare codes do not occur.
MIN_TOKENS = 50_000
_WRITTEN_LAST = "config.json"
_CARD = """\
---
{metadata}
---

# {title}

An image tokenizer: {description}.
Loading it runs the Python file of this repository; read it first.

```python
from transformers import AutoModel

checkpoint = {name}
tokenizer = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
codes = tokenizer.get_codebook_indices(pixel_values)  # (B, C, H, W) uint8, or floats in [0, 1] -> (B, h, w)
images = tokenizer.decode(codes)  # {decodes}
```

```bash
{command}
```
"""


def main(argv: list[str]) -> None:
    settings = load_tokenizer_settings(argv)
    state, _ = join(settings.use_cpu)
    first_on_main(state, partial(refuse_finished, settings, _WRITTEN_LAST))
    model_class: Any = TOKENIZERS[settings.method]
    targets = open_tokenizer_targets(settings, model_class)
    features = {} if targets is None else {"feature_size": targets.config_settings["feature_size"]}
    config = model_class.config_class(**settings.config_settings(), **features)
    images = open_images(settings, state)
    with torch.device("meta"):
        image = torch.empty(1, config.num_channels, *config.input_size)
        batch = {"pixel_values": image, "return_loss": targets is None}
        footprint = measure_footprint(model_class(config).train(), batch)
    height, width = config.input_size
    grid = (height // config.stride, width // config.stride)  # of codes
    num_images = (len(images.train), len(images.validation))
    hardware = find_hardware(state)
    sizes = {"pixel_values": config.input_size}
    if targets is not None and targets.view is not None:
        sizes[targets.view.name] = targets.view.image_size
    trial = TrialStep(
        partial(model_class, config),
        lambda number: {
            name: torch.zeros(number, config.num_channels, *size, dtype=torch.uint8) for name, size in sizes.items()
        },
        targets,
    )
    settings, size_notes = with_batch_size(settings, hardware, len(images.train), footprint, trial)
    notes = [*images.summary.notes, *size_notes]

    def make_plan(settings: TokenizerSettings) -> TokenizerPlan:
        return TokenizerPlan.make(settings, hardware, num_images, footprint, images.describe(), grid, notes)

    views = views_of(settings, random_crop(settings.image_size, settings.crop_scale), targets)

    def build(plan: TokenizerPlan, checkpoint: Path | None = None) -> MimTrainer:
        cached = with_cache(settings, views, images)
        return build_trainer(settings, plan, model_class, config, cached, targets, checkpoint)

    fitted = fit_to_budget(settings, make_plan, build)
    settings, notes = fitted.settings, [*notes, *fitted.notes]
    train(
        make_plan(settings),
        images.bad,
        _WRITTEN_LAST,
        build_trainer=build,
        finish=partial(finish, settings, images, argv),
        shorter=QUICKSTART,
        lines=describe_cache(settings, views),
        callbacks=fitted.callbacks,
    )


# ---- training ----


def build_trainer(
    settings: TokenizerSettings,
    plan: TokenizerPlan,
    model_class: Any,
    config: PreTrainedConfig,
    images: PretrainingSplits,
    targets: Targets | None,
    checkpoint: Path | None,
) -> MimTrainer:
    """Create the data sets, the tokenizer, the trainer and its callbacks."""
    output_dir = plan.output_dir
    arguments = TrainingArguments(**plan.training_arguments())
    if targets is not None:
        targets = targets.to(arguments.device)
    set_seed(settings.seed)
    tokenizer = model_class(config)
    random = views_of(settings, random_crop(settings.image_size, settings.crop_scale), targets)
    train = image_crops(settings, images.train, random, plan, train=True)
    if checkpoint is None and settings.start_from_images:
        num_images = min(getattr(tokenizer, "num_images_to_start_from", NUM_IMAGES), 4 * len(train))
        generator = seeded_generator(settings.seed, "codebook_start")
        if hasattr(tokenizer, "start_from_images"):
            step = max(1, len(train) // num_images)  # neighbors may be alike
            chosen, size = range(0, step * num_images, step), arguments.per_device_train_batch_size
            parts = (chosen[start : start + size] for start in range(0, num_images, size))
            batches = (send_to_device(stack_items([train[i] for i in part]), arguments.device) for part in parts)
            with_targets = batches if targets is None else map(targets, batches)
            tokenizer.to(arguments.device).start_from_images(with_targets, generator)
        else:
            some = [train[index]["pixel_values"] for index in range(num_images)]
            start_from_images(tokenizer, map_pixels(torch.stack(some)), generator)
    center = views_of(settings, CenterCrop(settings.image_size), targets)
    validation = image_crops(settings, images.validation, center, plan) if len(images.validation) else None
    trainer = MimTrainer(
        model=tokenizer,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=stack_items,
        targets=targets,
        schedules=plan.schedules,
        ema_decay=settings.ema_decay,
        flops_per_image=plan.footprint.flops_per_image,
    )
    show_progress(trainer, output_dir / BAD_IMAGES_FILE, images.bad, settings.max_bad_fraction)
    shown = image_crops(settings, images.train, center, plan) if validation is None else validation
    batch = stack_items([shown[index] for index in panel_indices(len(shown))])
    name = f"{tokenizer.title}, {tokenizer.vocab_size:,} codes"

    def panel(model: Any, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        views: dict[str, torch.Tensor] = model.panel(batch if targets is None else targets(batch))
        return views

    show_panels(trainer, output_dir / PANELS, batch, panel_drawer(name, panel))
    return trainer


def views_of(settings: TokenizerSettings, crop: Crop, targets: Targets | None) -> Views:
    """Return the transform to a crop, and to the view of it that a teacher needs."""
    other_size = None if targets is None or targets.view is None else OtherSize(*targets.view)
    return Views((CropView(crop, other_size=other_size),), settings.num_channels)


def image_crops(
    settings: TokenizerSettings, images: Samples, views: Views, plan: TokenizerPlan, train: bool = False
) -> ImageDataset:
    """Return the data set of views of the images."""
    return ImageDataset(
        images,
        views,
        seed=settings.seed,
        train=train,
        images_per_step=plan.images_per_step,
        bad_images_file=plan.output_dir / BAD_IMAGES_FILE,
    )


# ---- the end ----


def finish(settings: TokenizerSettings, images: PretrainingSplits, argv: list[str], trainer: MimTrainer) -> str:
    """Count the codes in use, and write the averaged tokenizer with its card; returns a description."""
    output_dir = trainer.output_dir
    trainer.evaluate_at_the_end()
    with trainer.averaged(), trainer.whole_model():
        if trainer.is_world_process_zero():
            facts = codebook_facts(trainer, settings, images)
            trainer.save_state()
            draw_curve(trainer, output_dir)
            if facts:
                (output_dir / CODEBOOK_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
            card = tokenizer_card(trainer, settings, facts, argv)
            (output_dir / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
            with replacing(output_dir) as scratch:
                trainer.accelerator.unwrap_model(trainer.model).save_pretrained(scratch)
    trainer.accelerator.wait_for_everyone()
    method = trainer.model.used_by
    return f"image tokenizer; run_pretraining.py --method {method} takes it as --tokenizer {output_dir}"


@torch.no_grad()
def codebook_facts(trainer: MimTrainer, settings: TokenizerSettings, images: PretrainingSplits) -> dict[str, Any]:
    """Log and return the use of the codebook on `MIN_TOKENS` or more tokens of random crops of validation images."""
    if not len(images.validation):
        return {}
    tokenizer: Any = trainer.model.eval()
    crops = ImageDataset(
        images.validation,
        single_view(random_crop(settings.image_size, settings.crop_scale), settings.num_channels),
        seed=settings.seed,
        train=True,
        bad_images_file=trainer.train_dataset.bad_images_file,
    )
    tokens_per_image = math.prod(length // tokenizer.config.stride for length in settings.image_size)
    num_crops = math.ceil(MIN_TOKENS / tokens_per_image)
    histogram = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    batch_size = trainer.args.per_device_eval_batch_size
    for start in range(0, num_crops, batch_size):
        counters = range(start, min(start + batch_size, num_crops))
        pixels = torch.stack([crops[counter]["pixel_values"] for counter in counters])
        codes = tokenizer.get_codebook_indices(pixels.to(trainer.args.device))
        histogram += torch.bincount(codes.flatten(), minlength=tokenizer.vocab_size).cpu()
    use = CodebookUse.of(histogram)
    trainer.log({f"codebook_{name}": value for name, value in asdict(use).items()})
    return {"vocab_size": tokenizer.vocab_size, **asdict(use), "num_crops": num_crops, "num_images": len(crops)}


def tokenizer_card(trainer: MimTrainer, settings: TokenizerSettings, facts: dict[str, Any], argv: list[str]) -> str:
    """Return the README.md of the folder: how to use the tokenizer, how it was trained, what was measured."""
    output_dir = trainer.output_dir
    metadata = ModelCardData(
        library_name="transformers", license=settings.license, tags=["image-tokenizer", settings.method]
    )
    command = shorten_command(shlex.join(["python", "run_tokenizer.py", *argv]))
    title, name = escape(output_dir.name), json.dumps(output_dir.name, ensure_ascii=False)
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    teacher = getattr(settings, "teacher", None)
    description = f"{model.description}, with the teacher {escape(teacher)}" if teacher else model.description
    about = {"description": description, "decodes": model.decodes}
    parts = [_CARD.format(metadata=metadata.to_yaml(), title=title, name=name, command=command, **about)]
    if facts:
        parts.append(
            f"On validation images ({facts['num_tokens']:,} codes: {facts['num_crops']:,} random crops of "
            f"{facts['num_images']:,} images) {facts['num_alive']:,} of {facts['vocab_size']:,} codes occur; the "
            f"perplexity of their frequencies is {facts['perplexity']:.1f}.\n"
        )
    problems = describe_non_finite(trainer.state.log_history), describe_collapse(trainer)
    parts += [f"**Warning: {problem}.**\n" for problem in problems if problem]
    if losses := [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]:
        parts.append(model.loss_in_words.format(f"{losses[-1]:.4g}") + "\n")
    if panel := copy_panel(output_dir, output_dir):
        parts.append(f"![Images and their reconstructions]({panel})\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], main, lambda: make_parser(chosen_settings(sys.argv[1:]))))

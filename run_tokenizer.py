"""Train an image tokenizer, the discrete VAE of DALL-E: `accelerate launch run_tokenizer.py --dataset ./photos`.

Settings -> images -> plan -> Trainer -> a folder that `AutoModel.from_pretrained` opens with its own code, and that
`run_pretraining.py --method beit --tokenizer` takes. `--help` lists the flags.
"""

import json
import math
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from transformers import TrainingArguments, set_seed

from commands.job import Job, train
from commands.launch import find_hardware, first_on_main, join, run
from commands.memory import Footprint, measure_footprint
from commands.output_folder import BAD_IMAGES_FILE, CURVE_FILE, PANEL_FILE, PANELS
from commands.parsing import make_parser
from commands.tokenizer_plan import TokenizerPlan, make_tokenizer_plan
from commands.tokenizer_settings import TokenizerSettings, load_tokenizer_settings
from data.augmentations import CenterCrop, Crop, RandomResizedCrop, random_crop, single_view
from data.collators import stack_items
from data.images import ImageDataset, Samples
from data.seeds import seeded_generator
from data.splits import PretrainingSplits, open_pretraining_splits
from evaluation.pictures import panel_drawer, panel_indices, training_curve
from hub.redaction import shorten_command
from modeling.dvae import CodebookUse, DvaeConfig, DvaeModel, map_pixels
from training.callbacks import show_panels, show_progress
from training.codebook_start import NUM_IMAGES, start_from_images
from training.trainer import MimTrainer

QUICKSTART = "accelerate launch run_tokenizer.py --config recipes/dvae_nano_sample.yaml"
CODEBOOK_FILE = "codebook.json"
# Tokens of validation images on which the use of the codebook is counted; with fewer, rare codes do not occur.
MIN_TOKENS = 50_000
_WRITTEN_LAST = "config.json"


def main(argv: list[str]) -> None:
    settings = load_tokenizer_settings(argv)
    state, _ = join(settings.use_cpu)
    config = DvaeConfig(**settings.config_settings())
    images = first_on_main(
        state,
        lambda: open_pretraining_splits(
            settings.dataset,
            validation_fraction=settings.validation_fraction,
            max_bad_fraction=settings.max_bad_fraction,
            seed=settings.seed,
        ),
    )
    plan = make_tokenizer_plan(
        settings,
        find_hardware(state),
        len(images.train),
        len(images.validation),
        *measure_model(config),
        data=images.describe(),
    )
    train(
        Job(
            plan=plan,
            bad=images.bad,
            written_last=_WRITTEN_LAST,
            build_trainer=partial(build_trainer, settings, plan, config, images),
            finish=partial(finish, settings, images, argv),
        )
    )


def measure_model(config: DvaeConfig) -> tuple[Footprint, tuple[int, int]]:
    """Return the footprint of the tokenizer, and rows and columns of codes; computes nothing."""
    with torch.device("meta"):
        model = DvaeModel(config).train()
        image = torch.empty(1, config.num_channels, *config.input_size)
    height, width = config.input_size
    return measure_footprint(model, {"pixel_values": image}), (height // config.stride, width // config.stride)


# ---- training ----


def build_trainer(
    settings: TokenizerSettings,
    plan: TokenizerPlan,
    config: DvaeConfig,
    images: PretrainingSplits,
    checkpoint: Path | None,
) -> MimTrainer:
    """Create the data sets, the tokenizer, the trainer and its callbacks."""
    output_dir = plan.output_dir
    arguments = TrainingArguments(**plan.training_arguments())
    set_seed(settings.seed)
    tokenizer = DvaeModel(config)
    train = image_crops(settings, images.train, crop_of(settings), plan, train=True)
    if checkpoint is None and settings.start_from_images:
        some = (train[index]["pixel_values"] for index in range(min(NUM_IMAGES, 4 * len(train))))
        generator = seeded_generator(settings.seed, "codebook_start")
        start_from_images(tokenizer, map_pixels(torch.stack(list(some))), generator)
    center = CenterCrop(settings.image_size)
    validation = image_crops(settings, images.validation, center, plan) if len(images.validation) else None
    trainer = MimTrainer(
        model=tokenizer,
        args=arguments,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=stack_items,
        schedules=plan.schedules,
        ema_decay=settings.ema_decay,
    )
    show_progress(trainer, output_dir / BAD_IMAGES_FILE, images.bad, settings.max_bad_fraction, QUICKSTART)
    shown = image_crops(settings, images.train, center, plan) if validation is None else validation
    batch = stack_items([shown[index] for index in panel_indices(len(shown))])
    name = f"discrete VAE, {tokenizer.vocab_size:,} codes"
    show_panels(trainer, output_dir / PANELS, batch, panel_drawer(name, lambda model, batch: model.panel(batch)))
    return trainer


def crop_of(settings: TokenizerSettings) -> RandomResizedCrop:
    return random_crop(settings.image_size, settings.crop_scale)


def image_crops(
    settings: TokenizerSettings, images: Samples, crop: Crop, plan: TokenizerPlan, train: bool = False
) -> ImageDataset:
    """Return the data set of crops of the images."""
    return ImageDataset(
        images,
        single_view(crop, settings.num_channels),
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
    if trainer.is_world_process_zero():
        with trainer.averaged():
            facts = codebook_facts(trainer, settings, images)
            write_tokenizer(trainer, settings, facts, output_dir, argv)
    trainer.accelerator.wait_for_everyone()
    return f"image tokenizer; run_pretraining.py --method beit takes it as --tokenizer {output_dir}"


@torch.no_grad()
def codebook_facts(trainer: MimTrainer, settings: TokenizerSettings, images: PretrainingSplits) -> dict[str, Any]:
    """Log and return the use of the codebook on `MIN_TOKENS` or more tokens of random crops of validation images."""
    if not len(images.validation):
        return {}
    tokenizer: Any = trainer.model.eval()
    crops = ImageDataset(
        images.validation,
        single_view(crop_of(settings), settings.num_channels),
        seed=settings.seed,
        train=True,
        bad_images_file=trainer.train_dataset.bad_images_file,
    )
    tokens_per_image = math.prod(length // tokenizer.config.stride for length in settings.image_size)
    num_crops = math.ceil(MIN_TOKENS / tokens_per_image)
    histogram = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for pixels in _batches(crops, num_crops, trainer.args.per_device_eval_batch_size):
        codes = tokenizer.get_codebook_indices(pixels.to(trainer.args.device))
        histogram += torch.bincount(codes.flatten(), minlength=tokenizer.vocab_size).cpu()
    use = CodebookUse.of(histogram)
    trainer.log({f"codebook_{name}": value for name, value in asdict(use).items()})
    return {"vocab_size": tokenizer.vocab_size, **asdict(use), "num_crops": num_crops, "num_images": len(crops)}


def _batches(crops: ImageDataset, num_crops: int, batch_size: int) -> Iterator[torch.Tensor]:
    for start in range(0, num_crops, batch_size):
        yield torch.stack(
            [crops[counter]["pixel_values"] for counter in range(start, min(start + batch_size, num_crops))]
        )


def write_tokenizer(
    trainer: MimTrainer, settings: TokenizerSettings, facts: dict[str, Any], output_dir: Path, argv: list[str]
) -> None:
    history = trainer.state.log_history
    trainer.save_state()
    if any("loss" in entry or "eval_loss" in entry for entry in history):
        training_curve(history, output_dir / CURVE_FILE)
    if panels := sorted((output_dir / PANELS).glob("*.png")):
        shutil.copy(panels[-1], output_dir / PANEL_FILE)
    if facts:
        (output_dir / CODEBOOK_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    card = tokenizer_card(settings.license, output_dir, facts, losses[-1] if losses else None, argv)
    (output_dir / "README.md").write_text(card, encoding="utf-8")
    scratch = output_dir / ".export"
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(scratch)
    for path in sorted(scratch.iterdir(), key=lambda path: path.name == _WRITTEN_LAST):
        path.replace(output_dir / path.name)
    scratch.rmdir()


def tokenizer_card(
    license: str | None, output_dir: Path, facts: dict[str, Any], eval_loss: float | None, argv: list[str]
) -> str:
    """README.md of the folder: how to use it, how it was made, what was measured."""
    metadata = ModelCardData(library_name="transformers", license=license, tags=["image-tokenizer", "dvae"])
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        "",
        f"# {output_dir.name}",
        "",
        "An image tokenizer: a discrete VAE as in [DALL-E](https://arxiv.org/abs/2102.12092).",
        "Loading it runs the Python file of this repository; read it first.",
        "",
        "```python",
        "from transformers import AutoModel",
        "",
        f'checkpoint = "{output_dir.name}"',
        "tokenizer = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()",
        "codes = tokenizer.get_codebook_indices(pixel_values)  # (B, C, H, W) uint8, or floats in [0, 1] -> (B, h, w)",
        "images = tokenizer.decode(codes)  # in [0, 1]",
        "```",
        "",
        "```bash",
        shorten_command(shlex.join(["python", "run_tokenizer.py", *argv])),
        "```",
    ]
    if facts:
        lines += [
            "",
            f"On validation images ({facts['num_tokens']:,} codes: {facts['num_crops']:,} random crops of "
            f"{facts['num_images']:,} images) {facts['num_alive']:,} of {facts['vocab_size']:,} codes occur; the "
            f"perplexity of their frequencies is {facts['perplexity']:.1f}.",
        ]
    if eval_loss is not None:
        lines += [
            "",
            f"Validation reconstruction loss, from the chosen codes: {eval_loss:.4g} nats per pixel channel.",
        ]
    if (output_dir / PANEL_FILE).exists():
        lines += ["", f"![Images and their reconstructions]({PANEL_FILE})"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], main, partial(make_parser, TokenizerSettings)))

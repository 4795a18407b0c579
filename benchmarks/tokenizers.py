"""Compare the tokenizers of BEiT and BEiT v2: their codebooks, and what the same training time with each is worth.

    python -m benchmarks.tuxstamps --size 96 --output_dir outputs/tuxstamps-96
    python -m benchmarks.efficientnet_lite0 outputs/efficientnet-lite0
    python -m benchmarks.tokenizers --teacher outputs/efficientnet-lite0

A discrete VAE and a VQ-KD with that teacher are trained on the photographs for --tokenizer_minutes each, then BEiT
with the one and BEiT v2 with the other for --minutes each and every seed; the steps of all four alternate in one
process on the CPU first, which gives the number of steps that fit. The teacher knows ImageNet's labels, so VQ-KD
learns from more than the photographs. Encoders are scored on frozen features (kNN, logistic regression) and after
fine-tuning, with the labels of tuning/train, on tuning/val; no test image is read.

Every finished command is kept in --output_dir, so that an interrupted benchmark continues; partial results are in
results.json there. Writes benchmarks/tokenizers_<model>_<date>.md.
"""

import argparse
import datetime
import json
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.equal_time import SEEDS, accuracies, hardware, measured_speeds
from benchmarks.few_label import ROOT, run
from commands.presets import ENCODER_SIZES
from commands.targets import open_tokenizer_targets
from commands.tokenizer_settings import load_tokenizer_settings
from data.collators import MaskingCollator
from modeling import MODELS, TOKENIZERS
from modeling.patches import patch_grid
from training.targets import TokenizerTargets

TOKENIZER_OF = {"beit": "dvae", "beit2": "vqkd"}
_FACTS = ("num_alive", "vocab_size", "perplexity", "num_tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("outputs/tuxstamps-96"), help="what tuxstamps wrote")
    parser.add_argument("--teacher", default="outputs/efficientnet-lite0", help="folder or Hub id, for VQ-KD")
    parser.add_argument("--model", default="vit-nano", choices=sorted(ENCODER_SIZES), help="also VQ-KD's encoder")
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--patch_size", type=int, default=8, help="8, as the codes of the discrete VAE")
    parser.add_argument("--vocab_size", type=int, default=512)
    parser.add_argument("--tokenizer_minutes", type=float, default=10, help="of the training of each tokenizer")
    parser.add_argument("--minutes", type=float, default=20, help="of one pre-training")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--finetune_steps", type=int, default=200)
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images, in each command")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/tokenizers"))
    options = parser.parse_args()
    options.candidates = [*TOKENIZER_OF.values(), *TOKENIZER_OF]
    options.output_dir.mkdir(parents=True, exist_ok=True)
    measured = measured_speeds(options, lambda name: training_step(name, options))
    speeds = measured["images_per_second"]
    codebooks = {name: train_tokenizer(name, speeds[name], options) for name in TOKENIZER_OF.values()}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in TOKENIZER_OF}
    for seed in options.seeds:
        for method in TOKENIZER_OF:
            results[method].append(score(method, seed, speeds[method], options))
            partial = {"options": vars(options), **measured, "codebooks": codebooks, "accuracies": results}
            (options.output_dir / "results.json").write_text(json.dumps(partial, indent=1, default=str) + "\n")
    write(options, measured, codebooks, results)


def steps_in(minutes: float, images_per_second: float, options: argparse.Namespace) -> str:
    return str(max(20, round(minutes * 60 * images_per_second / options.batch_size)))


def common_flags(options: argparse.Namespace) -> list[str]:
    return [
        *("--image_size", str(options.image_size), "--per_device_train_batch_size", str(options.batch_size)),
        *("--learning_rate", str(options.learning_rate), "--warmup_steps", "0.05", "--crop_scale", "0.3", "1.0"),
        *("--eval_steps", "0.5", "--save_steps", "0.25", "--save_total_limit", "1", "--report_to", "none"),
        *("--dataloader_num_workers", str(options.num_workers), "--bf16", "false"),
        *("--validation_fraction", "0.02"),
    ]


# ---- tokenizers ----


def tokenizer_flags(name: str, options: argparse.Namespace) -> list[str]:
    """Return the flags of a tokenizer besides the length of its training."""
    own = {
        # Chosen for the bundled photographs, see its header.
        "dvae": ["--config", "dvae_nano_sample"],
        "vqkd": [
            *("--method", "vqkd", "--teacher", str(options.teacher)),
            *("--model", options.model, "--patch_size", str(options.patch_size)),
            # The paper's codebook is too slow for some hundred steps, see docs/small-data.md.
            *("--learning_rate", "5e-4", "--codebook_decay", "0.9", "--restarts_dead_codes", "true"),
        ],
    }[name]
    dataset = ["--dataset", str(options.data / "photographs"), "--vocab_size", str(options.vocab_size)]
    return [*common_flags(options), *own, *dataset]


def train_tokenizer(name: str, images_per_second: float, options: argparse.Namespace) -> dict[str, float]:
    """Train a tokenizer, and return the use of its codebook on validation images."""
    folder = options.output_dir / name
    steps = steps_in(options.tokenizer_minutes, images_per_second, options)
    run("run_tokenizer.py", *tokenizer_flags(name, options), "--max_steps", steps, "--output_dir", str(folder))
    facts = json.loads((folder / "codebook.json").read_text())
    return {fact: facts[fact] for fact in _FACTS}


# ---- speed ----


def training_step(name: str, options: argparse.Namespace) -> Callable[[], None]:
    """Return a training step of a tokenizer or a method, with what makes its targets."""
    torch.manual_seed(0)
    settings = load_tokenizer_settings(tokenizer_flags(TOKENIZER_OF.get(name, name), options))
    model_class: Any = TOKENIZERS[settings.method]
    teacher = open_tokenizer_targets(settings, model_class)
    features = {} if teacher is None else {"feature_size": teacher.config_settings["feature_size"]}
    model: Any = model_class(model_class.config_class(**settings.config_settings(), **features))
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    batch: dict[str, Any] = {"pixel_values": images}
    targets: Any = teacher
    if name in TOKENIZER_OF:
        grid = patch_grid(options.image_size, options.patch_size)
        targets = TokenizerTargets(model, grid)
        encoder = ENCODER_SIZES[options.model] | {"image_size": options.image_size, "patch_size": options.patch_size}
        method_class: Any = MODELS[name]
        model = method_class(method_class.config_class(encoder_config=encoder, vocab_size=options.vocab_size))
        items = [{"pixel_values": image, "image_index": i, "epoch": 0, "step": 0} for i, image in enumerate(images)]
        batch = MaskingCollator(grid, 0.3827, strategy="exact-block")(items)
    if targets is not None and targets.view is not None:
        size = targets.view.image_size
        batch[targets.view.name] = torch.randint(0, 256, (options.batch_size, 3, *size), dtype=torch.uint8)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    model.train()

    def step() -> None:
        inputs = batch if targets is None else targets(batch)
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ---- quality ----


def score(method: str, seed: int, images_per_second: float, options: argparse.Namespace) -> dict[str, float]:
    """Pre-train with the method's tokenizer, and return the validation accuracies by name."""
    encoder = options.output_dir / method / f"encoder-{seed}"
    run(
        "run_pretraining.py", "--method", method, "--model", options.model, "--patch_size", str(options.patch_size),
        "--tokenizer", str(options.output_dir / TOKENIZER_OF[method]), *common_flags(options),
        "--dataset", str(options.data / "photographs"), str(options.data / "tuning" / "train"),
        "--max_steps", steps_in(options.minutes, images_per_second, options), "--seed", str(seed),
        "--output_dir", str(encoder),
    )  # fmt: skip
    return accuracies(encoder, seed, options)


# ---- the result file ----


def write(
    options: argparse.Namespace,
    measured: dict[str, Any],
    codebooks: dict[str, dict[str, float]],
    results: dict[str, list[dict[str, float]]],
) -> None:
    date, speeds = datetime.date.today().isoformat(), measured["images_per_second"]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "scikit-learn"))
    rows = sorted(set.intersection(*(set(seed) for found in results.values() for seed in found)))
    lines = [
        f"# Tokenizers of BEiT and BEiT v2, {options.model} at {options.image_size} px, {date}",
        "",
        f"Command: `{' '.join(['python -m benchmarks.tokenizers', *sys.argv[1:]])}`",
        f"Speed measured on: {measured['measured_on']}, float32. Trained on: {hardware()}, float32. {versions}.",
        f"{options.tokenizer_minutes:g} minutes of steps for a tokenizer, {options.minutes:g} for a pre-training; "
        f"seeds {', '.join(map(str, options.seeds))} (one of each tokenizer). VQ-KD's teacher: {options.teacher}.",
        "",
        "| tokenizer | images/s | codes alive | perplexity | tokens counted |",
        "|---|---|---|---|---|",
    ]
    for name, use in codebooks.items():
        alive = f"{use['num_alive']:,} of {use['vocab_size']:,}"
        lines.append(f"| {name} | {speeds[name]:.1f} | {alive} | {use['perplexity']:.1f} | {use['num_tokens']:,} |")
    lines += [
        "",
        "Validation accuracy (tuning/val), mean +- standard deviation over the seeds:",
        "",
        f"| method | tokenizer | images/s | {' | '.join(rows)} |",
        "|---" * (3 + len(rows)) + "|",
    ]
    for method, found in results.items():
        cells = [TOKENIZER_OF[method], f"{speeds[method]:.1f}"]
        for row in rows:
            values = [seed[row] for seed in found]
            spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    file = ROOT / "benchmarks" / f"tokenizers_{options.model}_{date}.md"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{file.name}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()

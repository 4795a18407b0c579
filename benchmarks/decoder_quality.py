"""Compare MAE decoders at equal training time: which one gives a small encoder the best features on validation images.

    python -m benchmarks.tuxstamps --size 96 --output_dir outputs/tuxstamps-96
    python -m benchmarks.decoder_quality --minutes 30

First the steps of all candidates alternate in one process on the CPU, which gives the speed of each on this computer.
Then every candidate is pre-trained for as many steps as it makes in --minutes, once for each seed, with the same
images, masks, learning rate and share of warm-up; or, with --num_images, for equally many steps. As the steps are
counted, the training may be done elsewhere: copy speeds.json to the --output_dir of a faster computer. Each encoder is
scored on frozen features (kNN, logistic regression) and after fine-tuning, with the labels of tuning/train, on
tuning/val; no test image is read. The published decoder is a candidate, so that images/s and accuracies have it as
their reference.

Every finished command is kept in --output_dir, so that an interrupted benchmark continues; partial results are in
results.json there. Writes benchmarks/decoder_quality_<model>_<equal what>_<date>.md.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.few_label import run
from benchmarks.resumable import ROOT
from commands.presets import ENCODER_SIZES
from data.collators import MaskingCollator
from modeling.mae import MaeConfig, MaeForPreTraining
from modeling.patches import patch_grid

SEEDS = (0, 1, 2)


def candidate(decoder: str, width: int, num_blocks: int, prediction_ratio: float = 1.0) -> dict[str, Any]:
    """Return the flags of a decoder."""
    return {
        "decoder": decoder,
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": num_blocks,
        "decoder_num_attention_heads": width // 32,
        "decoder_intermediate_size": 4 * width,
        "prediction_ratio": prediction_ratio,
    }


CANDIDATES = {
    "published": candidate("self", 512, 8),
    "self-192x4": candidate("self", 192, 4),
    "self-192x2": candidate("self", 192, 2),
    "self-192x1": candidate("self", 192, 1),
    "self-256x4": candidate("self", 256, 4),
    "self-96x2": candidate("self", 96, 2),
    "cross-192x4": candidate("cross", 192, 4),
    "cross-192x2": candidate("cross", 192, 2),
    "cross-192x4-third": candidate("cross", 192, 4, 1 / 3),
    "cross-192x8-third": candidate("cross", 192, 8, 1 / 3),
    "cross-256x4-third": candidate("cross", 256, 4, 1 / 3),
    "cross-512x8-quarter": candidate("cross", 512, 8, 0.25),
    "cross-384x4-quarter": candidate("cross", 384, 4, 0.25),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("outputs/tuxstamps-96"), help="what tuxstamps wrote")
    parser.add_argument("--model", default="vit-tiny", choices=sorted(ENCODER_SIZES))
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--patch_size", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=30, help="of one pre-training")
    parser.add_argument("--num_images", type=int, help="of one pre-training, instead of equal time")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--finetune_steps", type=int, default=200)
    parser.add_argument("--num_jobs", type=int, default=1, help="pre-trainings at a time")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images, in each job")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/decoder_quality"))
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    measured = measured_speeds(options, lambda name: training_step(CANDIDATES[name], options))
    speeds = measured["images_per_second"]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.candidates}
    runs = [(name, seed, speeds[name], options) for seed in options.seeds for name in options.candidates]
    with ThreadPoolExecutor(options.num_jobs) as pool:
        for (name, *_), accuracies in zip(runs, pool.map(lambda arguments: score(*arguments), runs), strict=True):
            results[name].append(accuracies)
            partial = {"options": vars(options), **measured, "trained_on": hardware(), "accuracies": results}
            (options.output_dir / "results.json").write_text(json.dumps(partial, indent=1, default=str) + "\n")
    write(options, measured, results)


# ---- speed ----


def measured_speeds(
    options: argparse.Namespace, step_of: Callable[[str], Callable[[], None]], num_rounds: int = 7
) -> dict[str, Any]:
    """Return the hardware and the images/s of each candidate; measured once, as the numbers of steps depend on it."""
    file = options.output_dir / "speeds.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"images_per_second": {}}
    if missing := [name for name in options.candidates if name not in known["images_per_second"]]:
        if known["images_per_second"]:
            raise SystemExit(f"{file} has no speed of {', '.join(missing)}: use another --output_dir")
        steps = {name: step_of(name) for name in options.candidates}
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for round_number in range(num_rounds + 1):
            for name, step in steps.items():
                start = time.perf_counter()
                step()
                if round_number:  # the first one warms up
                    seconds[name].append(time.perf_counter() - start)
        found = {name: options.batch_size / statistics.median(times) for name, times in seconds.items()}
        known = {"measured_on": f"{cpu()}, {torch.get_num_threads()} threads", "images_per_second": found}
        file.write_text(json.dumps(known) + "\n")
    return known


def cpu() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu()


def training_step(flags: dict[str, Any], options: argparse.Namespace) -> Any:
    encoder = ENCODER_SIZES[options.model] | {"image_size": options.image_size, "patch_size": options.patch_size}
    settings = {name: value for name, value in flags.items() if name.startswith("decoder")}
    torch.manual_seed(0)
    model = MaeForPreTraining(MaeConfig(encoder_config=encoder, **settings)).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    items = [{"pixel_values": image, "image_index": i, "epoch": 0, "step": 0} for i, image in enumerate(images)]
    grid = patch_grid(options.image_size, options.patch_size)
    batch = MaskingCollator(grid, 0.75, prediction_ratio=flags["prediction_ratio"])(items)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ---- quality ----


def score(name: str, seed: int, images_per_second: float, options: argparse.Namespace) -> dict[str, float]:
    """Pre-train, and return the validation accuracies by name."""
    encoder = options.output_dir / name / f"encoder-{seed}"
    num_images = options.num_images or options.minutes * 60 * images_per_second
    num_steps = max(20, round(num_images / options.batch_size))
    workers = ["--dataloader_num_workers", str(options.num_workers), "--bf16", "false"]
    flags = [f"--{flag}={value}" for flag, value in CANDIDATES[name].items()]
    tuning = str(options.data / "tuning")
    run(
        "run_pretraining.py", "--model", options.model, "--method", "mae", *flags,
        "--image_size", str(options.image_size), "--patch_size", str(options.patch_size),
        "--dataset", str(options.data / "photographs"), tuning + "/train", "--validation_fraction", "0.02",
        "--max_steps", str(num_steps), "--warmup_steps", "0.05", "--learning_rate", str(options.learning_rate),
        "--crop_scale", "0.3", "1.0", "--per_device_train_batch_size", str(options.batch_size), "--eval_steps", "0.5",
        "--save_steps", "0.25", "--save_total_limit", "1", "--report_to", "none", "--seed", str(seed), *workers,
        "--output_dir", str(encoder),
    )  # fmt: skip
    return accuracies(encoder, seed, options)


def accuracies(encoder: Path, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the validation accuracies of an encoder by name: frozen, and fine-tuned with labels."""
    frozen, tuned = (encoder.parent / f"{kind}-{seed}" for kind in ("frozen", "finetuned"))
    tuning, workers = str(options.data / "tuning"), ["--dataloader_num_workers", str(options.num_workers)]
    run(
        "run_evaluation.py", "--model", str(encoder), "--dataset", tuning, "--probes", "knn", "logistic",
        "--seed", str(seed), "--output_dir", str(frozen),
    )  # fmt: skip
    run(
        "run_finetune.py", "--config", "finetune_tuxstamps_few", "--model", str(encoder), "--dataset", tuning,
        "--max_steps", str(options.finetune_steps), "--eval_steps", "0.5", "--save_steps", "0.5",
        "--report_to", "none", "--seed", str(seed), *workers, "--bf16", "false", "--output_dir", str(tuned),
    )  # fmt: skip
    entries = json.loads((frozen / "metrics.json").read_text())["results"]
    found = {entry["name"]: entry["value"] for entry in entries if entry["metric"] == "accuracy"}
    history = json.loads((tuned / "trainer_state.json").read_text())["log_history"]
    found["fine-tuned"] = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry][-1]
    return found


# ---- the result file ----


def write(options: argparse.Namespace, measured: dict[str, Any], results: dict[str, list[dict[str, float]]]) -> None:
    speeds, date = measured["images_per_second"], datetime.date.today().isoformat()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "scikit-learn"))
    rows = sorted(set.intersection(*(set(seed) for found in results.values() for seed in found)))
    aim = "with equally many images" if options.num_images else "at equal training time"
    amount = f"{options.num_images:,} images" if options.num_images else f"{options.minutes:g} minutes of steps"
    slowest = speeds.get("published", min(speeds.values()))
    lines = [
        f"# MAE decoders of {options.model} {aim}, {date}",
        "",
        f"Command: `{' '.join(['python -m benchmarks.decoder_quality', *sys.argv[1:]])}`",
        f"Speed measured on: {measured['measured_on']}, float32. Trained on: {hardware()}, float32. {versions}.",
        f"{amount} each; seeds {', '.join(map(str, options.seeds))}. "
        "Validation accuracy (tuning/val), mean +- standard deviation over the seeds.",
        "",
        f"| decoder | images/s | ratio | {' | '.join(rows)} |",
        "|---" * (3 + len(rows)) + "|",
    ]
    for name, found in results.items():
        cells = [f"{speeds[name]:.1f}", f"{speeds[name] / slowest:.2f}"]
        for row in rows:
            values = [seed[row] for seed in found]
            spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    slug = "equal-images" if options.num_images else "equal-time"
    file = ROOT / "benchmarks" / f"decoder_quality_{options.model}_{slug}_{date}.md"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{file.name}\n\n" + "\n".join(lines))


if __name__ == "__main__":
    main()

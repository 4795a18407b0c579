"""Measure the rules of docs/small-data.md: one setting of a small run is changed at a time, on two real data sets.

    python -m benchmarks.tuxstamps --size 96 --output_dir outputs/tuxstamps-96
    python -m benchmarks.small_data_rules --num_threads 1                        # as many runs at a time as cores
    python -m benchmarks.small_data_rules --method simmim --studies "mask unit"

Studies: the learning rate at batches from 16 to 512, the length, the mask ratio, the smallest crop, the patch, the
decoder and SimMIM's mask unit. Patches and decoders are compared in equal time (--time_budget), all others with
equally many images. Every encoder is scored on frozen features, by kNN and logistic regression. No test image of any
data set is read: tuxstamps are scored on tuning/val, Fashion-MNIST on images of its training file that no encoder is
trained on.

Every finished command is kept in --output_dir: the benchmark may be interrupted and continues. Writes
benchmarks/small_data_rules_<method>_<hardware>_<date>.json and .md.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.provenance import TODAY, command, hardware, hardware_slug, versions, write_report
from benchmarks.resumable import ROOT, Jobs
from data.idx import find_idx_files, read_idx

BATCHES = (16, 32, 64, 128, 256, 512)
RATES = (3e-4, 6e-4, 1.2e-3, 2.4e-3, 4.8e-3)
REFERENCE_BATCH, REFERENCE_RATE = 16, 1.2e-3  # those of the rules for MAE and vit-nano on a CPU
NUM_FASHION = {"train": 5000, "val": 2000}  # images of the training file
USUAL_NUM_PATCHES = 8  # on a side
METRICS = ("kNN, class token", "kNN, mean of patches", "logistic regression, mean of patches")


def studies(options: argparse.Namespace, side: int) -> dict[str, dict[str, list[str]]]:
    """Return the flags of each trial by study; a study of equal time has no --max_steps.

    Args:
        side: Of the images, in pixels.
    """

    def steps(num_images: float, batch: int = REFERENCE_BATCH) -> list[str]:
        return ["--max_steps", str(max(20, round(num_images / batch))), "--per_device_train_batch_size", str(batch)]

    def rate(value: float) -> list[str]:
        return ["--learning_rate", str(value)] if options.method == "mae" else []  # else by the rules

    images, usual = options.num_images, [*steps(options.num_images), *rate(REFERENCE_RATE)]
    timed = ["--time_budget", f"{options.minutes:g}m", "--per_device_train_batch_size", str(REFERENCE_BATCH)]
    timed += rate(REFERENCE_RATE)
    found = {
        "learning rate": {
            f"batch {batch}, {value:g}": [*steps(images, batch), *rate(value)] for batch in BATCHES for value in RATES
        },
        "length": {
            f"{times:g} x {images:,} images": [*steps(times * images), *rate(REFERENCE_RATE)]
            for times in (0.25, 0.5, 1, 2, 4)
        },
        "smallest crop": {f"{low:g}": [*usual, "--crop_scale", str(low), "1.0"] for low in (0.08, 0.2, 0.4, 0.6)},
        "patches on a side": {f"{number}": [*timed, "--patch_size", str(side // number)] for number in (4, 8, 16)},
    }
    if options.method == "simmim":
        found["mask unit"] = {
            f"1/{number} of the image": [*usual, "--mask_unit", str(side // number)] for number in (2, 4, 8)
        }
    if options.method == "mae":
        found["mask ratio"] = {f"{ratio}": [*usual, "--mask_ratio", str(ratio)] for ratio in (0.4, 0.6, 0.75, 0.85)}
        found["decoder"] = {
            f"{blocks} x {width}": [
                *timed, "--decoder_num_hidden_layers", str(blocks), "--decoder_hidden_size", str(width),
                "--decoder_num_attention_heads", str(width // 32), "--decoder_intermediate_size", str(4 * width),
            ]
            for blocks, width in ((1, 128), (2, 128), (4, 128), (2, 256), (8, 512))
        }  # fmt: skip
    return {name: trials for name, trials in found.items() if not options.studies or name in options.studies}


def fashion_folders(source: Path, target: Path) -> Path:
    """Write images of the training file as class folders below train/ and val/, once; returns the folder."""
    images, labels = read_idx(*find_idx_files(source)["train"])
    assert labels is not None
    first = 0
    for split, number in NUM_FASHION.items():
        for index in range(first, first + number):
            file = target / split / str(labels[index]) / f"{index}.png"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(images[index]).convert("RGB").save(file)
        first += number
    return target


def score(
    folder: Path, data: dict[str, Any], flags: list[str], seed: int, options: argparse.Namespace, jobs: Jobs
) -> dict[str, float]:
    """Pre-train and return the accuracies on the validation images by name."""
    encoder, frozen = folder / f"encoder-{seed}", folder / f"frozen-{seed}"
    jobs.succeed(
        "run_pretraining.py", "--model", "vit-nano", "--method", options.method, "--image_size", str(data["side"]),
        *([] if "--patch_size" in flags else ["--patch_size", str(data["side"] // USUAL_NUM_PATCHES)]),
        "--dataset", *map(str, data["unlabeled"]), "--validation_fraction", "0.02", "--eval_steps", "0.5",
        "--save_steps", "0.5", "--save_total_limit", "1", "--report_to", "none", "--seed", str(seed), *flags,
        "--output_dir", str(encoder),
    )  # fmt: skip
    jobs.succeed(
        "run_evaluation.py", "--model", str(encoder), "--dataset", *data["labeled"], "--probes", "knn", "logistic",
        "--seed", str(seed), "--output_dir", str(frozen),
    )  # fmt: skip
    entries = json.loads((frozen / "metrics.json").read_text())["results"]
    found = {entry["name"]: entry["value"] for entry in entries if entry["metric"] == "accuracy"}
    return {name: found[name] for name in METRICS if name in found}


def report(results: dict[str, Any], options: argparse.Namespace, jobs: Jobs) -> str:
    """Return the tables in Markdown."""
    lines = [
        f"# Rules for small data, {options.method}, vit-nano, {TODAY}",
        "",
        f"Command: `{command('small_data_rules')}`",
        f"{hardware()}; {versions('torch', 'transformers')}. Seeds: {', '.join(map(str, options.seeds))}; mean, and "
        f"standard deviation where there are several; threads of a run: {jobs.num_threads}. Accuracies on validation "
        f"images. {options.num_images:,} images per run, or {options.minutes:g} minutes.",
    ]
    for study, by_set in results.items():
        for name, trials in by_set.items():
            rows = list(dict.fromkeys(row for seeds in trials.values() for found in seeds for row in found))
            lines += ["", f"## {study}, {name}", "", f"| | {' | '.join(rows)} |", "|---" * (1 + len(rows)) + "|"]
            for trial, seeds in trials.items():
                cells = []
                for row in rows:
                    values = [found[row] for found in seeds if row in found]
                    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                    cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
                lines.append(f"| {trial} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tuxstamps", type=Path, default=Path("outputs/tuxstamps-96"), help="what tuxstamps wrote")
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"), help="idx files")
    parser.add_argument("--method", default="mae")
    parser.add_argument("--sets", nargs="+", default=["fashion", "tuxstamps"], choices=["fashion", "tuxstamps"])
    parser.add_argument("--studies", nargs="*", default=[], help="default: all")
    parser.add_argument("--num_images", type=int, default=24_000, help="of one pre-training")
    parser.add_argument("--minutes", type=float, default=3, help="of one pre-training, where the time is equal")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--num_threads", type=int, help="of each command (default: one command, all cores)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/small_data_rules"))
    options = parser.parse_args()
    tux, fashion = options.tuxstamps, fashion_folders(options.fashion, options.output_dir / "fashion")
    sets: dict[str, dict[str, Any]] = {
        "fashion": {
            "unlabeled": [fashion / "train"],
            "labeled": (str(fashion), "--labels_per_class", "50"),
            "side": 32,
        },
        "tuxstamps": {
            "unlabeled": [tux / "photographs", tux / "tuning/train"],
            "labeled": (str(tux / "tuning"),),
            "side": 64,
        },
    }
    jobs = Jobs(options.num_threads)
    trials = [
        (study, name, trial, flags, seed)
        for name, data in sets.items()
        if name in options.sets
        for study, found in studies(options, data["side"]).items()
        for trial, flags in found.items()
        for seed in options.seeds
    ]

    def measure(each: tuple[str, str, str, list[str], int]) -> dict[str, float]:
        study, name, trial, flags, seed = each
        slug = "".join(letter if letter.isalnum() else "-" for letter in f"{options.method} {study} {trial}")
        return score(options.output_dir / name / slug, sets[name], flags, seed, options, jobs)

    results: dict[str, Any] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for (study, name, trial, *_), found in zip(trials, jobs.map(measure, trials), strict=True):
        results[study][name][trial].append(found)
    text = report(results, options, jobs)
    write_report(ROOT / "benchmarks" / f"small_data_rules_{options.method}_{hardware_slug()}_{TODAY}", results, text)
    print(text)


if __name__ == "__main__":
    main()

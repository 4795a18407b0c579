"""Pre-train candidates for equally many minutes, several seeds each, and score their encoders on validation images.

What `decoder_quality.py` and `research_options.py` share: images and labels of `tuxstamps.py`, of whose splits no test
image is read, scores on frozen features (kNN, logistic regression) and after fine-tuning, and the table.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.few_label import run
from benchmarks.provenance import TODAY
from benchmarks.resumable import ROOT
from commands.presets import ENCODER_SIZES

SEEDS = (0, 1, 2)
Results = Mapping[str, Sequence[Mapping[str, float]]]  # of candidates: for each seed accuracies by name


def make_parser(description: str | None, candidates: Iterable[str]) -> argparse.ArgumentParser:
    """Return a parser of the flags that both benchmarks have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("outputs/tuxstamps-96"), help="what tuxstamps wrote")
    parser.add_argument("--model", default="vit-tiny", choices=sorted(ENCODER_SIZES))
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--patch_size", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=30, help="of one pre-training")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--candidates", nargs="+", default=list(candidates), choices=list(candidates))
    parser.add_argument("--finetune_steps", type=int, default=200)
    parser.add_argument("--num_jobs", type=int, default=1, help="pre-trainings at a time")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images, in each job")
    return parser


def cpu() -> str:
    return f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def hardware() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu()


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


def score_all(
    options: argparse.Namespace, score: Callable[[str, int], dict[str, float]], **facts: Any
) -> dict[str, list[dict[str, float]]]:
    """Return the accuracies of all candidates; partial ones are in results.json, beside facts."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in options.candidates}
    runs = [(name, seed) for seed in options.seeds for name in options.candidates]
    with ThreadPoolExecutor(options.num_jobs) as pool:
        for (name, _), accuracies in zip(runs, pool.map(lambda pair: score(*pair), runs), strict=True):
            results[name].append(accuracies)
            partial = {"options": vars(options), **facts, "trained_on": hardware(), "accuracies": results}
            (options.output_dir / "results.json").write_text(json.dumps(partial, indent=1, default=str) + "\n")
    return results


def pretrain(
    folder: Path, flags: Sequence[str], num_steps: int, learning_rate: float, seed: int, options: argparse.Namespace
) -> None:
    """Pre-train into a folder, unless that was done before."""
    run(
        "run_pretraining.py", "--model", options.model, *flags,
        "--image_size", str(options.image_size), "--patch_size", str(options.patch_size),
        "--dataset", str(options.data / "photographs"), str(options.data / "tuning" / "train"),
        "--validation_fraction", "0.02",
        "--max_steps", str(num_steps), "--warmup_steps", "0.05", "--learning_rate", str(learning_rate),
        "--crop_scale", "0.3", "1.0", "--per_device_train_batch_size", str(options.batch_size), "--eval_steps", "0.5",
        "--save_steps", "0.25", "--save_total_limit", "1", "--report_to", "none", "--seed", str(seed),
        *_workers(options), "--output_dir", str(folder),
    )  # fmt: skip


def accuracies(encoder: Path, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the validation accuracies of an encoder by name: frozen, and fine-tuned with labels."""
    frozen, tuned = (encoder.parent / f"{kind}-{seed}" for kind in ("frozen", "finetuned"))
    tuning = str(options.data / "tuning")
    run(
        "run_evaluation.py", "--model", str(encoder), "--dataset", tuning, "--probes", "knn", "logistic",
        "--seed", str(seed), "--output_dir", str(frozen),
    )  # fmt: skip
    run(
        "run_finetune.py", "--config", "finetune_tuxstamps_few", "--model", str(encoder), "--dataset", tuning,
        "--max_steps", str(options.finetune_steps), "--eval_steps", "0.5", "--save_steps", "0.5",
        "--report_to", "none", "--seed", str(seed), *_workers(options), "--output_dir", str(tuned),
    )  # fmt: skip
    entries = json.loads((frozen / "metrics.json").read_text())["results"]
    found = {entry["name"]: entry["value"] for entry in entries if entry["metric"] == "accuracy"}
    history = json.loads((tuned / "trainer_state.json").read_text())["log_history"]
    found["fine-tuned"] = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry][-1]
    return found


def _workers(options: argparse.Namespace) -> tuple[str, ...]:
    return "--dataloader_num_workers", str(options.num_workers), "--bf16", "false"


def table(kind: str, columns: Mapping[str, Mapping[str, str]], results: Results) -> list[str]:
    """Return the lines of a table: further columns of the candidates, then mean and standard deviation over seeds."""
    rows = sorted(set.intersection(*(set(seed) for found in results.values() for seed in found)))
    lines = [f"| {' | '.join([kind, *columns, *rows])} |", "|---" * (1 + len(columns) + len(rows)) + "|"]
    for name, found in results.items():
        cells = [column[name] for column in columns.values()]
        for row in rows:
            values = [seed[row] for seed in found]
            spread = f" +- {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def write(name: str, lines: Sequence[str]) -> None:
    """Write benchmarks/<name>_<date>.md and print it."""
    file = ROOT / "benchmarks" / f"{name}_{TODAY}.md"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{file.name}\n\n" + "\n".join(lines))

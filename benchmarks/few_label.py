"""Few-label benchmark: fine-tuning after pre-training and from random weights, and frozen features against raw pixels.

    python -m benchmarks.few_label                                             # the bundled subset of Fashion-MNIST
    python -m benchmarks.few_label --dataset /usr/share/datasets/fashion-mnist # all of it

For each of three seeds: pre-train without labels, fine-tune with 20 labels per class, and fine-tune the same
architecture from random weights. Both use the same grid of learning rates and layer decays, searched with seed 0 on
200 labels per class of the training split (20 for training and 180 for validation, which include the 20 of the final
run with seed 0), or on --tuning_dataset; each final run uses the test split once. Every step is one of the commands in
the README. Writes benchmarks/<name>_<hardware>_<date>.md. An interrupted benchmark can be continued.

    python -m benchmarks.tuxstamps && python -m benchmarks.efficientnet_lite0 outputs/efficientnet-lite0
    python -m benchmarks.few_label --dataset outputs/tuxstamps/stamps --tuning_dataset outputs/tuxstamps/tuning \\
        --unlabeled outputs/tuxstamps/photographs outputs/tuxstamps/stamps/train --labels_per_class all \\
        --pretraining mae_vit-nano_tuxstamps simmim_vit-nano_tuxstamps --finetuning finetune_tuxstamps_few \\
        --learning_rates 2e-3 4e-3 --layer_decays 0.75 --reference outputs/efficientnet-lite0 --name tuxstamps
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import resumable
from benchmarks.resumable import ROOT

SEEDS = (0, 1, 2)
LABELS_PER_CLASS = 20
TUNING_LABELS_PER_CLASS, VALIDATION_FRACTION = 200, 0.9  # 20 for training, 180 for validation
_seconds: list[float] = []  # of each command, including earlier starts
ARMS = {"pre-trained": [], "from random weights": ["--from_scratch"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="sample-fashion", help="with labels and a test split")
    parser.add_argument("--tuning_dataset", help="with labels and a val split, disjoint from the test split")
    parser.add_argument("--unlabeled", nargs="+", help="images to pre-train on (default: those of --dataset)")
    parser.add_argument("--pretraining", nargs="+", default=["mae_vit-nano_fashion"], help="recipes to compare")
    parser.add_argument("--finetuning", default="finetune_fashion_few", help="recipe")
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3, 2e-3])
    parser.add_argument("--layer_decays", type=float, nargs="+", default=[0.75, 1.0])
    parser.add_argument(
        "--labels_per_class", type=lambda text: None if text == "all" else int(text), default=LABELS_PER_CLASS
    )
    parser.add_argument("--reference", type=Path, help="folder of an encoder whose frozen features are compared")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/few_label"))
    parser.add_argument("--name", default="few_label", help="of the result file")
    options = parser.parse_args()
    options.grid = [(rate, decay) for rate in options.learning_rates for decay in options.layer_decays]
    if options.labels_per_class is None and options.tuning_dataset is None:
        parser.error("--labels_per_class all leaves no labels for tuning: add a --tuning_dataset")
    comparisons = [compare(recipe, options) for recipe in options.pretraining]
    reference = measure_reference(options) if options.reference else {}
    write(options, comparisons, reference)


def compare(recipe: str, options: argparse.Namespace) -> dict[str, Any]:
    """Do all runs of one pre-training recipe."""
    folder = options.output_dir / recipe
    encoders, frozen, seconds = [], [], []
    for seed in SEEDS:
        encoder = folder / f"encoder-{seed}"
        unlabeled = options.unlabeled or [options.dataset]
        flags = ["--config", recipe, "--dataset", *unlabeled, "--output_dir", str(encoder), "--seed", str(seed)]
        seconds.append(run("run_pretraining.py", *flags, "--eval_steps", "0.5", "--save_steps", "0.5"))
        encoders.append(encoder)
        frozen.append(evaluate(encoder, folder / f"frozen-{seed}", seed, options))
    tuned = {arm: tune(arm, encoders[0], folder, options) for arm in ARMS}
    accuracies: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for arm in ARMS:
        best = max(options.grid, key=tuned[arm].__getitem__)
        for seed, encoder in zip(SEEDS, encoders, strict=True):
            out = folder / f"{arm.replace(' ', '-')}-{seed}"
            data = [options.dataset, *labels(options, "--validation_fraction=0")]
            finetune(arm, encoder, out, seed, best, data, options)
            accuracies[arm].append(results_of(out)["accuracy"])
    return {"recipe": recipe, "tuned": tuned, "accuracies": accuracies, "frozen": frozen, "seconds": seconds}


def tune(arm: str, encoder: Path, folder: Path, options: argparse.Namespace) -> dict[tuple[float, float], float]:
    """Return the validation accuracy for each learning rate and layer decay."""
    if options.tuning_dataset:
        data = [options.tuning_dataset]
    else:
        number = ["--labels_per_class", str(TUNING_LABELS_PER_CLASS)]
        data = [options.dataset, *number, "--validation_fraction", str(VALIDATION_FRACTION)]
    accuracies = {}
    for rate, decay in options.grid:
        out = folder / f"tune-{arm.replace(' ', '-')}-{rate}-{decay}"
        finetune(arm, encoder, out, 0, (rate, decay), data, options)
        history = json.loads((out / "trainer_state.json").read_text())["log_history"]
        accuracies[rate, decay] = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry][-1]
    return accuracies


def finetune(
    arm: str, encoder: Path, out: Path, seed: int, best: tuple[float, float], data: list[str], options: Any
) -> None:
    rate, decay = best
    run(
        "run_finetune.py", "--config", options.finetuning, "--model", str(encoder), "--dataset", *data,
        "--output_dir", str(out), "--seed", str(seed), "--learning_rate", str(rate), "--layer_decay", str(decay),
        "--eval_steps", "0.5", "--save_steps", "0.5", *ARMS[arm],
    )  # fmt: skip


def evaluate(encoder: Path, out: Path, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Return the accuracies of classifiers on frozen features, an untrained encoder's features, and raw pixels."""
    run(
        "run_evaluation.py", "--model", str(encoder), "--dataset", options.dataset, "--output_dir", str(out),
        "--probes", "knn", "logistic", "--seed", str(seed), *labels(options),
    )  # fmt: skip
    results = json.loads((out / "metrics.json").read_text())["results"]
    return {_row(entry["name"]): entry["value"] for entry in results if entry["metric"] == "accuracy"}


def _row(name: str) -> str:
    """Drop the kind of features of an untrained encoder: it is the best one of the trained encoder, which varies."""
    return f"{name.split(', ')[0]}, untrained encoder" if name.endswith(", untrained") else name


def measure_reference(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the accuracies by name for each seed; only seed 0 if all labels are used, as it hardly matters then."""
    seeds = SEEDS if options.labels_per_class else SEEDS[:1]
    name = options.reference.name
    by_seed = [evaluate(options.reference, options.output_dir / f"{name}-{seed}", seed, options) for seed in seeds]
    rows = [row for row in by_seed[0] if not row.endswith(("raw pixels", "untrained encoder"))]
    suffix = "" if options.labels_per_class else ", seed 0"
    return {f"{name}: {row}{suffix}": [accuracies[row] for accuracies in by_seed] for row in rows}


def labels(options: argparse.Namespace, *otherwise: str) -> list[str]:
    """Return the flags for the number of labels per class, or `otherwise` for all labels."""
    return ["--labels_per_class", str(options.labels_per_class)] if options.labels_per_class else [*otherwise]


def results_of(folder: Path) -> dict[str, float]:
    return {entry["metric"]: entry["value"] for entry in json.loads((folder / "metrics.json").read_text())["results"]}


def run(script: str, *flags: str) -> float:
    """Run a command unless it has finished before, and return the seconds that it took; exit if it fails."""
    outcome = resumable.run(script, *flags)
    if outcome.exit_code:
        raise SystemExit(f"{' '.join(outcome.command)} failed:\n{outcome.output}")
    _seconds.append(outcome.seconds)
    return outcome.seconds


# ---- the result file ----


def write(options: argparse.Namespace, comparisons: list[dict[str, Any]], reference: dict[str, list[float]]) -> None:
    hardware = f"{platform.machine()}-cpu{os.cpu_count()}"
    date = datetime.date.today().isoformat()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "datasets", "scikit-learn"))
    command = " ".join(["python -m benchmarks.few_label", *sys.argv[1:]])
    lines = [
        f"# {f'{options.labels_per_class} labels per class' if options.labels_per_class else 'Few labels'}, {date}",
        "",
        f"Command: `{command}`",
        f"Hardware: {os.cpu_count()} cores, {platform.machine()}, no GPU. {versions}, Python "
        f"{platform.python_version()}.",
        f"Time: {sum(_seconds) / 60:.0f} minutes for all commands. Data: the test split of {options.dataset}. "
        f"Settings: recipes/{options.finetuning}.yaml and the ones below.",
        "Accuracy: mean +- standard deviation over seeds 0, 1, 2. The seed determines the "
        f"{'labels, ' if options.labels_per_class else ''}initial weights and the order, also in pre-training.",
        "",
    ]
    for comparison in comparisons:
        lines += table(comparison, reference, options)
    file = ROOT / "benchmarks" / f"{options.name}_{hardware}_{date}.md"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{file.name}\n\n" + "\n".join(lines))


def table(comparison: dict[str, Any], reference: dict[str, list[float]], options: argparse.Namespace) -> list[str]:
    lines = [f"## recipes/{comparison['recipe']}.yaml", "", "| | accuracy | each seed |", "|---|---|---|"]
    rows = {f"fine-tuned, {arm}": values for arm, values in comparison["accuracies"].items()}
    rows |= {name: [seed[name] for seed in comparison["frozen"]] for name in comparison["frozen"][0]} | reference
    for name, values in rows.items():
        each = ", ".join(f"{value:.4f}" for value in values)
        spread = f" +- {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        lines.append(f"| {name} | {statistics.mean(values):.4f}{spread} | {each} |")
    lines += [
        "",
        "Validation accuracy, seed 0:",
        "",
        "| learning rate, layer decay | " + " | ".join(ARMS) + " |",
    ]
    lines.append("|---" * (1 + len(ARMS)) + "|")
    for rate, decay in options.grid:
        values = " | ".join(f"{comparison['tuned'][arm][rate, decay]:.4f}" for arm in ARMS)
        lines.append(f"| {rate:g}, {decay:g} | {values} |")
    seconds = ", ".join(f"{value:.0f}" for value in comparison["seconds"])
    return [*lines, "", f"Pre-training took {seconds} seconds.", ""]


if __name__ == "__main__":
    main()

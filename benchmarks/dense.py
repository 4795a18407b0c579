"""Segmentation and detection of scenes: after pre-training, from random weights, and frozen features beside them.

    python -m benchmarks.scenes && python -m benchmarks.efficientnet_lite0 outputs/efficientnet-lite0
    python -m benchmarks.dense --reference outputs/efficientnet-lite0
    python -m benchmarks.dense --encoders mae=FOLDER dino=FOLDER      # trained elsewhere; all see --image_size

Pre-trains an encoder with each of --methods, on the crops and the training scenes without their labels (`feature` with
--teacher, or --reference, as its teacher), then for each of three seeds a UPerNet on every encoder and on random
weights of the first one, and for the first seed a linear layer on the frozen patches, a detector, and a detector with
the encoder frozen (this one not of random weights). All runs of a kind have the same time (--minutes) and settings,
and with --num_threads several run beside each other, on cores of their own. Frozen patches of every encoder, of the
EfficientNet-Lite0 that is given as --reference, and raw pixels are measured by the same linear probe
(`run_evaluation.py --dense`), but not for detection alone. Test scenes have other stamps and photographs. Writes
benchmarks/<name>_<hardware>_<date>.md and .json. An interrupted benchmark continues.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import TODAY, command, hardware, hardware_slug, versions, write_report
from benchmarks.resumable import ROOT, Jobs

RANDOM = "random weights"
PROBED = "frozen linear probe"
# Most pixels are background.
_SEGMENTATION = ("--task", "segmentation", "--class_weights", "balanced", "--resize_scale", "0.75", "1.5")
# The teacher sees every image once; a small encoder learns most from all patches.
_FEATURE = ("--cache_tokens", "true", "--distill_visible", "true")
# A scene has at most three objects, and every query is trained in all groups.
_DETECTION = ("--task", "detection", "--num_queries", "12")
_KINDS = {  # name: flags, and the metrics that are reported
    # A head of the published width would be 11 times the work of the encoder.
    "UPerNet": ((*_SEGMENTATION, "--head_hidden_size", "64"), ("mean_iou", "pixel_accuracy")),
    "linear": ((*_SEGMENTATION, "--mode", "linear"), ("mean_iou", "pixel_accuracy")),
    "detection": (_DETECTION, ("ap", "ap50")),
    "frozen-detection": ((*_DETECTION, "--mode", "linear"), ("ap", "ap50")),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("outputs/scenes"), help="what benchmarks.scenes wrote")
    parser.add_argument("--methods", nargs="+", help="of pre-training (default: mae and, with a teacher, feature)")
    parser.add_argument("--teacher", help="of feature (default: --reference)")
    parser.add_argument("--teacher_image_size", type=int, help="as of run_pretraining.py")
    parser.add_argument("--encoders", nargs="*", default=[], metavar="NAME=FOLDER", help="instead of --methods")
    parser.add_argument("--reference", type=Path, help="an encoder whose frozen patches are probed as well")
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=list(_KINDS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", default="vit-nano")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--patch_size", type=int, default=8)
    parser.add_argument("--pretraining_minutes", type=float, default=20.0)
    parser.add_argument("--minutes", type=float, default=4.0, help="of each fine-tuning")
    parser.add_argument("--steps", type=int, help="of every training instead of the times, for a trial")
    parser.add_argument("--num_threads", type=int, help="of each command (default: one command, all cores)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the head; encoders have a part of it")
    parser.add_argument("--linear_learning_rate", type=float, default=1e-2)
    parser.add_argument("--layer_decay", type=float, default=0.75)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/dense"))
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks", help="where the report goes")
    parser.add_argument("--name", default="dense", help="of the report")
    options = parser.parse_args()
    options.teacher = options.teacher or options.reference
    methods = options.methods or (["mae", "feature"] if options.teacher else ["mae"])
    if "feature" in methods and not options.teacher:
        parser.error("feature needs a --teacher, or --reference as its teacher: see --help")
    jobs = Jobs(options.num_threads)
    encoders = dict(each.split("=", 1) for each in options.encoders)
    if not encoders:
        folders = jobs.map(lambda method: pretrain(method, options, jobs), methods)
        encoders = {method: str(folder) for method, folder in zip(methods, folders, strict=True)}
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    for kind in options.kinds:
        seeds = options.seeds if kind == "UPerNet" else options.seeds[:1]
        rows = dict(encoders)
        if "frozen" not in kind:
            rows[RANDOM] = next(iter(encoders.values()))
        runs = [(kind, row, rows[row], seed) for row in rows for seed in seeds]
        found = iter(jobs.map(lambda each: tune(*each, options, jobs), runs))
        results[kind] = {row: [next(found) for _ in seeds] for row in rows}
        write(options, results)
    if all("detection" in kind for kind in options.kinds):
        return
    probed = encoders | ({"EfficientNet-Lite0": str(options.reference)} if options.reference else {})
    frozen = jobs.map(lambda each: probe(*each, options, jobs), probed.items())
    results[PROBED] = {row: [metrics] for row, metrics in zip(probed, frozen, strict=True)}
    write(options, results)


def pretrain(method: str, options: argparse.Namespace, jobs: Jobs) -> Path:
    folder: Path = options.output_dir / f"encoder-{method}"
    images = [str(options.data / "photographs"), str(options.data / "train" / "images")]
    sizes = ["--image_size", str(options.image_size), "--patch_size", str(options.patch_size)]
    flags = ["--method", method, "--model", options.model, *sizes, "--dataset", *images]
    flags += ["--validation_fraction", "0.02"]
    if method == "feature":
        flags += ["--teacher", str(options.teacher), *_FEATURE]
        if options.teacher_image_size:
            flags += ["--teacher_image_size", str(options.teacher_image_size)]
    jobs.succeed("run_pretraining.py", *flags, *_length(options.pretraining_minutes, options), *_common(folder))
    return folder


def tune(kind: str, row: str, encoder: str, seed: int, options: argparse.Namespace, jobs: Jobs) -> dict[str, float]:
    """Return the metrics of a fine-tuned model on the test scenes."""
    flags, wanted = _KINDS[kind]
    folder: Path = options.output_dir / f"{kind}-{row.replace(' ', '-')}-{seed}"
    scratch = ["--from_scratch"] if row == RANDOM else []
    rate = options.linear_learning_rate if kind == "linear" else options.learning_rate
    rates = ["--learning_rate", str(rate), "--layer_decay", str(options.layer_decay)]
    flags = (*flags, "--model", encoder, "--dataset", str(options.data), *scratch, *rates, "--seed", str(seed))
    size = ("--image_size", str(options.image_size), "--per_device_train_batch_size", str(options.batch_size))
    length = _length(options.minutes, options)
    jobs.succeed("run_finetune.py", *flags, *size, *length, "--eval_steps", "0.25", *_common(folder))
    return {name: value for name, value in _metrics(folder).items() if name in wanted}


def probe(row: str, encoder: str, options: argparse.Namespace, jobs: Jobs) -> dict[str, float]:
    """Return the mean IoU of a linear probe of frozen patches."""
    folder: Path = options.output_dir / f"probe-{row.replace(' ', '-')}"
    flags = ["--dense", "--model", encoder, "--dataset", str(options.data), "--output_dir", str(folder)]
    jobs.succeed("run_evaluation.py", *flags)
    entries = json.loads((folder / "metrics.json").read_text())["results"]
    return {entry["name"]: entry["value"] for entry in entries if entry["metric"] == "mean_iou"}


def write(options: argparse.Namespace, results: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """Write the report, of what is finished so far."""
    lengths = f"{options.minutes:g} minutes for each fine-tuning"
    if not options.encoders:
        lengths += f", {options.pretraining_minutes:g} for a pre-training"
    if options.steps:
        lengths = f"A trial of {options.steps} steps"
    lines = [
        f"# Segmentation and detection of scenes, {TODAY}\n",
        f"{hardware()}; {versions('torch', 'transformers')}. `{command('dense')}`\n",
        f"{lengths}. Mean ± standard deviation over seeds, on the test split of {options.data.name}, in percent.\n",
    ]
    for kind, rows in results.items():
        names = list(dict.fromkeys(name for found in rows.values() for each in found for name in each))
        lines += [f"\n## {kind}\n", f"| weights | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for row, found in rows.items():
            cells = [_spread([each[name] for each in found if name in each]) for name in names]
            lines.append(f"| {row} | {' | '.join(cells)} |")
    stem = options.results / f"{options.name}_{hardware_slug()}_{TODAY}"
    shown = {name: str(value) for name, value in vars(options).items() if name != "results"}
    report = {"options": shown, "results": results}
    write_report(stem, report, "\n".join(lines))


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = 100 * statistics.mean(values)
    return f"{mean:.1f} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else f"{mean:.1f}"


def _length(minutes: float, options: argparse.Namespace) -> list[str]:
    if options.steps:
        return ["--max_steps", str(options.steps)]
    return ["--time_budget", f"{round(60 * minutes)}s"]


def _common(folder: Path) -> list[str]:
    return ["--report_to", "none", "--save_total_limit", "1", "--output_dir", str(folder)]


def _metrics(folder: Path) -> dict[str, Any]:
    entries = json.loads((folder / "metrics.json").read_text())["results"]
    return {entry["metric"]: entry["value"] for entry in entries}


if __name__ == "__main__":
    main()

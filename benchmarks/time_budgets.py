"""Runs with --time_budget: when they end, and what they learn beside runs that have as many steps from the start.

    python -m benchmarks.tuxstamps --size 96 --output_dir outputs/tuxstamps-96
    python -m benchmarks.time_budgets --data outputs/tuxstamps-96 --num_threads 1     # as many runs at a time as cores

Each method is trained with the defaults of a user on images of each size, of 8 x 8 patches, for --budget of wall-clock
time. A second run, for --compared_sizes, has the first one's number of steps as --max_steps, so that its schedules are
planned for them from its first step; the first run had to change its plan whenever the speed changed. Both are scored
by the loss on the same validation images, and by kNN on frozen features with the labels of tuning/train, on
tuning/val; no test image is read.

Every finished command is kept in --output_dir, so that an interrupted benchmark continues. Writes
benchmarks/time_budgets_<hardware>_<date>.md and .json.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from benchmarks.provenance import TODAY, command, hardware, hardware_slug, versions, write_report
from benchmarks.resumable import ROOT, Jobs

_SIDE = 8  # patches
_LOSS = "eval_loss"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("outputs/tuxstamps-96"), help="what tuxstamps wrote")
    parser.add_argument("--methods", nargs="+", default=["mae", "dino", "simmim"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 96], help="of images, in pixels")
    parser.add_argument("--compared_sizes", type=int, nargs="*", help="whose runs are made again (default: all)")
    parser.add_argument("--budget", default="10m")
    parser.add_argument("--model", default="vit-nano")
    parser.add_argument("--num_threads", type=int, help="of each run (default: one run at a time, on all cores)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/time_budgets"))
    options = parser.parse_args()
    jobs = Jobs(options.num_threads)

    def measure(combination: tuple[int, str]) -> dict[str, Any]:
        size, method = combination
        folder = options.output_dir / f"{method}-{size}"
        flags = [
            "--method", method, "--model", options.model,
            "--image_size", str(size), "--patch_size", str(size // _SIDE),
            "--dataset", str(options.data / "photographs"), str(options.data / "stamps" / "train"),
            "--report_to", "none", "--seed", "0",
        ]  # fmt: skip
        found: dict[str, Any] = {"size": size, "method": method}
        compared = options.sizes if options.compared_sizes is None else options.compared_sizes
        for name in ("budget", "fixed") if size in compared else ("budget",):
            length = ["--time_budget", options.budget] if name == "budget" else ["--max_steps", str(found["steps"])]
            outcome = jobs.succeed("run_pretraining.py", *flags, *length, "--output_dir", str(folder / name))
            found |= {f"{name} seconds": outcome.seconds, **read_run(folder / name, name)}
            probe = ("--probes", "knn", "--seed", "0", "--dataset", str(options.data / "tuning"))
            out = folder / f"{name}-frozen"
            jobs.succeed("run_evaluation.py", *probe, "--model", str(folder / name), "--output_dir", str(out))
            found[f"{name} knn"] = read_knn(out)
        return found

    combinations = [(size, method) for size in options.sizes for method in options.methods]
    report(options, jobs, jobs.map(measure, combinations))


def read_run(folder: Path, name: str) -> dict[str, Any]:
    """Return the last validation loss of a run; of one with a budget also the planned and the made steps."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    found: dict[str, Any] = {f"{name} loss": [entry[_LOSS] for entry in history if _LOSS in entry][-1]}
    if name == "budget":
        log = folder.with_name(f"{folder.name}.log").read_text()
        planned = re.search(r"--time_budget \S+: ([\d,]+) steps", log)
        assert planned is not None
        found |= {"planned": int(planned[1].replace(",", "")), "steps": history[-1]["step"]}
    return found


def read_knn(folder: Path) -> float:
    """Return the accuracy with the features that are best on the training images."""
    entries = json.loads((folder / "metrics.json").read_text())["results"]
    own = [entry for entry in entries if entry["metric"] == "accuracy" and not entry["reference"]]
    return float(max(own, key=lambda entry: entry["accuracy_where_chosen"] or 0)["value"])


def report(options: argparse.Namespace, jobs: Jobs, results: list[dict[str, Any]]) -> None:
    rows = "\n".join(
        f"| {each['size']} | {each['method']} | {each['budget seconds'] / 60:.1f} | {each['planned']:,} | "
        f"{each['steps']:,} | {each['budget loss']:.4f} | {shown(each, 'fixed loss', '.4f')} | "
        f"{each['budget knn']:.3f} | {shown(each, 'fixed knn', '.3f')} |"
        for each in results
    )
    text = f"""# Runs with --time_budget {options.budget}: {TODAY}

`{command("time_budgets")}`

{hardware()}; {versions("torch", "transformers", "datasets")}

{options.model}, {_SIDE} x {_SIDE} patches; threads of a run: {jobs.num_threads}, runs at a time: {jobs.num_jobs}.
Minutes are those from the start of Python to its end. Planned are the steps of the measured speed, made those that fit
as the speed changed; "fixed" is a run with so many steps as `--max_steps`. kNN on tuning/val, one seed.

| pixels | method | minutes | steps planned | made | loss | loss, fixed | kNN | kNN, fixed |
|---|---|---|---|---|---|---|---|---|
{rows}
"""
    write_report(ROOT / "benchmarks" / f"time_budgets_{hardware_slug()}_{TODAY}", results, text)
    print(text)


def shown(result: dict[str, Any], name: str, form: str) -> str:
    return format(result[name], form) if name in result else ""


if __name__ == "__main__":
    main()

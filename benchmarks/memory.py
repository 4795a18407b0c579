"""Compare the memory of training steps with the classes of transformers: `python -m benchmarks.memory CASE`.

The cases and sides are those of `benchmarks.train_step`. Each side takes its steps in a process of its own: on a CPU
the largest resident memory of the process counts, less what it had before there was a model, on a GPU the largest
memory that PyTorch's allocator gave out. Both include weights, gradients, optimizer, batch and activations.
Writes benchmarks/memory_<hardware>_<date>.json and .md.
"""

import commands  # noqa: F401  # isort: skip  (before torch: it chooses how threads wait)

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.provenance import (
    TODAY,
    command,
    hardware,
    hardware_slug,
    peak_resident_mib,
    versions,
    write_report,
)
from benchmarks.train_step import NUM_WARMUP, SIDES, Case, Step, build_side, tokenizer
from benchmarks.train_step_report import STOCK

ROOT = Path(__file__).resolve().parent.parent


def measure_here(case: Case, name: str, device: torch.device) -> float:
    """Take steps in this process and return the memory that they need, in MiB."""
    before = _peak_mib(device)
    targets = tokenizer(case, device) if case.method == "beit" else None
    step = Step(build_side(case, name, device), targets, device, compiled=False)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(NUM_WARMUP):
        step(number)
    return _peak_mib(device) - before


def _peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident_mib()


def measure(case: Case, name: str, device: str) -> float:
    """Return the memory in MiB that a side needs in a new process."""
    spec = ":".join(map(str, case))
    words = [sys.executable, "-m", "benchmarks.memory", spec, "--side", name, "--device", device]
    ran = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return float(json.loads(ran.stdout.splitlines()[-1]))


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Memory of a training step, ours against the classes of transformers",
        "",
        f"{report['date']}, {report['hardware']}, {report['versions']}: `{report['command']}`",
        "",
        f"Medians of {report['num_repeats']} processes of {NUM_WARMUP} steps, smallest and largest in brackets.",
        "",
        "| case | side | MiB | share of stock |",
        "|---|---|---|---|",
    ]
    for case, rows in report["cases"].items():
        stock = statistics.median(rows[STOCK])
        for name, values in rows.items():
            median = statistics.median(values)
            spread = f"({min(values):,.0f}-{max(values):,.0f})"
            lines.append(f"| {case} | {name} | {median:,.0f} {spread} | **{median / stock:.3f}** |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="+", type=Case.parse, help="METHOD:ENCODER:BATCH_SIZE")
    parser.add_argument("--num_repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument("--side", help="only print the memory of this side, measured in this process")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure_here(options.cases[0], options.side, torch.device(options.device))))
        return
    report: dict[str, Any] = {
        "date": TODAY,
        "command": command("memory"),
        "hardware": hardware(options.device),
        "versions": versions("torch", "transformers"),
        "num_repeats": options.num_repeats,
        "cases": {},
    }
    for case in options.cases:
        rows: dict[str, list[float]] = {name: [] for name in SIDES[case.method]}
        for _ in range(options.num_repeats):
            for name in rows:
                rows[name].append(round(measure(case, name, options.device), 1))
        report["cases"][str(case)] = rows
    write_report(options.output / f"memory_{hardware_slug(options.device)}_{TODAY}", report, markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()

"""Measure what each method costs beside MAE: input, step and memory at the same encoder and resolution.

    python -m benchmarks.method_costs --dataset outputs/tuxstamps-96/photographs

All methods have the settings of their recipes in recipes/, and take turns in one process. The input is measured on its
own in this process, so images/s of one data worker: reading, decoding, cropping, colors, masks and stacking, per image
and per million pixels of the crops. A step is forward, backward and update of float32 weights on a batch that is at
hand. Memory is the largest resident memory of a process of its own, less what it had before there was a model.
Writes benchmarks/method_costs_<hardware>_<date>.json and .md.
"""

import commands  # noqa: F401  # isort: skip  (before torch: it chooses how threads wait)

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
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
from commands.pretraining_batches import build_collator, transform_of
from commands.pretraining_settings import load_pretraining_settings
from data.images import ImageDataset, SourceSamples
from data.sources import open_source
from modeling import CONFIGS, MODELS

ROOT = Path(__file__).resolve().parent.parent
METHODS = [method for method, model in MODELS.items() if model.targets is None]
FIRST = "mae"


class Trial:
    """A method with its data set, collator and model."""

    def __init__(self, method: str, options: argparse.Namespace) -> None:
        sizes = ("--image_size", str(options.image_size), "--patch_size", str(options.patch_size))
        argv = ["--method", method, "--model", options.model, *sizes, "--dataset", str(options.dataset)]
        settings = load_pretraining_settings(argv, CONFIGS)
        source = open_source(str(options.dataset))
        scaled = CONFIGS[method].settings_for(len(source))
        chosen = {name: value for name, value in scaled.items() if not settings.values[name]}
        config = CONFIGS[method](encoder_config=settings.encoder_settings(), **{**settings.method_settings, **chosen})
        self.collator = build_collator(settings, config)
        samples = SourceSamples(source, np.arange(len(source)))
        self.images = ImageDataset(samples, transform_of(settings, config, None, train=True), train=True)
        self.batch_size, self.next = options.batch_size, 0
        self.batch = self.read()
        del self.batch["image_index"]
        torch.manual_seed(0)
        self.model = MODELS[method](config).train()
        trained = (parameter for parameter in self.model.parameters() if parameter.requires_grad)
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def read(self) -> dict[str, Any]:
        """Read a batch of further images."""
        numbers = range(self.next, self.next + self.batch_size)
        self.next += self.batch_size
        return self.collator([self.images.item(number % len(self.images), 0) for number in numbers])

    def step(self) -> None:
        """Take a training step."""
        self.model(**self.batch).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def megapixels(self) -> float:
        """Millions of pixels in the crops of an image."""
        pixels = (value for name, value in self.batch.items() if name.endswith("pixel_values"))
        return sum(crops.numel() / crops.shape[-3] for crops in pixels) / self.batch_size / 1e6


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return seconds per image of input and step, for each round, and the sizes of each method."""
    trials = {method: Trial(method, options) for method in options.methods}
    found: dict[str, dict[str, Any]] = {
        method: {"input": [], "step": [], "megapixels": round(trial.megapixels, 4)} for method, trial in trials.items()
    }
    for number in range(options.num_rounds + 1):
        for method, trial in trials.items():
            times = {"input": seconds_of(trial.read), "step": seconds_of(trial.step)}
            if number:  # the first round warms up
                for name, seconds in times.items():
                    found[method][name].append(round(seconds / options.batch_size, 6))
    return found


def measure_memory(options: argparse.Namespace) -> float:
    """Take two steps in this process and return the memory that model, batch and steps need, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    trial = Trial(options.methods[0], options)
    for _ in range(2):
        trial.step()
    before = pages * resource.getpagesize() / 2**20
    return peak_resident_mib() - before


def memory_of(method: str, options: argparse.Namespace) -> float:
    """Return the memory that a method needs in a new process, in MiB."""
    words = [sys.executable, "-m", "benchmarks.method_costs", *sys.argv[1:], "--methods", method, "--only_memory"]
    ran = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return round(float(json.loads(ran.stdout.splitlines()[-1])), 1)


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# What the methods cost",
        "",
        f"{report['date']}, {report['hardware']}, {report['versions']}: `{report['command']}`",
        "",
        f"{report['what']}, batches of {report['batch_size']}, float32. Medians of {report['num_rounds']} rounds; in "
        "brackets the ratio to MAE. Input: one process without workers.",
        "",
        "| method | crops, thousand pixels per image | input, ms per image | input, ms per thousand pixels "
        "| step, images/s | input and step in turns, images/s | share of the input | memory, MiB |",
        "|---" * 8 + "|",
    ]
    rows = report["methods"]

    def seconds(method: str, name: str) -> float:
        return statistics.median(rows[method][name])

    for method, row in rows.items():
        read, step = seconds(method, "input"), seconds(method, "step")
        ratio = seconds(FIRST, "step") / step
        both = (seconds(FIRST, "input") + seconds(FIRST, "step")) / (read + step)
        kilo = row["megapixels"] * 1e3
        lines.append(
            f"| {method} | {kilo:.1f} | {read * 1e3:.2f} | {read * 1e3 / kilo:.3f} | {1 / step:.1f} ({ratio:.2f}) "
            f"| {1 / (read + step):.1f} ({both:.2f}) | {read / (read + step):.0%} | {row['memory']:,.0f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", type=Path, required=True, help="folder of images")
    parser.add_argument("--model", default="vit-tiny")
    parser.add_argument("--image_size", type=int, default=96)
    parser.add_argument("--patch_size", type=int, default=16)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--only_memory", action="store_true", help="only print the memory of the first method")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    if options.only_memory:
        print(json.dumps(measure_memory(options)))
        return
    found = measure(options)
    for method, row in found.items():
        row["memory"] = memory_of(method, options)
    report = {
        "date": TODAY,
        "command": command("method_costs"),
        "hardware": hardware(),
        "versions": versions("torch", "transformers"),
        "what": f"{options.model}, {options.image_size} pixels, patches of {options.patch_size}",
        "batch_size": options.batch_size,
        "num_rounds": options.num_rounds,
        "methods": found,
    }
    write_report(options.output / f"method_costs_{hardware_slug()}_{TODAY}", report, markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()

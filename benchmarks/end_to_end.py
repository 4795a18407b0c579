"""Compare the speed of a whole run with the stock script: `python -m benchmarks.end_to_end`.

MAE vit-tiny at 96 pixels on a folder of JPEGs (500x375, quality 90, parts of the two photographs of scikit-learn), two
data workers. Stock is `benchmarks.stock_mae`; ours is run_pretraining.py as a user starts it, also with --cache and
with the published decoder, which stock has. Each training is a process of its own and is timed from outside by the
lines of its log: images per second between two of them, after `WARM_UP_SECONDS`, and the start until the first. The
sides alternate. In further processes the parts are timed alone: the input (the loader of the run, which nothing else
waits for) and the step (forward, backward and optimizer on one batch); the rest is what remains of a whole run.
Writes benchmarks/end_to_end_<hardware>_<date>.json, .md and .png.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from benchmarks.provenance import TODAY, command, hardware, hardware_slug, versions, write_report

ROOT = Path(__file__).resolve().parent.parent
WARM_UP_SECONDS = 5.0  # after the first step
MIN_LINES = 4  # of the log
NUM_PART_WARM_UPS = 2  # batches
ENCODER = {
    "hidden_size": 192,
    "num_hidden_layers": 12,
    "num_attention_heads": 3,
    "intermediate_size": 768,
    "patch_size": 16,
    "image_size": 96,
}
PUBLISHED_DECODER = [
    *("--decoder_hidden_size", "512", "--decoder_num_hidden_layers", "8"),
    *("--decoder_num_attention_heads", "16", "--decoder_intermediate_size", "2048"),
]
STOCK = "stock"
SIDES = (STOCK, "ours, published decoder", "ours", "ours, cache")
FIRST = (STOCK, "ours, published decoder", "ours, cache")  # sides that find nothing of an earlier one
PARTS = ("input", "step")


def make_images(folder: Path, num_images: int) -> None:
    """Write 500x375 JPEGs: random parts of the two photographs of scikit-learn, resized."""
    photographs = [Image.fromarray(pixels) for pixels in load_sample_images().images]  # 640x427
    random = np.random.default_rng(0)
    for number in range(num_images):
        scale = random.uniform(0.6, 1)
        width, height = 560 * scale, 420 * scale
        left, top = random.uniform(0, 640 - width), random.uniform(0, 427 - height)
        box = (left, top, left + width, top + height)
        part = photographs[number % 2].resize((500, 375), Image.Resampling.BICUBIC, box)
        part.save(folder / f"{number:05}.jpg", quality=90)


# ---- the sides ----


class Bench:
    """The commands of the sides, all with the same images, batch size and workers."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work, self.images = options, work, work / "images"
        self.environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(work / "home"),
            "PYTHONPATH": str(ROOT),
        }

    def arguments(self) -> dict[str, Any]:
        """Return settings of TrainingArguments that are not those of the side."""
        return {
            "output_dir": str(self.work / "out"),
            "per_device_train_batch_size": self.options.batch_size,
            "dataloader_num_workers": self.options.num_workers,
            "max_steps": 100_000,
            "logging_steps": self.options.logging_steps,
            "logging_first_step": True,
        }

    def our_flags(self, side: str) -> list[str]:
        flags = ["--dataset", str(self.images), "--method", "mae", "--model", "vit-tiny", "--image_size", "96"]
        flags += ["--validation_fraction", "0", "--save_strategy", "no", "--report_to", "none", "--overwrite"]
        for name, value in self.arguments().items():
            flags += [f"--{name}", str(value)]
        if side == "ours, published decoder":
            flags += PUBLISHED_DECODER
        return [*flags, "--cache", str(self.work / "cache")] if side == "ours, cache" else flags

    def training(self, side: str) -> list[str]:
        if side == STOCK:
            settings = [json.dumps(ENCODER), json.dumps(self.arguments())]
            return [sys.executable, "-m", "benchmarks.stock_mae", str(self.images), *settings]
        return [sys.executable, "run_pretraining.py", *self.our_flags(side)]

    def parts(self, side: str) -> list[str]:
        if side == STOCK:
            settings = ([str(self.images)], ENCODER, self.arguments())
            call = f"time_parts_of_stock({settings!r}, {self.options.part_seconds})"
        else:
            call = f"time_parts_of_ours({self.our_flags(side)!r}, {self.options.part_seconds})"
        first = "" if side == STOCK else "import commands; "  # before torch, as run_pretraining.py
        return [sys.executable, "-c", f"{first}from benchmarks import end_to_end; end_to_end.{call}"]

    # ---- measuring ----

    def train(self, side: str, seconds: float) -> dict[str, float]:
        """Train for some seconds after the warm-up; returns the seconds of the start, and images per second."""
        shutil.rmtree(self.work / "out", ignore_errors=True)
        began = time.perf_counter()
        process = subprocess.Popen(
            self.training(side),
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        lines: list[str] = []
        logged: list[tuple[int, float]] = []  # steps and times
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if not (found := re.match(r"step (\d+)", line)):
                continue
            logged.append((int(found[1]), time.perf_counter()))
            steady = [one for one in logged if one[1] >= logged[0][1] + WARM_UP_SECONDS]
            if not seconds or (len(steady) >= MIN_LINES and steady[-1][1] > steady[0][1] + seconds):
                break
        process.kill()  # its workers notice and end
        process.wait()
        if not logged:
            raise SystemExit(f"{side} did not train:\n{''.join(lines[-30:])}")
        start = logged[0][1] - began
        if not seconds:
            return {"start": start}
        (first_step, first), (last_step, last) = steady[0], steady[-1]
        rate = (last_step - first_step) * self.options.batch_size / (last - first)
        return {"start": start, "images/s": rate}

    def time_parts(self, side: str) -> dict[str, float]:
        """Return the milliseconds per image of each part alone."""
        shutil.rmtree(self.work / "out", ignore_errors=True)
        run = subprocess.run(
            self.parts(side), cwd=ROOT, env=self.environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return json.loads(run.stdout.splitlines()[-1])


def time_parts_of_stock(settings: tuple[list[str], dict, dict], seconds: float) -> None:
    from benchmarks.stock_mae import build_trainer

    print_parts(build_trainer(*settings), seconds)


def time_parts_of_ours(flags: list[str], seconds: float) -> None:
    """Let the command build the trainer as for a run, and time its parts where it would train."""
    import run_pretraining
    from training.trainer import MimTrainer

    def train(trainer: Any, **kwargs: Any) -> None:
        print_parts(trainer, seconds)
        sys.exit()

    MimTrainer.train = train  # type: ignore[method-assign, assignment]
    run_pretraining.main(flags)


def print_parts(trainer: Any, seconds: float) -> None:
    """Print the milliseconds per image of the loader and of the step of a `Trainer`."""
    milliseconds, batch = time_loader(trainer.get_train_dataloader(), seconds)
    parts, model = {"input": milliseconds}, trainer.model.train()
    optimizer = trainer.create_optimizer()

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    parts["step"] = time_calls(step, seconds)
    batch_size = len(batch["pixel_values"])
    print("\n" + json.dumps({name: value / batch_size for name, value in parts.items()}))


def time_loader(loader: Any, seconds: float) -> tuple[float, dict[str, Any]]:
    """Return the milliseconds of a batch on average, and a batch."""
    batches = (batch for _ in itertools.count() for batch in loader)
    milliseconds = time_calls(lambda: next(batches), seconds)
    batch = next(batches)
    batch.pop("image_index", None)
    return milliseconds, batch


def time_calls(call: Any, seconds: float) -> float:
    """Return the milliseconds of a call on average."""
    for _ in range(NUM_PART_WARM_UPS):
        call()
    start, num_calls = time.perf_counter(), 0
    while time.perf_counter() < start + seconds:
        call()
        num_calls += 1
    return 1000 * (time.perf_counter() - start) / num_calls


# ---- equal losses ----


def losses_of_equal_models(images: Path, num_steps: int = 5) -> list[tuple[float, float]]:
    """Train stock and ours with the published decoder from the same weights on the same crops and masks.

    Returns the pairs of losses, stock's first.
    """
    from benchmarks.stock_mae import Transform, build_model
    from hub.init_from import open_starting_model
    from hub.init_weights import read_weights
    from modeling.mae import MaeConfig, MaeForPreTraining

    torch.manual_seed(0)
    stock = build_model(ENCODER)
    with tempfile.TemporaryDirectory() as folder:
        stock.save_pretrained(folder)
        start = open_starting_model(folder, "mae")
        ours = MaeForPreTraining(MaeConfig(encoder_config={**ENCODER, "layer_norm_eps": stock.config.layer_norm_eps}))
        unused = ours.load_state_dict(read_weights(start, ours).state, strict=False)
    assert not unused.unexpected_keys
    paths = sorted(images.iterdir())[: 16 * num_steps]
    transform = Transform(ENCODER["image_size"])
    pixels = torch.stack([transform.transform(Image.open(path)) for path in paths])
    noise = torch.rand(len(pixels), (ENCODER["image_size"] // ENCODER["patch_size"]) ** 2)
    masked = noise.argsort(1).argsort(1) >= noise.shape[1] // 4
    optimizers = [
        torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3) for model in (stock, ours)
    ]
    pairs = []
    for batch, mask in zip(pixels.split(16), masked.split(16), strict=True):
        losses = [
            stock(pixel_values=batch, noise=mask.float()).loss,
            ours(batch, mask, int(mask.sum())).loss,
        ]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        pairs.append((losses[0].item(), losses[1].item()))
    return pairs


# ---- report ----


def summarize(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Return the medians, the extremes, and the decomposition of each side."""
    sides: dict[str, dict[str, Any]] = {}
    for side in rounds[0]:
        values = {name: [one[side][name] for one in rounds] for name in rounds[0][side]}
        medians = {name: statistics.median(list_of) for name, list_of in values.items()}
        ratios = [one[side]["images/s"] / one[STOCK]["images/s"] for one in rounds]
        whole = 1000 / medians["images/s"]
        sides[side] = {
            "rounds": values,
            "median": medians,
            "ratios to stock": ratios,
            "ratio to stock": statistics.median(ratios),
            "milliseconds per image": {
                "whole": whole,
                **{name: medians[name] for name in PARTS},
                "rest": whole - sum(medians[name] for name in PARTS),
            },
        }
    return sides


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# A whole run, ours against the stock script",
        "",
        f"{report['date']}, {report['hardware']}, {report['versions']}: `{report['command']}`",
        "",
        "Stock is benchmarks/stock_mae.py, which does what run_mae.py of transformers does, and fills its tables of "
        f"positions. MAE vit-tiny at {ENCODER['image_size']} px, batches of {report['batch_size']}, "
        f"{report['num_workers']} data workers, {report['num_images']:,} JPEGs of 500x375. "
        f"Medians of {report['num_rounds']} rounds, lowest and "
        "highest in brackets; the ratio is the median of the rounds' ratios. Start: from the start of the process to "
        "the end of the first step, when earlier runs have seen the images; not part of the images/s.",
        "",
        "| | images/s | times stock | start, s |",
        "|---|---|---|---|",
    ]
    for side, found in report["sides"].items():
        low, high = min(found["ratios to stock"]), max(found["ratios to stock"])
        cells = [spread_of(found["rounds"][name], found["median"][name]) for name in ("images/s", "start")]
        lines.append(
            f"| {side} | {cells[0]} | **{found['ratio to stock']:.2f}** ({low:.2f}-{high:.2f}) | {cells[1]} |"
        )
    lines += [
        "",
        "Where the time goes, in milliseconds per image: input, the data loader alone with its workers; step, "
        "forward, backward and optimizer on one batch without loading; rest, what the whole run takes beyond the two "
        "(Trainer, logging, and what workers and step take from each other; negative where they overlap).",
        "",
        "| | whole | input | step | rest |",
        "|---|---|---|---|---|",
    ]
    for side, found in report["sides"].items():
        parts = found["milliseconds per image"]
        cells = [spread_of(found["rounds"][name], parts[name]) for name in PARTS]
        lines.append(f"| {side} | {parts['whole']:.2f} | {cells[0]} | {cells[1]} | {parts['rest']:.2f} |")
    starts = ", ".join(f"{side} {seconds:.1f} s" for side, seconds in report["first starts"].items() if side in FIRST)
    losses = ", ".join(f"{stock:.6f} / {ours:.6f}" for stock, ours in report["losses"])
    lines += [
        "",
        f"The first starts, in which ours reads the headers of all images, and writes the cache: {starts}.",
        "",
        "Ours has a decoder of 2 blocks x 192 beside vit-tiny by default, the published one and stock's has 8 x 512. "
        "With different decoders the losses are those of different models, so they are not compared here "
        "(benchmarks/decoder_quality.py compares the encoders at equal time). With the published decoder both are the "
        f"same model: from the same weights, on the same crops and masks, the losses of {len(report['losses'])} AdamW "
        f"steps are (stock / ours) {losses}.",
        "",
    ]
    return "\n".join(lines)


def spread_of(values: list[float], median: float) -> str:
    return f"{median:.3g} ({min(values):.3g}-{max(values):.3g})"


def plot(report: dict[str, Any], file: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sides = report["sides"]
    figure, (speed, parts) = plt.subplots(1, 2, figsize=(10, 2.6), layout="constrained", sharey=True)
    medians = [found["median"]["images/s"] for found in sides.values()]
    extremes = [found["rounds"]["images/s"] for found in sides.values()]
    lower = [median - min(values) for median, values in zip(medians, extremes, strict=True)]
    upper = [max(values) - median for median, values in zip(medians, extremes, strict=True)]
    colors = ["#9a9a9a", *["#1f6fb4"] * (len(sides) - 1)]
    bars = speed.barh(list(sides), medians, xerr=[lower, upper], color=colors, capsize=2)
    labels = [f"{found['median']['images/s']:.0f}, {found['ratio to stock']:.1f}x" for found in sides.values()]
    speed.bar_label(bars, labels, padding=6, fontsize=8)
    speed.set(xlabel="images/s of a whole run", xlim=(0, 1.3 * max(medians)))
    speed.invert_yaxis()
    left = [0.0] * len(sides)
    for name, color in zip((*PARTS, "rest"), ("#e0a030", "#1f6fb4", "#c0c0c0"), strict=True):
        widths = [max(0.0, found["milliseconds per image"][name]) for found in sides.values()]
        parts.barh(list(sides), widths, left=left, color=color, label=name)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    parts.set(xlabel="milliseconds per image")
    parts.legend(fontsize=8, frameon=False)
    for axis in (speed, parts):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_images", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--num_workers", type=int, default=2)
    parser.add_argument("--logging_steps", type=int, default=2, help="of both sides")
    parser.add_argument("--num_rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=40, help="of each training, after the warm-up")
    parser.add_argument("--part_seconds", type=float, default=8, help="of each part")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    machine = hardware()  # before this adds to the load
    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(options, Path(temporary))
        bench.images.mkdir()
        make_images(bench.images, options.num_images)
        losses = losses_of_equal_models(bench.images)
        print("losses", losses, flush=True)
        first_starts = {side: bench.train(side, 0)["start"] for side in SIDES}
        print("first starts", first_starts, flush=True)
        rounds: list[dict[str, dict[str, float]]] = []
        for number in range(options.num_rounds):
            order = SIDES if number % 2 == 0 else SIDES[::-1]
            found = {side: bench.train(side, options.seconds) | bench.time_parts(side) for side in order}
            rounds.append({side: found[side] for side in SIDES})
            print(number, json.dumps(rounds[-1]), flush=True)
    report: dict[str, Any] = {
        "date": TODAY,
        "command": command("end_to_end"),
        "hardware": machine,
        "versions": versions("torch", "transformers", "accelerate", "datasets", "pillow"),
        **{name: getattr(options, name) for name in ("num_images", "batch_size", "num_workers", "num_rounds")},
        "seconds": options.seconds,
        "first starts": first_starts,
        "losses": losses,
        "sides": summarize(rounds),
    }
    stem = options.output / f"end_to_end_{hardware_slug()}_{TODAY}"
    write_report(stem, report, markdown(report), partial(plot, report))
    print(markdown(report))


if __name__ == "__main__":
    main()

"""Trace the steps of a real pre-training run: `python -m benchmarks.step_trace --model vit-tiny`.

Runs `run_pretraining.py` with the flags that this command does not know, by default on the bundled photographs, and
observes it in three windows after `--before` steps: 25 steps timed part by part, with a log at the end; 20 steps
under PyTorch's profiler without a log, in which everything that makes the host wait for the device is counted; and,
on a GPU, 4 steps in CUDA's sync debug mode, which names the lines that wait. On a CPU nothing waits, so there the same
operations are counted that would: `item` and `nonzero`. Masks and collation are timed on a batch of the run, because
data workers do them in other processes.
Writes benchmarks/step_trace_<model>_<hardware>_<date>.json and .md.
"""

import commands  # noqa: F401  # isort: skip  (before torch: it chooses how threads wait)

import argparse
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

import run_pretraining
from benchmarks.provenance import TODAY, command, hardware, hardware_slug, versions, write_report
from data.collators import stack_items

NUM_TIMED, NUM_TRACED, NUM_WATCHED = 25, 20, 4
ROOT = Path(__file__).resolve().parent.parent
# What waits for the device, or would if there were one. Copies to pageable memory wait, whatever their name says.
WAITS = (
    *("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH"),
    *("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"),
)
# Methods of the trainer and of what it holds, and the part of the step that each belongs to.
PARTS = {
    "get_batch_samples": "waiting for the batch",
    "_count_losses": "counting the items of the losses",
    "_prepare_inputs": "copy to the device",
    "_with_targets": "targets",
    "_reseed": "seed of the step",
    "compute_loss": "forward",
    "accelerator.backward": "backward",
    "guard.watch_loss": "guard against NaN",
    "guard.watch_gradient": "guard against NaN",
    "guard.skip_update_if_raised": "guard against NaN",
    "_clip_grad_norm": "clipping",
    "_get_grad_norm": "gradient norm",
    "optimizer.step": "optimizer",
    "lr_scheduler.step": "learning rate",
    "callback_handler.call_event": "callbacks",
    "_maybe_log_save_evaluate": "logging",
}
METHOD_ITSELF = ("waiting for the batch", "copy to the device", "targets", "forward", "backward", "optimizer")


class Parts:
    """Time the parts of a step on the host, without the parts inside them."""

    def __init__(self, trainer: Any) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.inside = [0.0]  # seconds of inner parts, by depth
        for path, label in PARTS.items():
            *owners, name = path.split(".")
            owner = trainer
            for each in owners:
                owner = getattr(owner, each, None)
            if (method := getattr(owner, name, None)) is not None:
                setattr(owner, name, update_wrapper(partial(self.run, label, method), method))

    def run(self, label: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        self.inside.append(0.0)
        try:
            with record_function(label):
                return method(*args, **kwargs)
        finally:
            seconds = time.perf_counter() - start
            self.seconds[label] += seconds - self.inside.pop()
            self.inside[-1] += seconds


class Observer(TrainerCallback):
    """Observe the windows; a failure of one is recorded and the training goes on."""

    def __init__(self, trainer: Any, before: int, report: dict[str, Any]) -> None:
        self.trainer, self.before, self.report = trainer, before, report
        self.device = trainer.args.device.type
        self.lines: Counter[str] = Counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.parts = Parts(self.trainer)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = {
            self.before: self.start_timing,
            self.before + NUM_TIMED: self.start_tracing,
            self.before + NUM_TIMED + NUM_TRACED: self.start_watching,
        }
        if state.global_step in steps:
            self.attempt(steps[state.global_step])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attempt(self.stop_watching)
        end = self.before + NUM_TIMED  # what follows is slowed by the profiler
        self.report["log"] = [entry for entry in state.log_history if "loss" in entry and entry["step"] <= end]
        self.attempt(self.time_collator)

    def attempt(self, do: Callable[[], None]) -> None:
        try:
            do()
        except Exception as error:
            traceback.print_exc()
            self.report.setdefault("failed", []).append(f"{do.__name__}: {type(error).__name__}: {error}")

    def start_timing(self) -> None:
        self.parts.seconds.clear()
        self.synchronize()
        self.started = time.perf_counter()

    def start_tracing(self) -> None:
        self.synchronize()
        per_step = (time.perf_counter() - self.started) / NUM_TIMED
        parts = {label: seconds / NUM_TIMED for label, seconds in _largest_first(self.parts.seconds)}
        parts["loop of Trainer"] = per_step - sum(parts.values())
        self.report |= {"seconds_per_step": per_step, "host_seconds": parts}
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.device == "cuda" else [])]
        self.profiler: Any = profile(activities=activities)
        self.profiler.start()

    def start_watching(self) -> None:
        self.profiler.stop()
        self.report |= summarize(self.profiler.events())
        if self.device == "cuda":
            warnings.simplefilter("always")
            self.show, warnings.showwarning = warnings.showwarning, self.keep_line
            torch.cuda.set_sync_debug_mode("warn")

    def keep_line(self, message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchronizing" not in str(message):
            return
        frames = [frame for frame in traceback.extract_stack() if "site-packages/torch/" not in frame.filename]
        frames = [frame for frame in frames if "step_trace" not in frame.filename][-3:]
        self.lines[" < ".join(f"{_short(f.filename)}:{f.lineno} {f.name}" for f in frames[::-1])] += 1

    def stop_watching(self) -> None:
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = self.show
            self.report["waiting_lines"] = dict(self.lines.most_common())

    def time_collator(self) -> None:
        """Time a batch on one thread, as in a data worker."""
        trainer = self.trainer
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        start = time.perf_counter()
        items = trainer.train_dataset.__getitems__(list(range(trainer.args.train_batch_size)))
        decoding = time.perf_counter() - start
        both = _median_seconds(lambda: trainer.data_collator(items))
        stacking = _median_seconds(lambda: stack_items(items))
        torch.set_num_threads(threads)
        self.report["batch_seconds"] = {"images": decoding, "stacking": stacking, "masks": max(0.0, both - stacking)}
        self.report["num_workers"] = trainer.args.dataloader_num_workers
        self.report["batch_size"] = trainer.args.train_batch_size

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


def _median_seconds(do: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        do()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _largest_first(seconds: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(seconds.items(), key=lambda pair: -pair[1])


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else "/".join(path.parts[-2:])


def summarize(events: Sequence[Any]) -> dict[str, Any]:
    """Return what waited, by operation and part, and the busy seconds of the GPU per step."""
    labels = set(PARTS.values())
    spans = [(e.time_range.start, e.time_range.end, e.name) for e in events if e.name in labels]
    spans = [span for span in spans if span[1] > span[0]]
    first, last = min(start for start, _, _ in spans), max(end for _, end, _ in spans)
    waits: Counter[str] = Counter()
    for event in events:
        at = event.time_range.start
        if event.name.startswith(WAITS) and first <= at <= last:
            around = [(end - start, name) for start, end, name in spans if start <= at <= end]
            waits[f"{event.name} in {min(around)[1] if around else 'loop of Trainer'}"] += 1
    on_device = [e for e in events if e.device_type == DeviceType.CUDA and e.name not in labels]
    on_device = [e for e in on_device if not getattr(e, "is_user_annotation", False)]
    kernels: defaultdict[str, float] = defaultdict(float)
    for event in on_device:
        kernels[event.name.split("<")[0][:60]] += event.time_range.elapsed_us() / 1e6
    of_parts: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.name in labels and event.device_type == DeviceType.CPU:
            of_parts[event.name] += event.device_time_total / 1e6  # of the same thread: not the backward pass
    return {
        "waits": dict(waits.most_common()),
        "device_seconds": sum(kernels.values()) / NUM_TRACED,
        "device_seconds_of_parts": {n: s / NUM_TRACED for n, s in _largest_first(of_parts) if s},
        "kernels": {name: seconds / NUM_TRACED for name, seconds in _largest_first(kernels)[:15]},
    }


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# Trace of a training step: {report['arguments']}",
        "",
        f"{report['date']}, {report['hardware']}, {report['versions']}: `{report['command']}`",
        "",
    ]
    if "seconds_per_step" in report:
        per_step = report["seconds_per_step"]
        lines += [
            f"{1000 * per_step:.1f} ms per step over {NUM_TIMED} steps with one log. Time of the training process on "
            "the host, which on a GPU runs ahead of the device; each part without the parts inside it:",
            "",
            "| part | ms per step | share |",
            "|---|---|---|",
        ]
        for label, seconds in report["host_seconds"].items():
            lines.append(f"| {label} | {1000 * seconds:.3f} | {seconds / per_step:.2%} |")
        overhead = sum(s for label, s in report["host_seconds"].items() if label not in METHOD_ITSELF)
        lines += ["", f"All but {', '.join(METHOD_ITSELF)}: **{overhead / per_step:.2%}** of the step.", ""]
    if report.get("device_seconds"):
        busy = report["device_seconds"]
        lines += [
            f"GPU: {1000 * busy:.1f} ms of kernels and copies per step, "
            f"{busy / report['seconds_per_step']:.1%} of it. Launched by: "
            + ", ".join(f"{n} {1000 * s:.2f} ms" for n, s in report["device_seconds_of_parts"].items())
            + "; the rest by the backward pass.",
            "",
        ]
    if "batch_seconds" in report:
        masks, stacking = report["batch_seconds"]["masks"], report["batch_seconds"]["stacking"]
        share = (
            f" ({(masks + stacking) / report['seconds_per_step']:.2%} of a step)"
            if "seconds_per_step" in report
            else ""
        )
        lines += [
            f"A batch of {report['batch_size']} images on one core: images {report['batch_seconds']['images']:.3f} s, "
            f"stacking {1000 * stacking:.2f} ms, masks {1000 * masks:.2f} ms{share}; "
            f"{report['num_workers']} worker processes did this.",
            "",
        ]
    if "waits" in report:
        found = [f"- {count} x {name}" for name, count in report["waits"].items()]
        lines += [f"Waiting for the device in {NUM_TRACED} steps without a log:", "", *(found or ["- nothing"]), ""]
    if "waiting_lines" in report:
        found = [f"- {count} x {name}" for name, count in report["waiting_lines"].items()]
        lines += [f"Lines that wait, in {NUM_WATCHED} steps with a log:", "", *(found or ["- none"]), ""]
    if speeds := [entry for entry in report.get("log", []) if "images_per_second" in entry]:
        lines += ["Log:", "", "| step | images/s | TFLOP/s (MFU) | waits for data |", "|---|---|---|---|"]
        for entry in speeds:
            mfu = entry.get("model_flops_utilization")
            lines.append(
                f"| {entry['step']} | {entry['images_per_second']:,.4g} | {entry['flops_per_second'] / 1e12:.3g}"
                f"{'' if mfu is None else f' ({mfu:.1%})'} | {entry['data_wait_share']:.1%} |"
            )
    return "\n".join([*lines, *(f"- failed: {text}" for text in report.get("failed", [])), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--dataset", default="sample")
    parser.add_argument("--model", default="vit-tiny")
    parser.add_argument("--before", type=int, default=NUM_TIMED, help="steps before the first window, in 25s")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options, flags = parser.parse_known_args()
    num_steps = options.before + NUM_TIMED + NUM_TRACED + NUM_WATCHED
    device = "cpu" if "--use_cpu" in flags or not torch.cuda.is_available() else "cuda"
    report: dict[str, Any] = {
        "date": TODAY,
        "command": command("step_trace"),
        "arguments": " ".join(["--model", options.model, *flags]),
        "hardware": hardware(device),
        "versions": versions("torch", "transformers", "accelerate"),
    }
    train = run_pretraining.train

    def observed(*args: Any, callbacks: Sequence[Any] = (), **kwargs: Any) -> None:
        train(*args, callbacks=[*callbacks, lambda trainer: Observer(trainer, options.before, report)], **kwargs)

    with tempfile.TemporaryDirectory() as output, mock.patch.object(run_pretraining, "train", observed):
        argv = ["--dataset", options.dataset, "--model", options.model, "--max_steps", str(num_steps), *flags]
        argv += ["--logging_steps", str(NUM_TIMED), "--save_strategy", "no", "--eval_strategy", "no"]
        try:
            run_pretraining.main([*argv, "--output_dir", output])
        finally:
            stem = options.output / f"step_trace_{options.model}_{hardware_slug(device)}_{TODAY}"
            write_report(stem, report, markdown(report))
            print(markdown(report))
    sys.exit(1 if report.get("failed") else 0)


if __name__ == "__main__":
    main()

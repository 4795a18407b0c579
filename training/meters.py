"""Metrics and speed, summed between two lines of the log."""

import time
from collections.abc import Mapping
from typing import Any

import torch


class MetricSums:
    """Metrics by name, summed on the device over the micro-batches since the last reading."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, metrics: Mapping[str, torch.Tensor]) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def read(self, accelerator: Any) -> dict[str, torch.Tensor]:
        sums, self.sums = self.sums, {}
        return accelerator.reduce(sums, reduction="sum") if sums else {}


class Meter:
    """The speed of training since the last reading; evaluation and saving are not counted."""

    def __init__(self) -> None:
        self.start(0)
        self.seconds_per_step: float | None = None

    def start(self, step: int) -> None:
        self.step, self.started, self.seconds_waiting = step, time.perf_counter(), 0.0

    def read(self, step: int, images_per_step: int, steps_left: int) -> dict[str, float]:
        seconds, steps = time.perf_counter() - self.started, step - self.step
        waiting = self.seconds_waiting
        self.start(step)
        if not steps:
            return {}
        self.seconds_per_step = seconds / steps
        return {
            "images_per_second": round(images_per_step / self.seconds_per_step, 2),
            "data_wait_share": round(waiting / seconds, 4),
            "images_seen": step * images_per_step,
            "eta_seconds": round(self.seconds_per_step * steps_left, 1),
        }

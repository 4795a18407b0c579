"""Metrics and speed, summed between two lines of the log."""

import multiprocessing
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import psutil
import torch

_BUSY = 0.9  # of the cores: workers and step wait for each other
_NOTICEABLE = 0.05


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
    """The speed of training since the last reading; evaluation and saving are not counted.

    Args:
        num_step_threads: Threads of this process that compute.
        num_cores: Cores for them and for the data workers.
    """

    def __init__(self, num_step_threads: int, num_cores: int) -> None:
        self.num_step_threads, self.num_cores = num_step_threads, num_cores
        self.start(0)
        self.seconds_per_step: float | None = None

    def start(self, step: int) -> None:
        self.step, self.started, self.seconds_waiting = step, time.perf_counter(), 0.0
        self.cpu_started, self.worker_seconds = time.process_time(), cpu_seconds_of_workers()

    def exclude(self, seconds: float, cpu_seconds: float) -> None:
        """Do not count time that was not spent on training."""
        self.started += seconds
        self.cpu_started += cpu_seconds

    def read(self, step: int, images_per_step: int, steps_left: int) -> dict[str, float]:
        seconds, steps = time.perf_counter() - self.started, step - self.step
        waiting, worker_share = self.seconds_waiting, self._worker_share(seconds)
        self.start(step)
        if not steps:
            return {}
        self.seconds_per_step = seconds / steps
        return {
            "images_per_second": round(images_per_step / self.seconds_per_step, 2),
            "data_wait_share": round(waiting / seconds, 4),
            **({} if worker_share is None else {"worker_cpu_share": round(worker_share, 4)}),
            "images_seen": step * images_per_step,
            "eta_seconds": round(self.seconds_per_step * steps_left, 1),
        }

    def _worker_share(self, seconds: float) -> float | None:
        """Return the workers' share of the cores if they take it from the step, which has to share full cores."""
        worker_seconds, cores = cpu_seconds_of_workers(), self.num_cores * seconds
        used = sum(max(0.0, now - self.worker_seconds.get(pid, 0.0)) for pid, now in worker_seconds.items())
        are_crowded = len(worker_seconds) + self.num_step_threads > self.num_cores
        is_busy = used + time.process_time() - self.cpu_started >= _BUSY * cores
        return min(1.0, used / cores) if are_crowded and is_busy and used >= _NOTICEABLE * cores else None


def cpu_seconds_of_workers() -> dict[int, float]:
    """Return the CPU time that each living process which this one started for data has used so far."""
    seconds: dict[int, float] = {}
    for worker in multiprocessing.active_children():
        with suppress(psutil.Error):  # it has just ended
            assert worker.pid is not None
            seconds[worker.pid] = sum(psutil.Process(worker.pid).cpu_times()[:2])
    return seconds

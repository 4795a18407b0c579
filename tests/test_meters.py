"""The speed in a line of the log, and what data workers take from it."""

import multiprocessing
import time

import pytest

from training import meters
from training.meters import Meter, cpu_seconds_of_workers


def read_after(monkeypatch, workers: dict[int, tuple[float, float]], own: float, excluded: float = 0.0) -> dict:
    """Read a meter on two cores with two step threads after 10 seconds.

    Args:
        workers: CPU seconds of each worker before and after.
        own: CPU seconds of this process.
        excluded: Seconds with one busy core that are not training.
    """
    clock, cpu = iter([100.0, 110.0, 110.0]), iter([5.0, 5.0 + own, 5.0 + own])
    used = iter(
        [{pid: before for pid, (before, _) in workers.items()}, *2 * [{k: v for k, (_, v) in workers.items()}]]
    )
    monkeypatch.setattr(meters.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(meters.time, "process_time", lambda: next(cpu))
    monkeypatch.setattr(meters, "cpu_seconds_of_workers", lambda: next(used))
    meter = Meter(num_step_threads=2, num_cores=2)
    meter.exclude(excluded, excluded)
    return meter.read(step=4, images_per_step=8, steps_left=0)


def test_workers__on_full_cores_are_reported_with_their_share(monkeypatch):
    entry = read_after(monkeypatch, {7: (1.0, 5.0), 8: (1.0, 6.0)}, own=10.5)
    assert entry["worker_cpu_share"] == 0.45  # 9 of 20 seconds
    assert entry["images_per_second"] == 3.2


@pytest.mark.parametrize(
    ("workers", "own"),
    [
        ({}, 20.0),  # no workers
        ({7: (1.0, 5.0), 8: (1.0, 6.0)}, 6.0),  # a quarter of the cores is idle
        ({7: (1.0, 1.3), 8: (1.0, 1.3)}, 19.0),  # 3 %
    ],
)
def test_workers__that_take_nothing_are_not_reported(workers, own, monkeypatch):
    assert "worker_cpu_share" not in read_after(monkeypatch, workers, own)


def test_workers__with_a_core_for_everybody_are_not_reported(monkeypatch):
    monkeypatch.setattr(meters, "cpu_seconds_of_workers", lambda: {7: time.perf_counter()})
    meter = Meter(num_step_threads=1, num_cores=2)
    assert "worker_cpu_share" not in meter.read(step=1, images_per_step=8, steps_left=0)


def test_excluded_time__does_not_count_as_busy(monkeypatch):
    workers = {7: (1.0, 3.0), 8: (1.0, 3.0)}
    assert "worker_cpu_share" in read_after(monkeypatch, workers, own=14.0)
    assert "worker_cpu_share" not in read_after(monkeypatch, workers, own=10.0, excluded=4.0)  # 10 of 12 seconds


def test_new_workers__count_from_their_start(monkeypatch):
    assert read_after(monkeypatch, {9: (0.0, 8.0)}, own=12.0)["worker_cpu_share"] == 0.4


def burn(seconds: float, done, end) -> None:
    while time.process_time() < seconds:
        pass
    done.set()
    end.wait()


def test_cpu_seconds__are_those_of_processes_that_run():
    done, end = multiprocessing.Event(), multiprocessing.Event()
    worker = multiprocessing.Process(target=burn, args=(0.3, done, end))
    worker.start()
    done.wait()
    assert cpu_seconds_of_workers()[worker.pid] >= 0.25  # the kernel counts in hundredths
    end.set()
    worker.join()
    assert worker.pid not in cpu_seconds_of_workers()

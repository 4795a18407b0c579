"""Run commands of this project so that an interrupted benchmark continues: a finished command is not run again."""

import json
import os
import queue
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
_WRITTEN_LAST = ("README.md", "report.html")  # by training, by evaluation

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Args:
        seconds: The time that it took, including interrupted runs.
        output: The end of what it printed.
    """

    command: Sequence[str]
    seconds: float
    exit_code: int
    output: str = ""


def run(
    script: str,
    *flags: str,
    python: str = sys.executable,
    environment: Mapping[str, str] | None = None,
    cores: Collection[int] = (),
    final: Collection[int] = (),
) -> Outcome:
    """Run a command unless it has finished before, with its output in a file next to its results.

    Args:
        script: A file of this project, or a module of it.
        cores: Of the CPU, to which the command is restricted; empty for all.
        final: Exit codes other than 0 after which it is not run again either.
    """
    out = Path(flags[flags.index("--output_dir") + 1])
    command, record = [script, *flags], out.parent / f"{out.name}.json"
    done: dict[str, Any] = {"command": command, "seconds": 0.0, "finished": False}
    if record.exists():
        done = json.loads(record.read_text())
    if done["command"] != command:
        if done["finished"] or out.exists():
            raise SystemExit(
                f"{out} belongs to another command, {' '.join(done['command'])}: use another --output_dir"
            )
        done = {"command": command, "seconds": 0.0, "finished": False}  # the other one failed at its start
    log = out.parent / f"{out.name}.log"
    if done["finished"] and any((out / name).exists() for name in _WRITTEN_LAST):
        return Outcome(command, done["seconds"], 0)
    if done.get("exit_code") in final:
        return Outcome(command, done["seconds"], done["exit_code"], log.read_text()[-3000:])
    out.parent.mkdir(parents=True, exist_ok=True)
    program = [str(ROOT / script)] if script.endswith(".py") else ["-m", script]
    environment = {**(os.environ if environment is None else environment), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(ROOT)]))
    started, exit_code = time.perf_counter(), None
    try:
        with log.open("w") as file:
            process = subprocess.Popen([python, *program, *flags], stdout=file, stderr=file, env=environment)
            if cores:
                os.sched_setaffinity(process.pid, cores)
            try:
                exit_code = process.wait()
            finally:
                process.kill()
    finally:
        done |= {"finished": exit_code == 0, "exit_code": exit_code}
        done["seconds"] += time.perf_counter() - started
        record.write_text(json.dumps(done) + "\n")
    assert exit_code is not None
    print(f"{done['seconds']:6.0f} s  {out.name}{f'  exit code {exit_code}' if exit_code else ''}", flush=True)
    return Outcome(command, done["seconds"], exit_code, log.read_text()[-3000:])


class Jobs:
    """Run commands beside each other, each with so many threads on as many cores of its own.

    Args:
        num_threads: Of a command; none: one command at a time, on all cores.
    """

    def __init__(self, num_threads: int | None = None) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self.num_threads = num_threads or len(cores)
        self.environment = {**os.environ, "OMP_NUM_THREADS": str(self.num_threads)}
        self.num_jobs = max(1, len(cores) // self.num_threads)
        self._free: queue.SimpleQueue[Collection[int]] = queue.SimpleQueue()
        for number in range(self.num_jobs):
            self._free.put(cores[number * self.num_threads : (number + 1) * self.num_threads])

    def run(self, script: str, *flags: str, environment: Mapping[str, str] | None = None, **options: Any) -> Outcome:
        """Run a command, as `run` does, as soon as there are free cores."""
        cores = self._free.get()
        try:
            return run(script, *flags, environment=environment or self.environment, cores=cores, **options)
        finally:
            self._free.put(cores)

    def succeed(self, script: str, *flags: str) -> Outcome:
        """Run a command; raises SystemExit if it fails."""
        outcome = self.run(script, *flags)
        if outcome.exit_code:
            raise SystemExit(f"{' '.join(outcome.command)} failed: {outcome.output}")
        return outcome

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Return what `work` returns for each item, as many at a time as there are cores for."""
        with ThreadPoolExecutor(self.num_jobs) as pool:
            return list(pool.map(work, items))

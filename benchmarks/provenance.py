"""Name the hardware and the versions behind a measurement, and write its report."""

import datetime
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

TODAY = str(datetime.date.today())


def hardware_slug(device: str = "cpu") -> str:
    """Return the hardware as a part of a file's name."""
    if device == "cuda":
        return "".join(c if c.isalnum() else "-" for c in torch.cuda.get_device_name().lower())
    return f"{platform.machine()}-cpu{os.cpu_count()}"


def processor() -> str:
    """Return the name of the processor and the vector instructions that torch uses."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


def hardware(device: str = "cpu") -> str:
    """Return the processor, its cores, the threads of torch and the load; and the GPU if that is the device."""
    parts = [processor(), f"{os.cpu_count()} cores", f"threads {torch.get_num_threads()}"]
    parts.append(f"load {os.getloadavg()[0]:.1f}")
    if device == "cuda":
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        parts.insert(0, f"{torch.cuda.get_device_name()} with {gib:.0f} GiB")
    return ", ".join(parts)


def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines() if Path(path).exists() else []


def versions(*names: str) -> str:
    """Return the versions of Python and of installed packages."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])


def command(module: str) -> str:
    """Return the command line of a benchmark."""
    return f"python -m benchmarks.{module} {shlex.join(sys.argv[1:])}".strip()


def write_report(stem: Path, report: Any, markdown: str, plot: Callable[[Path], None] | None = None) -> None:
    """Write a report: <stem>.json, <stem>.md and, drawn by `plot`, <stem>.png."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    Path(f"{stem}.md").write_text(markdown.rstrip() + "\n", encoding="utf-8")
    if plot is not None:
        plot(Path(f"{stem}.png"))


def peak_resident_mib() -> float:
    """Return the largest resident memory of this process so far, in MiB.

    Unlike that of getrusage, it does not begin with the memory of the process that started this one.
    """
    (kib,) = [int(line.split()[1]) for line in _lines("/proc/self/status") if line.startswith("VmHWM:")]
    return kib / 2**10

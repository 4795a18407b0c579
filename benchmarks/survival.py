# ruff: noqa: E402
"""Kill runs, damage images and break the environment, and write a table of what survived: `make survival`.

- Kills: short runs of `run_tokenizer.py`, `run_pretraining.py`, `run_finetune.py` and `run_evaluation.py --embed` get
  SIGKILL, half of them at a random time, half at a random file that they open for writing, rename or delete. The same
  command must then end with the weights or features of a run that nobody disturbed, and leave nothing unfinished.
- Faults: the tests named in `FAULTS` (full disk, read-only folder, removed data, two runs in one folder, damaged and
  foreign checkpoints, lost processes, and more).
- Files: damaged images of all formats are scanned, decoded and cropped. Each must be an image or a `BadImage`; a
  crash, another exception or more than 60 seconds is a failure.

Each result is kept in the work folder as soon as it is known, and not computed again: stop the program at any time.
Writes benchmarks/survival_<hardware>_<date>.md.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import commands  # noqa: F401  # isort: skip  (before torch: it chooses how threads wait)

import argparse
import datetime
import hashlib
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import time
import traceback
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

from same_weights import digest

import run_evaluation
import run_finetune
import run_pretraining
import run_tokenizer
from benchmarks.damaged_images import read_damaged
from commands.launch import run

TINY = ["--max_steps", "6", "--per_device_train_batch_size", "8", "--save_steps", "2", "--eval_steps", "3"]
TINY += ["--report_to", "none", "--use_cpu", "--image_size", "32"]
# Name -> the command and its words; {name} stands for the output of another undisturbed run, {} for its own folder.
RUNS: dict[str, tuple[Callable[[list[str]], None], list[str]]] = {
    "tokenizer": (
        run_tokenizer.main,
        ["--model", "dvae-nano", "--vocab_size", "64", "--start_from_images", "--usage_weight", "0.1", *TINY],
    ),
    "mae": (run_pretraining.main, ["--model", "vit-nano", *TINY]),
    "beit": (
        run_pretraining.main,
        ["--method", "beit", "--model", "vit-nano", "--tokenizer", "{tokenizer}", "--cache_tokens", *TINY],
    ),
    "simmim": (run_pretraining.main, ["--method", "simmim", "--model", "vit-nano", *TINY, "--image_size", "64"]),
    "fine-tuning": (
        run_finetune.main,
        ["--model", "{mae}", "--dataset", "sample-fashion", "--labels_per_class", "8", "--ema_decay", "0.9", *TINY],
    ),
    "embedding": (
        run_evaluation.main,
        ["--model", "{mae}", "--dataset", "sample", "--embed", "{}/features.parquet", "--use_cpu"],
    ),
}
KILLED_RUNS = ("tokenizer", "beit", "simmim", "fine-tuning", "embedding")
FAULTS = (
    *("tests/test_faults.py", "tests/test_run_lock.py", "tests/test_lost_process.py"),
    "tests/test_trainer.py::test_checkpoint__with_a_cut_or_missing_file_is_not_whole",
    "tests/test_trainer.py::test_checkpoint__with_flipped_bytes_is_not_whole",
    "tests/test_run_tokenizer.py::test_checkpoint__that_would_run_a_program_is_refused",
    "tests/test_run_pretraining.py::test_run__an_interrupted_one_of_another_shape_is_refused",
    "tests/test_run_pretraining.py::test_mistakes__an_output_folder_that_another_run_uses",
    "tests/test_run_pretraining.py::test_mistakes__an_output_folder_that_cannot_be_made",
    "tests/test_cache.py::test_full_disk__is_one_message_and_leaves_nothing_half_written",
    "tests/test_cache.py::test_read_only_folder__is_one_message",
    "tests/test_scan_file.py::test_full_disk__is_a_note_and_the_old_scan_file_stays",
)
UNFINISHED = (".export*", "*.part*", "*.tmp", "pretraining/.export*")
FILES_PER_TASK = 100


class Results:
    """The results so far, by key, in a file of JSON lines."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.by_key: dict[str, dict] = {entry["key"]: entry for entry in map(json.loads, lines)}

    def add(self, key: str, failure: str = "", **facts: object) -> None:
        self.by_key[key] = {"key": key, "failure": failure, **facts}
        with self.file.open("a") as stream:
            stream.write(json.dumps(self.by_key[key]) + "\n")
        print(f"{key}: {failure or 'survived'}", file=sys.stderr, flush=True)

    def of(self, prefix: str) -> list[dict]:
        return [entry for key, entry in self.by_key.items() if key.startswith(f"{prefix}/")]


# ---- kills ----


def in_a_process(work: Callable[[], int], log: Path, seconds: float | None = None) -> int:
    """Fork, so that torch is imported once; return the exit code, negative for a signal. SIGKILL after `seconds`."""
    if not (child := os.fork()):
        with log.open("w") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        code = 70
        try:
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + (seconds or 3600)
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= end:
            os.kill(child, signal.SIGKILL)
            end += 3600
        time.sleep(0.002)


def command(name: str, work: Path, output_dir: Path, dies_at_write: int = 0) -> Callable[[], int]:
    """Return the command of a run, which dies at a file that it opens for writing or renames in its folder."""
    main, words = RUNS[name]
    words = [str(work / word[1:-1]) if word.startswith("{") and word.endswith("}") else word for word in words]
    words = [word.replace("{}", str(output_dir)) for word in words]
    if main is not run_evaluation.main:
        words += ["--output_dir", str(output_dir)]
    num_writes = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal num_writes
        is_write = (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)) or event in (
            "os.rename",
            "os.remove",
        )
        if is_write and isinstance(arguments[0], str | bytes) and str(output_dir) in os.fsdecode(arguments[0]):
            num_writes += 1
            if num_writes == dies_at_write:
                os.kill(os.getpid(), signal.SIGKILL)

    def start() -> int:
        sys.addaudithook(count)
        code = run(words, main, argparse.ArgumentParser)
        output_dir.with_suffix(".writes").write_text(str(num_writes))
        return code

    return start


def weights_of(folder: Path) -> dict[str, str]:
    files = [*folder.glob("*.safetensors"), *folder.glob("pretraining/*.safetensors")]
    digests = {str(file.relative_to(folder)): digest(file) for file in files}
    return digests | {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.parquet")}


def undisturbed(name: str, work: Path) -> None:
    """Run to the end, and note the duration."""
    folder = work / name
    if (work / f"{name}.seconds").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    start = time.monotonic()
    code = in_a_process(command(name, work, folder), work / f"{name}.log")
    if code:
        sys.exit(f"{name} ended with {code}:\n{(work / f'{name}.log').read_text()[-3000:]}")
    (work / f"{name}.seconds").write_text(str(time.monotonic() - start))


def kill(name: str, number: int, work: Path) -> tuple[str, str]:
    """Kill a run, and start it again; return where it was killed, and what is wrong then, if anything."""
    expected, folder, log = weights_of(work / name), work / "killed", work / "killed.log"
    shutil.rmtree(folder, ignore_errors=True)
    generator = random.Random(f"{name} {number}")
    if number % 2:
        write = generator.randint(1, int((work / name).with_suffix(".writes").read_text()))
        where = f"write {write}"
        code = in_a_process(command(name, work, folder, write), log)
    else:
        seconds = generator.uniform(0, float((work / f"{name}.seconds").read_text()))
        where = f"{seconds:.2f} s"
        code = in_a_process(command(name, work, folder), log, seconds)
    if code not in (0, -signal.SIGKILL):
        return where, f"ended with {code} before it was killed: {log.read_text()[-300:]}"
    code = in_a_process(command(name, work, folder), log)
    if code and "holds a finished run" not in log.read_text():
        return where, f"the same command ended with {code}: {log.read_text()[-300:]}"
    if weights_of(folder) != expected:
        return where, "other weights"
    left = [str(path.relative_to(folder)) for pattern in UNFINISHED for path in folder.glob(pattern)]
    return where, f"left behind: {', '.join(left)}" if left else ""


# ---- faults ----


def faults(results: Results, work: Path) -> None:
    report = work / "faults.xml"
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", f"--junitxml={report}", *FAULTS]
    subprocess.run(words, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stdout=sys.stderr, check=False)
    for case in ET.parse(report).iter("testcase"):
        problems = [child.tag for child in case if child.tag in ("failure", "error")]
        skipped = case.find("skipped") is not None
        results.add(f"faults/{case.get('name')}", ", ".join(problems), **({"skipped": True} if skipped else {}))


# ---- damaged files ----


def read_task(first: int, num_files: int, results: Results, work: Path) -> None:
    """Read `num_files` damaged files in a process of their own; go on behind one that crashes it."""
    folder, report = work / "files", work / "files.jsonl"
    folder.mkdir(exist_ok=True)
    report.unlink(missing_ok=True)
    begin, end, failures = first, first + num_files, []
    while begin < end:
        code = in_a_process(partial(read_damaged, begin, end - begin, folder, report), work / "files.log")
        lines = [json.loads(line) for line in report.read_text().splitlines()]
        begin = lines[-1]["number"] + 1
        if code:
            failures.append(f"{lines[-1]['number']} {lines[-1].get('kind')}: the process ended with {code}")
        elif begin < end:
            sys.exit("the files did not end")
    by_number: dict[int, dict] = {}
    for line in lines:
        by_number.setdefault(line["number"], {}).update(line)
    failures += [f"{n} {line['kind']}: {line['failure']}" for n, line in by_number.items() if line.get("failure")]
    kinds = Counter(line["kind"] for line in by_number.values())
    num_images = sum(line.get("is_image", False) for line in by_number.values())
    failure = "; ".join(failures)
    results.add(f"files/{first}", failure, num_files=num_files, num_images=num_images, failures=failures, kinds=kinds)


# ---- the table ----


def table(results: Results, arguments: argparse.Namespace) -> str:
    rows = ["| | tried | survived | |", "|---|---|---|---|"]
    for name in KILLED_RUNS:
        entries = results.of(name)
        failed = [f"{entry['key']} ({entry['where']}): {entry['failure']}" for entry in entries if entry["failure"]]
        what = "features" if name == "embedding" else "weights"
        note = "; ".join(failed) or f"the {what} of the undisturbed run, bit by bit"
        rows.append(f"| {name}, killed | {len(entries)} | {len(entries) - len(failed)} | {note} |")
    entries = [entry for entry in results.of("faults") if not entry.get("skipped")]
    failed = [entry["key"].removeprefix("faults/") for entry in entries if entry["failure"]]
    note = "; ".join(failed) or "one message, or only the images that it meets"
    rows.append(f"| faults | {len(entries)} | {len(entries) - len(failed)} | {note} |")
    entries = results.of("files")
    num_files, num_images = (sum(entry[key] for entry in entries) for key in ("num_files", "num_images"))
    failed = [failure for entry in entries for failure in entry["failures"]]
    kinds = {kind for entry in entries for kind in entry["kinds"]}
    note = f"{num_images:,} still read, the others are refused with a reason; {len(kinds)} kinds"
    note = "; ".join([note, *failed])
    rows.append(f"| damaged images | {num_files:,} | {num_files - len(failed):,} | {note} |")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "accelerate", "pillow"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    hardware = f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB"
    return "\n".join(
        [
            "# What survives kills, faults and damaged images",
            "",
            f"{datetime.date.today()}, {hardware}, Python {platform.python_version()}, {packages}:",
            f"`python -m benchmarks.survival --num_kills {arguments.num_kills} --num_files {arguments.num_files}`",
            "",
            "Half of the kills come at a random time, half at a random file that the run opens for writing, renames "
            "or deletes; then the same command is given again. Runs of 6 steps with a checkpoint every 2, on the "
            "CPU in float32. The faults are the tests that benchmarks/survival.py names.",
            "",
            *rows,
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_kills", type=int, default=100, help="of all kinds of runs in turn (default: 100)")
    parser.add_argument("--num_files", type=int, default=1000, help="damaged images (default: 1,000)")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing new after this time")
    parser.add_argument("--work_dir", type=Path, default=Path("outputs/survival"), help="keeps what is known so far")
    parser.add_argument("--table_dir", type=Path, default=ROOT / "benchmarks")
    arguments = parser.parse_args()
    work, end = arguments.work_dir.resolve(), time.monotonic() + 60 * arguments.minutes
    work.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_ASSETS_CACHE": str(work / "assets")}
    results = Results(work / "results.jsonl")

    def is_wanted(key: str) -> bool:
        return key not in results.by_key and time.monotonic() < end

    for name in RUNS:
        if time.monotonic() < end:
            undisturbed(name, work)
    for count in range(arguments.num_kills):
        number, name = count // len(KILLED_RUNS), KILLED_RUNS[count % len(KILLED_RUNS)]
        if is_wanted(key := f"{name}/{number}"):
            where, failure = kill(name, number, work)
            results.add(key, failure, where=where)
    for first in range(0, arguments.num_files, FILES_PER_TASK):
        if is_wanted(f"files/{first}"):
            read_task(first, min(FILES_PER_TASK, arguments.num_files - first), results, work)
    if not results.of("faults") and time.monotonic() < end:
        faults(results, work)
    name = f"survival_{platform.machine()}-cpu{os.cpu_count()}_{datetime.date.today()}.md"
    (arguments.table_dir / name).write_text(table(results, arguments), encoding="utf-8")
    print(table(results, arguments))
    return int(any(entry["failure"] for entry in results.by_key.values()))


if __name__ == "__main__":
    sys.exit(main())

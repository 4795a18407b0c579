"""Compare how long a run takes to start with the stock way: `python -m benchmarks.start_up --num_files 50000`.

Stock is what run_mae.py of transformers does: `load_dataset("imagefolder")`, a split, and a transform that opens the
image with Pillow. Ours is `open_pretraining_splits`, which also checks that every image can be read. Each start is a
process of its own, the sides alternate, and the first and the second start of a round share a new cache.
Writes benchmarks/start_up_<files>_<hardware>_<date>.json and .md.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPHS = ROOT / "data/samples/photographs/train"
FILES_PER_FOLDER = 1000
SIDES = ("ours", "stock")

MEASURES = {
    "scan": "seconds until the images are known, ours with a check of each, and split",
    "start": "until the first item of the training set",
    "process": "from the start of the process, with the imports",
    "CPU": "processor seconds of the process and its helpers",
    "MiB": "peak memory of the process",
}

OURS = """
import torch, transformers
from data.augmentations import random_crop, single_view
from data.images import ImageDataset
from data.splits import open_pretraining_splits
start = time.perf_counter()
splits = open_pretraining_splits([sys.argv[1]], validation_fraction=0.05, max_bad_fraction=0.05, seed=0)
scan = time.perf_counter()
num_images = len(splits.train) + len(splits.validation)
images = ImageDataset(splits.train, single_view(random_crop((224, 224), (0.2, 1.0)), 3), train=True)
images[0]["pixel_values"]
"""
STOCK = """
import numpy as np
import torch, transformers
from datasets import load_dataset
from PIL import Image
def transform(examples):
    crops = [i.convert("RGB").resize((224, 224), Image.BICUBIC, box=(9, 9, 60, 60)) for i in examples["image"]]
    return {"pixel_values": [torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255 for crop in crops]}
start = time.perf_counter()
images = load_dataset("imagefolder", data_files={"train": sys.argv[1] + "/**"}, split="train")
splits = images.train_test_split(0.05)
scan = time.perf_counter()
num_images = len(images)
splits["train"].set_transform(transform)
splits["train"][0]["pixel_values"]
"""
BEFORE = "import json, os, resource, sys, time"
AFTER = """
end = time.perf_counter()
ticks = float(open("/proc/self/stat").read().rpartition(")")[2].split()[19])  # between boot and start of the process
process = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
cpu = sum(one.ru_utime + one.ru_stime for one in used)
from benchmarks.provenance import peak_resident_mib  # after the times
values = scan - start, end - start, process, cpu, peak_resident_mib()
print("\\n" + json.dumps([num_images, *values]))
"""


def make_files(folder: Path, num_files: int, size: tuple[int, int], hard_links: bool) -> None:
    """Fill a folder with JPEG files, or with hard links to a hundred of them."""
    photographs = sorted(PHOTOGRAPHS.glob("*.jpg"))[:100]
    contents = []
    for photograph in photographs:
        stream = BytesIO()
        Image.open(photograph).convert("RGB").resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        contents.append(stream.getvalue())
    originals = [folder.parent / f"{number}.jpg" for number in range(len(contents))]
    for original, content in zip(originals, contents, strict=True):
        original.write_bytes(content)
    for number in range(num_files):
        path = folder / f"{number // FILES_PER_FOLDER:05}" / f"{number:08}.jpg"
        if number % FILES_PER_FOLDER == 0:
            path.parent.mkdir(parents=True)
        if hard_links:
            os.link(originals[number % len(originals)], path)
        else:
            path.write_bytes(contents[number % len(contents)])


def read_files(folder: Path) -> None:
    """Bring all files into the page cache, of which other programs may have taken some."""
    for root, _, names in os.walk(folder):
        for name in names:
            with open(os.path.join(root, name), "rb") as file:
                file.read()


def start_once(side: str, folder: Path, num_files: int, caches: Path) -> dict[str, float]:
    """Start once in a new process; returns the measures."""
    environment = {**os.environ, "HF_HOME": str(caches / side), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for name in ("HF_ASSETS_CACHE", "HF_DATASETS_CACHE"):
        environment.pop(name, None)
    program = BEFORE + (OURS if side == "ours" else STOCK) + AFTER
    command = [sys.executable, "-c", program, str(folder)]
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    num_images, *values = json.loads(ran.stdout.splitlines()[-1])
    assert num_images == num_files
    return dict(zip(MEASURES, values, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--num_files", type=int, default=50_000)
    parser.add_argument("--size", type=int, nargs=2, default=[500, 375], help="width and height")
    parser.add_argument("--hard_links", action="store_true", help="link to 100 files instead of writing all of them")
    parser.add_argument("--num_rounds", type=int, default=5)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--work_dir", help="folder for the files (default: a temporary one)")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=options.work_dir))
    results: dict[str, list[dict[str, float]]] = {}
    try:
        make_files(work / "photos", options.num_files, tuple(options.size), options.hard_links)
        time.sleep(3)  # files that have just been written are not trusted to be settled
        for number in range(options.num_rounds):
            caches = work / f"caches{number}"
            read_files(work / "photos")
            for which in ("first", "second"):
                for side in options.sides if number % 2 == 0 else options.sides[::-1]:
                    found = start_once(side, work / "photos", options.num_files, caches)
                    results.setdefault(f"{side}, {which} start", []).append(found)
                    print(number, side, which, {name: round(value, 2) for name, value in found.items()}, flush=True)
            shutil.rmtree(caches)
    finally:
        shutil.rmtree(work)
    report(options, results)


def flags_of(options: argparse.Namespace) -> str:
    flags = f"--num_files {options.num_files} --size {options.size[0]} {options.size[1]}"
    flags += " --hard_links" if options.hard_links else ""
    return f"{flags} --num_rounds {options.num_rounds} --sides {' '.join(options.sides)}"


def report(options: argparse.Namespace, results: dict[str, list[dict[str, float]]]) -> None:
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    hardware = f"{cpu}, {len(os.sched_getaffinity(0))} cores, {gib} GiB, load average {os.getloadavg()[2]:.1f}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("datasets", "pillow", "pyarrow", "torch"))
    today = datetime.date.today()
    command = f"python -m benchmarks.start_up {flags_of(options)}"
    rows = []
    for name, times in results.items():
        cells = [name]
        for key in MEASURES:
            values = [one[key] for one in times]
            cells.append(f"{statistics.median(values):,.2f} ({min(values):,.2f}-{max(values):,.2f})")
        rows.append("| " + " | ".join(cells) + " |")
    kind = "hard links to 100 files" if options.hard_links else "files"
    lines = [
        f"# Start of a run on {options.num_files:,} images",
        "",
        f"{today}, {hardware}, Python {platform.python_version()}, {versions}, {options.num_rounds} rounds:",
        f"`{command}`",
        "",
        f"{options.num_files:,} {kind} of {options.size[0]}x{options.size[1]} px in folders of "
        f"{FILES_PER_FOLDER:,}, in the page cache. Median (smallest-largest) of:",
        "",
        *(f"- {name}: {text}" for name, text in MEASURES.items()),
        "",
        f"| | {' | '.join(MEASURES)} |",
        "|---" * (len(MEASURES) + 1) + "|",
        *rows,
        "",
    ]
    if len(options.sides) == len(SIDES):
        for which in ("first", "second"):
            ours, stock = (
                statistics.median(one["scan"] for one in results[f"{side}, {which} start"]) for side in SIDES
            )
            lines.append(f"Ratio of the scans, {which} start, stock / ours: **{stock / ours:.1f}**")
            lines.append("")
    slug = f"start_up_{options.num_files}_{platform.machine()}-cpu{len(os.sched_getaffinity(0))}_{today}"
    target = Path(__file__).parent / slug
    target.with_suffix(".md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    data = {"command": command, "date": str(today), "hardware": hardware, "versions": versions, "results": results}
    target.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

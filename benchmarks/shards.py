"""Compare shards behind a web server that fails with a local folder: `python -m benchmarks.shards`.

Small photographs are written to a folder and to tars, which a server in a process of its own offers: it answers some
requests with the status 500, closes some connections, and delays some answers. Measured for both: seconds from the
start of `run_pretraining.py` to its first step, images per second of the data loader over an epoch, and the memory of
the process; for the shards also whether an epoch has every image once.
Writes benchmarks/shards_<images>_<hardware>_<date>.json and .md.
"""

import argparse
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.provenance import TODAY, command, hardware, hardware_slug, versions, write_report
from benchmarks.range_server import RangeServer

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPHS = ROOT / "data/samples/photographs/train"
FAULTS: dict[str, Any] = {"errors": 0.02, "resets": 0.02, "delays": 0.2, "seconds": 0.3}
SIDE, CROP, BATCH = 96, 64, 64

# One epoch of the data loader, as run_pretraining.py builds it; the names of all images that it showed.
EPOCH = """
import json, sys, time
from benchmarks.provenance import peak_resident_mib
from data.augmentations import random_crop, single_view
from data.collators import stack_items
from data.images import ImageDataset
from data.sampling import EpochSampler
from data.splits import open_pretraining_splits
from torch.utils.data import DataLoader

dataset, num_workers, side, batch = sys.argv[1], *map(int, sys.argv[2:])
begin = time.perf_counter()
splits = open_pretraining_splits([dataset], validation_fraction=0, max_bad_fraction=0.05, seed=0)
opened = time.perf_counter()
images = ImageDataset(splits.train, single_view(random_crop((side, side), (0.2, 1.0)), 3), train=True)
seen, started = [], time.perf_counter()
loader = DataLoader(images, batch, sampler=EpochSampler(len(images)), num_workers=num_workers, collate_fn=stack_items)
for number, one in enumerate(loader):
    seen += one["image_index"].tolist()
    first = time.perf_counter() if not number else first
seconds = time.perf_counter() - first
print(json.dumps({
    "seconds": seconds, "seconds to open": opened - begin, "seconds to the first batch": first - begin,
    "images per second": (len(seen) - batch) / seconds, "images": len(seen), "different images": len(set(seen)),
    "MiB": peak_resident_mib(),
}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--num_images", type=int, default=200_000)
    parser.add_argument("--num_shards", type=int, default=100)
    parser.add_argument("--num_workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where the images are kept (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = arguments.folder or Path(scratch) / "data"
        if not (data / f"done_{arguments.num_images}_{arguments.num_shards}").exists():
            write_data(data, arguments.num_images, arguments.num_shards)
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        server = context.Process(target=serve, args=(data / "shards", there), daemon=True)
        server.start()
        url = f"{here.recv()}/train-{{{0:04}..{arguments.num_shards - 1:04}}}.tar"
        results = {
            "folder": measure(str(data / "folder"), Path(scratch) / "folder", arguments.num_workers),
            "shards": measure(url, Path(scratch) / "shards", arguments.num_workers),
        }
        here.send("stop")
        results["shards"]["answers"] = here.recv()
        server.join()
    report(results, arguments)


def write_data(folder: Path, num_images: int, num_shards: int) -> None:
    """Write different crops of the bundled photographs as files in a folder for each shard, and as tars."""
    photographs = [Image.open(path).convert("RGB") for path in sorted(PHOTOGRAPHS.glob("*.jpg"))]
    (folder / "shards").mkdir(parents=True)
    for shard in range(num_shards):
        files = folder / "folder" / f"{shard:04}"
        files.mkdir(parents=True)
        with tarfile.open(folder / "shards" / f"train-{shard:04}.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
            for number in range(shard * num_images // num_shards, (shard + 1) * num_images // num_shards):
                photograph = photographs[number % len(photographs)]
                place = number // len(photographs)
                left = place % max(1, photograph.width - SIDE)
                top = place // max(1, photograph.width - SIDE) % max(1, photograph.height - SIDE)
                stream = io.BytesIO()
                photograph.crop((left, top, left + SIDE, top + SIDE)).save(stream, "JPEG", quality=85)
                entry = tarfile.TarInfo(f"{number:08}.jpg")
                entry.size = len(stream.getvalue())
                archive.addfile(entry, io.BytesIO(stream.getvalue()))
                (files / entry.name).write_bytes(stream.getvalue())
    (folder / f"done_{num_images}_{num_shards}").touch()


def serve(folder: Path, pipe: Any) -> None:
    with RangeServer(folder, **FAULTS) as server:
        pipe.send(server.url)
        pipe.recv()
        pipe.send({**server.counts, "CPU seconds": time.process_time()})


def measure(dataset: str, folder: Path, num_workers: int) -> dict[str, Any]:
    """Return the seconds of `run_pretraining.py` to its first step, and the figures of EPOCH; both without a cache."""
    found: dict[str, Any] = {"seconds to the first step": first_step(dataset, folder / "run")}
    environment = environment_in(folder / "epoch")
    words = [sys.executable, "-c", EPOCH, dataset]
    words += [str(number) for number in (num_workers, CROP, BATCH)]
    done = subprocess.run(words, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found |= json.loads(done.stdout.splitlines()[-1])
    return found


def first_step(dataset: str, folder: Path) -> float:
    """Return the seconds from the start of a run to the first line of its log."""
    words = [sys.executable, "run_pretraining.py", "--model", "vit-nano", "--dataset", dataset, "--max_steps", "2"]
    words += ["--output_dir", str(folder / "out"), "--logging_steps", "1", "--report_to", "none", "--use_cpu"]
    words += ["--validation_fraction", "0"]
    start = time.perf_counter()
    process = subprocess.Popen(
        words, cwd=ROOT, env=environment_in(folder), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    seconds, lines = None, []
    for line in process.stdout:
        lines.append(line)
        if seconds is None and "loss" in line and "step" in line:
            seconds = time.perf_counter() - start
    if process.wait() or seconds is None:
        raise RuntimeError("".join(lines))
    return seconds


def environment_in(folder: Path) -> dict[str, str]:
    """Return an environment with a cache of its own, so that nothing is known of the data."""
    return {**os.environ, "HF_ASSETS_CACHE": str(folder / "assets"), "PYTHONPATH": str(ROOT)}


def report(results: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> None:
    rate = results["shards"]["images per second"] / results["folder"]["images per second"]
    num_images, num_different = results["shards"]["images"], results["shards"]["different images"]
    rows = [name for name in results["folder"] if name != "answers"]
    table = "\n".join(
        f"| {name} | " + " | ".join(f"{one[name]:,.1f}" for one in results.values()) + " |" for name in rows
    )
    answers = Counter(results["shards"]["answers"])
    faults = ", ".join(f"{answers[name]:,} {name}" for name in ("served", "errors", "resets", "delays"))
    text = f"""# {arguments.num_images:,} images in {arguments.num_shards} shards on a web server that fails

| | local folder | shards |
|---|---|---|
{table}

Images per second are {rate:.2f} times those of the folder. An epoch of the shards had {num_images:,} images,
{num_different:,} of them different. The server answered: {faults} ({answers["bytes"] / 1e6:,.0f} MB).
It took {answers["CPU seconds"]:.0f} seconds of the same cores, in the first run and in the epoch, which itself took
{results["shards"]["seconds"]:.0f} seconds.

`{command("shards")}`: {hardware()}; {versions("torch", "datasets", "fsspec", "aiohttp")}; {TODAY}.
"""
    stem = ROOT / "benchmarks" / f"shards_{arguments.num_images}_{hardware_slug()}_{TODAY}"
    write_report(stem, {"results": results, "arguments": {k: str(v) for k, v in vars(arguments).items()}}, text)
    print(text)


if __name__ == "__main__":
    main()

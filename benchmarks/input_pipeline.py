"""Compare the decoding of training crops with the stock way: `python -m benchmarks.input_pipeline --images FOLDER`.

Stock is what run_mae.py of transformers does with Pillow: decode the whole image, convert it to RGB, cut out the
random resized crop, resize it by Pillow's bicubic filter, mirror it, and make it a uint8 tensor. Ours gives the same
crops, without a cache and from caches of both formats. The sides alternate in one process with one thread, on the same
images and crops, which are new in every round; files are read before. Times are processor times, which other programs
change less than the time on the clock.

Images: each file of --images as it is; without it, 500x375 JPEGs (quality 90) made of the two photographs of
scikit-learn. With --large FOLDER, its photographs as baseline and as progressive JPEGs with their own quantization;
Debian's package lomiri-wallpapers-16.04 has some in /usr/share/backgrounds.
Writes benchmarks/input_pipeline_<hardware>_<date>.json, .md and .png.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, features
from sklearn.datasets import load_sample_images
from torch import Tensor

from benchmarks.provenance import TODAY, command, hardware, hardware_slug, versions, write_report
from data.augmentations import RandomResizedCrop, single_view
from data.cache import CacheFormat, cache_images
from data.images import SourceSamples
from data.seeds import seeded_generator
from data.sources import IMAGE_EXTENSIONS, open_source

NUM_SMALL = 24
SIDES = ("stock", "ours", "ours, raw cache", "ours, jpeg cache")

Side = Callable[[int, torch.Generator], Tensor]  # image, random numbers -> (C, H, W)


def small_images(folder: Path) -> None:
    """Write 500x375 JPEGs: parts of the two photographs of scikit-learn, resized."""
    for number in range(NUM_SMALL):
        photograph = Image.fromarray(load_sample_images().images[number % 2])  # 640x427
        left, top = 6 * (number // 2), 2 * (number // 2)
        part = photograph.resize((500, 375), Image.Resampling.LANCZOS, (left, top, left + 520, top + 390))
        part.save(folder / f"{number:02}.jpg", quality=90)


def large_images(photographs: Path, folder: Path, progressive: bool) -> None:
    """Write photographs in one of the two forms of JPEG, with their own quantization and subsampling."""
    for path in sorted(photographs.iterdir()):
        image = Image.open(path)
        if image.format == "JPEG" and image.width * image.height > 4_000_000:
            image.save(folder / path.name, quality="keep", progressive=progressive)


def stock_side(files: list[bytes], crop: RandomResizedCrop) -> Side:
    def load(index: int, generator: torch.Generator) -> Tensor:
        image = Image.open(BytesIO(files[index])).convert("RGB")
        draw = crop.draw(generator, 0)
        box = crop.choose_box(image.width, image.height, draw.numbers)
        image = image.crop(box).resize(crop.size[::-1], crop.interpolation)
        if draw.is_flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    return load


def cached_side(samples: SourceSamples, crop: RandomResizedCrop) -> Side:
    return lambda index, generator: crop(samples.sample(index)["image"], 3, generator)


def sides_of(folder: Path, cache: Path, size: int) -> tuple[dict[str, Side], dict[str, Any]]:
    """Return the ways to load the images of a folder, and what the images are."""
    source = open_source(str(folder))
    samples = SourceSamples(source, np.arange(len(source)))
    files = [Path(source.name(index)).read_bytes() for index in range(len(source))]
    transform = single_view(RandomResizedCrop((size, size)), 3)
    crop = transform.views[0].crop
    assert isinstance(crop, RandomResizedCrop)
    sides = {SIDES[0]: stock_side(files, crop), SIDES[1]: lambda index, generator: crop(files[index], 3, generator)}
    facts: dict[str, Any] = {"num_images": len(files), "megabytes": round(sum(map(len, files)) / 1e6, 2)}
    side = transform.shortest_side
    for name, form in zip(SIDES[2:], (CacheFormat(side, 3, "raw"), CacheFormat(side, 3, "jpeg")), strict=True):
        start, encoding = time.perf_counter(), form.encoding
        (cached,) = cache_images([samples], cache, form)
        facts[f"seconds to write the {encoding} cache"] = round(time.perf_counter() - start, 2)
        tables = (cache / form.folder).glob("*.arrow")
        facts[f"megabytes of the {encoding} cache"] = round(sum(path.stat().st_size for path in tables) / 1e6, 2)
        sides[name] = cached_side(cached, crop)
    sizes = [Image.open(BytesIO(data)).size for data in files]
    facts["megapixels"] = round(statistics.mean(width * height for width, height in sizes) / 1e6, 2)
    return sides, facts


def measure(sides: dict[str, Side], num_images: int, num_rounds: int) -> dict[str, dict[str, Any]]:
    """Return time and difference to stock of each side, in rounds over all images."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    differences: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(num_rounds + 1):
        crops: dict[str, list[Tensor]] = {}
        for name, load in sides.items():
            generators = [seeded_generator("benchmark", number, index) for index in range(num_images)]
            start = time.process_time()
            crops[name] = [load(index, generator) for index, generator in enumerate(generators)]
            if number:  # after a round to warm up
                seconds[name].append((time.process_time() - start) / num_images)
        for name, found in crops.items():
            pairs = zip(found, crops[SIDES[0]], strict=True)
            differences[name] += [float((one.int() - other.int()).abs().float().mean()) for one, other in pairs]
    return {
        name: {
            "milliseconds": [round(1000 * value, 4) for value in seconds[name]],
            "median": round(1000 * statistics.median(seconds[name]), 3),
            "times faster than stock": round(
                statistics.median(a / b for a, b in zip(seconds[SIDES[0]], seconds[name], strict=True)), 2
            ),
            "difference": round(statistics.mean(differences[name]), 3),
            "largest difference": round(max(differences[name]), 2),
        }
        for name in sides
    }


def contact_sheet(sides: dict[str, Side], num_images: int, file: Path) -> None:
    """Draw crops of every side in a row, and how much they differ from stock, eight times enlarged."""
    rows = []
    for index in range(0, num_images, max(1, num_images // 6)):
        crops = [load(index, seeded_generator("sheet", index)).int() for load in sides.values()]
        differences = [(8 * (crop - crops[0]).abs()).clamp(max=255) for crop in crops[1:]]
        rows.append(torch.cat([*crops, *differences], 2))
    Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).to(torch.uint8).numpy()).save(file)


# ---- report ----


def markdown(report: dict[str, Any]) -> str:
    lines = [
        "# Training crops per core, ours against stock",
        "",
        f"{report['date']}, {report['processor']}, {report['versions']}: `{report['command']}`",
        "",
        f"Random resized crop to {report['size']} px at scale 0.2 to 1, encoded bytes to uint8 tensor; stock decodes "
        f"the whole image and resizes with Pillow. Medians of {report['rounds']} rounds over all images, fastest and "
        "slowest round in brackets; the ratio is the median of the rounds' ratios. Difference: mean absolute "
        "difference to stock in levels of 255, of all crops, and of the worst crop.",
        "",
        "| images | | processor ms per crop | times faster | difference | worst |",
        "|---|---|---|---|---|---|",
    ]
    for name, group in report["images"].items():
        label = f"{name}: {group['num_images']}, {group['megapixels']:g} megapixels, {group['megabytes']:g} MB"
        for side, row in group["sides"].items():
            spread = f"{min(row['milliseconds']):.2f}-{max(row['milliseconds']):.2f}"
            lines.append(
                f"| {label} | {side} | {row['median']:.2f} ({spread}) | **{row['times faster than stock']:.2f}** "
                f"| {row['difference']:.2f} | {row['largest difference']:.2f} |"
            )
            label = ""
    lines += ["", "Caches (written with all cores):", ""]
    for name, group in report["images"].items():
        for encoding in ("raw", "jpeg"):
            megabytes, seconds = (
                group[f"megabytes of the {encoding} cache"],
                group[f"seconds to write the {encoding} cache"],
            )
            lines.append(f"- {name}, {encoding}: {megabytes:g} MB, {seconds:g} s")
    return "\n".join([*lines, ""])


def plot(report: dict[str, Any], file: Path) -> None:
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = report["images"]
    figure, axes = plt.subplots(1, len(groups), figsize=(4.2 * len(groups), 2.6), layout="constrained", squeeze=False)
    for axis, (name, group) in zip(axes[0], groups.items(), strict=True):
        rows = group["sides"]
        medians = [row["median"] for row in rows.values()]
        lower = [row["median"] - min(row["milliseconds"]) for row in rows.values()]
        upper = [max(row["milliseconds"]) - row["median"] for row in rows.values()]
        colors = ["#9a9a9a", "#1f6fb4", "#1f6fb4", "#1f6fb4"]
        bars = axis.barh(list(rows), medians, xerr=[lower, upper], color=colors, capsize=2)
        labels = [f"{row['median']:.2f} ms, {row['times faster than stock']:.1f}x" for row in rows.values()]
        axis.bar_label(bars, labels, padding=6, fontsize=8)
        axis.set(title=name, xlabel="processor ms per crop", xlim=(0, 1.5 * max(medians)))
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, help="folder of images to measure as they are")
    parser.add_argument("--large", type=Path, help="folder of large JPEG photographs, measured in both forms of JPEG")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--num_rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    parser.add_argument(
        "--sheets", action="store_true", help="also write pictures of some crops and their differences"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "date": TODAY,
        "command": command("input_pipeline"),
        "processor": hardware(),
        "versions": f"{versions('torch', 'pillow', 'datasets')}, libjpeg-turbo {features.version('libjpeg_turbo')}",
        "size": options.size,
        "rounds": options.num_rounds,
        "images": {},
    }
    stem = options.output / f"input_pipeline_{hardware_slug()}_{TODAY}"
    with tempfile.TemporaryDirectory() as temporary:
        folders: dict[str, Path] = {}
        if options.images:
            folders[options.images.name] = options.images
        else:
            folders["500x375 JPEG"] = Path(temporary, "small")
            folders["500x375 JPEG"].mkdir()
            small_images(folders["500x375 JPEG"])
        for form in ("baseline", "progressive") if options.large else ():
            folders[f"large {form}"] = Path(temporary, form)
            folders[f"large {form}"].mkdir()
            large_images(options.large, folders[f"large {form}"], form == "progressive")
        for number, (name, folder) in enumerate(folders.items()):
            if not any(path.suffix.lower() in IMAGE_EXTENSIONS for path in folder.rglob("*")):
                parser.error(f"there are no images for {name!r}; --large expects JPEGs of more than 4 megapixels")
            sides, facts = sides_of(folder, Path(temporary, f"cache{number}"), options.size)
            report["images"][name] = {**facts, "sides": measure(sides, facts["num_images"], options.num_rounds)}
            if options.sheets:
                contact_sheet(sides, facts["num_images"], Path(f"{stem}_{number}.png"))
    write_report(stem, report, markdown(report), lambda file: plot(report, file))
    print(markdown(report))


if __name__ == "__main__":
    main()

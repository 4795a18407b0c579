"""Pairs of real images and texts from Debian packages, in folders of images with captions.jsonl.

Views of Tux Paint's stamps and scenes of two of them, with their English captions; drawings of openclipart, with their
file names; emoji, with their Unicode names. No stamp or drawing of a training pair is in a held-out one. The commands
that install the packages are in benchmarks/pairs.py.
"""

import argparse
import json
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from benchmarks.tuxstamps import Stamp, draw, find_stamps, number_of

SIZE = 64
_VIEWS = {"train": 12, "test": 4}
_SCENES = {"train": 1000, "test": 200}
_MAX_PIXELS, _MAX_DRAWINGS = 4_000_000, 2000  # of openclipart, which has drawings of hundreds of megapixels
_TEST_SHARE = 0.1  # of drawings and emoji
_EMOJI_SIZE = 109  # the only one of the bitmap font
_FONT, _CLIPART = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", "usr/share/openclipart/png"


@dataclass(frozen=True)
class Pair:
    image: Image.Image
    text: str
    source: str


def write_pairs(options: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Write pairs/ (train, validation) and stamps/ (train, test), and return the number of pairs of each source.

    The splits of retrieval/ are all training pairs, and the stamps for the test.
    """
    done = options.output_dir / "counts.json"
    if not done.exists():
        photographs = sorted(options.photographs.glob("*.jpg"))
        stamps = find_stamps(options.root)
        if not stamps or not photographs:
            raise SystemExit(f"{len(stamps)} stamps in {options.root}, {len(photographs)} images in --photographs")
        backgrounds = [Image.open(file).convert("RGB") for file in photographs[::20]]
        counts: dict[str, dict[str, int]] = {}
        for split in ("train", "test"):
            views = [pair for stamp in of_split(stamps, split) for pair in views_of(stamp, backgrounds, split)]
            others = [*scenes(of_split(stamps, split), backgrounds, split), *drawings(options.root, split)]
            others += emoji(options.root, split)
            write(options.output_dir / "stamps" / split, views)
            write(options.output_dir / "pairs" / ("validation" if split == "test" else split), [*views, *others])
            counts[split] = dict(Counter(pair.source for pair in [*views, *others]))
        done.write_text(json.dumps(counts))
    retrieval = options.output_dir / "retrieval"
    retrieval.mkdir(exist_ok=True)
    for split, source in (("train", "pairs"), ("test", "stamps")):
        if not (retrieval / split).exists():
            (retrieval / split).symlink_to(Path("..") / source / split, target_is_directory=True)
    found: dict[str, dict[str, int]] = json.loads(done.read_text())
    return found


def of_split(stamps: list[Stamp], split: str) -> list[Stamp]:
    return [stamp for stamp in stamps if stamp.is_for_test == (split == "test") and caption(stamp)]


def caption(stamp: Stamp) -> str:
    """Return the English caption of a stamp, the first line of the text file beside it; maybe none."""
    file = stamp.file.with_suffix(".txt")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    return lines[0].strip() if lines else ""


def views_of(stamp: Stamp, backgrounds: list[Image.Image], split: str) -> Iterator[Pair]:
    for view in range(_VIEWS[split]):
        yield Pair(draw(stamp, view, backgrounds, SIZE), caption(stamp), "stamps")


def scenes(stamps: list[Stamp], backgrounds: list[Image.Image], split: str) -> Iterator[Pair]:
    """Yield images with one stamp on the left and another on the right."""
    rng = np.random.RandomState(0)
    for number in range(_SCENES[split]):
        pair = [stamps[index] for index in rng.choice(len(stamps), 2, replace=False)]
        scene = Image.new("RGB", (SIZE, SIZE))
        for place, stamp in enumerate(pair):
            view = draw(stamp, 1000 + number, backgrounds, SIZE).resize((SIZE // 2, SIZE))
            scene.paste(view, (place * SIZE // 2, 0))
        yield Pair(scene, " ".join(map(caption, pair)), "scenes of two stamps")


def drawings(root: Path, split: str) -> Iterator[Pair]:
    files = sorted((root / _CLIPART).rglob("*.png"), key=lambda file: number_of(file.stem))
    num_found = 0
    Image.MAX_IMAGE_PIXELS = None  # Pillow refuses to open the largest ones, which are left out below
    for file in files:
        text = " ".join(re.findall(r"[a-z]+", file.stem.lower()))
        if is_test(re.sub(r"\d+", "", file.stem)) != (split == "test") or len(text) < 3:
            continue
        image = Image.open(file)
        if math.prod(image.size) > _MAX_PIXELS or min(image.size) < SIZE // 2:
            continue
        yield Pair(on_white(image), text, "openclipart")
        num_found += 1
        if num_found == round(_MAX_DRAWINGS * (_TEST_SHARE if split == "test" else 1 - _TEST_SHARE)):
            return


def emoji(root: Path, split: str) -> Iterator[Pair]:
    if not (root / _FONT).exists():
        return
    font = ImageFont.truetype(str(root / _FONT), _EMOJI_SIZE)
    for code in (*range(0x231A, 0x2BFF), *range(0x1F300, 0x1FAFF)):
        name = unicodedata.name(chr(code), "").lower()
        if not name or is_test(name) != (split == "test"):
            continue
        image = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(image).text((0, 0), chr(code), font=font, embedded_color=True)
        if image.getbbox() is not None and len(image.getcolors(2**16) or range(9)) > 8:
            yield Pair(on_white(image), name, "emoji")


def is_test(name: str) -> bool:
    return number_of(name) % 1000 < 1000 * _TEST_SHARE


def on_white(image: Image.Image) -> Image.Image:
    """Return the drawing in the middle of a white square."""
    image = image.convert("RGBA")
    image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIZE, SIZE), "white")
    square.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2), image)
    return square


def write(folder: Path, pairs: list[Pair]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, pair in enumerate(pairs):
        pair.image.save(folder / f"{number:06d}.png")
        lines.append(json.dumps({"file_name": f"{number:06d}.png", "text": pair.text}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")


def read(folder: Path) -> tuple[list[Path], list[str]]:
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    return [folder / row["file_name"] for row in rows], [row["text"] for row in rows]

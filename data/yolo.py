"""Read YOLO folders: a text file beside the images for each of them, with one object per line.

A line holds the class number, and either the center, width and height of a box or the corners of a polygon, as
fractions of the image. An image without a file, or with an empty one, has no objects. The names of the classes are in
data.yaml (`names`) or classes.txt.
Shapes: M boxes.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from data.boxes import RawBoxes

_NAMES_FILES = ("data.yaml", "data.yml", "dataset.yaml", "classes.txt", "obj.names")
_IMAGES, _LABELS = "images", "labels"


def find_names_file(folder: Path) -> Path | None:
    """Return the file with the names of the classes; it marks a YOLO folder."""
    return next((folder / name for name in _NAMES_FILES if (folder / name).is_file()), None)


def read_class_names(file: Path) -> tuple[str, ...]:
    """Read the names of the classes.

    Raises:
        ValueError: If the file has none.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the classes cannot be read from {file}: {error}") from None
    names: Any = text.strip().splitlines() if file.suffix not in (".yaml", ".yml") else None
    if names is None:
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is not valid YAML ({str(error).splitlines()[0]})") from None
        names = content.get("names") if isinstance(content, dict) else None
        if isinstance(names, dict) and set(names) == set(range(len(names))):
            names = [names[number] for number in range(len(names))]
    names = [str(name).strip() for name in names] if isinstance(names, list) else []
    if not names or not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{file} has no list of different class names; expected `names: [first, second]`")
    return tuple(names)


def image_folders(root: Path, split: str) -> Iterator[Path]:
    """Yield folders in which a YOLO dataset may have the images of a split, the most specific first."""
    yield root / _IMAGES / split
    yield root / split / _IMAGES


def label_file(image: Path) -> Path:
    """Return the text file of an image: in labels/ in place of the last images/ of its path, or else beside it."""
    parts = list(image.parts)
    if _IMAGES in parts[:-1]:
        last = len(parts) - 2 - parts[-2::-1].index(_IMAGES)
        parts[last] = _LABELS
    return Path(*parts).with_suffix(".txt")


def read_yolo(images: Sequence[Path]) -> RawBoxes:
    """Read the boxes of images; lines that are not numbers become boxes that cannot be used."""
    rows: list[tuple[int, int, tuple[float, ...]]] = []
    places: list[tuple[Path, int]] = []
    for index, image in enumerate(images):
        file = label_file(image)
        try:
            lines = file.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({error.strerror}); repair or remove it") from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append((index, *_parse(line)))
                places.append((file, number))
    boxes = np.array([box for _, _, box in rows], np.float64).reshape(-1, 4)
    return RawBoxes(
        images=np.array([index for index, _, _ in rows], np.int64),
        boxes=boxes,
        classes=np.array([number for _, number, _ in rows], np.int64),
        areas=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
        is_crowd=np.zeros(len(rows), bool),
        name=partial(_name, places),
    )


def _name(places: Sequence[tuple[Path, int]], row: int) -> str:
    file, line = places[row]
    return f"{file}, line {line}"


def _parse(line: str) -> tuple[int, tuple[float, ...]]:
    """Return class number and box (left, top, right, bottom); NaN if the line has another form."""
    try:
        first, *numbers = (float(word) for word in line.split())
    except ValueError:
        return 0, (np.nan,) * 4
    number = int(first) if first.is_integer() and abs(first) < 1e9 else -1
    if len(numbers) in (4, 5):  # the fifth is a confidence
        x, y, width, height = numbers[:4]
        return number, (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    if len(numbers) >= 6 and len(numbers) % 2 == 0:
        xs, ys = numbers[::2], numbers[1::2]
        return number, (min(xs), min(ys), max(xs), max(ys))
    return number, (np.nan,) * 4

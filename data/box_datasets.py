"""Open datasets of images with boxes: COCO json, YOLO folders, tables and Hub ids.

Shapes: N images, M boxes.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from data.bad_images import BadImages
from data.boxes import BoxSamples, RawBoxes, usable_boxes
from data.coco import CocoFile, is_coco, read_coco
from data.decoding import BadImage, header_of, opened
from data.image_checks import Checks, Summary, check_images
from data.image_source import FileSource, ImageSource, TableSource
from data.images import split_validation
from data.sources import open_source, split_names
from data.splits import Splits
from data.tables import VALIDATION_NAMES
from data.yolo import find_names_file, image_folders, label_file, read_class_names, read_yolo

SPLIT_NAMES = ("train", *VALIDATION_NAMES)
_VALIDATION_FRACTION = 0.1
_NUM_MEASURED, _LARGEST_DISTORTION = 100, 0.05  # images whose size is compared with that in the file
_OBJECTS, _BOXES = ("objects", "annotations", "instances", "faces"), ("bbox", "bboxes", "boxes", "box")
_CLASSES = ("category", "categories", "label", "labels", "category_id", "class", "classes", "name")
_EXPECTED = (
    "expected COCO json (annotations.json beside the images, in train/ and val/ or without splits), a YOLO folder "
    "(images/, labels/ and data.yaml), or a table with images and a column of boxes"
)


class _Opened(NamedTuple):
    """A split as it is stored; `lists_classes`: its classes are listed, else they are those that occur."""

    source: ImageSource
    raw: RawBoxes
    class_names: tuple[str, ...]
    lists_classes: bool = True


@dataclass(frozen=True)
class BoxSplits(Splits):
    """Images with boxes for training, and for validation and test if there are any."""

    class_names: tuple[str, ...]
    samples: Mapping[str, BoxSamples]
    bad: BadImages
    summary: Summary
    notes_on_boxes: tuple[str, ...]

    @property
    def by_name(self) -> Mapping[str, BoxSamples]:
        return self.samples

    def describe(self) -> tuple[str, str]:
        return self.samples["train"].source.describe(), self.summary.describe()

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.summary.notes, *self.notes_on_boxes)


def open_box_splits(
    dataset: str,
    *,
    validation_fraction: float | None,
    max_bad_fraction: float,
    seed: int,
    checks: Checks = "new",
) -> BoxSplits:
    """Open images with boxes, with a seeded fraction of the training images for validation if there is no such split.

    Raises:
        ValueError: If the dataset cannot be opened, or too many of its images or boxes cannot be used.
    """
    found: dict[str, _Opened] = {}
    for name, one in _open(dataset):
        split = name if name in ("train", "test") else "validation"
        if split in found:
            raise ValueError(f"{dataset} has two splits for {split}: {name} is the second one; remove one of them")
        found[split] = one
    if "train" not in found:
        raise ValueError(f"no split 'train' in {dataset}; it has: {', '.join(found)}")
    class_names = found["train"].class_names
    samples: dict[str, BoxSamples] = {}
    bad, notes, summaries = BadImages(), [], {}
    for name, (source, raw, names, lists_classes) in found.items():
        if not lists_classes and set(names) < set(class_names):  # some classes do not occur in this split
            number_of = np.array([*map(class_names.index, names), -1])  # the last one is of boxes without a class
            raw = replace(raw, classes=number_of[raw.classes])
        elif names != class_names:
            raise ValueError(
                f"the classes of the {name} split of {dataset} differ from those of the training split: "
                f"{_differing(names, class_names)}"
            )
        usable, new_notes = usable_boxes(raw, class_names, f"the {name} split of {dataset}", max_bad_fraction)
        checked = check_images(source, max_bad_fraction, checks=checks)
        samples[name] = BoxSamples(source, checked.good, usable)
        summaries[name] = checked.summary
        bad |= checked.bad
        notes += new_notes
        if not samples[name].num_boxes:
            raise ValueError(f"no image of the {name} split of {dataset} has a box that can be used")
    fraction = _VALIDATION_FRACTION if validation_fraction is None else validation_fraction
    if fraction and "validation" not in samples:
        train, validation = split_validation(len(samples["train"]), fraction, seed)
        if len(validation):  # none of a single image
            whole = samples["train"]
            rest = {name: split for name, split in samples.items() if name == "test"}
            samples = {"train": whole.select(train), "validation": whole.select(validation), **rest}
    notes += [
        f"{split.num_empty:,} of {len(split):,} images of the {name} split have no box: nothing is to be found in them"
        for name, split in samples.items()
        if split.num_empty
    ]
    return BoxSplits(class_names, samples, BadImages(bad), summaries["train"], tuple(notes))


def _differing(names: Sequence[str], expected: Sequence[str]) -> str:
    more, fewer = sorted(set(names) - set(expected)), sorted(set(expected) - set(names))
    parts = [f"only there {', '.join(more[:5])}"] * bool(more) + [f"only here {', '.join(fewer[:5])}"] * bool(fewer)
    return "; ".join(parts) or "they have another order"


def _open(dataset: str) -> Iterator[tuple[str, _Opened]]:
    """Yield the splits by the names that they have in the dataset."""
    path = Path(dataset).expanduser()
    if path.is_file() and path.suffix.lower() == ".json":
        yield "train", _open_coco(path, "train")
    elif path.is_dir() and (files := coco_files(path)):
        yield from ((name, _open_coco(file, name)) for name, file in files.items())
    elif path.is_dir() and (names_file := find_names_file(path)):
        yield from _open_yolo(path, read_class_names(names_file))
    else:
        for name in split_names(dataset):
            if name in SPLIT_NAMES:
                source = open_source(dataset, name)
                if not isinstance(source, TableSource):
                    raise ValueError(f"there are no boxes in {source.describe()}; {_EXPECTED}")
                yield name, _open_table(source)


# ---- COCO ----


def coco_files(root: Path) -> dict[str, Path]:
    """Return COCO's json files by split, from folders of splits, an annotations folder, or the folder itself."""
    for folders in ([root / name for name in SPLIT_NAMES], [root / "annotations"], [root]):
        files = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*.json"))]
        by_split: dict[str, list[Path]] = {}
        for file in filter(is_coco, files):
            words = re.split(r"[^a-z]+", file.stem.lower().replace("held_out", "heldout"))
            own = next((name for name in SPLIT_NAMES if name.replace("_", "") in words), "train")
            by_split.setdefault(file.parent.name if file.parent.name in SPLIT_NAMES else own, []).append(file)
        for name, several in by_split.items():
            # COCO's own folder has captions and keypoints beside them.
            chosen = [file for file in several if "instances" in file.stem] if len(several) > 1 else several
            if len(chosen) != 1:
                listed = ", ".join(file.name for file in several)
                raise ValueError(f"{several[0].parent} has several json files for {name}: {listed}; keep one of them")
            by_split[name] = chosen
        if by_split:
            return {name: by_split[name][0] for name in SPLIT_NAMES if name in by_split}
    return {}


def _open_coco(file: Path, split: str) -> _Opened:
    content = read_coco(file)
    folder = image_folder(content, split)
    names = pa.array([os.fsencode(name) for name in content.file_names], pa.large_binary())
    source = FileSource(names, os.fsencode(folder), f"{file}: {len(names):,} images of {folder}", file)
    sizes = content.sizes  # completed below; masks are decoded by them too
    _check_proportions(source, sizes, file)
    for index in np.flatnonzero(sizes[:, 0] == 0):
        sizes[index] = _size_of(source, int(index))
    scale = sizes[content.images].astype(np.float64)  # (M, 2); those of images that are not listed are not used
    raw = RawBoxes(
        images=content.images,
        boxes=content.boxes / np.tile(scale, 2),
        classes=content.classes,
        areas=content.areas / scale.prod(axis=1),
        is_crowd=content.is_crowd,
        name=content.name,
        mask=content.mask,
    )
    return _Opened(source, raw, content.class_names)


def image_folder(content: CocoFile, split: str) -> Path:
    """Return the folder to which the names of the images refer."""
    parent, first = content.path.parent, content.file_names[0]
    own = content.path.stem.rpartition("_")[2]  # instances_train2017.json is beside train2017/
    outer = parent.parent
    tried = [parent, parent / "images", parent / split, outer / split, outer / own, outer / "images", parent / own]
    tried += [outer / "images" / name for name in (split, own)] + [parent / "images" / split, outer]
    for name in content.file_names[:20]:  # some may be missing, which is reported with all that cannot be read
        for folder in tried:
            if os.path.isfile(folder / name):  # False also for a name that no file can have
                return folder
    looked = ", ".join(dict.fromkeys(str(folder) for folder in tried if folder.is_dir()))
    raise ValueError(f"the images of {content.path}, such as {first}, are in none of: {looked}")


def _check_proportions(source: ImageSource, sizes: np.ndarray, title: Path | str) -> None:
    """Check on some images that they have the proportions that the dataset gives, as boxes become fractions of them.

    Raises:
        ValueError: If one has not: it was turned, or belongs to another file.
    """
    known = np.flatnonzero(sizes[:, 0])
    chosen = known[np.linspace(0, len(known) - 1, min(len(known), _NUM_MEASURED)).astype(int)]
    wrong = []
    for index in chosen.tolist():
        (width, height), (given_width, given_height) = _size_of(source, index), sizes[index].tolist()
        is_read = (width, height) != (1, 1)
        if is_read and abs(width * given_height / (height * given_width) - 1) > _LARGEST_DISTORTION:
            wrong.append(f"{source.name(index)} has {width} x {height} pixels, not {given_width} x {given_height}")
    if wrong:
        raise ValueError(
            f"{title} gives other proportions than {len(wrong):,} of {len(chosen):,} images have: {wrong[0]}; correct "
            "width and height there, since boxes would be misplaced"
        )


def _size_of(source: ImageSource, index: int) -> tuple[int, int]:
    """Return width and height of an image; 1, 1 if it cannot be read, which is reported elsewhere."""
    try:
        with opened(source.entry(index)) as image:
            header = header_of(image)
    except BadImage:
        return 1, 1
    return header.width, header.height


# ---- YOLO ----


def _open_yolo(root: Path, class_names: tuple[str, ...]) -> Iterator[tuple[str, _Opened]]:
    folders = {
        name: folder for name in SPLIT_NAMES for folder in reversed([*image_folders(root, name)]) if folder.is_dir()
    }
    for name, folder in (folders or {"train": root / "images"}).items():
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}; {_EXPECTED}")
        source = open_source(str(folder), None)
        paths = [Path(source.name(index)) for index in range(len(source))]
        raw = read_yolo(paths)
        if not len(raw):
            raise ValueError(f"no image in {folder} has a text file with boxes, such as {label_file(paths[0])}")
        yield name, _Opened(source, raw, class_names)


# ---- tables ----


def _open_table(source: TableSource) -> _Opened:
    table, title = source.table, source.describe()
    column = next((name for name in _OBJECTS if name in table.features), None)
    if column is None and not any(name in table.features for name in _BOXES):
        raise ValueError(f"no column of boxes in {title}; expected one of {', '.join((*_OBJECTS, *_BOXES))}")
    cells = table.with_format(None)[column][:] if column else _rows(table, (*_BOXES, *_CLASSES))
    objects = [_as_columns(cell) for cell in cells]
    keys = set().union(*objects)
    box_key, class_key = (next((key for key in names if key in keys), None) for names in (_BOXES, _CLASSES))
    if box_key is None or class_key is None:
        raise ValueError(
            f"the objects of {title} have {', '.join(sorted(keys)) or 'nothing'}; expected {_BOXES[0]} (left, top, "
            f"width, height in pixels) and {_CLASSES[0]}"
        )
    sizes = _sizes(source)
    places = [(row, number) for row, each in enumerate(objects) for number in range(len(each.get(box_key) or ()))]
    boxes = np.array([_numbers(objects[row][box_key][number]) for row, number in places], np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    images = np.array([row for row, _ in places], np.int64)
    values: list[Any] = [
        value if isinstance(value, int | str) else None for value in _each(objects, class_key, places)
    ]
    class_names = _class_names(table.features[column] if column else table.features, class_key)
    lists_classes = class_names is not None
    if class_names is None:
        different = sorted(
            {value for value in values if value is not None}, key=lambda value: (str(type(value)), value)
        )
        number_of = {value: number for number, value in enumerate(different)}
        class_names = tuple(map(str, different))
    else:
        number_of = {**{name: n for n, name in enumerate(class_names)}, **{n: n for n in range(len(class_names))}}
    scale = sizes[images].astype(np.float64)
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    areas = _each(objects, "area", places)
    given = np.array([area if isinstance(area, int | float) else np.nan for area in areas], np.float64)
    raw = RawBoxes(
        images=images,
        boxes=boxes / np.tile(scale, 2),
        classes=np.array([number_of.get(value, -1) for value in values], np.int64),
        areas=np.where(given > 0, given, sides) / scale.prod(axis=1),
        is_crowd=np.array([bool(crowd) for crowd in _each(objects, "iscrowd", places)], bool),
        name=partial(_name_in_table, source, places),
    )
    return _Opened(source, raw, class_names, lists_classes)


def _rows(table: datasets.Dataset, names: Sequence[str]) -> list[dict[str, Any]]:
    return table.with_format(None).select_columns([name for name in names if name in table.features]).to_list()


def _as_columns(cell: Any) -> dict[str, list[Any]]:
    """Return the objects of an image by key; they may be a list of objects."""
    if isinstance(cell, list):
        return {key: [each.get(key) for each in cell] for key in (cell[0] if cell else ())}
    return cell or {}


def _each(objects: Sequence[Mapping[str, Any]], key: str, places: Sequence[tuple[int, int]]) -> list[Any]:
    """Return the value of each object by row and number; None where there are fewer values than boxes."""
    lists = [value if isinstance(value := each.get(key), list) else () for each in objects]
    return [lists[row][number] if number < len(lists[row]) else None for row, number in places]


def _name_in_table(source: TableSource, places: Sequence[tuple[int, int]], index: int) -> str:
    row, number = places[index]
    return f"{source.name(row)}, object {number}"


def _numbers(box: Any) -> Sequence[float]:
    is_box = isinstance(box, Sequence) and len(box) == 4 and all(isinstance(number, int | float) for number in box)
    return box if is_box else (np.nan,) * 4


def _class_names(features: Any, key: str) -> tuple[str, ...] | None:
    """Return the names of the classes that the table declares, if it does."""
    feature = getattr(features, "feature", features)
    feature = feature.get(key) if isinstance(feature, dict) else None
    feature = getattr(feature, "feature", feature)
    return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None


def _sizes(source: TableSource) -> np.ndarray:
    """Return width and height of each image, int64 (N, 2), from columns of these names or from the images."""
    if {"width", "height"} <= set(source.table.features):
        columns = source.table.select_columns(["width", "height"]).with_format("numpy")[:]
        given = np.stack([np.asarray(columns[name], np.float64) for name in ("width", "height")], axis=1)
        sizes = np.where((given > 0).all(axis=1, keepdims=True), given, 0).astype(np.int64)
        _check_proportions(source, sizes, source.describe())
        for index in np.flatnonzero(sizes[:, 0] == 0):
            sizes[index] = _size_of(source, int(index))
        return sizes
    return np.array([_size_of(source, index) for index in range(len(source))], np.int64)

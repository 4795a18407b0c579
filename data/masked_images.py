"""Open and split datasets of images with masks: folders of images/ and masks/, COCO json, or tables with both.

Shapes: N images of a split, K classes.
"""

import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data.bad_images import BadImages
from data.coco_masks import BACKGROUND, open_coco_masks
from data.decoding import BadImage, check
from data.image_checks import NUM_SAMPLED, Checks, Summary, check_images, num_cores
from data.image_source import FileSource, ImageSource, TableSource, join_sources
from data.images import SourceSamples, split_validation
from data.mask_codes import CLASS_FILE, IGNORED, MAX_CLASSES, MaskCodes, codes_from_masks, read_class_file
from data.sources import open_source, split_names
from data.splits import Splits
from data.tables import VALIDATION_NAMES

logger = logging.getLogger(__name__)

IMAGE_FOLDERS, MASK_FOLDERS = ("images", "image"), ("masks", "mask", "annotations", "labels")
MASK_COLUMNS = (
    *("mask", "masks", "annotation", "annotations", "label", "labels", "segmentation", "segmentation_mask"),
    *("semantic_seg", "semantic", "scene_category_mask"),
)
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": (*(name for name in VALIDATION_NAMES if name != "test"), "validation"),
    "test": ("test", "testing"),
}
_VALIDATION_FRACTION = 0.1
_REST = "unlabeled"  # what COCO json does not cover, if one of its classes is the background
_NUM_LOOKED_AT = 100  # entries of a folder of masks, by which COCO json is told from images


@dataclass(frozen=True)
class MaskedImages(SourceSamples):
    """Images `indices` of `source` with the masks of the same indices, and the number of pixels of each class (N, K).

    The number of pixels is empty where it was not counted.
    """

    masks: ImageSource
    codes: MaskCodes | None = None

    def sample(self, index: int) -> dict[str, Any]:
        return {**super().sample(index), "mask": self.masks.read(int(self.indices[index]))}

    def mask(self, index: int) -> np.ndarray:
        """Return the classes of an image's pixels, uint8 (H, W)."""
        assert self.codes is not None
        return self.codes.read(self.masks.entry(int(self.indices[index])))


@dataclass(frozen=True)
class MaskedSplits(Splits):
    """Readable images with masks, the classes, and the number of training pixels of each, int64 (K,)."""

    splits: dict[str, MaskedImages]
    codes: MaskCodes
    pixels: np.ndarray
    bad: BadImages
    summary: Summary
    more_notes: tuple[str, ...]

    @property
    def by_name(self) -> Mapping[str, MaskedImages]:
        return self.splits

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.codes.names

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.summary.notes, *self.more_notes)

    def describe(self) -> tuple[str, str]:
        return self.splits["train"].source.describe(), self.summary.describe()


def open_masked_splits(
    dataset: Sequence[str],
    *,
    class_file: str | None,
    ignore_index: int,
    mask_column: str | None,
    validation_fraction: float | None,
    max_bad_fraction: float,
    seed: int,
    checks: Checks = "new",
) -> MaskedSplits:
    """Open images with masks, check them, and add a validation split if there is none.

    Raises:
        ValueError: If the data cannot be opened, its classes are not clear, or too many images cannot be used.
    """
    title = " + ".join(dataset)
    bad = BadImages()
    opened = [_open_one(name, mask_column, bad) for name in dataset]
    found = {split: [each[split] for each in opened if split in each] for split in _SPLIT_NAMES}
    splits = {name: _join(parts) for name, parts in found.items() if parts}
    if "train" not in splits:
        raise ValueError(f"no training images in {title}; it has: {', '.join(splits) or 'nothing'}")
    notes = []
    known = next((split.codes for split in splits.values() if split.codes), None)  # of COCO json
    if known is not None and class_file:
        raise ValueError(f"class_file {class_file} has no effect: {title} is COCO json, which names its classes")
    file = (
        Path(class_file)
        if class_file
        else next((path for name in dataset if (path := Path(name).expanduser() / CLASS_FILE).is_file()), None)
    )
    if known is not None:
        codes = known
    elif file is not None:
        codes = read_class_file(file, ignore_index)
    else:
        masks = splits["train"].masks
        codes, note = codes_from_masks(map(masks.entry, _checked(len(masks), checks)), ignore_index, title)
        notes.append(note)
    if ignore_index != IGNORED and (known is not None or codes.is_color):
        kind, instead = (
            ("COCO json", "") if known is not None else ("colors", "; a class named 'ignore' does not count")
        )
        raise ValueError(f"ignore_index {ignore_index} has no effect: the masks of {title} are {kind}{instead}")
    num_listed = len(bad) + sum(map(len, splits.values()))
    counts: dict[str, np.ndarray] = {}
    summaries = {}
    for name, split in splits.items():
        checked = check_images(split.source, max_bad_fraction, checks=checks)
        summaries[name] = checked.summary
        bad |= checked.bad
        usable = replace(split, indices=checked.good, codes=codes)
        good, counts[name] = _check_masks(usable, bad, checks)
        splits[name] = usable.select(good)
    num_bad = len(bad)
    if not all(map(len, splits.values())) or num_bad > max_bad_fraction * num_listed:
        raise ValueError(
            f"{num_bad:,} of {num_listed:,} images of {title} cannot be used with their masks (max_bad_fraction is "
            f"{max_bad_fraction:g}): {bad.describe()}"
        )
    if "validation" not in splits and validation_fraction != 0:
        fraction = _VALIDATION_FRACTION if validation_fraction is None else validation_fraction
        kept, held_out = split_validation(len(splits["train"]), fraction, seed)
        if len(held_out):
            train = splits["train"]
            chosen = {"train": train.select(kept), "validation": train.select(held_out)}
            splits = {**chosen, **{name: split for name, split in splits.items() if name == "test"}}
            notes.append(f"no validation split: {len(held_out):,} of {len(train):,} training images are used for it")
            counts["train"] = counts["train"][kept] if len(counts["train"]) == len(train) else counts["train"]
    pixels = counts["train"].sum(0, dtype=np.int64)
    return MaskedSplits(splits, codes, pixels, bad, summaries["train"], (*notes, *_notes_on_balance(codes, pixels)))


def _open_one(dataset: str, mask_column: str | None, bad: BadImages) -> dict[str, MaskedImages]:
    folder = Path(dataset).expanduser()
    pairs = _pairs_of_folders(folder) if folder.is_dir() else {}
    if pairs and not all(_has_json_only(masks) for _, masks in pairs.values()):  # annotations/ may be COCO's
        return {name: _pair(images, masks, bad) for name, (images, masks) in pairs.items()}
    if coco := _from_coco(folder, bad):
        return coco
    names = split_names(dataset)
    found = {}
    for split, candidates in _SPLIT_NAMES.items():
        name = next((name for name in candidates if name in names), None)
        if name is not None:
            found[split] = _from_tables(open_source(dataset, name), mask_column, dataset)
    return found


def _pairs_of_folders(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return the folders of images and of masks by split: train/images, images/train, or images alone."""
    found, halves = {}, list[tuple[Path, str]]()
    inside = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    images, masks = _first(inside, IMAGE_FOLDERS), _first(inside, MASK_FOLDERS)
    for split, names in _SPLIT_NAMES.items():
        if images and masks:
            pair = tuple(
                _first({path.name.lower(): path for path in each.iterdir() if path.is_dir()}, names)
                for each in (images, masks)
            )
        else:
            root = _first(inside, names)
            below = {path.name.lower(): path for path in root.iterdir() if path.is_dir()} if root else {}
            pair = _first(below, IMAGE_FOLDERS), _first(below, MASK_FOLDERS)
        if pair[0] and pair[1]:
            found[split] = (pair[0], pair[1])
        elif half := pair[0] or pair[1]:
            halves.append((half, "masks" if pair[0] else "images"))
    for half, what in halves if found else ():  # without any pair, they may be the images of COCO json
        logger.warning("%s is not used: there are no %s for it", half, what)
    if not found and images and masks:
        found["train"] = (images, masks)
    return found


def _has_json_only(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        names = [entry.name.lower() for entry in itertools.islice(entries, _NUM_LOOKED_AT)]
    return bool(names) and all(name.endswith(".json") for name in names)


def _first(folders: Mapping[str, Path], names: Sequence[str]) -> Path | None:
    return next((folders[name] for name in names if name in folders), None)


def _pair(image_folder: Path, mask_folder: Path, bad: BadImages) -> MaskedImages:
    """Pair images and masks of the same name, without its ending; record in `bad` what has no partner."""
    images, masks = (_files(folder) for folder in (image_folder, mask_folder))
    by_stem = {os.path.splitext(name)[0]: name for name in masks}
    if len(by_stem) < len(masks):
        raise ValueError(f"several masks in {mask_folder} have the same name up to its ending; keep one of each")
    pairs, taken = [], set()
    for name in images:
        stem = os.path.splitext(name)[0]
        mask = by_stem.pop(stem, None)
        if mask is not None:
            pairs.append((name, mask))
            taken.add(stem)
            continue
        bad[os.path.join(image_folder, os.fsdecode(name))] = (
            "another image has its name up to the ending, and the mask"
            if stem in taken
            else f"it has no mask of the same name in {mask_folder}"
        )
    for name in by_stem.values():
        bad[os.path.join(mask_folder, os.fsdecode(name))] = f"it has no image of the same name in {image_folder}"
    if not pairs:
        example = f", such as {os.fsdecode(images[0])} and {os.fsdecode(masks[0])}" if images and masks else ""
        raise ValueError(
            f"no image in {image_folder} has a mask of the same name in {mask_folder}: {len(images):,} images and "
            f"{len(masks):,} masks{example}"
        )
    description = f"{image_folder}: {len(pairs):,} images with masks in {mask_folder}"
    found = [
        FileSource(pa.array(list(names), pa.large_binary()), os.fsencode(folder), description, folder)
        for names, folder in zip(zip(*pairs, strict=True), (image_folder, mask_folder), strict=True)
    ]
    return MaskedImages(found[0], np.arange(len(pairs)), found[1])


def _files(folder: Path) -> list[bytes]:
    """Return the names of the images in a folder, relative to it."""
    source = open_source(str(folder), None)
    if not isinstance(source, FileSource):
        raise ValueError(f"{folder} holds tables, expected image files")
    names: list[bytes] = source.names.to_pylist()
    return names


def _from_coco(path: Path, bad: BadImages) -> dict[str, MaskedImages]:
    found = {}
    for name, images, masks in open_coco_masks(path, bad):
        split = next(split for split, names in _SPLIT_NAMES.items() if name in names)
        if split in found:
            raise ValueError(f"{path} has two splits for {split}: {name} is the second one; remove one of them")
        rest = _REST if BACKGROUND in masks.content.class_names else BACKGROUND  # no two classes have one name
        names = (rest, *masks.content.class_names)
        codes = MaskCodes(names, tuple(range(len(names))), False, ())
        if len(names) > MAX_CLASSES:
            raise ValueError(f"{path} has {len(names):,} classes, expected at most {MAX_CLASSES}")
        found[split] = MaskedImages(images, np.arange(len(images)), masks, codes)
    return found


def _from_tables(source: ImageSource, mask_column: str | None, title: str) -> MaskedImages:
    images, masks = [], []
    for part in source.parts:
        if not isinstance(part, TableSource):
            raise ValueError(
                f"there are no masks in {part.describe()}; expected a folder with {IMAGE_FOLDERS[0]}/ and "
                f"{MASK_FOLDERS[0]}/, or a table with a column of images and one of masks"
            )
        table = part.table
        column = mask_column or _find_mask_column(table.features, title)
        if column not in table.features:
            raise ValueError(f"mask_column {column!r} is not in {title}, which has {', '.join(table.features)}")
        name = part.name(0).partition("#")[0]
        images.append(TableSource(table.remove_columns([column]), name))
        masks.append(TableSource(table.select_columns([column]), name))
    joined = join_sources(images)
    return MaskedImages(joined, np.arange(len(joined)), join_sources(masks))


def _find_mask_column(features: datasets.Features, title: str) -> str:
    pictures = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    for name in MASK_COLUMNS:
        if name in pictures:
            return name
    raise ValueError(
        f"no column with masks in {title}; its columns of images are {', '.join(pictures) or 'none'}, expected one of "
        f"{', '.join(MASK_COLUMNS)}; mask_column can name it"
    )


def _join(parts: list[MaskedImages]) -> MaskedImages:
    source, codes = join_sources([part.source for part in parts]), parts[0].codes
    if any(part.codes != codes for part in parts):
        raise ValueError("the datasets have different classes, or only some of them are COCO json")
    return MaskedImages(source, np.arange(len(source)), join_sources([part.masks for part in parts]), codes)


def _checked(num_masks: int, checks: Checks) -> Sequence[int]:
    """Return the positions of the masks that are read before training."""
    if checks != "sample" or num_masks <= NUM_SAMPLED:
        return range(num_masks)
    positions: list[int] = np.linspace(0, num_masks - 1, NUM_SAMPLED).astype(np.int64).tolist()
    return positions


def _check_masks(split: MaskedImages, bad: BadImages, checks: Checks) -> tuple[np.ndarray, np.ndarray]:
    """Compare every mask with its image; returns the positions of usable ones, and their pixels of each class."""
    assert split.codes is not None
    num_classes = len(split.codes.names)

    def count(position: int) -> np.ndarray | str:
        index = int(split.indices[position])
        try:
            mask = split.mask(position)
            header = check(split.source.entry(index))
        except BadImage as error:
            return str(error)
        if mask.shape != (header.height, header.width):
            turned = " (the EXIF orientation turns the image)" if header.orientation >= 5 else ""
            return (
                f"its mask is {mask.shape[1]} x {mask.shape[0]} pixels, but the image {header.width} x "
                f"{header.height}{turned}"
            )
        counts = np.bincount(mask.ravel(), minlength=IGNORED + 1)
        # A copy of the classes alone, as there is one for every mask.
        own = counts[:num_classes].astype(np.int32)
        return own if own.any() else "no pixel of its mask counts"

    positions = _checked(len(split), checks)
    with ThreadPoolExecutor(min(16, num_cores())) as pool:
        shown = tqdm(pool.map(count, positions), "masks", len(positions), disable=len(positions) < 2000)
        found = list(shown)
    wrong = {position: result for position, result in zip(positions, found, strict=True) if isinstance(result, str)}
    bad.update({split.name(position): result for position, result in wrong.items()})
    good = np.array([position for position in range(len(split)) if position not in wrong], np.int64)
    counts = [result for result in found if not isinstance(result, str)]
    return good, np.array(counts, np.int32).reshape(-1, num_classes)


def _notes_on_balance(codes: MaskCodes, pixels: np.ndarray) -> list[str]:
    notes = []
    total, order = max(pixels.sum(), 1), np.argsort(-pixels, kind="stable")
    shares = [f"{codes.names[k]} {pixels[k] / total:.2%}" for k in order]
    shown = shares if len(shares) <= 8 else [*shares[:4], "...", *shares[-3:]]
    notes.append(f"pixels by class: {', '.join(shown)}")
    absent = [codes.names[k] for k in np.flatnonzero(pixels == 0)]
    if absent:
        notes.append(f"{len(absent)} classes do not occur in the training masks: {', '.join(absent[:10])}")
    return notes

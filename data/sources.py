"""Open a dataset by name as a source of encoded images.

A dataset is a bundled sample, a folder of images (with any nesting), a text file of paths, a parquet or arrow file, a
tar or zip archive, a folder of these or written by `save_to_disk`, a folder of MNIST's idx files, a pattern of shards
anywhere (`data.shard_files`), a dataset on the Hub, or a list of these.
"""

import difflib
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from data.band_files import ARRAY_EXTENSIONS
from data.decoding import EXTENSIONS
from data.idx import find_idx_files, read_idx
from data.image_source import ArraySource, FileSource, ImageSource, TableSource, join_sources
from data.measured import Measured
from data.measured_sources import join_measured, measured_source
from data.shard_files import ARCHIVES, ShardFile, find_shards, is_shard_pattern, local_shard
from data.shards import ShardSource
from data.tables import TABLE_EXTENSIONS, VALIDATION_NAMES, group_by_split, load_tables

_SAMPLES = Path(__file__).parent / "samples"
BUNDLED = {"sample": _SAMPLES / "photographs", "sample-fashion": _SAMPLES / "fashion_mnist"}
IMAGE_EXTENSIONS = frozenset(extension for extensions in EXTENSIONS.values() for extension in extensions)
LIST_EXTENSIONS = frozenset({".txt", ".lst"})

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def open_source(
    dataset: str | list[str], split: str | None = "train", measured: Measured | None = None
) -> ImageSource:
    """Open a split of a dataset, or all images if `split` is None or the dataset has no splits.

    Args:
        measured: How images are read whose values are measurements.

    Raises:
        ValueError: If there is no such dataset or split, or it has no images.
    """
    names = [dataset] if isinstance(dataset, str) else dataset
    if not names or not all(names):  # `Path` would take an empty name for the current folder
        raise ValueError("the dataset is missing; name a folder of images, or 'sample' for the bundled photographs")
    source = join_sources([_open(name, split, _kinds(measured)) for name in names])
    return source if measured is None else measured_source(source, measured)


def _open(dataset: str, split: str | None, kinds: frozenset[str]) -> ImageSource:
    if dataset in BUNDLED:
        return _open_folder(BUNDLED[dataset], split, kinds)
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _open_folder(path, split, kinds)
    if is_shard_pattern(dataset):
        groups = _shards_by_split(dataset)
        if list(groups) == ["train"] and split in (None, "train"):
            return ShardSource(groups["train"], dataset)
        return _open_splits(list(groups), split, dataset, lambda name, title: ShardSource(groups[name], title))
    if path.is_file():
        return _open_file(path)
    if _HUB_ID.fullmatch(dataset) and path.suffix.lower() not in IMAGE_EXTENSIONS | TABLE_EXTENSIONS | LIST_EXTENSIONS:
        return _open_hub(dataset, split)
    raise ValueError(f"dataset {dataset!r}: {_describe_missing(path)}, and this is not a valid Hub id (owner/name)")


def open_validation(dataset: str | list[str], measured: Measured | None = None) -> ImageSource | None:
    """Open the validation split of a dataset, or those of several; None if there are none."""
    if isinstance(dataset, str):
        names = split_names(dataset, measured)
        name = next((name for name in VALIDATION_NAMES if name in names), None)
        return None if name is None else open_source(dataset, name, measured)
    sources = [source for one in dataset if (source := open_validation(one, measured)) is not None]
    return join_measured(sources) if sources else None


def split_names(dataset: str, measured: Measured | None = None) -> list[str]:
    """Return the splits of a dataset that `open_source` can open; only "train" if it has no splits."""
    folder = BUNDLED.get(dataset, Path(dataset).expanduser())
    if is_shard_pattern(dataset) and not folder.is_dir():
        return list(_shards_by_split(dataset))
    if folder.is_file():
        return ["train"]
    if not folder.is_dir():
        return _hub_split_names(dataset)
    if (folder / "dataset_dict.json").exists():
        return list(datasets.load_from_disk(str(folder)))
    if files := find_idx_files(folder):
        return list(files)
    if _choose_subfolder(folder, "train")[1] is not None:
        subfolders = _subfolders(folder)
        return [name for name in ("train", *VALIDATION_NAMES) if name in subfolders]
    kinds = _kinds(measured)
    if any(_kind(name) in kinds for _, names in _walk(folder) for name in names):  # without listing millions again
        return ["train"]
    _, tables, archives, _ = _list_files(folder)
    return list(group_by_split(archives or tables, folder)) if archives or tables else ["train"]


def _open_file(path: Path) -> ImageSource:
    extension = path.suffix.lower()
    if extension in TABLE_EXTENSIONS:
        return TableSource(load_tables([path]), str(path))
    if extension in LIST_EXTENSIONS:
        lines = [line for text in path.read_bytes().splitlines() if (line := text.strip())]
        if not lines:
            raise ValueError(f"{path} is empty; expected one image path per line, relative to the folder of this file")
        # Binary, because a file name need not be valid Unicode.
        names = pa.array(lines, pa.large_binary())
        return FileSource(names, os.fsencode(path.parent), f"{path}: a list of {len(names):,} image files", path)
    raise ValueError(
        f"dataset {str(path)!r} is a single file; expected a folder of images, a {_or(LIST_EXTENSIONS)} file with one "
        f"image path per line, or a {_or(TABLE_EXTENSIONS)} file with an image column"
    )


def _open_folder(folder: Path, split: str | None, kinds: frozenset[str]) -> ImageSource:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _open_saved(folder, split)
    if find_idx_files(folder):
        return _open_idx(folder, split)
    subfolder, validation = _choose_subfolder(folder, split)
    images, tables, archives, others = _list_files(subfolder, kinds)
    if len(images):
        if split not in (None, "train") and subfolder == folder:
            raise ValueError(f"no split {split!r} in {folder}; it has: {', '.join(split_names(str(folder)))}")
        description = f"{subfolder}: {len(images):,} image file{'s' * (len(images) != 1)}"
        if validation is not None:
            description += f" ({validation.name}/ beside it is for validation)"
        return FileSource(images, os.fsencode(subfolder), description, subfolder)
    if archives:
        return _open_archives(subfolder, archives, split)
    if tables:
        return _open_tables(subfolder, tables, split)
    found = ", ".join(f"{count:,} {extension}" for extension, count in others.most_common(5)) or "nothing"
    raise ValueError(
        f"no image files in {subfolder} (found {found}); expected {_or(IMAGE_EXTENSIONS)} files, "
        f"tables in {_or(TABLE_EXTENSIONS)} files, or archives in {_or(ARCHIVES)} files"
    )


def _choose_subfolder(folder: Path, split: str | None) -> tuple[Path, Path | None]:
    """Return the folder to read and its validation folder; training images need both to be recognized as splits."""
    subfolders = _subfolders(folder)
    validation = next((subfolders[name] for name in VALIDATION_NAMES if name in subfolders), None)
    if split == "train":
        return (
            (subfolders["train"], validation) if validation is not None and "train" in subfolders else (folder, None)
        )
    return subfolders.get(split or "", folder), None


def _subfolders(folder: Path) -> dict[str, Path]:
    """Return the folders in a folder by name in lower case."""
    with os.scandir(folder) as entries:
        return {name.lower(): folder / name for name in sorted(entry.name for entry in entries if _is_folder(entry))}


def _is_folder(entry: os.DirEntry[Any]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, for example
        return False


def _list_files(
    folder: Path, kinds: frozenset[str] = frozenset({"image"})
) -> tuple[pa.LargeBinaryArray, list[Path], list[Path], Counter[str]]:
    """Return the names of image files (of these kinds), table files, archives, and the number of other files."""
    images = [pa.array([], pa.large_binary())]  # an array for each folder: Python objects would take twice the memory
    containers: dict[str, list[Path]] = {TABLE: [], ARCHIVE: []}
    others: Counter[str] = Counter()
    start = len(os.path.join(os.fsencode(folder), b""))
    for root, names in _walk(folder):
        parent = os.path.join(root, b"")[start:]
        found = [parent + name for name in names if _kind(name) in kinds]
        images.append(pa.array(found, pa.large_binary()))
        if len(found) < len(names):
            others.update(_kind(name) for name in names if _kind(name) not in kinds)
            for kind, paths in containers.items():
                paths += [Path(os.fsdecode(os.path.join(root, name))) for name in names if _kind(name) == kind]
    for kind in (IMAGE, *containers):
        del others[kind]
    return pa.concat_arrays(images), containers[TABLE], containers[ARCHIVE], others


def _walk(folder: Path) -> Iterator[tuple[bytes, list[bytes]]]:
    """Yield each folder with the sorted names of its files, hidden ones excepted; includes broken links."""
    seen: set[tuple[int, int]] = set()
    waiting = [os.fsencode(folder)]
    while waiting:
        root = waiting.pop()
        try:
            status = os.stat(root)
            if (status.st_dev, status.st_ino) in seen:  # not listed again: every folder may have a link to its parent
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root) as entries:
                is_folder = {entry.name: _is_folder(entry) for entry in entries if not entry.name.startswith(b".")}
        except OSError as error:
            raise ValueError(
                f"the folder {os.fsdecode(root)} cannot be read ({error.strerror}); check its permissions"
            ) from error
        names = sorted(is_folder)
        waiting += [os.path.join(root, name) for name in reversed(names) if is_folder[name]]
        yield root, [name for name in names if not is_folder[name]]


IMAGE, TABLE, ARCHIVE = "image", "table", "archive"


def _kinds(measured: Measured | None) -> frozenset[str]:
    """Return which kinds of files are images; measurements are in arrays and DICOM files too."""
    return frozenset({IMAGE}) if measured is None else ARRAY_EXTENSIONS | {IMAGE}


def _kind(name: bytes) -> str:
    """Return whether a file is an image, a table or an archive; else its extension."""
    return _kind_of(name.rpartition(b".")[2] if b"." in name else b"")


@lru_cache(1024)
def _kind_of(extension: bytes) -> str:
    text = f".{os.fsdecode(extension).lower()}" if extension else "without extension"
    kinds = {IMAGE: IMAGE_EXTENSIONS, TABLE: TABLE_EXTENSIONS, ARCHIVE: ARCHIVES}
    return next((kind for kind, extensions in kinds.items() if text in extensions), text)


def _open_tables(folder: Path, tables: list[Path], split: str | None) -> ImageSource:
    if split is None:
        return TableSource(load_tables(tables), str(folder))
    is_split = folder.name.lower() == split  # as in train/part.parquet
    groups = {split: tables} if is_split else group_by_split(tables, folder)
    return _open_splits(list(groups), split, folder, lambda name, title: TableSource(load_tables(groups[name]), title))


def _open_archives(folder: Path, archives: list[Path], split: str | None) -> ImageSource:
    is_split = folder.name.lower() == split  # as in train/000.tar
    groups = {str(split): archives} if is_split else group_by_split(archives, folder)

    def open_split(name: str, title: str) -> ImageSource:
        return ShardSource([local_shard(path) for path in groups[name]], title)

    return _open_splits(list(groups), split, folder, open_split)


def _shards_by_split(pattern: str) -> dict[str, list[ShardFile]]:
    """Group shards by the split named in the part of their names that differs; all are for training if none is."""
    files = find_shards(pattern)
    start = os.path.commonprefix([file.url for file in files]).rfind("/") + 1  # noqa: RUF071  (cut at a slash)
    by_path = {Path(file.url[start:]): file for file in files}
    groups = group_by_split(list(by_path), Path())
    named = {name: [by_path[path] for path in paths] for name, paths in groups.items()}
    return named if len(named) > 1 else {"train": list(files)}


def _open_saved(folder: Path, split: str | None) -> ImageSource:
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):
        return TableSource(saved, str(folder))
    return _open_splits(list(saved), split, folder, lambda name, title: TableSource(saved[name], title))


def _open_idx(folder: Path, split: str | None) -> ImageSource:
    files = find_idx_files(folder)
    return _open_splits(list(files), split, folder, lambda name, title: ArraySource(*read_idx(*files[name]), title))


def _open_hub(dataset: str, split: str | None) -> ImageSource:
    def open_split(name: str, title: str) -> ImageSource:
        return TableSource(datasets.load_dataset(dataset, split=name), title)

    return _open_splits(_hub_split_names(dataset), split, dataset, open_split)


def _hub_split_names(name: str) -> list[str]:
    try:
        return datasets.get_dataset_split_names(name)
    # The Hub's client raises a dozen types from three libraries (not found, offline, gated, several configurations).
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"dataset {name!r}: {_describe_missing(Path(name))}, and the Hub has no dataset of this name ({reason})"
        ) from error


def _open_splits(
    names: list[str], split: str | None, dataset: str | Path, open_split: Callable[[str, str], ImageSource]
) -> ImageSource:
    """Open one split, or all of them for None; `open_split` takes the name of a split and its title."""
    if split is not None and split not in names:
        raise ValueError(f"no split {split!r} in {dataset}; it has: {', '.join(names)}")
    return join_sources([open_split(name, f"{dataset}/{name}") for name in ([split] if split else names)])


def _describe_missing(path: Path) -> str:
    """Say that `path` does not exist, and suggest files beside it with similar names."""
    parent = path.absolute().parent
    while not parent.is_dir():
        parent, path = parent.parent, parent
    near = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()] + list(BUNDLED), n=3)
    return f"there is no {path.name!r} in {parent}" + (f" (did you mean {' or '.join(near)}?)" if near else "")


def _or(extensions: frozenset[str]) -> str:
    *first, last = sorted(extensions)
    return f"{', '.join(first)} or {last}"

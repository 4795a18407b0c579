"""Where the images come from: opens whatever the dataset argument names and gives each image's encoded bytes.

It may name a bundled sample, a folder of images (any nesting), a text file of paths, a parquet or arrow file, a folder
of those or of `save_to_disk`, or a dataset of the Hub; or several of these.
"""

import difflib
import os
import re
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path

import datasets
import pyarrow as pa

from data.decoding import EXTENSIONS, BadImage, read_bytes
from data.tables import HELD_OUT_NAMES, TABLE_EXTENSIONS, image_column, load_tables, tables_by_split

_SAMPLES = Path(__file__).parent / "samples"
BUNDLED = {"sample": _SAMPLES / "photographs", "sample-fashion": _SAMPLES / "fashion_mnist"}
IMAGE_EXTENSIONS = frozenset(extension for extensions in EXTENSIONS.values() for extension in extensions)
LIST_EXTENSIONS = frozenset({".txt", ".lst"})

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class ImageSource(ABC):
    """A numbered collection of encoded images; knows nothing of pixels."""

    def __init__(self, description: str, open_held_out: "Callable[[], ImageSource] | None" = None) -> None:
        self._description = description
        self._open_held_out = open_held_out

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def entry(self, index: int) -> bytes | Path:
        """The image where it lies: a path for a file, so that a check need not read all of it."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What a person needs to find the image again: its path, or dataset/split#row."""

    def read(self, index: int) -> bytes:
        entry = self.entry(index)
        return entry if isinstance(entry, bytes) else read_bytes(entry)

    def held_out(self) -> "ImageSource | None":
        """The part that the dataset itself keeps apart for validation, if it has one."""
        return self._open_held_out() if self._open_held_out else None

    def describe(self) -> str:
        return self._description


class FileSource(ImageSource):
    """Image files; the paths are one arrow array, which worker processes share instead of copying."""

    def __init__(
        self, paths: Sequence[bytes], description: str, open_held_out: Callable[[], ImageSource] | None = None
    ) -> None:
        super().__init__(description, open_held_out)
        self._paths = pa.array(paths, pa.large_binary())  # binary: a file name need not be valid unicode

    def __len__(self) -> int:
        return len(self._paths)

    def entry(self, index: int) -> Path:
        return Path(self.name(index))

    def name(self, index: int) -> str:
        return os.fsdecode(self._paths[index].as_py())


class TableSource(ImageSource):
    """The image column of a `datasets.Dataset`."""

    def __init__(
        self, table: datasets.Dataset, title: str, open_held_out: Callable[[], ImageSource] | None = None
    ) -> None:
        column = image_column(table.features, title)
        super().__init__(f"{title}: {len(table):,} rows, image column {column!r}", open_held_out)
        self._table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self._column = column
        self._title = title

    def __len__(self) -> int:
        return len(self._table)

    def entry(self, index: int) -> bytes | Path:
        cell = self._table[index][self._column]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise BadImage("no image in this row")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"])

    def name(self, index: int) -> str:
        return f"{self._title}#{index}"


class JoinedSource(ImageSource):
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[ImageSource]) -> None:
        super().__init__("; ".join(part.describe() for part in parts))
        self._parts = tuple(parts)
        self._starts = (0, *accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._starts[-1]

    def entry(self, index: int) -> bytes | Path:
        part, index = self._locate(index)
        return part.entry(index)

    def name(self, index: int) -> str:
        part, index = self._locate(index)
        return part.name(index)

    def held_out(self) -> ImageSource | None:
        held_out = [part for part in (part.held_out() for part in self._parts) if part is not None]
        return _joined(held_out) if held_out else None

    def _locate(self, index: int) -> tuple[ImageSource, int]:
        number = bisect_right(self._starts, index) - 1
        return self._parts[number], index - self._starts[number]


def open_source(dataset: str | list[str], split: str | None = "train") -> ImageSource:
    """Opens what `dataset` names; `split` picks a part where there are parts (None: all of them together)."""
    if not dataset:
        raise ValueError("no dataset was named; name a folder of images, or 'sample' for the bundled photographs")
    if not isinstance(dataset, str):
        return _joined([open_source(one, split) for one in dataset])
    if dataset in BUNDLED:
        return _open_folder(BUNDLED[dataset], split)
    path = Path(dataset).expanduser()
    if path.is_dir():
        return _open_folder(path, split)
    if path.is_file():
        return _open_file(path)
    if _HUB_ID.fullmatch(dataset) and path.suffix.lower() not in IMAGE_EXTENSIONS | TABLE_EXTENSIONS | LIST_EXTENSIONS:
        return _open_hub(dataset, split)
    raise ValueError(f"dataset {dataset!r}: {_nothing_there(path)}, and this is not the form of a Hub id (owner/name)")


def _joined(parts: list[ImageSource]) -> ImageSource:
    return parts[0] if len(parts) == 1 else JoinedSource(parts)


def _open_file(path: Path) -> ImageSource:
    extension = path.suffix.lower()
    if extension in TABLE_EXTENSIONS:
        return TableSource(load_tables([path]), str(path))
    if extension in LIST_EXTENSIONS:
        lines = [line.strip() for line in path.read_bytes().splitlines()]
        paths = [os.path.join(os.fsencode(path.parent), line) for line in lines if line]
        if not paths:
            raise ValueError(f"{path} is empty, expected one image path a line, relative to the folder of this file")
        return FileSource(paths, f"{path}: a list of {len(paths):,} image files")
    raise ValueError(
        f"dataset {str(path)!r} is a single file; expected a folder of images, a {_or(LIST_EXTENSIONS)} file with one "
        f"image path a line, or a {_or(TABLE_EXTENSIONS)} file with an image column"
    )


def _open_folder(folder: Path, split: str | None) -> ImageSource:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return _open_saved(folder, split)
    part, held_out = _choose_subfolder(folder, split)
    images, tables, others = _list_files(part)
    if images:
        if split not in (None, "train") and part == folder:
            raise ValueError(f"there is no folder {split!r} in {folder}; its images are one part: use split 'train'")
        description = f"{part}: {len(images):,} image files"
        if held_out is None:
            return FileSource(images, description)
        description += f" ({held_out.name}/ beside it is held out)"
        return FileSource(images, description, partial(_open_folder, held_out, None))
    if tables:
        return _open_tables(part, tables, split, held_out)
    found = ", ".join(f"{count:,} {extension}" for extension, count in others.most_common(5)) or "nothing"
    raise ValueError(
        f"no image files in {part} (found {found}); expected {_or(IMAGE_EXTENSIONS)} files, "
        f"or tables in {_or(TABLE_EXTENSIONS)} files"
    )


def _choose_subfolder(folder: Path, split: str | None) -> tuple[Path, Path | None]:
    """The folder to read and the held-out one: parts are recognised only where a training and a held-out one exist."""
    subfolders = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    held_out = next((subfolders[name] for name in HELD_OUT_NAMES if name in subfolders), None)
    if split == "train":
        return (subfolders["train"], held_out) if held_out is not None and "train" in subfolders else (folder, None)
    return subfolders.get(split or "", folder), None


def _list_files(folder: Path) -> tuple[list[bytes], list[Path], Counter[str]]:
    """Image files, table files, and how many of every other extension; broken links count as files, to be reported."""
    images: list[bytes] = []
    tables: list[Path] = []
    others: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()
    for root, subfolders, files in os.walk(folder, followlinks=True, onerror=_raise):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:  # a link to a folder above would go round for ever
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(name for name in files if not name.startswith(".")):
            extension = os.path.splitext(name)[1].lower()
            if extension in IMAGE_EXTENSIONS:
                images.append(os.fsencode(os.path.join(root, name)))
            elif extension in TABLE_EXTENSIONS:
                tables.append(Path(root, name))
            else:
                others[extension or "without extension"] += 1
    return images, tables, others


def _raise(error: OSError) -> None:
    raise ValueError(f"the folder {error.filename} cannot be read ({error.strerror}); fix its permissions or move it")


def _open_tables(folder: Path, tables: list[Path], split: str | None, held_out: Path | None) -> ImageSource:
    """Parquet or arrow files; those whose path names a split (train-00000.parquet, data/test.parquet) belong to it."""
    by_split = tables_by_split(tables, folder)
    if folder.name == split:  # the folder itself is the split: train/part.parquet
        by_split = {split: tables}
    chosen = tables if split is None else by_split.get(split)
    if chosen is None:
        raise ValueError(f"no split {split!r} in {folder}; its tables are of: {', '.join(sorted(by_split))}")
    name = next((name for name in HELD_OUT_NAMES if name in by_split), None)
    open_held_out = None
    if held_out is not None:
        open_held_out = partial(_open_folder, held_out, None)
    elif split == "train" and name is not None:
        open_held_out = partial(_open_tables, folder, tables, name, None)
    return TableSource(load_tables(chosen), f"{folder}/{split}" if split else str(folder), open_held_out)


def _open_saved(folder: Path, split: str | None) -> ImageSource:
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):
        return TableSource(saved, str(folder))
    return _from_splits(list(saved), split, str(folder), partial(_open_saved, folder), saved.__getitem__)


def _open_hub(name: str, split: str | None) -> ImageSource:
    try:
        splits = datasets.get_dataset_split_names(name)
    # The Hub's client raises a dozen types from three libraries (not found, offline, gated, several configurations).
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"dataset {name!r}: {_nothing_there(Path(name))}, and the Hub gives no dataset of this name ({reason})"
        ) from error
    return _from_splits(splits, split, name, partial(_open_hub, name), partial(_load_hub, name))


def _load_hub(name: str, split: str) -> datasets.Dataset:
    return datasets.load_dataset(name, split=split)


def _from_splits(
    splits: list[str],
    split: str | None,
    title: str,
    reopen: Callable[[str], ImageSource],
    load: Callable[[str], datasets.Dataset],
) -> ImageSource:
    if split is None:
        return _joined([TableSource(load(each), f"{title}/{each}") for each in splits])
    if split not in splits:
        raise ValueError(f"no split {split!r} in {title}; it has: {', '.join(splits)}")
    held_out = next((name for name in HELD_OUT_NAMES if name in splits), None)
    open_held_out = partial(reopen, held_out) if held_out and split == "train" else None
    return TableSource(load(split), f"{title}/{split}", open_held_out)


def _nothing_there(path: Path) -> str:
    """Says that nothing lies at `path`, and what lies nearby under a similar name."""
    parent = path.absolute().parent
    while not parent.is_dir():
        parent, path = parent.parent, parent
    near = difflib.get_close_matches(path.name, [p.name for p in parent.iterdir()] + list(BUNDLED), n=3)
    return f"there is no {path.name!r} in {parent}" + (f" (did you mean {' or '.join(near)}?)" if near else "")


def _or(extensions: frozenset[str]) -> str:
    *first, last = sorted(extensions)
    return f"{', '.join(first)} or {last}"

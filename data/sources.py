"""Where the images come from: opens whatever the dataset argument names and gives each image's encoded bytes.

It may name a bundled sample, a folder of images (any nesting), a text file of paths, a parquet or arrow file, a folder
of those or of `save_to_disk`, a folder of MNIST's idx files, or a dataset of the Hub; or several of these.
"""

import difflib
import os
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import datasets

from data.decoding import EXTENSIONS
from data.idx import idx_files, read_idx
from data.image_source import ArraySource, FileSource, ImageSource, TableSource, joined
from data.tables import TABLE_EXTENSIONS, VALIDATION_NAMES, load_tables, tables_by_split

_SAMPLES = Path(__file__).parent / "samples"
BUNDLED = {"sample": _SAMPLES / "photographs", "sample-fashion": _SAMPLES / "fashion_mnist"}
IMAGE_EXTENSIONS = frozenset(extension for extensions in EXTENSIONS.values() for extension in extensions)
LIST_EXTENSIONS = frozenset({".txt", ".lst"})

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def open_source(dataset: str | list[str], split: str | None = "train") -> ImageSource:
    """Opens what `dataset` names; `split` picks a part where there are parts (None: all of them together)."""
    if not dataset:
        raise ValueError("no dataset was named; name a folder of images, or 'sample' for the bundled photographs")
    if not isinstance(dataset, str):
        return joined([open_source(one, split) for one in dataset])
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


def split_names(dataset: str) -> list[str]:
    """The parts that `open_source` can open of one dataset; "train" alone where it is not in parts."""
    folder = BUNDLED.get(dataset, Path(dataset).expanduser())
    if folder.is_file():
        return ["train"]
    if not folder.is_dir():
        return _hub_split_names(dataset)
    if (folder / "dataset_dict.json").exists():
        return list(datasets.load_from_disk(str(folder)))
    if idx_files(folder):
        return list(idx_files(folder))
    if _choose_subfolder(folder, "train")[1] is not None:
        subfolders = {path.name.lower() for path in folder.iterdir() if path.is_dir()}
        return [name for name in ("train", *VALIDATION_NAMES) if name in subfolders]
    images, tables, _ = _list_files(folder)
    return ["train"] if images or not tables else list(tables_by_split(tables, folder))


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
    if idx_files(folder):
        return _open_idx(folder, split)
    part, validation = _choose_subfolder(folder, split)
    images, tables, others = _list_files(part)
    if images:
        if split not in (None, "train") and part == folder:
            raise ValueError(f"there is no folder {split!r} in {folder}; its images are one part: use split 'train'")
        description = f"{part}: {len(images):,} image files"
        if validation is None:
            return FileSource(images, description, folder=part)
        description += f" ({validation.name}/ beside it is held out)"
        return FileSource(images, description, partial(_open_folder, validation, None), folder=part)
    if tables:
        return _open_tables(part, tables, split, validation)
    found = ", ".join(f"{count:,} {extension}" for extension, count in others.most_common(5)) or "nothing"
    raise ValueError(
        f"no image files in {part} (found {found}); expected {_or(IMAGE_EXTENSIONS)} files, "
        f"or tables in {_or(TABLE_EXTENSIONS)} files"
    )


def _choose_subfolder(folder: Path, split: str | None) -> tuple[Path, Path | None]:
    """The folder to read and the held-out one: parts are recognized only where a training and a held-out one exist."""
    subfolders = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    validation = next((subfolders[name] for name in VALIDATION_NAMES if name in subfolders), None)
    if split == "train":
        return (
            (subfolders["train"], validation) if validation is not None and "train" in subfolders else (folder, None)
        )
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


def _open_tables(folder: Path, tables: list[Path], split: str | None, validation: Path | None) -> ImageSource:
    """Parquet or arrow files; those whose path names a split (train-00000.parquet, data/test.parquet) belong to it."""
    by_split = tables_by_split(tables, folder)
    if folder.name == split:  # the folder itself is the split: train/part.parquet
        by_split = {split: tables}
    chosen = tables if split is None else by_split.get(split)
    if chosen is None:
        raise ValueError(f"no split {split!r} in {folder}; its tables are of: {', '.join(sorted(by_split))}")
    name = next((name for name in VALIDATION_NAMES if name in by_split), None)
    open_validation = None
    if validation is not None:
        open_validation = partial(_open_folder, validation, None)
    elif split == "train" and name is not None:
        open_validation = partial(_open_tables, folder, tables, name, None)
    return TableSource(load_tables(chosen), f"{folder}/{split}" if split else str(folder), open_validation)


def _open_saved(folder: Path, split: str | None) -> ImageSource:
    saved = datasets.load_from_disk(str(folder))
    if isinstance(saved, datasets.Dataset):
        return TableSource(saved, str(folder))
    return _from_splits(list(saved), split, str(folder), partial(_open_saved, folder), saved.__getitem__)


def _open_idx(folder: Path, split: str | None) -> ImageSource:
    files = idx_files(folder)
    if split is None:
        return joined([_open_idx(folder, part) for part in files])
    if split not in files:
        raise ValueError(f"no split {split!r} in {folder}; its idx files are of: {', '.join(files)}")
    open_validation = partial(_open_idx, folder, "test") if split == "train" and "test" in files else None
    return ArraySource(*read_idx(*files[split]), f"{folder}/{split}", open_validation)


def _open_hub(name: str, split: str | None) -> ImageSource:
    return _from_splits(_hub_split_names(name), split, name, partial(_open_hub, name), partial(_load_hub, name))


def _hub_split_names(name: str) -> list[str]:
    try:
        return datasets.get_dataset_split_names(name)
    # The Hub's client raises a dozen types from three libraries (not found, offline, gated, several configurations).
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"dataset {name!r}: {_nothing_there(Path(name))}, and the Hub gives no dataset of this name ({reason})"
        ) from error


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
        return joined([TableSource(load(each), f"{title}/{each}") for each in splits])
    if split not in splits:
        raise ValueError(f"no split {split!r} in {title}; it has: {', '.join(splits)}")
    validation = next((name for name in VALIDATION_NAMES if name in splits), None)
    open_validation = partial(reopen, validation) if validation and split == "train" else None
    return TableSource(load(split), f"{title}/{split}", open_validation)


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

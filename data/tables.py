"""Open parquet and arrow files with an image column as a `datasets.Dataset`."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from data.decoding import BadImage, open_regular

TABLE_EXTENSIONS = frozenset({".parquet", ".arrow"})
VALIDATION_NAMES = ("validation", "valid", "val", "held_out", "test")  # by priority


def load_tables(paths: list[Path]) -> datasets.Dataset:
    """Load all rows of the files; parquet goes through the datasets cache, which makes random access fast.

    Raises:
        ValueError: If one of them is not a regular file, cannot be opened, or has other classes than the first one.
    """
    for path in paths:
        try:
            os.close(open_regular(path))
        except BadImage as error:
            raise ValueError(f"{path} cannot be read ({error}); repair or remove it") from error
    _check_classes(paths)
    parquet = [str(path) for path in paths if path.suffix.lower() == ".parquet"]
    tables = [datasets.Dataset.from_file(str(path)) for path in paths if path.suffix.lower() == ".arrow"]
    if parquet:
        tables.append(datasets.load_dataset("parquet", data_files=parquet, split="train"))
    return datasets.concatenate_datasets(tables)


def _check_classes(paths: list[Path]) -> None:
    """Raise ValueError if the numbers in a column stand for other classes than in the first file."""
    first: dict[str, tuple[Any, Path]] = {}
    for path in paths if len(paths) > 1 else ():
        for column, feature in _features(path).items():
            expected, where = first.setdefault(column, (feature, path))
            if feature != expected and datasets.ClassLabel in (type(feature), type(expected)):
                raise ValueError(
                    f"the classes in column {column!r} of {path} are not those of {where}, so their numbers mean "
                    "something else; write all files with the same names of classes in the same order"
                )


def _features(path: Path) -> datasets.Features:
    """Return the columns of a file; none if it is damaged, which loading reports."""
    try:
        if path.suffix.lower() == ".parquet":
            schema = pq.read_schema(path)
        else:
            with pa.memory_map(str(path)) as stream:
                stream.seek(8 if stream.read(6) == b"ARROW1" else 0)
                schema = pa.ipc.open_stream(stream).schema
        return datasets.Features.from_arrow_schema(schema)
    except (pa.ArrowException, OSError, ValueError):
        return datasets.Features()


def group_by_split(tables: list[Path], folder: Path) -> dict[str, list[Path]]:
    """Group files by the split named in their path (train-00000.parquet, data/test.parquet); train if none is."""
    groups: dict[str, list[Path]] = {}
    for table in tables:
        words = re.split(r"[^a-z0-9]+", str(table.relative_to(folder)).lower().replace("held_out", "heldout"))
        split = next((name for name in ("train", *VALIDATION_NAMES) if name.replace("_", "") in words), "train")
        groups.setdefault(split, []).append(table)
    return groups


def find_image_column(features: datasets.Features, title: str) -> str:
    """Return the first column of type Image, else of type {bytes, path}, else of type binary."""
    tests: list[Callable[[Any], bool]] = [
        lambda feature: isinstance(feature, datasets.Image),
        lambda feature: isinstance(feature, dict) and {"bytes", "path"} <= feature.keys(),
        lambda feature: getattr(feature, "dtype", None) in ("binary", "large_binary"),
    ]
    for is_image in tests:
        for name, feature in features.items():
            if is_image(feature):
                return name
    raise ValueError(
        f"no image column in {title}; its columns are {', '.join(features)}. Expected one of type Image, "
        "{bytes, path} or binary"
    )

"""Read the labels in shards: a column of a table; beside an image of an archive `KEY.cls` or `KEY.json`; a folder."""

import json
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from data.shard_files import ARCHIVES, ShardFile, retry
from data.shards import ShardSource


def table_features(source: ShardSource) -> datasets.Features | None:
    """Return the columns of the tables of a source; None if it has archives.

    Raises:
        ValueError: If it has both.
    """
    kinds = {file.extension in ARCHIVES for file in source.files}
    if len(kinds) > 1:
        raise ValueError(f"{source.describe()} has archives and tables; name shards of one kind to read their labels")
    return None if kinds == {True} else source.features_of(0)


def read_column(source: ShardSource, column: str) -> list[Any]:
    """Return the values of a column of all tables.

    Raises:
        ValueError: If a table has no such column, or other classes than the first one.
    """
    first = source.features_of(0)[column]
    for number, file in enumerate(source.files):
        features = source.features_of(number)
        if column not in features:
            raise ValueError(f"no column {column!r} in {file.url}; its columns are {', '.join(features)}")
        if features[column] != first and datasets.ClassLabel in (type(features[column]), type(first)):
            raise ValueError(
                f"the classes in column {column!r} of {file.url} are not those of {source.files[0].url}, so their "
                "numbers mean something else; write all shards with the same names of classes in the same order"
            )
    return [value for file in source.files for value in _column_of(file, column)]


def read_label_files(source: ShardSource, label_column: str | None) -> list[str | None]:
    """Return the label of each image of archives.

    Args:
        label_column: Field of `KEY.json`; None reads `KEY.cls`, or takes the name of the folder.

    Raises:
        ValueError: If there is neither, or a label cannot be read.
    """
    indices = range(len(source))
    if label_column is not None:
        return [_field(source, index, label_column) for index in indices]
    if any("cls_size" in source.index_of(number) for number in range(len(source.files))):
        texts = [source.read_beside(index, "cls") for index in indices]
        return [None if text is None else text.decode(errors="replace").strip() for text in texts]
    folders = [source.name(index).rpartition("#")[2].rpartition("/")[0].rpartition("/")[2] for index in indices]
    if not any(folders):
        raise ValueError(
            f"{source.describe()} has no labels; expected KEY.cls beside KEY.jpg, class folders, or KEY.json and a "
            "field of it in label_column"
        )
    return [folder or None for folder in folders]


def _field(source: ShardSource, index: int, name: str) -> str | None:
    text = source.read_beside(index, "json")
    if text is None:
        return None
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ValueError(f"the labels of {source.name(index)} cannot be read: {error}") from error
    value = fields.get(name) if isinstance(fields, dict) else None
    return None if value is None else str(value)


def _column_of(file: ShardFile, column: str) -> list[Any]:
    def read() -> list[Any]:
        with file.open() as stream:
            if file.extension == ".parquet":
                table = pq.ParquetFile(stream).read(columns=[column])
            else:
                stream.seek(8 if stream.read(6) == b"ARROW1" else 0)
                table = pa.ipc.open_stream(stream).read_all().select([column])
            values: list[Any] = table[column].to_pylist()
            return values

    return read() if file.is_local else retry(read, file.url)

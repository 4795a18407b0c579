"""Read the label of each image of a source: its class folder, a column of its table, or its idx file.

Shapes: N labeled images of a source.
"""

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from data.image_source import ArraySource, FileSource, ImageSource, TableSource
from data.shard_labels import read_column, read_label_files, table_features
from data.shards import ShardSource
from data.tables import VALIDATION_NAMES

logger = logging.getLogger(__name__)

# Names used by image datasets on the Hub, by priority.
LABEL_COLUMNS = ("label", "labels", "class", "classes", "category", "target", "class_name", "label_name", "y")
_WHOLE = ("int", "uint", "bool", "string", "large_string")


@dataclass(frozen=True)
class RawLabels:
    """Labels as stored: image `indices[i]` of `source` has the class `values[i]`.

    Images without a label are left out; `num_missing` counts those that should have one. `class_names` is set if the
    dataset itself defines the order of its classes. `hint` completes the error message about a single class.
    """

    source: ImageSource
    indices: np.ndarray
    values: list[str]
    class_names: tuple[str, ...] | None = None
    num_missing: int = 0
    hint: str = ""

    def __len__(self) -> int:
        return len(self.values)


def read_labels(source: ImageSource, label_column: str | None) -> RawLabels:
    """Read the labels of a source.

    Raises:
        ValueError: If the source has no labels, or they are not classes.
    """
    if isinstance(source, TableSource):
        column = partial(_values_in, source)
        return _table_labels(source, source.table.features, column, label_column)
    if isinstance(source, ShardSource):
        if (features := table_features(source)) is not None:
            return _table_labels(source, features, partial(read_column, source), label_column)
        return _labeled(source, read_label_files(source, label_column))
    if label_column is not None:
        raise ValueError(f"label_column is {label_column!r}, but {source.describe()} is not a table")
    if isinstance(source, FileSource):
        return _folder_labels(source)
    if isinstance(source, ArraySource):
        return _idx_labels(source)
    raise ValueError(f"{source.describe()} has no labels; expected class folders, a table or idx files")


def _folder_labels(source: FileSource) -> RawLabels:
    if source.folder is None:
        raise ValueError(
            f"{source.describe()} has no labels; expected a folder of class folders, or a table with a label column"
        )
    root = source.folder
    classes = _first_folders(source, root)
    if set(classes) == {"train"}:  # a folder of splits with the training split only
        root = root / "train"
        classes = _first_folders(source, root)
    inside = [index for index, name in enumerate(classes) if name is not None]
    if not inside:
        raise ValueError(
            f"the images are directly in {root}, so their classes are unknown; expected a folder for each class: "
            f"{root / 'some class' / 'image.jpg'}"
        )
    if {classes[index] for index in inside} <= set(VALIDATION_NAMES):
        raise ValueError(
            f"there is no train folder in {root}, which has {_folders(root)}; add it, or rename one of them"
        )
    if len(inside) < len(classes):
        first = source.name(classes.index(None))
        logger.warning(
            "%d images outside the class folders are ignored, such as %s", len(classes) - len(inside), first
        )
    hint = f"; expected a folder for each class in {root}, which has {_folders(root)}"
    return RawLabels(source, np.array(inside, np.int64), [name for name in classes if name is not None], hint=hint)


def _first_folders(source: FileSource, root: Path) -> list[str | None]:
    """Return the subfolder of `root` that contains each image; None for images in `root` itself."""
    start = len(os.path.join(root, ""))
    found = (source.name(index)[start:].split(os.sep, 1) for index in range(len(source)))
    return [parts[0] if len(parts) == 2 else None for parts in found]


def _folders(root: Path) -> str:
    return ", ".join(repr(path.name) for path in sorted(root.iterdir()) if path.is_dir()) or "no folders"


def _values_in(source: TableSource, column: str) -> Sequence[Any]:
    values: Sequence[Any] = source.table.with_format(None)[column][:]
    return values


def _table_labels(
    source: ImageSource,
    features: datasets.Features,
    values_in: Callable[[str], Sequence[Any]],
    label_column: str | None,
) -> RawLabels:
    column = label_column or _label_column(features, source.describe())
    if column not in features:
        raise ValueError(f"no column {column!r} in {source.describe()}; its columns are {', '.join(features)}")
    feature = features[column]
    values = values_in(column)
    class_names, name_of = None, str
    if isinstance(feature, datasets.ClassLabel):
        class_names, name_of = tuple(feature.names), feature.int2str
        values = [None if value is None or value < 0 else value for value in values]  # -1 marks secret test labels
    else:
        _check_type(column, feature, values, source.describe())
    return _labeled(source, [None if value is None else name_of(value) for value in values], class_names)


def _labeled(
    source: ImageSource, names: Sequence[str | None], class_names: tuple[str, ...] | None = None
) -> RawLabels:
    """Return the labels that are not missing."""
    labeled = [index for index, name in enumerate(names) if name is not None]
    found = [name for name in names if name is not None]
    return RawLabels(source, np.array(labeled, np.int64), found, class_names, len(names) - len(found))


def _label_column(features: datasets.Features, title: str) -> str:
    declared = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(declared) > 1:
        raise ValueError(f"{title} has several label columns: {', '.join(declared)}; choose one with label_column")
    named = [name for name in LABEL_COLUMNS if name in features]
    if not declared and not named:
        raise ValueError(
            f"no label column in {title}; its columns are {', '.join(features)}. Expected one of type ClassLabel, or "
            f"with one of the names {', '.join(LABEL_COLUMNS)}; choose one with label_column"
        )
    return (declared or named)[0]


def _check_type(column: str, feature: Any, values: Sequence[Any], title: str) -> None:
    dtype = getattr(feature, "dtype", type(feature).__name__)
    if dtype.startswith(_WHOLE):
        return
    example = next((value for value in values if value is not None), None)
    if dtype.startswith(("float", "double", "decimal")):
        raise ValueError(
            f"column {column!r} of {title} holds {dtype} numbers such as {example}: a regression target, not a "
            "class. Convert them to integers or strings if they are class numbers"
        )
    raise ValueError(
        f"column {column!r} of {title} is of type {dtype} (such as {example!r}); expected one class per image: "
        "ClassLabel, integer or string"
    )


def _idx_labels(source: ArraySource) -> RawLabels:
    if source.labels is None:
        return RawLabels(source, np.empty(0, np.int64), [], num_missing=len(source))
    return RawLabels(source, np.arange(len(source)), [str(label) for label in source.labels.tolist()])

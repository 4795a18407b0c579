"""Numbered collections of encoded images: files, a column of a table, pictures in memory, or several of these.

Shapes: N images, H W pixels.
"""

import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from data.decoding import BadImage, read_bytes
from data.tables import image_column


class ImageSource(ABC):
    """A numbered collection of encoded images; knows nothing of pixels."""

    def __init__(self, description: str, open_validation: "Callable[[], ImageSource] | None" = None) -> None:
        self._description = description
        self._open_validation = open_validation

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

    def validation(self) -> "ImageSource | None":
        """The part that the dataset itself keeps apart for validation, if it has one."""
        return self._open_validation() if self._open_validation else None

    def describe(self) -> str:
        return self._description


class FileSource(ImageSource):
    """Image files; the paths are one arrow array, which worker processes share instead of copying.

    `folder` is what they were found in, None for a list of paths.
    """

    def __init__(
        self,
        paths: Sequence[bytes],
        description: str,
        open_validation: Callable[[], ImageSource] | None = None,
        folder: Path | None = None,
    ) -> None:
        super().__init__(description, open_validation)
        self.folder = folder
        self._paths = pa.array(paths, pa.large_binary())  # binary: a file name need not be valid unicode

    def __len__(self) -> int:
        return len(self._paths)

    def entry(self, index: int) -> Path:
        return Path(self.name(index))

    def name(self, index: int) -> str:
        return os.fsdecode(self._paths[index].as_py())


class TableSource(ImageSource):
    """The image column of a `datasets.Dataset`; `table` keeps the other columns too."""

    def __init__(
        self, table: datasets.Dataset, title: str, open_validation: Callable[[], ImageSource] | None = None
    ) -> None:
        column = image_column(table.features, title)
        super().__init__(f"{title}: {len(table):,} rows, image column {column!r}", open_validation)
        self.table = table
        self._images = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
        self._column = column
        self._title = title

    def __len__(self) -> int:
        return len(self._images)

    def entry(self, index: int) -> bytes | Path:
        cell = self._images[index][self._column]
        if cell is None or (cell["bytes"] is None and not cell["path"]):
            raise BadImage("no image in this row")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"])

    def name(self, index: int) -> str:
        return f"{self._title}#{index}"


class ArraySource(ImageSource):
    """Equally large gray pictures (N, H, W) uint8, held in memory; `labels` (N,) where they came with any."""

    def __init__(
        self,
        pictures: np.ndarray,
        labels: np.ndarray | None,
        title: str,
        open_validation: Callable[[], ImageSource] | None = None,
    ) -> None:
        count, height, width = pictures.shape
        super().__init__(f"{title}: {count:,} gray pictures of {width}x{height} px", open_validation)
        self.labels = labels
        self._pictures = pictures
        self._title = title
        self._header = f"P5 {width} {height} 255\n".encode()

    def __len__(self) -> int:
        return len(self._pictures)

    def entry(self, index: int) -> bytes:
        return self._header + self._pictures[index].tobytes()  # a PGM file: the only encoding that costs nothing

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

    def validation(self) -> ImageSource | None:
        validation = [part for part in (part.validation() for part in self._parts) if part is not None]
        return joined(validation) if validation else None

    def _locate(self, index: int) -> tuple[ImageSource, int]:
        number = bisect_right(self._starts, index) - 1
        return self._parts[number], index - self._starts[number]


def joined(parts: Sequence[ImageSource]) -> ImageSource:
    """One source of several, or the only one as it is."""
    return parts[0] if len(parts) == 1 else JoinedSource(parts)

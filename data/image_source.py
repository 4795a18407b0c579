"""Indexed collections of encoded images: files, a table column, an array in memory, or several of these.

Shapes: N images, H W pixels.
"""

import os
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType

import datasets
import numpy as np
import pyarrow as pa

from data.crops import raw_header
from data.decoding import BadImage, read_bytes
from data.measured import Encoded, Measured, MeasuredImage
from data.tables import find_image_column

_FILES_PER_BLOCK = 256


class ImageSource(ABC):
    """An indexed collection of encoded images; it does not decode them.

    Attributes:
        blocks: Sizes of the blocks of neighboring images that are read together; None if any order is as fast.
        problems: What is known to be lost, by name, before any image is read.
        notes: What the user should know about the images.
        measured: How images are read whose values are measurements; None for photographs.
    """

    blocks: np.ndarray | None = None
    problems: Mapping[str, str] = MappingProxyType({})
    notes: Sequence[str] = ()
    measured: Measured | None = None

    def __init__(self, description: str) -> None:
        self._description = description

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def entry(self, index: int) -> bytes | Path:
        """Return the encoded image, or its path if it is a file, so that a check need not read all of it."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Return what identifies the image to a user: its path, or dataset/split#row."""

    def prefetch(self, indices: Iterable[int], wait: bool = True) -> None:  # noqa: B027
        """Bring what is needed to read these images close, if it is far away; in the background if not `wait`."""

    def locate(self, index: int) -> "tuple[ImageSource, int]":
        """Return the source that has the image, of those that this one joins, and its index there."""
        return self, index

    def image(self, index: int) -> Encoded:
        """Return the image as it is decoded: its entry, read as measurements if it is such."""
        source, index = self.locate(index)
        if source is not self:
            return source.image(index)
        entry = self.entry(index)
        return entry if self.measured is None else self.measured.image(entry)

    def read(self, index: int) -> bytes | MeasuredImage:
        """Return the image with the content of its file, unless that is read in parts."""
        image = self.image(index)
        return read_bytes(image) if isinstance(image, Path) else image

    def describe(self) -> str:
        return self._description

    @property
    def parts(self) -> "tuple[ImageSource, ...]":
        """The sources that this one joins, in order."""
        return (self,)


class FileSource(ImageSource):
    """Image files; their names are one arrow array, which worker processes share instead of copying.

    Args:
        names: Paths relative to `base`, or absolute.
        origin: The folder that was searched, or the file that lists the names.
    """

    def __init__(self, names: pa.LargeBinaryArray, base: bytes, description: str, origin: Path) -> None:
        super().__init__(description)
        self.names, self.base, self.origin = names, base, origin

    @property
    def folder(self) -> Path | None:
        """The folder that was searched; None for a list of paths."""
        return self.origin if os.fsencode(self.origin) == self.base else None

    def __len__(self) -> int:
        return len(self.names)

    def entry(self, index: int) -> Path:
        return Path(self.name(index))

    def name(self, index: int) -> str:
        return os.fsdecode(os.path.join(self.base, self.names[index].as_py()))


class TableSource(ImageSource):
    """The image column of a `datasets.Dataset`; `table` has all columns."""

    def __init__(self, table: datasets.Dataset, title: str) -> None:
        column = find_image_column(table.features, title)
        super().__init__(f"{title}: {len(table):,} rows, image column {column!r}")
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
    """Grayscale images (N, H, W) of type uint8 in memory, with `labels` (N,) if there are any."""

    def __init__(self, images: np.ndarray, labels: np.ndarray | None, title: str) -> None:
        num_images, height, width = images.shape
        super().__init__(f"{title}: {num_images:,} grayscale images of {width}x{height} px")
        self.labels = labels
        self._images = images
        self._title = title
        self._header = raw_header((width, height), 1)

    def __len__(self) -> int:
        return len(self._images)

    def entry(self, index: int) -> bytes:
        return self._header + self._images[index].tobytes()  # as a PGM file, which needs no compression

    def name(self, index: int) -> str:
        return f"{self._title}#{index}"


class JoinedSource(ImageSource):
    """The concatenation of several sources."""

    def __init__(self, sources: Sequence[ImageSource]) -> None:
        super().__init__("; ".join(source.describe() for source in sources))
        self._sources = tuple(sources)
        self._starts = (0, *accumulate(len(source) for source in sources))
        if any(source.blocks is not None for source in sources):
            self.blocks = np.concatenate([_blocks_of(source) for source in sources])

    def __len__(self) -> int:
        return self._starts[-1]

    def entry(self, index: int) -> bytes | Path:
        source, index = self.locate(index)
        return source.entry(index)

    def name(self, index: int) -> str:
        source, index = self.locate(index)
        return source.name(index)

    def prefetch(self, indices: Iterable[int], wait: bool = True) -> None:
        inside: dict[int, list[int]] = {}
        for index in indices:
            number = bisect_right(self._starts, index) - 1
            inside.setdefault(number, []).append(index - self._starts[number])
        for number, some in inside.items():
            self._sources[number].prefetch(some, wait)

    @property
    def parts(self) -> tuple[ImageSource, ...]:
        return tuple(part for source in self._sources for part in source.parts)

    def locate(self, index: int) -> tuple[ImageSource, int]:
        number = bisect_right(self._starts, index) - 1
        return self._sources[number].locate(index - self._starts[number])


def _blocks_of(source: ImageSource) -> np.ndarray:
    """Return the blocks of a source; files, which have none, in blocks as well, to be mixed with others."""
    if source.blocks is not None:
        return source.blocks
    return np.diff(np.append(np.arange(0, len(source), _FILES_PER_BLOCK), len(source)))


def join_sources(sources: Sequence[ImageSource]) -> ImageSource:
    """Concatenate sources; a single one is returned unchanged."""
    return sources[0] if len(sources) == 1 else JoinedSource(sources)

"""Sources of measured images: files with all channels, a file for each channel, or windows of images."""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.band_files import DTYPES
from data.decoding import BadImage, Header
from data.image_source import FileSource, ImageSource, join_sources
from data.measured import Measured, MeasuredImage

_NUM_PEEKED = 16  # images whose type of values is looked at


def measured_source(source: ImageSource, measured: Measured) -> ImageSource:
    """Return a source whose images are read as measurements, in the first of `DTYPES` that holds those of a few."""
    if measured.channel_files:
        source = ChannelFiles(_file_source(source), measured.channel_files)
    _set(source, measured)
    found = {DTYPES[0]}
    for index in range(min(_NUM_PEEKED, len(source))):
        try:
            with measured_image(source, index).opened() as image:
                found.add(image.dtype)
        except BadImage:
            continue
    _set(source, replace(measured, dtype=max(found, key=DTYPES.index)))
    return source if measured.tile is None else Tiles(source, measured.tile)


def join_measured(sources: Sequence[ImageSource]) -> ImageSource:
    """Concatenate sources; if they are measured, their images are read in the type that holds those of all.

    Otherwise a batch with images of two sources would mix integers with the bits of floats.
    """
    types = {part.measured.dtype for source in sources for part in source.parts if part.measured is not None}
    if len(types) > 1:
        widest = max(types, key=DTYPES.index)
        for part in (part for source in sources for part in source.parts):
            assert part.measured is not None, "either all sources are measured or none"
            _set(part, replace(part.measured, dtype=widest))
    return join_sources(sources)


def measured_image(source: ImageSource, index: int) -> MeasuredImage:
    """Return an image of a source that is measured."""
    image = source.image(index)
    assert isinstance(image, MeasuredImage), "the source is not measured"
    return image


def _set(source: ImageSource, measured: Measured) -> None:
    for part in (source, *source.parts):
        part.measured = measured
        if isinstance(part, Tiles):
            _set(part.source, measured)


class ChannelFiles(FileSource):
    """Images with a file for each channel; the name of an image is that of its first file."""

    def __init__(self, files: FileSource, channels: Iterable[tuple[str, str]]) -> None:
        self.channels = tuple(channels)
        patterns = [re.escape(pattern).replace(r"\*", "(.+)") for _, pattern in self.channels]
        compiled = [re.compile(os.fsencode(pattern), re.DOTALL) for pattern in patterns]
        found: dict[bytes, list[bytes | None]] = {}
        for name in files.names.to_pylist():
            folder, file = os.path.split(name)
            for number, pattern in enumerate(compiled):
                if match := pattern.fullmatch(file):
                    image = found.setdefault(os.path.join(folder, match[1]), [None] * len(compiled))
                    image[number] = name
        if not found:
            shown = ", ".join(pattern for _, pattern in self.channels)
            raise ValueError(f"no file of {files.describe()} has a name like {shown}")
        images = [found[key] for key in sorted(found)]
        names = [next(name for name in image if name is not None) for image in images]
        description = f"{files.describe()}, {len(images):,} images of {len(self.channels)} channels"
        super().__init__(pa.array(names, pa.large_binary()), files.base, description, files.origin)
        self._images = [pa.array(column, pa.large_binary()) for column in zip(*images, strict=True)]

    def image(self, index: int) -> MeasuredImage:
        """Raises BadImage if a channel has no file."""
        files: list[Path] = []
        for (name, pattern), column in zip(self.channels, self._images, strict=True):
            if (file := column[index].as_py()) is None:
                raise BadImage(f"the file of channel {name} ({pattern}) is missing")
            files.append(Path(os.fsdecode(os.path.join(self.base, file))))
        assert self.measured is not None
        return MeasuredImage(tuple(files), self.measured)


def _file_source(source: ImageSource) -> FileSource:
    if not isinstance(source, FileSource):
        raise ValueError(f"channel_files needs one folder of files, not {source.describe()}")
    return source


class Tiles(ImageSource):
    """Windows of `side` pixels, in rows, of the images of a source; what is left at the right and bottom is not used.

    An image that is smaller or cannot be read counts as one window.
    """

    def __init__(self, source: ImageSource, side: int) -> None:
        self.source = source
        rows: list[tuple[int, int, int]] = []  # number of the image, left, top; left -1 for all of it
        self._headers: dict[int, Header] = {}  # of the windows of an image
        for index in range(len(source)):
            try:
                header = measured_image(source, index).check()
            except BadImage:
                width = height = 0
            else:
                width, height = header.width, header.height
                self._headers[index] = replace(header, width=side, height=side)
            corners = [(x, y) for y in range(0, height - side + 1, side) for x in range(0, width - side + 1, side)]
            rows += [(index, *corner) for corner in corners or [(-1, -1)]]
        self._rows, self._side = np.array(rows, np.int64), side
        super().__init__(f"{source.describe()}, {len(rows):,} windows of {side} x {side} pixels")
        self.measured = source.measured

    def __len__(self) -> int:
        return len(self._rows)

    def entry(self, index: int) -> bytes | Path:
        return self.source.entry(int(self._rows[index, 0]))

    def name(self, index: int) -> str:
        number, left, top = self._rows[index].tolist()
        return self.source.name(number) + (f"#{left},{top}" if left >= 0 else "")

    def image(self, index: int) -> MeasuredImage:
        number, left, top = self._rows[index].tolist()
        image = measured_image(self.source, number)
        if left < 0:
            return image
        window = (left, top, left + self._side, top + self._side)
        return replace(image, window=window, header=self._headers[number])

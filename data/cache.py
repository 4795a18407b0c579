"""A folder with shrunk copies of images, which runs share so that large images are decoded once.

`FOLDER/<settings>/*.arrow` are tables that `datasets` opens, each with the columns "image" and "key". A key stands for
one version of one image: file, size, time stamps and inode, or the content. Images that change, appear or vanish need
no bookkeeping, therefore: a changed image has another key, whose row is missing and is added to a new table.

A table gets its name when it is complete and on disk; a process that ends before leaves a file that the next one
removes. Processes write one after another and never twice the same.
"""

import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

import datasets
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from data.crops import load_crops, raw_header, shrunk_from, to_image
from data.decoding import BadImage, check
from data.headers import identity
from data.image_source import ImageSource, TableSource
from data.images import SourceSamples
from data.measured import MeasuredImage
from data.tables import find_image_column

logger = logging.getLogger(__name__)

_VERSION = 1  # another number for other pixels
_JPEG_QUALITY = 95
_ROWS_PER_BATCH = 64
_BYTES_PER_TABLE = 1 << 30
_SECONDS_TO_SETTLE = 0.1  # time stamps of files advance in steps of up to 10 ms
_FEATURES = datasets.Features({"image": datasets.Image(), "key": datasets.Value("binary")})
_UNFINISHED = ".part"


@dataclass(frozen=True)
class CacheFormat:
    """How images are stored.

    Args:
        shortest_side: In pixels; smaller images keep their size.
        encoding: "raw" pixels are read fastest; "jpeg" (quality 95, full color resolution) needs a fifth of the space.
    """

    shortest_side: int
    num_channels: int
    encoding: Literal["raw", "jpeg"] = "raw"

    @property
    def folder(self) -> str:
        return f"{self.encoding}-{self.shortest_side}px-{self.num_channels}ch-v{_VERSION}-pillow{PIL.__version__}"

    def encode(self, data: bytes) -> bytes:
        """Return the shrunk image.

        Raises:
            BadImage: If it cannot be read.
        """
        header = check(data)
        scale = min(1.0, self.shortest_side / min(header.width, header.height))
        width, height = round(header.width * scale), round(header.height * scale)
        if self.encoding == "jpeg" and scale == 1 and header.format == "JPEG" and header.mode in ("RGB", "L"):
            return data
        view = ((height, width), Image.Resampling.LANCZOS)
        pixels = load_crops(data, lambda *size: [(0, 0, *size)], [view], self.num_channels)[0][0]
        if self.encoding == "raw":
            header_of_raw = raw_header((width, height), self.num_channels, (header.width, header.height))
            return header_of_raw + pixels.permute(1, 2, 0).contiguous().numpy().tobytes()  # (H, W, C)
        stream = BytesIO()
        comment = shrunk_from(header.width, header.height)
        to_image(pixels).save(stream, "JPEG", quality=_JPEG_QUALITY, subsampling=0, comment=comment)
        return stream.getvalue()


class CachedSource(ImageSource):
    """A source whose images are read from a table; those without a row come from the source itself.

    Args:
        table: With the columns "image" and "key".
        rows: The row of each image of the source, -1 for none.
    """

    def __init__(self, source: ImageSource, table: datasets.Dataset, rows: np.ndarray) -> None:
        super().__init__(source.describe())
        self.source, self._table, self._rows = source, table, rows
        self._images: pa.ChunkedArray | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}  # a memory-mapped table is passed on by its path

    def entry(self, index: int) -> bytes | Path:
        row = int(self._rows[index])
        return self.source.entry(index) if row < 0 else bytes(self._view(row))

    def read(self, index: int) -> bytes | MeasuredImage:
        row = int(self._rows[index])
        return self.source.read(index) if row < 0 else self._view(row)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def _view(self, row: int) -> bytes:
        """Return the bytes of a row without copying them; a memoryview reads only the rows of pixels that are used."""
        if self._images is None:
            self._images = pc.struct_field(self._table.data.column("image"), "bytes")
        view = memoryview(self._images[row].as_buffer())
        return view if view[:1] == b"P" else view.tobytes()  # type: ignore[return-value]


def cache_images(
    samples: Sequence[SourceSamples], folder: Path, form: CacheFormat, num_threads: int = os.cpu_count() or 1
) -> list[SourceSamples]:
    """Store the images that a folder does not have yet, and return the samples with the stored images as source.

    Images that cannot be read are not stored: reading them fails as it does without a cache.

    Raises:
        ValueError: If the folder cannot be written.
    """
    folder = folder.expanduser().absolute() / form.folder
    key_of = _Keys()
    keys = [[key_of(one.source, int(index)) for index in one.indices] for one in samples]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "lock"):
            for unfinished in folder.glob(f"*{_UNFINISHED}"):
                unfinished.unlink()
            tables, rows = _open_tables(folder)
            wanted = {
                key: (one.source, int(index))
                for one, some in zip(samples, keys, strict=True)
                for index, key in zip(one.indices, some, strict=True)
            }
            missing = {key: image for key, image in wanted.items() if key is not None and key not in rows}
            if missing:
                _write(missing, key_of, folder, form, num_threads)
                tables, rows = _open_tables(folder)
    except OSError as error:
        raise ValueError(
            f"the cache {folder} cannot be written: {error.strerror or error}. What it has so far stays valid; free "
            "some space, or name another folder"
        ) from error
    table = datasets.concatenate_datasets(tables) if tables else None
    found = []
    for one, some in zip(samples, keys, strict=True):
        in_table = np.full(len(one.source), -1, np.int64)
        in_table[np.asarray(one.indices)] = [-1 if key is None else rows.get(key, -1) for key in some]
        found.append(one if table is None else SourceSamples(CachedSource(one.source, table, in_table), one.indices))
    return found


# ---- keys ----


class _Keys:
    """Returns what a version of an image is known by; None for a file that cannot be opened."""

    def __init__(self) -> None:
        self._tables: dict[int, tuple[Any, ...] | None] = {}

    def __call__(self, source: ImageSource, index: int) -> bytes | None:
        source, index = source.locate(index)
        if isinstance(source, TableSource):
            if id(source) not in self._tables:
                self._tables[id(source)] = _table_identity(source.table)
            if (table := self._tables[id(source)]) is not None:
                return _digest((*table, index))
        try:
            entry = source.entry(index)
            return _digest(_file_identity(entry) if isinstance(entry, Path) else ("content", blake2b(entry).digest()))
        except (BadImage, OSError):
            return None


def _table_identity(table: datasets.Dataset) -> tuple[Any, ...] | None:
    """Return what changes with the rows of a table; None if they are not in files, or only paths of images are."""
    files = [Path(file["filename"]) for file in table.cache_files]
    column = table.data.column(find_image_column(table.features, "the table"))
    is_complete = not pa.types.is_struct(column.type) or not pc.struct_field(column, "bytes").null_count
    return ("row", table._fingerprint, *map(_file_identity, files)) if files and is_complete else None


def _file_identity(path: Path) -> tuple[Any, ...]:
    status = os.stat(path)
    return ("file", os.path.abspath(path), status.st_dev, *identity(status))


def _digest(identity: tuple[Any, ...]) -> bytes:
    return blake2b(repr(identity).encode("utf-8", "surrogateescape"), digest_size=16).digest()


# ---- tables ----


def _open_tables(folder: Path) -> tuple[list[datasets.Dataset], dict[bytes, int]]:
    """Return the tables of a folder, and the row of each key in their concatenation; removes damaged tables."""
    tables: list[datasets.Dataset] = []
    rows: dict[bytes, int] = {}
    for path in sorted(folder.glob("*.arrow")):
        try:
            table = datasets.Dataset.from_file(str(path))
            keys = table.data.column("key").to_pylist()
            num_rows = sum(map(len, tables))
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            logger.warning("removed the damaged table %s: %s", path, error)
            path.unlink()
            continue
        rows.update(zip(keys, range(num_rows, num_rows + len(keys)), strict=True))
        tables.append(table)
    return tables, rows


def _write(
    missing: Mapping[bytes, tuple[ImageSource, int]],
    key_of: Callable[[ImageSource, int], bytes | None],
    folder: Path,
    form: CacheFormat,
    num_threads: int,
) -> None:
    def encode(item: tuple[bytes, tuple[ImageSource, int]]) -> dict[str, Any] | None:
        key, (source, index) = item
        try:
            _let_settle(source.entry(index))
            content = source.read(index)
            assert isinstance(content, bytes), "measurements are never shrunk"
            encoded = form.encode(content)
            if key_of(source, index) != key:  # it changed in between
                return None
        except BadImage:
            return None
        name = source.name(index).encode("utf-8", "replace").decode()
        return {"image": {"bytes": encoded, "path": name}, "key": key}

    writer, items = _TableWriter(folder), list(missing.items())
    with (
        writer,
        ThreadPoolExecutor(num_threads) as pool,
        tqdm(total=len(items), desc="Caching images", unit="image") as progress,
    ):
        for start in range(0, len(items), _ROWS_PER_BATCH):
            some = items[start : start + _ROWS_PER_BATCH]
            rows = [row for row in pool.map(encode, some) if row is not None]
            if rows:
                writer.write(rows)
            if not start:
                _check_space(folder, writer.num_bytes / len(some) * (len(items) - len(some)))
            progress.update(len(some))


def _let_settle(entry: bytes | Path) -> None:
    """Wait until the time stamps of a file cannot be those of its next change as well."""
    if isinstance(entry, Path):
        try:
            age = time.time() - os.stat(entry).st_ctime
        except OSError:
            return
        if 0 <= age < _SECONDS_TO_SETTLE:
            time.sleep(_SECONDS_TO_SETTLE - age)


def _check_space(folder: Path, num_bytes: float) -> None:
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"the cache needs about {num_bytes / 1e9:,.1f} GB more, but {folder} has {free / 1e9:,.1f} GB: use a "
            "smaller cache_size, cache_format jpeg, or another folder"
        )


class _TableWriter:
    """Writes tables of about 1 GB, which get their names when they are complete and on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.num_bytes = folder, 0
        self._file: BinaryIO | None = None
        self._stream: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *others: object) -> None:
        if error is None:
            self._finish()
        elif self._file is not None:
            with suppress(OSError):  # a full disk, which the first error is about
                self._file.close()
            Path(self._file.name).unlink()

    def write(self, rows: list[dict[str, Any]]) -> None:
        schema = _FEATURES.arrow_schema
        if self._file is None:
            self._file = (self.folder / f"{uuid.uuid4().hex}.arrow{_UNFINISHED}").open("wb")
            self._stream = pa.ipc.new_stream(self._file, schema)
        self._stream.write_batch(pa.RecordBatch.from_pylist(rows, schema))
        self.num_bytes += sum(len(row["image"]["bytes"]) for row in rows)
        if self._file.tell() >= _BYTES_PER_TABLE:
            self._finish()

    def _finish(self) -> None:
        if self._file is None:
            return
        self._stream.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        unfinished, self._file = Path(self._file.name), None
        unfinished.rename(unfinished.with_suffix(""))

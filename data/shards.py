"""Shards: tar and zip archives, parquet and arrow files, local or remote, as one indexed collection of images.

Only the sizes of the shards are in memory; their indices (`data.shard_index`) are memory-mapped as they are needed.
Images of local archives are read where they are; what comes from elsewhere, or is compressed, is kept in blocks for a
while (`data.shard_blocks`).
Shapes: G blocks of all shards.
"""

import os
import struct
import zlib
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data.bad_images import BadImages
from data.decoding import BadImage
from data.image_source import ImageSource
from data.sampling import RUNS_PER_WINDOW
from data.shard_blocks import BlockCache
from data.shard_files import ARCHIVES, ShardError, ShardFile, retry
from data.shard_index import facts_of, open_index, open_indices, shard_key
from data.tables import find_image_column

_BYTES_PER_BLOCK, _MAX_PER_BLOCK = 8 << 20, 1024
_MAX_OPEN = 256  # indices and local files
_MAX_NOTES = 5  # of a thousand shards that are alike
_ZIP_HEADER, _STORED, _DEFLATED = struct.Struct("<4s5H3L2H"), 0, 8
_DESCRIPTORS = struct.Struct("<4s3L"), struct.Struct("<4sL2Q")


class ShardSource(ImageSource):
    """The images of shards, in the order of the shards.

    Args:
        title: What names the shards to a user.

    Raises:
        ValueError: If a shard is not what its extension says, there is no image, or the cache of blocks is too small.
        ShardError: If a shard cannot be read now.
    """

    blocks: np.ndarray

    def __init__(self, files: Sequence[ShardFile], title: str) -> None:
        self.files, self.title = tuple(files), title
        problems, notes = BadImages(), list[str]()
        sizes, shards, starts = [], [], []
        summaries = open_indices(files, lambda file, index: (facts_of(index), _block_sizes(file, index)))
        for number, (file, (facts, some)) in enumerate(zip(files, summaries, strict=True)):
            if "problem" in facts:
                problems[file.url] = facts["problem"]
            if "ignored" in facts:
                notes.append(f"{file.url}: ignored {facts['ignored']} (a sample has one image, named KEY.jpg)")
            if "links" in facts:
                notes.append(
                    f"{file.url}: ignored {facts['links']}, which are links to other files; pack their content with "
                    "`tar --dereference --hard-dereference`"
                )
            sizes.append(some)
            shards.append(np.full(len(some), number, np.int32))
            starts.append(np.cumsum(some) - some)
        more = [f"... and {len(notes) - _MAX_NOTES:,} more such notes on shards"] if len(notes) > _MAX_NOTES else []
        self.problems, self.notes = problems, [*notes[:_MAX_NOTES], *more]
        self.blocks = np.concatenate(sizes)  # (G,), number of images
        self._shard_of, self._start_in_shard = np.concatenate(shards), np.concatenate(starts)
        self._ends = np.cumsum(self.blocks)
        super().__init__(f"{title}: {len(self):,} images in {len(files):,} shard{'s' * (len(files) != 1)}")
        if not len(self):
            hints = [*problems.values(), *notes, "expected files such as 0001.jpg, or a column of images"]
            raise ValueError(f"no image in {title}: {hints[0]}")
        self.cache = BlockCache()
        needed = min(sum(file.size for file in files), 2 * RUNS_PER_WINDOW * self._bytes_per_block)
        if self._needs_cache and self.cache.limit < needed:
            raise ValueError(
                f"shard_cache_gb is {self.cache.limit / 1e9:g}, but {title} needs at least {needed / 1e9:.2g}: the "
                f"images of {2 * RUNS_PER_WINDOW} blocks are in use at a time"
            )
        self._reset()

    def _reset(self) -> None:
        self._indices: dict[int, Any] = {}
        self._descriptors: dict[int, _Descriptor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_indices": {}, "_descriptors": {}}

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @property
    def _bytes_per_block(self) -> float:
        return sum(file.size for file in self.files) / max(1, len(self.blocks))

    @property
    def _needs_cache(self) -> bool:
        return any(not self._is_read_in_place(file) for file in self.files)

    def entry(self, index: int) -> bytes:
        block, row = self._find(index)
        return self._read(block, row, "image")

    def name(self, index: int) -> str:
        block, row = self._find(index)
        number = int(self._shard_of[block])
        keys = self.index_of(number).get("key")
        return f"{self.files[number].url}#{row if keys is None else os.fsdecode(keys[row].as_py())}"

    def read_beside(self, index: int, kind: str) -> bytes | None:
        """Return the file with this extension ("cls", "json", "txt") beside an image of an archive; None if absent."""
        block, row = self._find(index)
        return self._read(block, row, kind) if self._has(block, row, kind) else None

    def prefetch(self, indices: Iterable[int], wait: bool = True) -> None:
        """Fetch the blocks of these images; if `wait` is false, in the background."""
        numbers = dict.fromkeys(np.searchsorted(self._ends, np.fromiter(indices, np.int64), side="right").tolist())
        wanted = [number for number in numbers if not self._is_read_in_place(self.files[self._shard_of[number]])]
        blocks = [(self._key(number), partial(self._fetch, number)) for number in wanted]
        (self.cache.add_all if wait else self.cache.add_later)(blocks)

    def index_of(self, number: int) -> dict[str, Any]:
        """Return the columns of the index of a shard: numpy arrays, and the keys as an arrow array."""
        found = self._indices.get(number)
        if found is None:
            table = open_index(self.files[number])
            found = {
                name: column.combine_chunks() if name == "key" else column.to_numpy()
                for name, column in zip(table.column_names, table.columns, strict=True)
            }
            found["facts"] = facts_of(table)
            _keep(self._indices, number, found)
        return found

    def features_of(self, number: int) -> datasets.Features:
        """Return the columns of a table."""
        schema = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(self.index_of(number)["facts"]["schema"])))
        return datasets.Features.from_arrow_schema(schema)

    # ---- blocks ----

    def _find(self, index: int) -> tuple[int, int]:
        """Return the block of an image, and its row in the shard."""
        block = int(np.searchsorted(self._ends, index, side="right"))
        return block, int(index - (self._ends[block] - self.blocks[block]) + self._start_in_shard[block])

    def _key(self, block: int) -> str:
        file = self.files[self._shard_of[block]]
        return f"{shard_key(file)}-{self._start_in_shard[block]}"

    def _is_read_in_place(self, file: ShardFile) -> bool:
        return file.is_local and file.extension in ARCHIVES

    def _has(self, block: int, row: int, kind: str) -> bool:
        sizes = self.index_of(int(self._shard_of[block])).get(f"{kind}_size")
        return sizes is not None and sizes[row] >= 0

    def _read(self, block: int, row: int, kind: str) -> bytes:
        number = int(self._shard_of[block])
        file, first = self.files[number], int(self._start_in_shard[block])
        fetch = partial(self._fetch, block)
        if file.extension not in ARCHIVES:
            count = int(self.blocks[block])
            table = self.cache.read(self._key(block), 0, 8 * (count + 1), fetch)
            begin, end = np.frombuffer(table, np.int64)[row - first : row - first + 2].tolist()
            if begin == end:
                raise BadImage("no image in this row")
            return self.cache.read(self._key(block), begin, end - begin, fetch)
        index = self.index_of(number)
        offset, size = int(index[f"{kind}_offset"][row]), int(index[f"{kind}_size"][row])
        if file.is_local:
            descriptor = self._descriptor(number)  # held until it was read
            content = os.pread(descriptor.number, size, offset)
        else:
            content = self.cache.read(self._key(block), offset - int(index["begin"][first]), size, fetch)
        if len(content) < size:
            raise BadImage(f"the shard ends within it, {size - len(content):,} bytes before its end")
        return _unzip(content) if file.extension == ".zip" else content

    def _descriptor(self, number: int) -> "_Descriptor":
        found = self._descriptors.get(number)
        if found is None:
            found = _Descriptor(self.files[number].url)
            _keep(self._descriptors, number, found)
        return found

    def _fetch(self, block: int) -> bytes:
        number = int(self._shard_of[block])
        file, first, count = self.files[number], int(self._start_in_shard[block]), int(self.blocks[block])
        index = self.index_of(number)
        if file.extension in ARCHIVES:
            begin = int(index["begin"][first])
            content = file.read(begin, int(index["end"][first : first + count].max()) - begin)
            return content
        group = int(np.searchsorted(np.cumsum(index["rows"]), first, side="right"))
        column = find_image_column(self.features_of(number), file.url)
        work = partial(_read_group, file, index, group, column)
        try:
            return _pack(work() if file.is_local else retry(work, file.url))
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, ShardError | FileNotFoundError) or getattr(error, "filename", None):  # of this name
                raise
            reason = str(error).partition("\n")[0]
            raise ShardError(f"{file.url} cannot be read: group {group} of its rows is damaged ({reason})") from error


class _Descriptor:
    """An open file, which is closed when nobody needs it: several threads may open it, and use it at the same time."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


def _keep(kept: dict[int, Any], number: int, new: Any) -> None:
    """Keep what was opened last; several threads may do so."""
    for oldest in list(kept)[: max(0, len(kept) + 1 - _MAX_OPEN)]:
        kept.pop(oldest, None)
    kept[number] = new


def _block_sizes(file: ShardFile, index: pa.Table) -> np.ndarray:
    """Return the number of images of each block of a shard; empty groups of a table are left out."""
    if file.extension not in ARCHIVES:
        rows = index["rows"].to_numpy()
        return rows[rows > 0].astype(np.int64)
    num_images = len(index)
    if not num_images:
        return np.empty(0, np.int64)
    wanted = min(max(1, _BYTES_PER_BLOCK * num_images // max(1, file.size)), _MAX_PER_BLOCK)
    edges = np.arange(-(-num_images // wanted) + 1) * num_images // -(-num_images // wanted)
    return np.diff(edges)


def _read_group(file: ShardFile, index: dict[str, Any], group: int, column: str) -> pa.ChunkedArray:
    """Return the images of a row group or record batch as binary values."""
    with file.open() as stream:
        if file.extension == ".parquet":
            found = pq.ParquetFile(stream).read_row_group(group, columns=[column])[column]
        else:
            begin, end = int(index["begin"][group]), int(index["end"][group])
            start = 8 if file.read(0, 6) == b"ARROW1" else 0
            head, body = file.read(start, int(index["begin"][0]) - start), file.read(begin, end - begin)
            schema = pa.ipc.read_schema(pa.py_buffer(head))
            if group and any(pa.types.is_dictionary(field.type) for field in schema):
                head += file.read(int(index["begin"][0]), int(index["end"][0] - index["begin"][0]))  # has them
            *_, table = pa.ipc.open_stream(pa.py_buffer(head + body))
            found = pa.chunked_array([table.column(column)])
    return pc.struct_field(found, "bytes") if pa.types.is_struct(found.type) else found


def _pack(images: pa.ChunkedArray) -> bytes:
    """Return the offsets (N + 1,) of the images in what is returned, and the images."""
    contents = [image or b"" for image in images.to_pylist()]
    offsets = np.cumsum([8 * (len(contents) + 1), *map(len, contents)], dtype=np.int64)
    return offsets.tobytes() + b"".join(contents)


def _unzip(entry: bytes) -> bytes:
    """Return the file in an entry of a zip archive, which begins with its header."""
    if len(entry) < _ZIP_HEADER.size or not entry.startswith(b"PK\x03\x04"):
        raise BadImage("its entry in the archive is damaged")
    _, _, flags, method, _, _, _, compressed, _, len_name, len_extra = _ZIP_HEADER.unpack_from(entry)
    content = entry[_ZIP_HEADER.size + len_name + len_extra :]
    if flags & 1:
        raise BadImage("it is encrypted")
    if method == _DEFLATED:
        try:
            return zlib.decompressobj(-15).decompress(content)
        except zlib.error as error:
            raise BadImage(f"its entry in the archive is damaged: {error}") from None
    if method != _STORED:
        raise BadImage(f"its compression method {method} is not supported, use none or deflate")
    if flags & 8:  # written to a stream: the sizes come after the file
        compressed = _size_before_descriptor(content)
    return content if compressed == 0xFFFFFFFF else content[:compressed]


def _size_before_descriptor(content: bytes) -> int:
    """Return the size of a file that the description of its size follows, as zipfile writes it; else of all."""
    for form in _DESCRIPTORS:
        size = len(content) - form.size
        if size >= 0 and form.unpack_from(content, size)[::2] == (b"PK\x07\x08", size):
            return size
    return len(content)

"""What is where in a shard: an index that is built once per version of a shard and memory-mapped after that.

The index of a tar or zip archive has a row for each image, that of a table one for each group of rows that are read
together: a row group of parquet, a record batch of arrow. Files of an archive belong to one sample if their names are
equal up to the first dot, as in webdataset: `0007.jpg`, `0007.cls`, `0007.json`.
"""

import hashlib
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from huggingface_hub import cached_assets_path
from tqdm import tqdm

from data.decoding import EXTENSIONS
from data.shard_files import NUM_THREADS, ShardError, ShardFile, filesystem_of, retry

logger = logging.getLogger(__name__)

T = TypeVar("T")

LABEL_FILES = ("cls", "json", "txt")  # beside an image, by priority

_VERSION = b"2"  # another number for another content of an index
_IMAGE_EXTENSIONS = frozenset(name[1:] for names in EXTENSIONS.values() for name in names)
_RECORD = 512
_CHUNK, _SMALL_CHUNK = 1 << 22, 1 << 14  # bytes of a request for headers: many small files, or few large ones
_FAR = 1 << 20


def open_index(file: ShardFile) -> pa.Table:
    """Return the index of a shard, built if there is none of this version.

    The metadata has "num_samples", and maybe "problem": what is wrong with the shard, "ignored": files without a place
    in a sample, or "links": images that are links to other files.

    Raises:
        ShardError: If the shard cannot be read now.
        ValueError: If it is not what its extension says.
    """
    path = index_path(file)
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
        if table.schema.metadata.get(b"version") == _VERSION:
            return table
    except (OSError, pa.ArrowException):
        pass  # missing, or damaged
    table = _BUILDERS[file.extension](file)
    metadata = {**table.schema.metadata, b"version": _VERSION, b"url": _as_bytes(file.url)}
    table = table.replace_schema_metadata(metadata).combine_chunks()
    _write(path, table)
    return table


def open_indices(files: Sequence[ShardFile], use: Callable[[ShardFile, pa.Table], T]) -> Iterator[T]:
    """Yield what `use` returns for each shard and its index, in order; those that are missing are built side by side.

    The indices themselves are not kept: of all shards they may be larger than the memory.
    """
    with (
        ThreadPoolExecutor(NUM_THREADS) as pool,
        tqdm(total=len(files), desc="Indexing shards", unit="shard", delay=2.0) as progress,
    ):
        try:
            for result in pool.map(lambda file: use(file, open_index(file)), files):
                progress.update()
                yield result
        finally:
            pool.shutdown(cancel_futures=True)


def index_path(file: ShardFile) -> Path:
    return cached_assets_path("masked-image-modeling", "shard_indices") / f"{shard_key(file)}.arrow"


def shard_key(file: ShardFile) -> str:
    """Return a name for a version of a file, under which its index and its blocks are kept."""
    return hashlib.sha256(repr((file.url, file.size, file.version)).encode()).hexdigest()[:32]


def facts_of(table: pa.Table) -> dict[str, str]:
    """Return the metadata of an index as text."""
    return {key.decode(): value.decode("utf-8", "surrogateescape") for key, value in table.schema.metadata.items()}


def _as_bytes(name: str) -> bytes:
    """Encode the name of a file, which need not be Unicode."""
    return name.encode("utf-8", "surrogateescape")


def _write(path: Path, table: pa.Table) -> None:
    temporary = None
    try:
        descriptor, temporary = tempfile.mkstemp(".unfinished", path.stem, path.parent)
        with os.fdopen(descriptor, "wb") as stream, pa.ipc.new_file(stream, table.schema) as writer:
            writer.write_table(table)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("the index of a shard cannot be kept in %s: %s", path.parent, error.strerror or error)
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


# ---- archives ----


class _Samples:
    """Collects the files of an archive as rows of its index."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.num_ignored, self.example = 0, ""
        self.num_links, self.example_of_links = 0, ""
        self._key: str | None = None
        self._members: dict[str, tuple[int, int]] = {}

    def add(self, name: str, offset: int, size: int) -> None:
        """Add a file with its place in the archive."""
        folder, _, base = name.rpartition("/")
        if base.startswith("."):
            return
        stem, _, extension = base.partition(".")
        key = f"{folder}/{stem}" if folder else stem
        if key != self._key:
            self.finish()
            self._key = key
        extension = extension.lower()
        if extension in _IMAGE_EXTENSIONS and "image" not in self._members:
            self._members["image"] = offset, size
        elif extension in LABEL_FILES and extension not in self._members:
            self._members[extension] = offset, size
        elif extension.rpartition(".")[2] in _IMAGE_EXTENSIONS:  # a second image, or "0007.seg.png"
            self.num_ignored, self.example = self.num_ignored + 1, self.example or name

    def add_link(self, name: str) -> None:
        """Count a link, which has no content, if it is named as an image."""
        if name.lower().rpartition(".")[2] in _IMAGE_EXTENSIONS:
            self.num_links, self.example_of_links = self.num_links + 1, self.example_of_links or name

    @property
    def num_images(self) -> int:
        return len(self.rows) + ("image" in self._members)

    def finish(self) -> None:
        if "image" in self._members:
            row: dict[str, Any] = {"key": self._key}
            for kind, (offset, size) in self._members.items():
                row |= {f"{kind}_offset": offset, f"{kind}_size": size}
            row["begin"] = min(offset for offset, _ in self._members.values())
            row["end"] = max(offset + size for offset, size in self._members.values())
            self.rows.append(row)
        self._members = {}

    def table(self, problem: str = "", **columns: Any) -> pa.Table:
        self.finish()
        kinds = ["image", *(kind for kind in LABEL_FILES if any(f"{kind}_size" in row for row in self.rows))]
        names = ["begin", "end", *(f"{kind}_{what}" for kind in kinds for what in ("offset", "size"))]
        arrays = {name: pa.array([row.get(name, -1) for row in self.rows], pa.int64()) for name in names}
        keys = [_as_bytes(row["key"]) for row in self.rows]
        facts = {"num_samples": str(len(self.rows))} | ({"problem": problem} if problem else {})
        if self.num_ignored:
            facts["ignored"] = f"{self.num_ignored:,} images, such as {self.example}"
        if self.num_links:
            facts["links"] = f"{self.num_links:,} images, such as {self.example_of_links}"
        metadata = {name: _as_bytes(text) for name, text in facts.items()}
        return pa.table({"key": pa.array(keys, pa.large_binary()), **arrays}, metadata=metadata)


def _index_tar(file: ShardFile) -> pa.Table:
    samples = _Samples()
    if _read_sidecar(file, samples):
        return samples.table()
    samples = _Samples()
    if file.is_local:
        with file.open() as stream:
            problem = _walk_tar(partial(_read_local, stream), file.size, samples)
    else:
        problem = _walk_tar(_ahead(file), file.size, samples)
    return samples.table(problem)


def _walk_tar(read: Callable[[int, int], bytes], size: int, samples: _Samples) -> str:
    """Add all files of a tar; returns what is wrong with it."""
    position, long_name, pax_size, has_ended = 0, None, None, False
    while position + _RECORD <= size:
        header = read(position, _RECORD)
        if header.count(0) == _RECORD:  # the end mark; another tar may have been appended
            position, has_ended = position + _RECORD, True
            continue
        if not _has_checksum(header):
            if has_ended:
                break
            return f"no tar header at byte {position:,}, after {samples.num_images:,} images: what follows is lost"
        has_ended = False
        kind, start = header[156:157], position + _RECORD
        try:
            length = _number(header[124:136])
            fields = _pax_fields(read(start, length)) if kind == b"x" else {}
            long_name, pax_size = fields.get(b"path", long_name), _pax_size(fields, pax_size)
        except ValueError:
            return f"damaged tar header at byte {position:,}, after {samples.num_images:,} images: the rest is lost"
        position = start + -(-length // _RECORD) * _RECORD
        if kind == b"x":
            continue
        if kind == b"L":
            long_name = read(start, length).rstrip(b"\0")
            continue
        if pax_size is not None:
            length = pax_size
            position = start + -(-length // _RECORD) * _RECORD
        name = _name(header) if long_name is None else long_name.removeprefix(b"./")
        if kind in (b"0", b"\0", b"7"):
            if start + length > size:
                break
            samples.add(name.decode("utf-8", "surrogateescape"), start, length)
        if kind in (b"1", b"2"):
            samples.add_link(name.decode("utf-8", "surrogateescape"))
        if kind != b"g":
            long_name = pax_size = None
    if has_ended:
        return ""
    return f"truncated: it ends at byte {size:,} without an end mark, after {samples.num_images:,} images"


def _read_local(stream: BinaryIO, start: int, size: int) -> bytes:
    if stream.tell() != start:
        stream.seek(start)
    return stream.read(size)


def _ahead(file: ShardFile) -> Callable[[int, int], bytes]:
    """Return a function that reads a tar's headers in requests as large as the files in it suggest."""
    buffered, begin = b"", 0

    def read(start: int, size: int) -> bytes:
        nonlocal buffered, begin
        if not begin <= start <= start + size <= begin + len(buffered):
            is_far = start > begin + len(buffered) + _FAR
            buffered, begin = file.read(start, max(size, _SMALL_CHUNK if is_far else _CHUNK)), start
        return buffered[start - begin : start - begin + size]

    return read


def _has_checksum(header: bytes) -> bool:
    try:
        wanted = int(header[148:156].split(b"\0")[0].strip() or b"x", 8)
    except ValueError:
        return False
    return sum(header) - sum(header[148:156]) + 8 * 32 == wanted


def _number(text: bytes) -> int:
    if text[0] & 0x80:  # in base 256
        return int.from_bytes(text, "big") & ~(0xFF << 88)
    return _not_negative(int(text.split(b"\0")[0].strip() or b"0", 8))


def _not_negative(number: int) -> int:
    if number < 0:  # the walk would not end
        raise ValueError(f"a size of {number} bytes")
    return number


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0")[0]
    prefix = header[345:500].split(b"\0")[0] if header[257:262] == b"ustar" and header[263:265] == b"00" else b""
    return (prefix + b"/" + name if prefix else name).removeprefix(b"./")


def _pax_fields(content: bytes) -> dict[bytes, bytes]:
    """Return the fields of an extended header; raises ValueError if they are damaged."""
    fields = {}
    while content and content[0]:
        length = int(content.split(b" ", 1)[0])
        if not 0 < length <= len(content):
            raise ValueError(f"a field of {length} bytes in {len(content)}")
        key, _, value = content[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        fields[key], content = value, content[length:]
    return fields


def _pax_size(fields: dict[bytes, bytes], before: int | None) -> int | None:
    return _not_negative(int(fields[b"size"])) if b"size" in fields else before


def _read_sidecar(file: ShardFile, samples: _Samples) -> bool:
    """Add the files that `name.idx` lists, as DALI's wds2idx writes it; returns whether there is a usable one."""
    idx = ShardFile(os.path.splitext(file.url)[0] + ".idx", 1 << 40, "")
    try:
        content = Path(idx.url).read_bytes() if file.is_local else _whole(idx)
    except OSError:  # there is none, or it cannot be read: the shard itself has all that is needed
        return False
    try:
        head, *lines = content.decode("utf-8", "surrogateescape").splitlines()
        version, count = head.split()
        if version != "v1.2" or int(count) != len(lines):
            raise ValueError("it is not of version v1.2, or incomplete")
        for line in lines:
            words = line.split()
            for offset, size, name in zip(words[1::4], words[2::4], words[3::4], strict=True):
                if int(offset) + int(size) > file.size:
                    raise ValueError("it lists more than the shard has")
                samples.add(name, int(offset), int(size))
    except ValueError as error:
        logger.warning("%s is ignored: %s", idx.url, error)
        return False
    return True


def _whole(file: ShardFile) -> bytes:
    fs, path = filesystem_of(file.url)
    content: bytes = retry(lambda: fs.cat_file(path), file.url)
    return content


def _index_zip(file: ShardFile) -> pa.Table:
    """Index a zip archive; offsets are those of the entries' own headers, sizes reach to the next entry."""

    def entries() -> tuple[list[zipfile.ZipInfo], int]:
        with file.open() as stream, zipfile.ZipFile(stream) as archive:
            return sorted(archive.infolist(), key=lambda entry: entry.header_offset), archive.start_dir

    try:
        found, end = entries() if file.is_local else retry(entries, file.url)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{file.url} is no zip archive: {error}") from error
    samples = _Samples()
    ends = [*(entry.header_offset for entry in found[1:]), end]
    for entry, end in zip(found, ends, strict=True):
        if not entry.is_dir():
            samples.add(entry.filename, entry.header_offset, end - entry.header_offset)
    return samples.table()


# ---- tables ----


def _index_parquet(file: ShardFile) -> pa.Table:
    def footer() -> Any:
        with file.open() as stream:
            return pq.read_metadata(stream)

    try:
        found = footer() if file.is_local else retry(footer, file.url)
    except pa.ArrowException as error:
        raise ValueError(f"{file.url} is no parquet file: {error}") from error
    rows = [found.row_group(number).num_rows for number in range(found.num_row_groups)]
    return _groups(rows, range(len(rows)), found.schema.to_arrow_schema())


def _index_arrow(file: ShardFile) -> pa.Table:
    """Index an arrow stream, or the stream in an arrow file; a batch is at "begin", and ends where the next begins."""
    try:
        with file.open() as stream:
            if stream.read(6) == b"ARROW1":
                stream.seek(8)
            else:
                stream.seek(0)
            reader = pa.ipc.open_stream(stream)
            rows, begins = [], [stream.tell()]
            for batch in reader:
                rows.append(batch.num_rows)
                begins.append(stream.tell())
    except pa.ArrowException as error:
        raise ValueError(f"{file.url} is no arrow file: {error}") from error
    except OSError as error:
        raise ShardError(f"{file.url} cannot be read: {error}") from error
    return _groups(rows, begins[:-1], reader.schema, ends=begins[1:])


def _groups(rows: list[int], begins: Any, schema: pa.Schema, ends: Any = None) -> pa.Table:
    columns = {"rows": rows, "begin": list(begins), "end": list(ends if ends is not None else begins)}
    arrays = {name: pa.array(values, pa.int64()) for name, values in columns.items()}
    facts = {"num_samples": str(sum(rows)), "schema": schema.serialize().to_pybytes().hex()}
    return pa.table(arrays, metadata=facts)


_BUILDERS: dict[str, Callable[[ShardFile], pa.Table]] = {
    ".tar": _index_tar,
    ".zip": _index_zip,
    ".parquet": _index_parquet,
    ".arrow": _index_arrow,
}

"""Keep what a scan learned about the image files of a folder, so that the next run opens only new and changed files.

The scan file is in the cache of the Hugging Face Hub (`HF_ASSETS_CACHE`, by default in `~/.cache/huggingface`): runs
with any output folder profit, and the data may be read-only. It only saves time. Each row holds the identity of the
file when it was read, so that a row never speaks for another content. A file that is damaged, or that other versions
of the code or of Pillow wrote, is ignored. It is replaced as a whole, so that processes can share it.
"""

import hashlib
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.compute as pc
from huggingface_hub import cached_assets_path

from data import decoding, headers
from data.headers import IDENTITY, RECORD, UNKNOWN
from data.image_source import FileSource

# Clocks of file systems are coarse: a file that changes again this soon may keep its times.
NANOSECONDS_UNTIL_SETTLED = 2_000_000_000
_DIGEST_BYTES = hashlib.sha256().digest_size
_HOURS_OF_AN_UNFINISHED_FILE = 1.0


def load_scan(source: FileSource) -> tuple[np.ndarray, dict[int, str]]:
    """Return the kept record (RECORD) of each file, with the identity UNKNOWN where there is none, and the reasons."""
    records = np.zeros(len(source), RECORD)
    records["size"] = UNKNOWN[0]
    try:
        content = scan_file_of(source).read_bytes()
    except OSError:
        return records, {}
    if hashlib.sha256(memoryview(content)[_DIGEST_BYTES:]).digest() != content[:_DIGEST_BYTES]:
        return records, {}
    kept = pa.ipc.open_stream(pa.py_buffer(content)[_DIGEST_BYTES:]).read_all()
    if kept.schema.metadata != _written_by():
        return records, {}
    kept = kept.combine_chunks()
    rows = pc.fill_null(pc.index_in(source.names, value_set=kept["name"].combine_chunks()), -1).to_numpy()
    known = np.flatnonzero(rows >= 0)
    column = kept["record"].chunk(0) if kept.num_rows else pa.array([], pa.binary(RECORD.itemsize))
    all_records = np.frombuffer(column.buffers()[1] or b"", RECORD)
    records[known] = all_records[rows[known]]
    bad = known[~records["is_good"][known]]
    texts = kept["reason"].take(pa.array(rows[bad])).to_pylist()
    return records, dict(zip(bad.tolist(), texts, strict=True))


def save_scan(source: FileSource, records: np.ndarray, reasons: dict[int, str], started: int) -> str | None:
    """Keep the final records of a scan that started at this time in ns; returns a note if they cannot be kept."""
    changed = np.maximum(records["mtime"], records["ctime"])
    rows = np.flatnonzero(records["is_final"] & (changed < started - NANOSECONDS_UNTIL_SETTLED))
    texts = [reasons.get(row) for row in rows.tolist()] if reasons else [None] * len(rows)
    columns = {
        "name": source.names.take(pa.array(rows)),
        "record": pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(RECORD.itemsize), len(rows), [None, pa.py_buffer(records[rows].tobytes())]
        ),
        "reason": pa.array(texts, pa.string()),
    }
    table = pa.table(columns).replace_schema_metadata(_written_by())
    file = None
    try:
        file = scan_file_of(source)
        _remove_unfinished(file)
        _replace(file, table)
    except OSError as error:
        where = f" in {file.parent}" if file else ""
        return (
            f"the result of checking the images cannot be kept{where} ({error.strerror or error}); the next run will "
            "check all of them again"
        )
    return None


def scan_file_of(source: FileSource) -> Path:
    """Return the scan file of a folder or a list of images; it need not exist."""
    key = hashlib.sha256(os.path.abspath(os.fsencode(source.origin))).hexdigest()[:32]
    return cached_assets_path("masked-image-modeling", "image_scans") / f"{key}.scan"


def _written_by() -> dict[bytes, bytes]:
    """Return what verdicts depend on: the code that checks and the version of Pillow."""
    code = b"".join(Path(str(module.__file__)).read_bytes() for module in (decoding, headers))
    return {b"code": hashlib.sha256(code).hexdigest().encode(), b"pillow": PIL.__version__.encode()}


def _replace(file: Path, table: pa.Table) -> None:
    """Write a new file beside the old one and put it in its place, so that it is always whole."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    content = sink.getvalue()
    descriptor, temporary = tempfile.mkstemp(".unfinished", file.stem, file.parent)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(hashlib.sha256(content).digest())
            stream.write(content)
        os.replace(temporary, file)
    except BaseException:
        os.unlink(temporary)
        raise


def _remove_unfinished(file: Path) -> None:
    """Remove what a run that was killed left behind."""
    for path in file.parent.glob(f"{file.stem}*.unfinished"):
        with suppress(FileNotFoundError):  # another process has just finished it
            if path.stat().st_mtime < time.time() - _HOURS_OF_AN_UNFINISHED_FILE * 3600:
                path.unlink()


def identities(records: np.ndarray) -> list[tuple[int, ...]]:
    """Return the identities (IDENTITY) of records as tuples of integers."""
    rows: list[tuple[int, ...]] = records[list(IDENTITY.names or ())].tolist()
    return rows

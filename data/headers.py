"""Read the headers of image files: those of common JPEG and PNG files directly, all others with Pillow.

`scan_files` gives the verdict of `data.decoding.check` for many files. With Pillow that takes 0.15 ms per file, most
of it Python code that holds the interpreter's lock, so that threads do not help. The readers of this module take a
tenth of it. They know the plain case only: they return None, and Pillow decides, if anything is unusual or damaged.

`ScanProcesses` are helper processes for large folders. They are fresh interpreters that import numpy and Pillow only:
a fork would copy the threads' locks of torch, CUDA and gloo, and multiprocessing's spawn would import the run script.
"""

import os
import pickle
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from data.decoding import MAX_PIXELS, BadImage, Header, check, open_regular

# What identifies the content of a file: ctime and inode differ if a file is replaced by one of equal size and mtime.
IDENTITY = np.dtype([("size", "i8"), ("mtime", "i8"), ("ctime", "i8"), ("inode", "u8")])
# Header and verdict of an image; `is_final` if another look at the same content would give the same verdict.
RECORD = np.dtype(
    [
        *((name, IDENTITY[name]) for name in IDENTITY.names or ()),
        *(("width", "u4"), ("height", "u4"), ("mode", "S8"), ("format", "S8")),
        *(("num_bits", "u1"), ("num_channels", "u2"), ("is_good", "?"), ("is_final", "?")),
    ]
)
UNKNOWN = (-1, 0, 0, 0)  # the identity of no file

_FIRST_BYTES, _MORE_BYTES = 4096, 1 << 18  # the headers of most files, and of those with a thumbnail or color profile
_TAIL_BYTES = 512


class Scan(NamedTuple):
    """The records of the files at `positions` of a task, and the reasons why some of them cannot be read."""

    positions: list[int]
    records: np.ndarray
    reasons: dict[int, str]


def scan_files(base: bytes, names: Sequence[bytes], identities: Sequence[tuple[int, ...]] | None = None) -> Scan:
    """Read the headers of the files that have changed.

    Args:
        base: Folder of the names.
        identities: Of each file when its header was read before, or UNKNOWN; None for no file.
    """
    positions, rows, reasons = [], [], {}
    for position, name in enumerate(names):
        path = os.path.join(base, name)
        if identities is not None and identities[position] == _identity_at(path):
            continue
        identity, header, reason, is_final = _scan_file(path)
        positions.append(position)
        rows.append((*identity, *as_row(header), header is not None, is_final))
        if header is None:
            reasons[position] = reason
    return Scan(positions, np.array(rows, RECORD), reasons)


def as_row(header: Header | None) -> tuple[Any, ...]:
    """Return the values of a header in the order of RECORD."""
    if header is None:
        return 0, 0, b"", b"", 0, 0
    mode, format_name = header.mode.encode(), header.format.encode()
    return header.width, header.height, mode, format_name, header.num_bits, header.num_channels


def _identity_at(path: bytes) -> tuple[int, ...] | None:
    try:
        return identity(os.stat(path))
    except (OSError, ValueError):  # no such file, or a path with a NUL byte
        return None


def identity(status: os.stat_result) -> tuple[int, ...]:
    """Return what changes when a file is written or replaced, even by one of the same size and modification time."""
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _scan_file(path: bytes) -> tuple[tuple[int, ...], Header | None, str, bool]:
    """Return identity, header (None if the image is bad), reason, and whether the verdict is final."""
    known: tuple[int, ...] = UNKNOWN
    try:
        descriptor = open_regular(path)
        try:
            status = os.fstat(descriptor)  # before reading: a later change gives another identity
            known = identity(status)
            header = _read_plain_header(descriptor, status.st_size)
        finally:
            os.close(descriptor)
        return known, header or check(Path(os.fsdecode(path))), "", True
    except BadImage as error:
        cause = error.__cause__
        from_system = isinstance(cause, OSError) and cause.errno is not None
        return known, None, str(error), known != UNKNOWN and not from_system
    except OSError as error:  # of pread: the storage fails
        return known, None, f"cannot be read: {error.strerror}", False


# ---- the plain case of JPEG and PNG ----


def _read_plain_header(descriptor: int, size: int) -> Header | None:
    start = _read_at(descriptor, 0, _FIRST_BYTES)
    reader = _READERS.get(start[:3])
    if reader is None:
        return None
    tail = start[-_TAIL_BYTES:] if size <= len(start) else _read_at(descriptor, size - _TAIL_BYTES, _TAIL_BYTES)
    try:
        return reader(start, tail)
    except IndexError:  # the header is longer
        if size <= len(start):
            return None
    try:
        return reader(_read_at(descriptor, 0, _MORE_BYTES), tail)
    except IndexError:
        return None


def read_plain_header(data: bytes) -> Header | None:
    """Return the header of a plain JPEG or PNG file in memory; None if Pillow must decide."""
    reader = _READERS.get(data[:3])
    try:
        return reader(data, data[-_TAIL_BYTES:]) if reader else None
    except IndexError:
        return None


def _read_at(descriptor: int, offset: int, length: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, length, offset)
    os.lseek(descriptor, offset, os.SEEK_SET)  # on Windows
    return os.read(descriptor, length)


def _jpeg_header(data: bytes, tail: bytes) -> Header | None:
    """Return the header of a plain baseline or progressive JPEG; raises IndexError if it is longer than `data`."""
    if not tail.rstrip(b"\0\r\n ").endswith(b"\xff\xd9"):
        return None
    position, frame, exif, xmp = 2, b"", b"", b""
    while True:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        length = data[position + 2] << 8 | data[position + 3]
        if length < 2:
            return None
        end = position + 2 + length
        data[end]  # the segment is complete
        content = data[position + 4 : end]
        position = end
        if marker == 0xDA:
            break
        if marker == 0xDB:  # quantization tables
            if not _has_whole_tables(content):
                return None
        elif marker in (0xC0, 0xC1, 0xC2):
            if frame or len(content) < 6 or content[0] != 8 or len(content) != 6 + 3 * content[5]:
                return None
            frame = content
        elif marker == 0xE1 and content.startswith(b"Exif\0\0"):
            if exif:
                return None
            exif = content[6:]
        elif marker == 0xE1 and content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
            xmp = content
        elif not (marker in (0xC4, 0xDD, 0xFE) or (0xE0 <= marker <= 0xEF and _is_plain_application(marker, content))):
            return None
    if not frame or frame[5] not in (1, 3, 4) or b"Orientation" in xmp:
        return None
    orientation = _exif_orientation(exif) if exif else 1
    height, width = frame[1] << 8 | frame[2], frame[3] << 8 | frame[4]
    if orientation is None or not width or not height or width * height > MAX_PIXELS:
        return None
    size = (width, height) if orientation < 5 else (height, width)
    return Header(*size, {1: "L", 3: "RGB", 4: "CMYK"}[frame[5]], "JPEG", orientation, 8, frame[5])


def _has_whole_tables(content: bytes) -> bool:
    while content:
        length = 129 if content[0] >> 4 else 65
        if len(content) < length:
            return False
        content = content[length:]
    return True


def _is_plain_application(marker: int, content: bytes) -> bool:
    """Return whether Pillow takes nothing that matters from this segment and cannot stumble over it."""
    if marker == 0xE0 and content.startswith(b"JFIF"):
        return len(content) >= 14
    if marker == 0xE2:
        return not content.startswith(b"MPF\0") and (len(content) > 14 or not content.startswith(b"ICC_PROFILE\0"))
    if marker == 0xED:
        return not content.startswith(b"Photoshop 3.0\0")
    return marker != 0xEE or len(content) >= 12 or not content.startswith(b"Adobe")


_EXIF_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}


def _exif_orientation(exif: bytes) -> int | None:
    """Return the orientation that the first directory of EXIF data gives; None if anything is unusual."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 14:
        return None
    (start,) = struct.unpack_from(order + "I", exif, 4)
    if not 8 <= start <= len(exif) - 2:
        return None
    (num_entries,) = struct.unpack_from(order + "H", exif, start)
    if start + 2 + 12 * num_entries + 4 > len(exif):
        return None
    orientation, tags = 1, set()
    for offset in range(start + 2, start + 2 + 12 * num_entries, 12):
        tag, kind, count, value = struct.unpack_from(order + "HHII", exif, offset)
        length = count * _EXIF_UNITS.get(kind, 1 << 32)
        if tag in tags or not length or (length > 4 and value + length > len(exif)):
            return None
        tags.add(tag)
        if tag == 0x0112:
            if kind != 3 or count != 1:
                return None
            (orientation,) = struct.unpack_from(order + "H", exif, offset + 8)
    return orientation if 1 <= orientation <= 8 else 1


_PNG_MODES = {  # mode of Pillow and channels by bits and color type
    **{(1, 0): ("1", 1), (2, 0): ("L", 1), (4, 0): ("L", 1), (8, 0): ("L", 1), (16, 0): ("I;16", 1)},
    **{(8, 2): ("RGB", 3), (16, 2): ("RGB", 3), (8, 4): ("LA", 2), (8, 6): ("RGBA", 4), (16, 6): ("RGBA", 4)},
    **{(bits, 3): ("P", 1) for bits in (1, 2, 4, 8)},
}
_PNG_LENGTHS = {b"gAMA": (4, 4), b"sRGB": (1, 1), b"pHYs": (9, 9), b"cHRM": (32, 32), b"PLTE": (3, 768)}
_PNG_LENGTHS |= {b"bKGD": (1, 6), b"sBIT": (1, 4), b"tIME": (7, 7)}


def _png_header(data: bytes, tail: bytes) -> Header | None:
    """Return the header of a plain PNG; raises IndexError if what precedes the pixels is longer than `data`."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or b"IEND" not in tail:
        return None
    position, header = 8, b""
    while True:
        data[position + 7]
        length, name = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8]
        if name == b"IDAT":
            break
        if length > _MORE_BYTES:
            return None
        end = position + 12 + length
        data[end - 1]
        content = data[position + 8 : end - 4]
        if zlib.crc32(data[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            return None
        if name == b"IHDR":
            if header or position != 8 or length != 13 or content[10:12] != b"\0\0" or content[12] > 1:
                return None
            header = content
        elif not header:
            return None
        elif name == b"tEXt":
            key, separator, _ = content.partition(b"\0")
            is_caption = key[:1].isupper() or key.startswith(b"date:")  # Pillow acts on some other keys
            if not separator or not is_caption or b"exif" in key.lower() or b"xmp" in key.lower():
                return None
        elif name == b"tRNS":
            if length < (6 if header[9] == 2 else 2 if header[9] == 0 else 1):
                return None
        elif not _PNG_LENGTHS.get(name, (1, 0))[0] <= length <= _PNG_LENGTHS.get(name, (1, 0))[1]:
            return None
        position = end
    if not header:
        return None
    width, height = struct.unpack_from(">II", header)
    mode, num_channels = _PNG_MODES.get((header[8], header[9]), ("", 0))
    if not mode or not width or not height or width * height > MAX_PIXELS:
        return None
    return Header(width, height, mode, "PNG", 1, max(8, header[8]), num_channels)


_READERS = {b"\xff\xd8\xff": _jpeg_header, b"\x89PN": _png_header}


# ---- processes ----


class ScanProcesses:
    """Processes that run `scan_files`, each for one caller at a time; to be used in a `with` statement."""

    def __init__(self, number: int) -> None:
        root = str(Path(__file__).resolve().parents[1])
        program = f"import sys; sys.path.insert(0, {root!r}); from data.headers import serve; serve()"
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-c", program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
            for _ in range(number)
        ]
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for process in self._processes:
            self._idle.put(process)

    def __enter__(self) -> "ScanProcesses":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()  # idle, or the scan has failed; they write nothing
            process.communicate()

    def scan_files(
        self, base: bytes, names: Sequence[bytes], identities: Sequence[tuple[int, ...]] | None = None
    ) -> Scan:
        process = self._idle.get()
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump((base, list(names), identities), process.stdin)
            process.stdin.flush()
            scan: Scan = pickle.load(process.stdout)
            return scan
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            first = os.fsdecode(os.path.join(base, names[0]))
            raise ChildProcessError(
                f"a process that checks images ended with exit code {process.wait()}, at {first} or one of the "
                f"{len(names) - 1} images after it"
            ) from error
        finally:
            self._idle.put(process)


def serve() -> None:
    """Answer the tasks of a `ScanProcesses` until it closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the process that asked, which ends this one
    tasks, answers = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # nothing that a library prints may get between the answers
    while True:
        try:
            task = pickle.load(tasks)
        except EOFError:
            return
        pickle.dump(scan_files(*task), answers)
        answers.flush()

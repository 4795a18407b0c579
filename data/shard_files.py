"""Find shards by a pattern of names, and read byte ranges of them, locally or through fsspec.

`s3://bucket/train-{0000..0999}.tar` stands for 1,000 files, `{a,b}` for two, and `*` for what a listing shows.
"""

import asyncio
import itertools
import os
import random
import re
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa

ARCHIVES, TABLES = frozenset({".tar", ".zip"}), frozenset({".parquet", ".arrow"})
SHARD_EXTENSIONS = ARCHIVES | TABLES
NUM_THREADS = 16  # requests in flight

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_NUM_TRIES, _FIRST_PAUSE, _LONGEST_PAUSE = 8, 0.2, 15.0  # seconds: a minute in all
_SECONDS_WITHOUT_DATA = 60
_TRANSIENT = (408, 425, 429)  # and 500 or more; other HTTP errors stay
_VERSION_KEYS = ("ETag", "etag", "xet_hash", "blob_id", "LastModified", "Last-Modified", "last_modified", "mtime")
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}

T = TypeVar("T")


class ShardError(OSError):
    """A shard that cannot be read now; the message says which one and why."""


@dataclass(frozen=True)
class ShardFile:
    """A shard: `version` changes with its content, as far as the storage says."""

    url: str
    size: int
    version: str

    @property
    def is_local(self) -> bool:
        return not is_url(self.url)

    @property
    def extension(self) -> str:
        return os.path.splitext(_without_query(self.url))[1].lower()

    def read(self, start: int, size: int) -> bytes:
        """Return bytes of the file, fewer than `size` only at its end.

        Raises:
            ShardError: If they cannot be read, after some tries.
        """
        end = min(start + size, self.size)
        if end <= start:
            return b""
        if self.is_local:
            with open(self.url, "rb") as stream:
                return os.pread(stream.fileno(), end - start, start)

        def fetch() -> bytes:
            fs, path = filesystem_of(self.url)
            content: bytes = fs.cat_file(path, start, end)
            if len(content) == end - start:
                return content
            if len(content) == self.size:
                raise PermissionError(f"{self.url}: the server ignores the range of a request; use one that does not")
            raise ConnectionError(f"{len(content):,} of {end - start:,} bytes came")

        return retry(fetch, self.url)

    @contextmanager
    def open(self) -> Iterator[Any]:
        """Open the file for reading at any place; its errors are not retried."""
        if self.is_local:
            with open(self.url, "rb") as stream:
                yield stream
        else:
            fs, path = filesystem_of(self.url)
            with fs.open(path, "rb", block_size=2**20) as stream:
                yield stream


def is_url(name: str) -> bool:
    return _URL.match(name) is not None


def is_shard_pattern(name: str) -> bool:
    """Whether a name stands for shards: a URL, an archive, or a pattern with braces or a star of shards."""
    is_pattern = any(mark in name for mark in "{}*") and name.lower().endswith(tuple(SHARD_EXTENSIONS))
    return is_url(name) or is_pattern or name.lower().endswith((*ARCHIVES, *_COMPRESSED))


@lru_cache(32)  # it is asked for each split
def find_shards(pattern: str) -> tuple[ShardFile, ...]:
    """Return the files that a pattern stands for, in order.

    Raises:
        ValueError: If the pattern is wrong, or a file is missing or of another kind.
        ShardError: If the storage does not answer.
    """
    urls = [url for name in expand_braces(pattern) for url in (_glob(name) if "*" in name else [name])]
    twice = next((url for url, again in itertools.pairwise(sorted(urls)) if url == again), None)
    if twice is not None:
        raise ValueError(f"{pattern} names {twice} twice")
    for url in urls:
        if _without_query(url).lower().endswith(_COMPRESSED):
            raise ValueError(f"{url} is compressed as a whole, so no image can be read alone; decompress it to .tar")
        if ShardFile(url, 0, "").extension not in SHARD_EXTENSIONS:
            raise ValueError(f"{url} is not a shard; expected {', '.join(sorted(SHARD_EXTENSIONS))} files")
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = list(pool.map(_look_up, urls))
    missing = [url for url, file in zip(urls, found, strict=True) if file is None]
    if missing:
        shown = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise ValueError(f"{len(missing)} of the {len(urls)} shards of {pattern} are missing: {shown}")
    return tuple(file for file in found if file is not None)


def local_shard(path: Path) -> ShardFile:
    status = path.stat()
    return ShardFile(str(path.absolute()), status.st_size, str(status.st_mtime_ns))


def expand_braces(pattern: str) -> list[str]:
    """Return the names that a pattern with `{0000..0999}` and `{a,b}` stands for.

    Raises:
        ValueError: If braces are not closed, empty, or count down.
    """
    match = _BRACES.search(pattern)
    if match is None:
        if "{" in pattern or "}" in pattern:
            raise ValueError(f"{pattern} has a brace without its partner; expected a range such as {{0000..0999}}")
        return [pattern]
    inside = match[1]
    if numbers := _RANGE.fullmatch(inside):
        first, last = numbers.groups()
        if int(first) > int(last):
            raise ValueError(f"{{{inside}}} in {pattern} counts down; the first number must not be above the last")
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        words = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    elif "," in inside and ".." not in inside:
        words = inside.split(",")
    else:
        raise ValueError(f"{{{inside}}} in {pattern} is no range; expected {{0000..0999}} or {{a,b}}")
    rest = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + word + end for word in words for end in rest]


def retry(work: Callable[[], T], name: str) -> T:
    """Return the result of `work`, which is tried again after errors that may pass.

    Raises:
        FileNotFoundError: If there is no such file.
        ShardError: If it fails for about a minute, or for ever; the message has `name`.
    """
    for attempt in range(_NUM_TRIES):
        if attempt:
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (attempt - 1))
            time.sleep(pause * (0.5 + random.random() / 2))  # not all workers at once; no result depends on it
        try:
            return work()
        except (zipfile.BadZipFile, pa.ArrowInvalid):  # a wrong file, not a wrong answer
            raise
        # Each storage has its own errors, from half a dozen libraries.
        except Exception as error:
            last = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
            if isinstance(last, FileNotFoundError) or _status_of(last) in (404, 410):
                raise FileNotFoundError(f"{name} does not exist") from error
            if _is_permanent(last):
                raise ShardError(f"{name} cannot be read: {_describe(last)}") from error
    raise ShardError(f"{name} cannot be read after {_NUM_TRIES} tries: {_describe(last)}") from last


@contextmanager
def naming_missing_packages(url: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, ValueError) as error:
        protocol = url.partition("://")[0]
        if isinstance(error, ImportError) or "not known" in str(error):
            package = _PACKAGES.get(protocol)
            advice = f"run `pip install {package}`" if package else "install the package that fsspec needs for it"
            raise ValueError(f"{url}: {protocol}:// cannot be opened ({error}); {advice}") from error
        raise


def filesystem_of(url: str) -> tuple[Any, str]:
    """Return the file system of a URL and the path there; each process has its own, because threads do not survive a
    fork."""
    return _open_filesystem(url.partition("://")[0].lower(), os.getpid()), _path_of(url)


@lru_cache(64)
def _open_filesystem(protocol: str, process: int) -> Any:
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        import aiohttp  # comes with `datasets`, which needs fsspec[http]

        timeout = aiohttp.ClientTimeout(None, sock_connect=_SECONDS_WITHOUT_DATA, sock_read=_SECONDS_WITHOUT_DATA)
        options = {"client_kwargs": {"timeout": timeout}}
    with naming_missing_packages(f"{protocol}://"):
        return fsspec.filesystem(protocol, **options)


def _without_query(url: str) -> str:
    """Return a URL without what follows a question mark, which may be in the path of a file."""
    return url.partition("?")[0] if is_url(url) else url


def _path_of(url: str) -> str:
    return url if url.lower().startswith(("http://", "https://")) else url.partition("://")[2]


def _glob(pattern: str) -> list[str]:
    if pattern.lower().startswith(("http://", "https://")):
        raise ValueError(f"{pattern}: a web server lists no files; name them with braces, such as {{0000..0999}}")
    if not is_url(pattern):
        parts = Path(pattern).expanduser().parts
        first = next(number for number, part in enumerate(parts) if "*" in part)
        found = sorted(map(str, Path(*parts[:first]).glob("/".join(parts[first:]))))
    else:
        fs, path = filesystem_of(pattern)
        protocol = pattern.partition("://")[0]
        found = [f"{protocol}://{name}" for name in sorted(retry(lambda: fs.glob(path), pattern))]
    if not found:
        raise ValueError(f"no file matches {pattern}")
    return found


def _look_up(url: str) -> ShardFile | None:
    """Return the file, or None if it is missing."""
    if not is_url(url):
        path = Path(url).expanduser()
        return local_shard(path) if path.is_file() else None
    fs, path_there = filesystem_of(url)
    try:
        info = retry(lambda: fs.info(path_there), url)
    except FileNotFoundError:
        return None
    if not isinstance(info.get("size"), int):
        raise ShardError(f"{url} cannot be read: the server does not say how large it is")
    return ShardFile(url, info["size"], next((str(info[key]) for key in _VERSION_KEYS if info.get(key)), ""))


def _status_of(error: BaseException) -> int | None:
    """Return the status of an answer, as aiohttp or the Hub's client name it."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_permanent(error: BaseException) -> bool:
    if (status := _status_of(error)) is not None:
        return 400 <= status < 500 and status not in _TRANSIENT
    if type(error).__name__ in ("OfflineModeIsEnabled", "NoCredentialsError"):  # of the Hub and of S3
        return True
    return isinstance(error, PermissionError | ImportError | NotADirectoryError | IsADirectoryError)


def _describe(error: BaseException) -> str:
    if isinstance(error, TimeoutError | asyncio.TimeoutError):
        return f"no answer within {_SECONDS_WITHOUT_DATA} seconds"
    status, message = _status_of(error), getattr(error, "message", None) or str(error)
    return f"{status} {message}" if status is not None else message or type(error).__name__

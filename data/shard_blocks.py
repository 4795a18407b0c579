"""A bounded folder with the blocks of shards that were fetched, which all processes of a computer share.

A block is what one request brings: neighboring samples of an archive, a row group or record batch of a table. It gets
its name when it is complete; the oldest ones are deleted when the folder is larger than its limit.
"""

import hashlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from filelock import FileLock, Timeout
from huggingface_hub import cached_assets_path

from data.shard_files import NUM_THREADS

logger = logging.getLogger(__name__)

DEFAULT_BYTES = 20 * 10**9
_NUM_LOCKS = 256
_NUM_AHEAD = 4  # threads that fetch what will be needed later
_limit = DEFAULT_BYTES


def limit_cache(num_bytes: int) -> None:
    """Set the limit of the folder for sources that are opened after this call in this process."""
    global _limit
    _limit = num_bytes


class BlockCache:
    """Blocks by key; `fetch` is called for those that are not in the folder."""

    def __init__(self) -> None:
        self.limit = _limit
        self.folder = cached_assets_path("masked-image-modeling", "shard_blocks")
        self._reset()

    def _reset(self) -> None:
        self._ahead: SimpleQueue[tuple[str, Callable[[], bytes]]] = SimpleQueue()
        self._process = 0  # whose threads read ahead: they do not survive a fork

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()
        self.folder.mkdir(parents=True, exist_ok=True)  # on another computer

    def has(self, key: str) -> bool:
        return self._path(key).exists()

    def read(self, key: str, offset: int, size: int, fetch: Callable[[], bytes]) -> bytes:
        """Return bytes of a block; fewer than `size` only at its end."""
        try:
            descriptor = os.open(self._path(key), os.O_RDONLY)
        except OSError:
            return self.add(key, fetch)[offset : offset + size]
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def add(self, key: str, fetch: Callable[[], bytes]) -> bytes:
        """Fetch a block, unless another process has just done so, and return it."""
        path = self._path(key)
        with FileLock(self._lock_of(key)):
            with suppress(OSError):  # there is none
                return path.read_bytes()
            content = fetch()
            try:
                self._write(path, content)
            except OSError as error:
                logger.warning("fetched images cannot be kept in %s: %s", self.folder, error.strerror or error)
            return content

    def add_all(self, blocks: Iterable[tuple[str, Callable[[], bytes]]]) -> None:
        """Fetch the blocks that are missing side by side, and wait for them."""
        missing = [(key, fetch) for key, fetch in blocks if not self.has(key)]
        if len(missing) > 1:
            with ThreadPoolExecutor(NUM_THREADS) as pool:
                for _ in pool.map(lambda block: bool(self.add(*block)), missing):
                    pass

    def add_later(self, blocks: Iterable[tuple[str, Callable[[], bytes]]]) -> None:
        """Fetch the blocks that are missing in the background; an error shows when one is read."""
        wanted = [(key, fetch) for key, fetch in blocks if not self.has(key)]
        if not wanted:
            return
        if self._process != os.getpid():
            ahead: SimpleQueue[tuple[str, Callable[[], bytes]]] = SimpleQueue()
            for _ in range(_NUM_AHEAD):
                threading.Thread(target=self._fetch_ahead, args=(ahead,), daemon=True).start()
            self._ahead = ahead
            self._process = os.getpid()  # last: other threads come here at the same time, and need the queue
        for block in wanted:
            self._ahead.put(block)

    def _fetch_ahead(self, ahead: "SimpleQueue[tuple[str, Callable[[], bytes]]]") -> None:
        while True:
            key, fetch = ahead.get()
            with suppress(Exception):  # whoever reads the block tries again, and says what is wrong
                self.add(key, fetch)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.block"

    def _lock_of(self, key: str) -> Path:
        return self.folder / f"{int(hashlib.sha256(key.encode()).hexdigest(), 16) % _NUM_LOCKS}.lock"

    def _write(self, path: Path, content: bytes) -> None:
        descriptor, temporary = tempfile.mkstemp(".unfinished", path.stem, self.folder)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(content)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        self._shrink()

    def _shrink(self) -> None:
        """Delete the oldest blocks, and what killed processes left, until the folder is as small as it may be."""
        with suppress(Timeout), FileLock(self.folder / "shrink.lock", timeout=0):
            entries = []
            with os.scandir(self.folder) as found:
                for entry in found:
                    if entry.name.endswith((".block", ".unfinished")):
                        with suppress(FileNotFoundError):
                            status = entry.stat()
                            entries.append((status.st_mtime_ns, status.st_size, entry.path))
            excess = sum(size for _, size, _ in entries) - self.limit
            for _, size, path in sorted(entries):
                if excess <= 0:
                    break
                with suppress(FileNotFoundError):
                    os.unlink(path)
                excess -= size

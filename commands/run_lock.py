"""A lock that keeps a second run out of an output folder; the system releases it when the process ends, however."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it does not exist.

    The lock is one of POSIX: data workers do not inherit it, and NFS shows it to other computers. On a file system
    without such locks, and on Windows, nothing is locked.

    Raises:
        ValueError: If another process holds it.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with _open_locked(folder / LOCK_FILE) as file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}, since {datetime.now():%Y-%m-%d %H:%M}")
        file.flush()
        try:
            yield
        finally:
            (folder / LOCK_FILE).unlink(missing_ok=True)
            if is_new:
                with suppress(OSError):
                    folder.rmdir()  # if nothing was written


def _open_locked(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read() or "which starts at this moment"
            file.close()
            raise ValueError(
                f"{path.parent} is in use by another run ({holder}): wait, stop it, or give another --output_dir"
            ) from None
        except OSError:  # there are no locks here
            return file
        # The run that had the lock before removes its file at the end: then this is the lock of nothing.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()

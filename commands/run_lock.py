"""A lock that keeps a second run out of an output folder; a killed run leaves a lock that the next one recognizes."""

import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

LOCK_FILE = ".lock"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which is made if it does not exist.

    Raises:
        ValueError: If another process holds it.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock, process = folder / LOCK_FILE, psutil.Process()
    me = {"pid": process.pid, "host": socket.gethostname(), "started": process.create_time()}
    while True:
        try:
            with lock.open("x", encoding="utf-8") as stream:  # fails if it exists
                json.dump(me, stream)
            break
        except FileExistsError:
            _remove_if_stale(lock)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        if is_new:
            with suppress(OSError):
                folder.rmdir()  # if nothing was written


def _remove_if_stale(lock: Path) -> None:
    """Remove the lock of a process that has ended; raises ValueError if it runs or may run."""
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
        host, pid, started = holder["host"], int(holder["pid"]), float(holder["started"])
    except FileNotFoundError:
        return
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{lock} cannot be read: delete it unless another run uses this folder") from None
    if host == socket.gethostname() and not _is_running(pid, started):
        with suppress(FileNotFoundError):
            lock.unlink()
        return
    advice = "wait for it, stop it, or give another --output_dir"
    if host != socket.gethostname():
        advice += f"; if it has died, delete {lock}"
    since = f"{datetime.fromtimestamp(started):%Y-%m-%d %H:%M}"
    raise ValueError(f"{lock.parent} is in use by another run (process {pid} on {host}, since {since}): {advice}")


def _is_running(pid: int, started: float) -> bool:
    """Whether the process runs; another process may have got its number since."""
    try:
        process: Any = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - started) < 2
    except psutil.NoSuchProcess:
        return False

"""End all processes of a run soon after one of them is gone, with one message.

Collectives would wait for it for up to half an hour (`ddp_timeout`): `torchrun` ends the other processes of its own
computer only, and a computer that lost its power or its network tells nobody.
"""

import os
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import distributed

EXIT_CODE = 4  # of a fault of the system, as in all commands
# Beats are counted, not seconds: where this process gets no time to count, the others may get none to beat.
_SECONDS_BETWEEN_BEATS, _BEATS_UNTIL_LOST = 5.0, 8
# What gloo and NCCL report of a process that has ended.
_LOST = re.compile(
    r"Connection (?:closed|reset|refused)|Broken pipe|Socket closed|remote process (?:exited|has)|ncclRemoteError"
)


def is_about_lost_process(error: BaseException) -> bool:
    """Return whether a collective failed because another process of the run has ended."""
    is_of_torch = isinstance(error, RuntimeError) and "torch" in type(error).__module__
    return bool(_LOST.search(str(error))) and (is_of_torch or "gloo" in str(error))


def is_first_to_report() -> bool:
    """Return whether no other process of the run has reported its end yet; the answer is yes only once."""
    try:
        if distributed.is_initialized():
            return bool(_store().add("reported", 1) == 1)
    except RuntimeError:  # the first process, which keeps the store, is gone
        return _reports_without_store()
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def watching_processes(what_is_safe: Callable[[], str]) -> Iterator[None]:
    """End this process within a minute if another one of the run is gone while the block runs.

    Args:
        what_is_safe: Says from what the run can be continued.
    """
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        yield
        return
    watch = _Watch(what_is_safe)
    watch.start()
    try:
        yield
        watch.leave()  # not after an error: then this process is lost for the others
    finally:
        watch.ended.set()


class _Watch:
    """Count beats in the store that the processes share; the first process watches all others, and they the first."""

    def __init__(self, what_is_safe: Callable[[], str]) -> None:
        self.what_is_safe, self.ended, store = what_is_safe, threading.Event(), _store()
        # A connection of its own: another one may be waiting for an answer.
        self._store = store.clone() if hasattr(store, "clone") else store
        self._rank = distributed.get_rank()
        self._watched = range(1, distributed.get_world_size()) if self._rank == 0 else range(1)
        self._seen: dict[int, tuple[int, int]] = {}  # the last beat of a process, and how often it was seen again
        self._unanswered = 0  # beats since the last answer of the store

    def start(self) -> None:
        for work in (self._beat, self._expect_answers):
            threading.Thread(target=work, daemon=True).start()

    def leave(self) -> None:
        with suppress(RuntimeError):
            self._store.set(f"left/{self._rank}", "")

    def _beat(self) -> None:
        try:
            self._store.set(f"host/{self._rank}", socket.gethostname())
            while not self.ended.wait(_SECONDS_BETWEEN_BEATS):
                self._store.add(f"beats/{self._rank}", 1)
                for rank in self._watched:
                    if self._is_lost(rank):
                        host = self._store.get(f"host/{rank}").decode() if self._seen[rank][0] else "an unknown host"
                        self._end(f"process {rank} (on {host})", is_first_to_report())
                self._unanswered = 0
        except RuntimeError:  # the store is gone
            return

    def _is_lost(self, rank: int) -> bool:
        beat, (before, times) = self._store.add(f"beats/{rank}", 0), self._seen.get(rank, (-1, 0))
        self._seen[rank] = (beat, times + 1 if beat == before else 0)
        return self._seen[rank][1] >= _BEATS_UNTIL_LOST and not self._store.check([f"left/{rank}"])

    def _expect_answers(self) -> None:
        while not self.ended.wait(_SECONDS_BETWEEN_BEATS):
            self._unanswered += 1
            if self._unanswered >= _BEATS_UNTIL_LOST + 2:
                self._end("the first process, or its computer,", _reports_without_store())

    def _end(self, who: str, reports: bool) -> None:
        """End this process, whose main thread may wait for the lost one."""
        if not self.ended.is_set():
            if reports:
                seconds = _BEATS_UNTIL_LOST * _SECONDS_BETWEEN_BEATS
                text = f"{who} has not answered for {seconds:.0f} s, so all processes of this run end"
                print(f"{text}; {self.what_is_safe()}", file=sys.stderr, flush=True)
            os._exit(EXIT_CODE)


def _reports_without_store() -> bool:
    """Return whether this process is the first one of its computer that lives."""
    return os.environ.get("LOCAL_RANK", "0") == "0" or os.environ.get("RANK") == "1"


def _store() -> Any:
    return distributed.distributed_c10d._get_default_store()

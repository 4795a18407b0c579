"""Stop a training run at the end of a step, with a checkpoint, when a signal asks for it.

transformers' `enable_jit_checkpoint` knows SIGTERM only, lets each process stop at a step of its own, and returns as
if the training were complete.
"""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

_HANGUP = getattr(signal, "SIGHUP", None)  # absent on Windows
_WARNING = getattr(signal, "SIGUSR1", None)
# Ctrl-C; kill, and the end of a job's time on a cluster; a closed terminal or a lost connection; the warning before
# the end of a job's time (`sbatch --signal`).
_SIGNALS = tuple(filter(None, (signal.SIGINT, signal.SIGTERM, _HANGUP, _WARNING)))


class Stopped(BaseException):
    """A run was stopped by a signal."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number  # as shells report a process that a signal ended


@contextmanager
def raising_stopped(message: str) -> Iterator[None]:
    """Turn a signal within this context into `Stopped`; for work that can be interrupted anywhere."""

    def stop(number: int, frame: Any) -> None:
        _silence_lost_terminal()
        raise Stopped(number, f"stopped by {signal.Signals(number).name} {message}")

    with _handling_signals(stop):
        yield


class StopOnSignal(TrainerCallback):
    """Finish the step, write a checkpoint and raise `Stopped`; a second signal ends the process at once.

    All processes stop at the same step: they exchange what they received while the next step runs.
    """

    def __init__(self) -> None:
        self.received = 0
        self._agreement: _Agreement | None = None
        self._is_stopping = False

    def listening(self) -> AbstractContextManager[None]:
        """Handle the signals within this context, in which the trainer trains."""
        return _handling_signals(self._receive)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._agreement = _Agreement() if args.world_size > 1 else None

    def _receive(self, number: int, frame: Any) -> None:
        if self.received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
        _silence_lost_terminal()
        if os.environ.get("RANK", "0") == "0":
            print(
                f"{signal.Signals(number).name}: stopping after this step; a second one ends at once", file=sys.stderr
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        received = self._agreement.exchange(self.received) if self._agreement else self.received
        if received and state.global_step < state.max_steps:
            self.received, self._is_stopping = received, True
            control.should_training_stop, control.should_evaluate = True, False
            control.should_save = args.save_strategy != "no"

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_stopping:  # after the checkpoint, and before anything that belongs to the end of a training
            name, step = signal.Signals(self.received).name, state.global_step
            kept = f"{args.output_dir}/checkpoint-{step} is complete: the same command continues"
            if args.save_strategy == "no":
                kept = "nothing was saved, because `save_strategy` is no: the same command starts again"
            raise Stopped(self.received, f"stopped by {name} at step {step:,} of {state.max_steps:,}; {kept}")


def _silence_lost_terminal() -> None:
    """Discard all further output to a terminal that was closed: printing there would be an error."""
    for stream in (1, 2):
        try:
            os.get_terminal_size(stream)
        except OSError as error:
            if error.errno == errno.EIO:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def init_worker(seed_worker: Callable[[int], None] | None, worker_id: int) -> None:
    """Seed a data worker, which only its trainer may stop: the last step needs its images.

    A terminal and a cluster's scheduler send their signals to the workers, too.
    """
    for number in filter(None, (signal.SIGINT, _HANGUP, _WARNING)):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # absent on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_exit_if_the_trainer_asks, daemon=True).start()
    if seed_worker is not None:
        seed_worker(worker_id)


def _exit_if_the_trainer_asks() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


class _Agreement:
    """The largest of the numbers that the processes gave one step earlier, exchanged without waiting for a device."""

    def __init__(self) -> None:
        self._group = distributed.new_group(backend="gloo")
        self._number = torch.zeros(1, dtype=torch.int64)
        self._work: Any = None

    def exchange(self, number: int) -> int:
        if self._work is not None:
            self._work.wait()
        agreed = int(self._number)
        self._number = torch.tensor([number])
        self._work = distributed.all_reduce(self._number, distributed.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed


@contextmanager
def _handling_signals(handler: Any) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # Python handles signals there only
        yield
        return
    # nohup ignores SIGHUP, and so must we.
    handled = [n for n in _SIGNALS if n != _HANGUP or signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in handled}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)

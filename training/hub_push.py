"""Upload at every save in the background; a failed upload is reported and training continues."""

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import PartialState
from transformers import TrainerCallback

STAGING = ".hub"  # in the output folder: what waits to be uploaded


class Destination(Protocol):
    """Where uploads go. `push` returns the address; both raise errors whose text a person understands."""

    repo_id: str

    def create(self) -> Any: ...

    def push(self, folder: Path, message: str, checkpoint: str | None = None) -> str: ...

    def finishing_command(self, folder: Path) -> str: ...


class HubPush(TrainerCallback):
    """At each save the main process stages what others need and uploads it in a thread; a newer save takes the place
    of one that still waits.

    Args:
        stage: `stage(folder, checkpoint_name)` writes the public files of the model as it is now into a folder that
            does not exist yet, and the training state into a subfolder if that has a name.
        checkpoint_name: step -> name of the training state on the Hub; None: no training state goes there.
        at_saves: False to upload the finished run only.
    """

    def __init__(
        self,
        destination: Destination,
        output_dir: Path,
        stage: Callable[[Path, str | None], None],
        log: Callable[[str], None],
        checkpoint_name: Callable[[int], str] | None = None,
        at_saves: bool = True,
    ) -> None:
        self.destination, self.output_dir, self.stage, self.log = destination, output_dir, stage, log
        self.checkpoint_name, self.at_saves = checkpoint_name, at_saves
        self._uploads = _Uploads()
        self._told = ""  # the last problem: told once, however often it comes back

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            shutil.rmtree(self.output_dir / STAGING, ignore_errors=True)  # of a run that was killed
            self._uploads.put(lambda: self._try("yet", self.destination.create))  # a wrong token shows at once

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.checkpoint_name is not None:
            PartialState().wait_for_everyone()  # every process writes a part of the checkpoint
        is_last = state.global_step >= state.max_steps
        if not state.is_world_process_zero or not self.at_saves or (is_last and self.checkpoint_name is None):
            return  # what `finish` pushes is the model of the last step
        step = state.global_step
        folder = self.output_dir / STAGING / f"step-{step}"
        name = self.checkpoint_name(step) if self.checkpoint_name else None
        with torch.random.fork_rng(devices=[args.device] if args.device.type == "cuda" else []):
            staged = self._try(f"at step {step}", lambda: self.stage(folder, name))
        if staged:
            upload = lambda: self.destination.push(folder, f"Training in progress, step {step}", name)  # noqa: E731
            self._uploads.put(lambda: self._try(f"at step {step}", upload), lambda: _remove(folder))
        else:
            _remove(folder)

    def finish(self) -> None:
        """On the main process, when the output folder is complete: push it and say how that went."""
        repo_id = self.destination.repo_id
        try:
            if self._uploads.are_under_way:
                self.log(f"training is done; waiting for an upload to {repo_id} (Ctrl-C gives up the upload only)")
            self._uploads.wait()
            address = self.destination.push(self.output_dir, "End of training")
        except (Exception, KeyboardInterrupt) as error:  # the run is finished and on disk
            reason = str(error) or type(error).__name__
            command = self.destination.finishing_command(self.output_dir)
            self.log(f"note: the finished run is not on the Hub: {reason}\n  this finishes it: {command}")
        else:
            self.log(f"pushed to {address}")
        _remove(self.output_dir / STAGING)

    def _try(self, when: str, work: Callable[[], Any]) -> bool:
        try:
            work()
        except Exception as error:  # whatever it is, no upload is worth a training
            problem = str(error) or type(error).__name__
            if problem != self._told:
                self.log(f"note: nothing was pushed {when}: {problem}; training goes on")
            self._told = problem
            return False
        return True


class _Job(NamedTuple):
    run: Callable[[], Any]
    clean_up: Callable[[], None]


class _Uploads:
    """Runs jobs one after another in a thread; of those that wait, only the newest is kept."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: _Job | None = None
        self._is_running = False
        self._thread: threading.Thread | None = None

    @property
    def are_under_way(self) -> bool:
        return self._is_running or self._waiting is not None

    def put(self, run: Callable[[], Any], clean_up: Callable[[], None] = lambda: None) -> None:
        """`clean_up` is called after the job, and in its place if a newer one replaces it."""
        with self._changed:
            replaced, self._waiting = self._waiting, _Job(run, clean_up)
            self._changed.notify_all()
        if replaced is not None:
            replaced.clean_up()
        if self._thread is None:  # a daemon: a run that ends early does not wait for it
            self._thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Until nothing is left to do."""
        with self._changed:
            self._changed.wait_for(lambda: not self.are_under_way)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None)
                job, self._waiting, self._is_running = self._waiting, None, True
            assert job is not None
            job.run()
            job.clean_up()
            with self._changed:
                self._is_running = False
                self._changed.notify_all()


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)

"""Upload the model at every save, in the background; a failed upload is logged, and training continues."""

import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import PartialState
from transformers import TrainerCallback

from training.stopping import Stopped

STAGING = ".hub"  # in the output folder: files that wait for their upload


class Destination(Protocol):
    """A repository; `push` returns its address. Errors have readable messages."""

    repo_id: str

    def create(self) -> Any: ...

    def push(self, folder: Path, message: str, checkpoint: str | None = None) -> str: ...

    def finishing_command(self, folder: Path) -> str: ...


class HubPush(TrainerCallback):
    """Stage the public files at each save on the main process, and upload them in a thread.

    A newer save replaces one that still waits for its upload.

    Args:
        stage: `stage(folder, checkpoint_name)` writes the current public files to a new folder, and the training state
            to a subfolder if `checkpoint_name` is not None.
        checkpoint_name: Returns the name of the training state of a step on the Hub; None to upload no training state.
        at_saves: False to upload the finished run only.
        whole_model: Block on all processes in which the main process stages.
    """

    def __init__(
        self,
        destination: Destination,
        output_dir: Path,
        stage: Callable[[Path, str | None], None],
        log: Callable[[str], None],
        checkpoint_name: Callable[[int], str] | None = None,
        at_saves: bool = True,
        whole_model: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.destination, self.output_dir, self.stage, self.log = destination, output_dir, stage, log
        self.checkpoint_name, self.at_saves, self.whole_model = checkpoint_name, at_saves, whole_model
        self._uploads = _Uploads()
        self._last_problem = ""  # logged once, however often it occurs

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            shutil.rmtree(self.output_dir / STAGING, ignore_errors=True)  # of a run that was killed
            create = lambda: self._try("creating the repository", self.destination.create)  # noqa: E731
            self._uploads.put(create)  # reveals a wrong token at once

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.checkpoint_name is not None:
            PartialState().wait_for_everyone()  # every process writes a part of the checkpoint
        is_last = state.global_step >= state.max_steps
        if not self.at_saves or (is_last and self.checkpoint_name is None):
            return  # `finish` uploads the model of the last step
        with self.whole_model():
            if state.is_world_process_zero:
                self._stage_and_upload(args, state.global_step)

    def _stage_and_upload(self, args: Any, step: int) -> None:
        folder = self.output_dir / STAGING / f"step-{step}"
        name = self.checkpoint_name(step) if self.checkpoint_name else None
        with torch.random.fork_rng(devices=[args.device] if args.device.type == "cuda" else []):
            staged = self._try(f"the upload at step {step}", lambda: self.stage(folder, name))
        if staged:
            upload = lambda: self.destination.push(folder, f"Training in progress, step {step}", name)  # noqa: E731
            self._uploads.put(lambda: self._try(f"the upload at step {step}", upload), lambda: _remove(folder))
        else:
            _remove(folder)

    def finish(self) -> None:
        """Upload the complete output folder, on the main process, and log the result."""
        repo_id = self.destination.repo_id
        try:
            if self._uploads.are_under_way:
                self.log(f"training is done; waiting for an upload to {repo_id} (Ctrl-C cancels the upload only)")
            self._uploads.wait()
            address = self.destination.push(self.output_dir, "End of training")
        except (Exception, KeyboardInterrupt, Stopped) as error:  # the run is finished and on disk
            canceled = not isinstance(error, Exception)
            reason = "it was canceled" if canceled else str(error) or type(error).__name__
            command = self.destination.finishing_command(self.output_dir)
            self.log(f"warning: the upload of the finished run failed: {reason}\n  to upload it, run: {command}")
        else:
            self.log(f"pushed to {address}")
        _remove(self.output_dir / STAGING)

    def _try(self, what: str, work: Callable[[], Any]) -> bool:
        try:
            work()
        except Exception as error:  # no failed upload may stop a training
            problem = str(error) or type(error).__name__
            if problem != self._last_problem:
                self.log(f"warning: {what} failed: {problem}; training continues")
            self._last_problem = problem
            return False
        return True


class _Job(NamedTuple):
    run: Callable[[], Any]
    clean_up: Callable[[], None]


class _Uploads:
    """A thread that runs one job at a time; only the newest of the waiting jobs is kept."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: _Job | None = None
        self._is_running = False
        self._thread: threading.Thread | None = None

    @property
    def are_under_way(self) -> bool:
        return self._is_running or self._waiting is not None

    def put(self, run: Callable[[], Any], clean_up: Callable[[], None] = lambda: None) -> None:
        """Add a job; `clean_up` is called after it, or instead of it if a newer job replaces it."""
        with self._changed:
            replaced, self._waiting = self._waiting, _Job(run, clean_up)
            self._changed.notify_all()
        if replaced is not None:
            replaced.clean_up()
        if self._thread is None:  # a daemon, so that a run that ends early does not wait for it
            self._thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Wait until all jobs are done."""
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

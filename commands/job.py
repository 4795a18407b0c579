"""The course of a training command after planning: output folder, trainer, training, result, upload."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback

from commands.hub_settings import bring_back, build_hub_push, open_repository
from commands.launch import first_on_main, printer
from commands.output_folder import logging_into, prepare_output_dir
from commands.plan import Plan
from data.bad_images import BadImages
from training.trainer import MimTrainer


@dataclass(frozen=True)
class Job:
    """A planned training run.

    Args:
        bad: Images that are left out.
        lines: Logged below the plan.
        written_last: File that exists only in the output folder of a finished run.
        build_trainer: Called with the checkpoint to continue from, or None.
        finish: Writes the result to the output folder and returns a description of it; called on all processes.
        stage: Writes an upload during training: called with the trainer, a new folder, and the name of the training
            state in it, or None. Without it only the result is uploaded.
        callbacks: Called with the trainer; the results are called after all other callbacks.
        check: Raises ValueError if a checkpoint does not fit.
    """

    plan: Plan
    bad: BadImages
    written_last: str
    build_trainer: Callable[[Path | None], MimTrainer]
    finish: Callable[[Any], str]
    lines: Sequence[str] = ()
    stage: Callable[[Any, Path, str | None], None] | None = None
    callbacks: Sequence[Callable[[MimTrainer], TrainerCallback]] = ()
    check: Callable[[Path], None] | None = None


def train(job: Job) -> None:
    """Log the plan and, unless it is a dry run, carry it out.

    Raises:
        ValueError: If the output folder holds a finished run, or one that cannot or must not be continued.
    """
    settings, output_dir, state = job.plan.settings, job.plan.output_dir, PartialState()
    log = printer(state)
    log(f"settings\n{settings.describe()}\n\n{job.plan.describe()}")
    if job.bad:
        log(f"note: {len(job.bad)} unreadable images are left out:\n  " + job.bad.describe("\n  "))
    for line in job.lines:
        log(line)
    if settings.dry_run:
        return
    repository = open_repository(settings)

    def prepare() -> Path | None:
        if repository is not None and job.stage is not None:
            bring_back(repository, settings, output_dir, job.written_last, log)
        return prepare_output_dir(output_dir, settings, job.bad, log, job.written_last, job.check)

    checkpoint = first_on_main(state, prepare)
    with logging_into(output_dir):
        trainer = job.build_trainer(checkpoint)
    hub_push = None
    if repository is not None:
        stage = None if job.stage is None else partial(job.stage, trainer)
        hub_push = build_hub_push(repository, settings, output_dir, stage, log)
        trainer.add_callback(hub_push)
    for make_callback in job.callbacks:
        trainer.add_callback(make_callback(trainer))
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.stop_if_not_finite()
    log(f"{output_dir}: {job.finish(trainer)}")
    if hasattr(trainer, "end"):  # absent in transformers 5.17
        trainer.end()
    if hub_push is not None and state.is_main_process:
        hub_push.finish()

"""The course of a training command after planning: output folder, trainer, training, result, upload."""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError
from transformers import TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import HubStrategy

from commands.duration import DurationEstimate, describe_duration, measure_seconds_per_step
from commands.launch import first_on_main, limit_shard_cache, printer
from commands.memory import free_bytes
from commands.output_folder import SETTINGS_FILE, check_output_dir, logging_into, prepare_output_dir
from commands.plan import Plan
from commands.pretraining_settings import PretrainingSettings
from commands.run_lock import locked
from commands.settings import TrainingSettings
from commands.tokenizer_settings import TokenizerSettings
from data.bad_images import BadImages
from data.decoding import BadImage
from data.shard_files import find_shards, is_shard_pattern
from data.shard_index import open_indices
from data.splits import PretrainingSplits, open_pretraining_splits
from hub.checkpoints import LAST_CHECKPOINT, fetch_checkpoint
from hub.push import HubError, Repository
from training.checkpoints import last_whole_checkpoint, what_is_safe
from training.collapse import CollapseError, describe_collapse
from training.evaluation_guard import describe_non_finite
from training.guard import NonFiniteError
from training.hub_push import HubPush
from training.trainer import MimTrainer

_NAMES_OF_STATES: dict[HubStrategy, Callable[[int], str]] = {
    HubStrategy.CHECKPOINT: lambda step: LAST_CHECKPOINT,
    HubStrategy.ALL_CHECKPOINTS: lambda step: f"checkpoint-{step}",
}


def open_images(settings: PretrainingSettings | TokenizerSettings, state: PartialState) -> PretrainingSplits:
    """Open the images for training and validation on the main process."""
    limit_shard_cache(settings)
    if not getattr(settings, "streaming", False):
        index_shards(settings.dataset, state)
    work = partial(
        open_pretraining_splits,
        settings.dataset,
        validation_fraction=settings.validation_fraction,
        max_bad_fraction=settings.max_bad_fraction,
        seed=settings.seed,
        checks=settings.check_images,
        measured=getattr(settings, "measured", None),
        streaming=getattr(settings, "streaming", False),
    )
    splits: PretrainingSplits = first_on_main(state, work)
    return splits


def index_shards(dataset: Sequence[str], state: PartialState) -> None:
    """Index the shards of a data set on all processes of each computer, so that none waits for the main process."""
    num_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if num_processes > 1:
        for name in dataset:
            with suppress(ValueError, OSError):  # which the main process meets again, and tells
                files = find_shards(name) if is_shard_pattern(name) else ()
                for _ in open_indices(files[state.local_process_index :: num_processes], lambda *_: None):
                    pass


def stage_nothing(trainer: MimTrainer, folder: Path, checkpoint_name: str | None) -> None:
    raise AssertionError("only the result is uploaded")


def train(
    plan: Plan,
    bad: BadImages,
    written_last: str,
    build_trainer: Callable[[Any, Path | None], Any],
    finish: Callable[[Any], str],
    shorter: str,
    *,
    lines: Sequence[str] = (),
    stage: Callable[[Any, Path, str | None], None] = stage_nothing,
    callbacks: Sequence[Callable[[MimTrainer], TrainerCallback]] = (),
    check: Callable[[Path], None] | None = None,
) -> None:
    """Log the plan and, unless it is a dry run, carry it out.

    Args:
        written_last: File that exists only in the output folder of a finished run.
        build_trainer: Called with the plan, and the checkpoint to continue from or None.
        finish: Writes the result to the output folder and returns a description of it; called on all processes.
        shorter: What to do for a result in minutes, for a run of more than a day.
        lines: Logged below the plan.
        stage: Writes an upload during training: called with the trainer, a new folder, and the name of the training
            state in it, or None.
        callbacks: Called with the trainer; the results are called after all other callbacks.
        check: Raises ValueError if a checkpoint does not fit.

    Raises:
        ValueError: If the output folder holds a finished run, or one that cannot or must not be continued.
    """
    settings, output_dir, state = plan.settings, plan.output_dir, PartialState()
    log = printer(state)
    check_trackers(settings.report_to)
    log(f"settings\n{settings.describe()}\n\n{plan.describe()}")
    if bad:
        which = "1 unreadable image is" if len(bad) == 1 else f"{len(bad):,} unreadable images are"
        log(f"note: {which} left out:\n  " + bad.describe("\n  "))
    for line in lines:
        log(line)
    if settings.dry_run:
        log(measure_duration(plan, build_trainer, shorter))
        return
    repository = open_repository(settings)

    def prepare() -> Path | None:
        lock.enter_context(locked(output_dir))
        if repository is not None and settings.uploads_at_saves:
            bring_back(repository, settings, output_dir, written_last, log)
        return prepare_output_dir(output_dir, settings, bad, log, written_last, check)

    first_on_main(state, partial(check_output_dir, output_dir))
    with naming_what_is_safe(output_dir), ExitStack() as lock:
        checkpoint = first_on_main(state, prepare)
        with logging_into(output_dir):
            trainer = build_trainer(plan, checkpoint)
        hub_push = None
        if repository is not None:
            at_saves = settings.uploads_at_saves and settings.hub_strategy is not HubStrategy.END
            checkpoint_name = _NAMES_OF_STATES.get(settings.hub_strategy)
            stage_model = partial(stage, trainer)
            hub_push = HubPush(
                repository, output_dir, stage_model, log, checkpoint_name, at_saves, trainer.whole_model
            )
            trainer.add_callback(hub_push)
        for make_callback in callbacks:
            trainer.add_callback(make_callback(trainer))

        def report(seconds_per_step: float) -> None:
            if num_left := trainer.state.max_steps - trainer.state.global_step:
                log(describe_duration(seconds_per_step, num_left, shorter))

        trainer.add_callback(DurationEstimate(report))
        try:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{checkpoint} cannot be continued: a file is damaged, or holds more than tensors, which could run a "
                "program; delete this folder, or train in another one"
            ) from error
        trainer.stop_if_not_finite()
        log(f"{output_dir}: {finish(trainer)}")
        for problem in (describe_non_finite(trainer.state.log_history), describe_collapse(trainer)):
            if problem:
                log(f"warning: {problem}")
        if hasattr(trainer, "end"):  # absent in transformers 5.17
            trainer.end()
        if hub_push is not None and state.is_main_process:
            hub_push.finish()


def measure_duration(plan: Plan, build_trainer: Callable[[Any, Path | None], Any], shorter: str) -> str:
    """Train a few steps in a scratch folder and return how long the whole run will take."""
    needed, free = plan.bytes_for_weights + plan.bytes_for_activations, free_bytes(PartialState().device)
    if needed > free:
        return f"duration: not measured, because the free memory is {free / 2**30:.1f} GiB"
    with TemporaryDirectory() as scratch, logging_into(Path(scratch)):
        trainer = build_trainer(replace(plan, output_dir=Path(scratch)), None)
        seconds_per_step = measure_seconds_per_step(trainer)
    return describe_duration(seconds_per_step, plan.num_steps, shorter)


def check_trackers(report_to: str | list[str] | None) -> None:
    """Raise ValueError if there is no such experiment tracker, or its package is not installed."""
    installed = get_available_reporting_integrations()
    for name in [report_to] if isinstance(report_to, str) else report_to or []:
        if name in (*installed, "none", "all"):
            continue
        problem = f"this package is not installed; run `pip install {name}`, or use one of"
        if name not in INTEGRATION_TO_CALLBACK:
            problem = "there is no such experiment tracker; installed are"
        raise ValueError(f"report_to {name}: {problem} {', '.join([*installed, 'none'])}")


@contextmanager
def naming_what_is_safe(output_dir: Path) -> Iterator[None]:
    """Add to errors that are not about the settings what is on the disk, from which the run can continue."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError, BadImage) as error:
        if not isinstance(error, NonFiniteError | CollapseError):
            error.add_note(what_is_safe(output_dir))
        raise


def open_repository(settings: TrainingSettings) -> Repository | None:
    """Return the repository to upload to, or None; makes no request."""
    if not settings.push_to_hub:
        return None
    assert settings.hub_model_id is not None
    return Repository(settings.hub_model_id, settings.hub_private_repo, settings.hub_token, settings.hub_revision)


def bring_back(
    repository: Repository, settings: TrainingSettings, output_dir: Path, written_last: str, log: Callable[[str], None]
) -> None:
    """Download the checkpoint of an earlier run into an output folder that has none."""
    starts_anew = settings.overwrite or settings.resume == "never"
    if settings.hub_strategy not in _NAMES_OF_STATES or starts_anew or settings.resume_from_checkpoint:
        return
    if (output_dir / written_last).exists() or last_whole_checkpoint(output_dir)[0] is not None:
        return
    try:
        found = fetch_checkpoint(repository, output_dir, SETTINGS_FILE)
    except HubError as error:
        log(
            f"warning: no checkpoint could be downloaded from the Hub ({error}), so training starts from step 0; "
            "if there is one, stop now and try again"
        )
        return
    if found is not None:
        log(f"found a checkpoint of this run in {repository.url}: {found}")

"""`--time_budget 30m`: the number of steps for which a measured speed leaves time, beside the run's start and end."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

from accelerate import PartialState
from transformers import TrainerCallback

import commands
from commands.duration import measure_seconds_per_step
from commands.launch import first_on_main
from commands.memory import free_bytes
from commands.output_folder import logging_into, settings_of_interrupted_run
from commands.plan import Plan
from commands.settings import Origin, TrainingSettings
from training.callbacks import ReconstructionPanels, duration
from training.online_evaluation import EvaluateOnline
from training.time_budget import GOAL, Speed, TimeBudget
from training.trainer import MimTrainer

_MOST_INTERVALS, _SHARE_OF_INTERVALS = 10, 0.1  # evaluations of a run, and the share of the time that they may take
_FEWEST_STEPS = 20  # that are worth a run
_MEASURED_SHARE, _MEASURED_SECONDS = 0.02, 20.0  # of the budget, spent on the measurement
_END_SHARE, _END_SECONDS = 0.03, 10.0  # of the budget, for the export, the figures and the model card
_PROVISIONAL_STEPS = 1000
_INTERVALS = ("eval_steps", "save_steps")

S = TypeVar("S", bound=TrainingSettings)


@dataclass(frozen=True)
class Fitted(Generic[S]):
    """Settings with the number of steps that fits, notes for the plan, and what keeps the run within its time."""

    settings: S
    notes: Sequence[str] = ()
    callbacks: Sequence[Callable[[MimTrainer], TrainerCallback]] = ()


def fit_to_budget(
    settings: S,
    make_plan: Callable[[S], Plan],
    build_trainer: Callable[[Any], MimTrainer],
    callbacks: Sequence[Callable[[MimTrainer], TrainerCallback]] = (),
) -> Fitted[S]:
    """Choose the number of steps so that the run ends in time; without --time_budget nothing changes.

    A run that is continued keeps its number, and `TimeBudget` corrects it for the time that is left.

    Args:
        build_trainer: Called with a plan; the trainer is only measured.
        callbacks: Those of the run that evaluate.

    Raises:
        ValueError: If the time is not enough for a few steps.
    """
    if (seconds := settings.seconds) is None:
        return Fitted(settings)
    state = PartialState()
    saved = first_on_main(state, partial(settings_of_interrupted_run, settings))
    given = [name for name in _INTERVALS if settings.is_users(name)]
    ours = ["max_steps", *(name for name in _INTERVALS if name not in given)]
    kept = {name: int(value) if value >= 1 else value for name in ours if (value := saved.get(name, 0)) > 0}
    if "max_steps" in kept:
        step = GOAL * seconds / kept["max_steps"]  # until it is read from the checkpoint
        budget = partial(TimeBudget, seconds=seconds, started=commands.STARTED, speed=Speed(step, 0.0, 0.0))
        return Fitted(settings.derived(Origin.MEASURED, "as before the interruption", **kept), (), [budget])
    provisional: dict[str, Any] = {"max_steps": _PROVISIONAL_STEPS}
    if "head_warmup_epochs" in settings.values:
        provisional["head_warmup_epochs"] = 0.0  # its steps take less time
    plan = make_plan(settings.derived(Origin.MEASURED, "to be measured", **provisional))
    measured = measure_speed(plan, seconds, build_trainer, callbacks)
    speed, num_steps, interval = first_on_main(state, partial(_choose, settings, seconds, *measured))
    # Checkpoints come with evaluations, as fine-tuning ends with the best of them.
    both = settings.values[given[0]] if given else interval
    values = {name: num_steps if name == "max_steps" else both for name in ours}
    notes = [
        f"--time_budget {settings.time_budget}: {num_steps:,} steps of {speed.step:.2g} s, and {speed.interval:.2g} s "
        "for an evaluation with a checkpoint; when the speed changes, so does the number of steps"
    ]
    if num_steps < plan.steps_per_epoch:
        notes.append(
            f"the time is enough for {num_steps / plan.steps_per_epoch:.0%} of an epoch: a longer --time_budget, a "
            "smaller --model or a smaller --image_size lets the encoder see all images"
        )
    budget = partial(TimeBudget, seconds=seconds, started=commands.STARTED, speed=speed)
    return Fitted(
        settings.derived(Origin.MEASURED, f"fits --time_budget {settings.time_budget}", **values), notes, [budget]
    )


def measure_speed(
    plan: Plan,
    seconds: float,
    build_trainer: Callable[[Any], MimTrainer],
    callbacks: Sequence[Callable[[MimTrainer], TrainerCallback]] = (),
) -> tuple[Speed, float]:
    """Return the speed of a run, measured in a scratch folder, and the seconds in which its trainer is built."""
    needed, free = plan.bytes_for_weights + plan.bytes_for_activations, free_bytes(PartialState().device)
    if needed > free:
        raise ValueError(
            f"--time_budget: the run needs about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: use a "
            "smaller --model, --image_size or --per_device_train_batch_size"
        )
    with TemporaryDirectory() as scratch, logging_into(Path(scratch)):
        began = time.perf_counter()
        trainer = build_trainer(replace(plan, output_dir=Path(scratch)))
        seconds_to_build = time.perf_counter() - began
        evaluates, saves = trainer.args.eval_strategy != "no", trainer.args.save_strategy != "no"
        panels = [each for each in trainer.callback_handler.callbacks if isinstance(each, ReconstructionPanels)]
        online = [each for each in (make(trainer) for make in callbacks) if isinstance(each, EvaluateOnline)]
        step = measure_seconds_per_step(trainer, min(_MEASURED_SECONDS, _MEASURED_SHARE * seconds))
        began = time.perf_counter()
        if evaluates:
            trainer.evaluate()
        if saves:
            trainer._save_checkpoint(trainer.model, trial=None)
        for panel in panels:
            panel.on_evaluate(trainer.args, trainer.state, trainer.control, trainer.model)
        with trainer.whole_model():
            for each in online if trainer.is_world_process_zero() else ():
                each.measure(trainer.model)
        interval = time.perf_counter() - began
    return Speed(step, interval, interval + min(_END_SECONDS, _END_SHARE * seconds)), seconds_to_build


def _choose(
    settings: TrainingSettings, seconds: float, speed: Speed, seconds_to_build: float
) -> tuple[Speed, int, int]:
    """Return the speed, the number of steps, and the number of steps between evaluations."""
    used = time.perf_counter() - commands.STARTED + seconds_to_build
    left = GOAL * seconds - used
    num_intervals = int(min(_MOST_INTERVALS, max(1, _SHARE_OF_INTERVALS * left / max(speed.interval, 1e-6))))
    num_steps = int((left - speed.end - (num_intervals - 1) * speed.interval) / speed.step)
    if num_steps < _FEWEST_STEPS:
        needed = (used + speed.end + _FEWEST_STEPS * speed.step) / GOAL / (1 - _SHARE_OF_INTERVALS)
        raise ValueError(
            f"--time_budget {settings.time_budget} is enough for {max(0, num_steps)} steps of {speed.step:.2g} s, "
            f"beside {duration(used)} to start and {duration(speed.end)} to end; expected at least {_FEWEST_STEPS}: "
            f"give {_as_flag(needed)} or more, a smaller --model, or a smaller --image_size"
        )
    return speed, num_steps, -(-num_steps // num_intervals)


def _as_flag(seconds: float) -> str:
    return f"{int(seconds) + 1}s" if seconds < 60 else f"{int(seconds / 60) + 1}m"

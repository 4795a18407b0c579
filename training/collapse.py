"""Warn when an evaluation shows that a method with a teacher collapses, and stop a run that does not recover.

All is read from the log history, which a checkpoint contains, so that a resumed run counts on.
"""

import sys
from typing import Any

from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import TrainerCallback

from training.checkpoints import last_whole_checkpoint

# Evaluations in a row, and steps from the first to the last of them, after which a run is stopped: within the first
# few hundred steps a model may recover (data2vec 2.0 on 28 x 28 pixels: RankMe 19, 3.5 after 120 steps, 11 after 390).
_NUM_SIGNS, _NUM_STEPS = 3, 500


class CollapseError(RuntimeError):
    """A run was stopped because the model collapsed; the message names the last checkpoint before."""


class WatchForCollapse(TrainerCallback):
    """Ask the model after each evaluation for `collapse_signs`, warn, and stop the run if they stay.

    They stay if three evaluations in a row, over at least 500 steps, have them.

    The main process decides for all. While there is a sign no old checkpoint is deleted, so that one from before the
    first sign remains.

    Args:
        stops: Whether the run is stopped.
    """

    def __init__(self, trainer: Any, stops: bool = True) -> None:
        self.trainer, self.stops, self.save_total_limit = trainer, stops, trainer.args.save_total_limit

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._keep_checkpoints(self._agreed_signs())

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        signs = self._agreed_signs()
        self._keep_checkpoints(signs)
        if not signs:
            return
        if state.is_world_process_zero:
            tqdm.write(f"warning: step {state.global_step}: {signs[-1][1]}", file=sys.stderr)
        if self.stops and _stay(signs) and state.global_step < state.max_steps:
            raise CollapseError(self._describe(signs))

    def _agreed_signs(self) -> list[tuple[int, str]]:
        signs: list[Any] = [standing_signs(self.trainer)]
        broadcast_object_list(signs)
        return signs[0]

    def _keep_checkpoints(self, signs: list[tuple[int, str]]) -> None:
        self.trainer.args.save_total_limit = None if signs and self.stops else self.save_total_limit

    def _describe(self, signs: list[tuple[int, str]]) -> str:
        first, (last, sign) = signs[0][0], signs[-1]
        good, _ = last_whole_checkpoint(self.trainer.output_dir, before=first)
        saved = "no checkpoint from before is left"
        if good is not None:
            saved = f"the last checkpoint from before is {good}: continue from it with `resume_from_checkpoint`"
        return (
            f"the model collapsed. Step {last:,}: {sign} All {len(signs)} evaluations since step {first:,} show it; "
            f"{saved}, or set `stop_on_collapse` to false to go on"
        )


def standing_signs(trainer: Any) -> list[tuple[int, str]]:
    """Return steps and sentences of the last evaluations in a row that show a sign of collapse.

    Evaluations during warm-up, which comes after that of new heads, do not count, and none does if the features of the
    initial weights have such a sign, as those of nearly equal images have.
    """
    ask = getattr(trainer.model, "collapse_signs", None)
    if ask is None:
        return []
    by_step: dict[int, dict[str, float]] = {}
    for entry in trainer.state.log_history:
        metrics = {name[5:]: value for name, value in entry.items() if name.startswith("eval_")}
        by_step.setdefault(entry["step"], {}).update(metrics)
    if ask(by_step.get(0, {})):
        return []
    first_step = trainer.head_warmup.num_steps + trainer.args.get_warmup_steps(trainer.state.max_steps)
    signs: list[tuple[int, str]] = []
    for step, metrics in by_step.items():
        if step >= first_step and "loss" in metrics:
            sign = ask(metrics)
            signs = [*signs, (step, sign)] if sign else []
    return signs


def describe_collapse(trainer: Any) -> str | None:
    """Return that the last evaluations of a run showed a sign of collapse; None if the last one did not."""
    signs = standing_signs(trainer)
    if not signs:
        return None
    # The first evaluations of a run tell little: teachers start with distributions that are nearly uniform.
    verdict = "collapsed" if _stay(signs) else "may have collapsed, or was trained too shortly"
    return f"the model {verdict}: since step {signs[0][0]:,} {signs[-1][1].removesuffix('.')}"


def _stay(signs: list[tuple[int, str]]) -> bool:
    return len(signs) >= _NUM_SIGNS and signs[-1][0] - signs[0][0] >= _NUM_STEPS

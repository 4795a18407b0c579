"""`--time_budget`: a run ends in time although its speed changes, and its schedules end with it."""

import json
import math
import shutil
from types import SimpleNamespace
from typing import Any

import pytest
from pretraining_command import pretrain

from commands import time_budget
from commands.pretraining_settings import load_pretraining_settings
from commands.settings import SettingsError
from commands.time_budget import fit_to_budget
from modeling import CONFIGS
from training.time_budget import Pace, Speed, TimeBudget

TINY = ["--dataset", "sample-fashion", "--model", "vit-nano", "--image_size", "28", "--patch_size", "7"]
TINY += ["--report_to", "none", "--use_cpu"]


class Clock:
    """Time that only passes when it is told to."""

    def __init__(self, monkeypatch: Any) -> None:
        self.now = 0.0
        monkeypatch.setattr("training.time_budget.time.perf_counter", lambda: self.now)


def simulate(monkeypatch: Any, seconds_of_step: Any, budget: float = 600.0, planned: int = 1000) -> tuple[Any, Any]:
    """Steps that take `seconds_of_step(step)`, and 5 s every 100 steps; returns the clock and the trainer."""
    clock = Clock(monkeypatch)
    trainer = SimpleNamespace(pace=Pace(), rates=[])
    state = SimpleNamespace(max_steps=planned, global_step=0, log_history=[], eval_steps=100, save_steps=100)
    state.is_world_process_zero = True
    args, control = SimpleNamespace(eval_strategy="steps", save_strategy="steps"), SimpleNamespace(should_save=False)
    scheduler = SimpleNamespace(lr_lambdas=[lambda position: 1 - position / planned])
    callback = TimeBudget(trainer, budget, 0.0, Speed(0.5, 5.0, 15.0))
    callback.on_train_begin(args, state, control, scheduler)
    while state.global_step < state.max_steps:
        trainer.rates.append(scheduler.lr_lambdas[0](state.global_step))
        clock.now += seconds_of_step(state.global_step)
        state.global_step += 1
        control.should_save = state.global_step % 100 == 0
        callback.on_step_end(args, state, control)
        if control.should_save:
            clock.now += 5.0
            callback.on_evaluate(args, state, control)
    clock.now += 15.0
    trainer.state = state
    return clock, trainer


@pytest.mark.parametrize(
    "seconds_of_step",
    [
        lambda step: 1.5,  # three times slower than measured
        lambda step: 0.1,  # five times faster
        lambda step: 0.5 if step < 300 else 1.2,  # another program comes
        lambda step: 1.0 if step < 200 else 0.3,  # and goes
        lambda step: 0.2 + step % 2,  # irregular
    ],
)
def test_run__ends_between_8_and_11_of_10_minutes_and_the_rate_falls_to_zero_without_a_jump(
    monkeypatch, seconds_of_step
):
    clock, trainer = simulate(monkeypatch, seconds_of_step)
    assert 480 <= clock.now <= 660
    falls = [before - after for before, after in zip(trainer.rates, trainer.rates[1:], strict=False)]
    assert min(falls) > 0
    assert max(falls) < 0.02
    assert trainer.rates[-1] == pytest.approx(0, abs=0.02)


def test_run__as_fast_as_planned_keeps_its_steps(monkeypatch):
    _, trainer = simulate(monkeypatch, lambda step: 0.5)
    assert (trainer.pace, trainer.state.max_steps) == (Pace(), 1000)
    assert trainer.rates == [1 - step / 1000 for step in range(1000)]


@pytest.mark.parametrize("seconds", [1.5, 0.1])  # fewer steps than planned, and more
def test_resumed_run__has_the_time_that_is_left_and_the_pace(monkeypatch, seconds):
    _, trainer = simulate(monkeypatch, lambda step: seconds)
    saved = json.loads(json.dumps(trainer.state.log_history))
    resumed = SimpleNamespace(pace=Pace())
    last = saved[-1]["step"]
    state = SimpleNamespace(max_steps=1000, global_step=last, log_history=saved, eval_steps=100, save_steps=100)
    control = SimpleNamespace(should_training_stop=last >= 1000)  # as the trainer, which knows the plan only
    callback = TimeBudget(resumed, 600.0, 0.0, Speed(9.0, 9.0, 9.0))
    callback.on_train_begin(SimpleNamespace(eval_strategy="no", save_strategy="steps"), state, control)
    assert (resumed.pace, state.max_steps) == (trainer.pace, trainer.state.max_steps)
    assert callback.used() > saved[-1]["time_budget"]["used"] + 1
    assert callback.speed.step == pytest.approx(seconds)
    assert not control.should_training_stop


def test_resumed_run__that_was_stopped_early_does_not_train_on(monkeypatch):
    _, trainer = simulate(monkeypatch, lambda step: 0.5)
    saved = trainer.state.log_history[:3]
    state = SimpleNamespace(max_steps=1000, global_step=300, log_history=saved, eval_steps=100, save_steps=100)
    control = SimpleNamespace(should_training_stop=True)
    callback = TimeBudget(SimpleNamespace(pace=Pace()), 600.0, 0.0, Speed(9.0, 9.0, 9.0))
    callback.on_train_begin(SimpleNamespace(eval_strategy="no", save_strategy="steps"), state, control)
    assert control.should_training_stop


def test_pace__spreads_the_rest_of_the_plan():
    pace = Pace().changed(step=200, num_left=400, num_planned=1000)
    assert (pace.at(200), pace.at(400), pace.at(600)) == (200, 600, 1000)
    assert pace.last_step(1000) == 600


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--time_budget", "soon"], "--time_budget is soon, expected a time such as 45s, 30m or 2h"),
        (["--time_budget", "0m"], "--time_budget is 0m, expected a time"),
        (["--time_budget", "1h", "--max_steps", "9"], "--time_budget and --max_steps both set the length of the run"),
        (
            ["--time_budget", "1h", "--image_size", "64", "--image_size_schedule", "32", "64"],
            "leave out --image_size_sch",
        ),
    ],
)
def test_mistakes__are_answered_with_what_would_work(argv, message):
    with pytest.raises(SettingsError, match=message):
        load_pretraining_settings(argv, CONFIGS)


def test_length__given_nearer_to_the_command_line_wins(tmp_path):
    recipe = tmp_path / "budget.yaml"
    recipe.write_text("max_steps: 9\n")
    assert load_pretraining_settings(["--config", str(recipe), "--time_budget", "1.5m"], CONFIGS).seconds == 90
    recipe.write_text("time_budget: 2h\n")
    assert load_pretraining_settings(["--config", str(recipe)], CONFIGS).seconds == 7200
    assert load_pretraining_settings(["--config", str(recipe), "--max_steps", "9"], CONFIGS).seconds is None


def fitted(monkeypatch: Any, speed: Speed, budget: str = "10m", *argv: str) -> Any:
    monkeypatch.setattr(time_budget, "measure_speed", lambda *args: (speed, 1.0))
    monkeypatch.setattr("commands.STARTED", time_budget.time.perf_counter() - 20)
    settings = load_pretraining_settings([*argv, "--time_budget", budget], CONFIGS)
    make_plan: Any = lambda settings: SimpleNamespace(steps_per_epoch=2000)  # noqa: E731
    return fit_to_budget(settings, make_plan, lambda plan: plan)  # type: ignore[arg-type,return-value]


def test_steps__fill_the_time_between_the_start_and_the_end_of_the_run(monkeypatch):
    plan = fitted(monkeypatch, Speed(0.5, 2.0, 12.0))
    steps, every = (plan.settings.values[name] for name in ("max_steps", "eval_steps"))
    assert plan.settings.counts("max_steps")
    assert 20 + 1 + steps * 0.5 + 9 * 2 + 12 == pytest.approx(0.95 * 600, abs=1.0)
    assert every == math.ceil(steps / 10)
    assert any("% of an epoch" in note for note in plan.notes)


def test_evaluations__that_take_long_are_few(monkeypatch):
    plan = fitted(monkeypatch, Speed(0.5, 20.0, 30.0))
    assert plan.settings.values["eval_steps"] == math.ceil(plan.settings.values["max_steps"] / 2)


@pytest.mark.parametrize("given", ["eval_steps", "save_steps"])
def test_evaluations_and_checkpoints__come_together_when_the_interval_of_one_is_given(given, monkeypatch):
    plan = fitted(monkeypatch, Speed(0.5, 2.0, 12.0), "10m", f"--{given}", "0.25")
    values = plan.settings.values
    assert values["eval_steps"] == values["save_steps"] == 0.25
    assert plan.settings.is_users(given)


def test_budget_for_a_few_steps__is_an_error_that_says_what_would_be_enough(monkeypatch):
    with pytest.raises(
        ValueError, match=r"--time_budget 1m is enough for 4 steps of 5 s.*at least 20: give 3m or more"
    ):
        fitted(monkeypatch, Speed(5.0, 2.0, 12.0), "1m")


@pytest.mark.parametrize("num_left", [4, pytest.param(40, marks=pytest.mark.slow)])
def test_command__follows_a_changed_pace_to_the_end_and_a_killed_run_ends_with_the_same_weights(
    num_left, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(time_budget, "measure_speed", lambda *args: (Speed(2.0, 1.0, 1.0), 1.0))
    monkeypatch.setattr(time_budget, "_choose", lambda settings, seconds, speed, built: (speed, 20, 5))

    def check(self: TimeBudget, state: Any) -> None:
        if state.global_step == 8:
            self._set_pace(state, self.trainer.pace.changed(8, num_left, self.num_planned))

    monkeypatch.setattr(TimeBudget, "_check", check)
    argv = [
        *TINY,
        "--output_dir",
        str(tmp_path),
        "--time_budget",
        "60s",
        "--save_total_limit",
        "9",
        "--save_steps",
        "10",
    ]
    argv += ["--per_device_train_batch_size", "4", "--logging_steps", "1", "--eval_strategy", "no"]
    assert pretrain(argv) == 0
    assert "note: --time_budget 60s: " in capsys.readouterr().out
    ended = json.loads((tmp_path / "trainer_state.json").read_text())
    assert ended["global_step"] == ended["max_steps"] == 8 + num_left
    rates = [entry["learning_rate"] for entry in ended["log_history"] if "learning_rate" in entry]
    assert rates[-1] == pytest.approx(0, abs=0.2 * max(rates))
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "pretraining/config.json").unlink()  # as if it had been killed
    shutil.rmtree(tmp_path / f"checkpoint-{8 + num_left}")
    assert pretrain(argv) == 0
    assert f"continuing from {tmp_path / 'checkpoint'}" in capsys.readouterr().out
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 8 + num_left
    assert (tmp_path / "model.safetensors").read_bytes() == weights

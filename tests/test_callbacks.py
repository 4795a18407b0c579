"""What a person reads while it trains."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from PIL import Image

from commands import launch
from commands.duration import DurationEstimate, describe_duration
from training.callbacks import (
    BadImagesLimit,
    ReconstructionPanels,
    describe_log,
    duration,
)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(42, "42 s"), (90, "1 min 30 s"), (7260, "2 h 1 min"), (266400, "3 days 2 h"), (3599.7, "1 h 0 min")],
)
def test_duration__is_in_two_units(seconds, text):
    assert duration(seconds) == text


def test_log_line__has_units_and_only_what_is_there():
    logs = {
        "loss": 0.51234,
        "learning_rate": 1.5e-4,
        "images_per_second": 412.3,
        "data_wait_share": 0.031,
        "eta_seconds": 90,
    }
    assert describe_log(logs) == "loss 0.5123  lr 1.50e-04  412 images/s  waits 3% for data  1 min 30 s left"
    speed = logs | {"flops_per_second": 3.25e14, "model_flops_utilization": 0.329}
    assert "412 images/s  325 TFLOP/s (MFU 33%)  waits" in describe_log(speed)
    assert "412 images/s  0.0521 TFLOP/s  waits" in describe_log(logs | {"flops_per_second": 5.21e10})
    assert "waits 3% for data, workers use 45% of the CPU  1 min" in describe_log(logs | {"worker_cpu_share": 0.4512})
    assert describe_log({"eval_loss": 0.5}) == "validation loss 0.5000"
    assert describe_log({"train_runtime": 3.0}) == ""


def test_duration_estimate__is_reported_once_and_leaves_out_the_first_step(monkeypatch):
    ends = iter([0.0, 100.0, 102.0, 104.0, 106.0])
    monkeypatch.setattr("commands.duration.time.perf_counter", lambda: next(ends))
    monkeypatch.setattr("commands.duration._MAX_SECONDS", 1000)
    reported, control = [], SimpleNamespace(should_training_stop=False)
    callback = DurationEstimate(reported.append, ends_training=True)
    state = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=1000)
    arguments = SimpleNamespace(world_size=1)
    callback.on_train_begin(arguments, state, control)
    for number in range(10):
        callback.on_step_end(arguments, state, control)
        assert control.should_training_stop == (number >= 3)
    assert reported == [2.0]


def test_duration_estimate__of_a_run_of_two_steps_is_that_of_the_second(monkeypatch):
    ends = iter([0.0, 100.0, 102.0])
    monkeypatch.setattr("commands.duration.time.perf_counter", lambda: next(ends))
    monkeypatch.setattr("commands.duration._MAX_SECONDS", 1000)
    reported, control = [], SimpleNamespace(should_training_stop=False)
    callback = DurationEstimate(reported.append, ends_training=True)
    arguments = SimpleNamespace(world_size=1)
    callback.on_train_begin(arguments, None, control)
    for step in (1, 2):
        state = SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=2)
        callback.on_step_end(arguments, state, control)
    assert reported == [2.0]


def test_duration__of_a_run_that_nobody_waits_for_names_a_shorter_one():
    assert describe_duration(2.0, 100, "QUICK") == "duration: about 3 min 20 s for 100 steps (2 s per step)"
    assert describe_duration(2.0, 248_800, "QUICK") == (
        "duration: about 5 days 18 h for 248,800 steps (2 s per step); for one hour, add --max_steps 1800; "
        "for a result in minutes: QUICK"
    )


def test_panels__are_drawn_in_evaluation_mode_without_gradient_and_leave_the_model_as_it_was(tmp_path):
    seen = []

    def draw(model, batch, step, eval_loss):
        seen.append((model.training, torch.is_grad_enabled(), batch["pixel_values"].shape, step, eval_loss))
        return Image.new("RGB", (8, 8))

    model = torch.nn.Linear(2, 2).train()
    panels = ReconstructionPanels(tmp_path / "panels", {"pixel_values": torch.zeros(2, 3)}, draw, tensorboard=None)
    state = SimpleNamespace(global_step=7, is_world_process_zero=True)
    panels.on_evaluate(None, state, None, model=model, metrics={"eval_loss": 0.5})
    assert seen == [(False, False, (2, 3), 7, 0.5)]
    assert model.training
    assert Image.open(tmp_path / "panels" / "step-0000007.png").size == (8, 8)


def test_threads__are_restored_only_where_a_launcher_took_them(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        monkeypatch.setattr(launch, "launcher_environment", dict)
        assert launch.restore_threads() is None  # there is no launcher: it is the user's choice
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        monkeypatch.setattr(launch, "launcher_environment", lambda: {"OMP_NUM_THREADS": "1"})
        assert launch.restore_threads() is None  # the launcher passes the user's choice on
        monkeypatch.setattr(launch, "launcher_environment", dict)
        said = launch.restore_threads()
        assert torch.get_num_threads() == cores
        assert (said is None) == (cores == 1)
        torch.set_num_threads(1)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(cores))
        assert launch.restore_threads() is None  # one thread is this process's share
    finally:
        torch.set_num_threads(before)


def test_launcher_environment__is_that_of_the_parent_process():
    code = "from commands.launch import launcher_environment; print(launcher_environment().get('MARK'))"
    parent = (
        "import os, subprocess, sys; os.environ['MARK'] = 'set by the launcher'; "
        f"subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    )
    environment = os.environ | {"MARK": "users", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", parent], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "users"


def test_world__larger_than_the_trainers_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    launch.check_world(2)
    with pytest.raises(ValueError, match="--use_cpu"):
        launch.check_world(1)


def test_bad_images_limit__counts_what_was_not_left_out_before(tmp_path):
    file = tmp_path / "bad.jsonl"
    file.write_text("".join(json.dumps({"name": f"{n}.jpg", "reason": "cut off"}) + "\n" for n in range(11)))
    before = frozenset(f"{n}.jpg" for n in range(10))
    BadImagesLimit(file, num_images=90, max_bad_fraction=0.1, known=before).on_log(None, None, None)
    with pytest.raises(ValueError, match=r"1 of 9 images cannot be read \(10.jpg: cut off\)"):
        BadImagesLimit(file, num_images=9, max_bad_fraction=0.1, known=before).on_log(None, None, None)

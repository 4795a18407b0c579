"""SIGINT, SIGTERM, SIGHUP and SIGUSR1: the step ends, a checkpoint is written, the same command continues."""

import os
import signal

import pytest
import torch
from conftest import ROOT
from forked import Forked, run_forked
from PIL import ImageFile
from safetensors.torch import load_file

from data.decoding import decode
from training.checkpoints import last_whole_checkpoint
from training.stopping import Stopped, raising_stopped

TRAIN = ROOT / "tests" / "train_and_die.py"


ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(folder, *arguments):
    return Forked([TRAIN, folder, *arguments], ENVIRONMENT)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert start(folder).wait() == 0
    return load_file(folder / "final.safetensors")


def assert_equal_weights(folder, expected):
    resumed = load_file(folder / "final.safetensors")
    assert resumed.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.parametrize(
    "name", ["SIGTERM", *(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGHUP", "SIGUSR1"))]
)
def test_signal__to_all_processes_of_a_run_is_followed_by_a_checkpoint_of_that_step(tmp_path, undisturbed, name):
    """As from a terminal or a scheduler: the data workers receive the signal as well."""
    process = start(tmp_path, "--num_workers", "2", "--signal_at", f"6 {name} group")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + getattr(signal, name)
    assert f"stopped by {name} at step 7 of 16" in errors
    assert str(tmp_path / "checkpoint-7") in errors
    assert "Traceback" not in errors
    assert last_whole_checkpoint(tmp_path)[0].name == "checkpoint-7"
    assert start(tmp_path, "--num_workers", "2", "--resume").wait() == 0
    assert_equal_weights(tmp_path, undisturbed)


def test_signal__of_a_terminal_that_is_gone_is_followed_by_a_checkpoint_too(tmp_path):
    """Printing to such a terminal is an error."""
    assert start(tmp_path, "--signal_at", "6 SIGHUP terminal").wait() == 128 + signal.SIGHUP
    assert last_whole_checkpoint(tmp_path)[0].name == "checkpoint-7"


def test_signal__that_nohup_ignores_is_ignored(tmp_path, undisturbed):
    assert start(tmp_path, "--signal_at", "6 SIGHUP group", "--nohup").wait() == 0
    assert_equal_weights(tmp_path, undisturbed)


def test_second_signal__ends_the_process_at_once(tmp_path):
    process = start(tmp_path, "--signal_at", "6 SIGTERM twice")
    assert process.wait(timeout=120) == -signal.SIGTERM
    assert last_whole_checkpoint(tmp_path)[0].name == "checkpoint-4"


def test_signal__to_one_of_two_processes_stops_both_at_the_same_step(tmp_path):
    stopped = run_forked([TRAIN, tmp_path, "--signal_at", "6 SIGTERM rank1"], ENVIRONMENT, num_processes=2)
    assert stopped.returncode == 128 + signal.SIGTERM
    checkpoint = last_whole_checkpoint(tmp_path)[0]
    assert checkpoint.name == "checkpoint-8"  # received in the seventh step, known everywhere one step later
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2


def test_raising_stopped__ends_work_that_can_be_interrupted_anywhere():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match=r"^stopped by SIGTERM in between$") as stopped, raising_stopped("in between"):
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_raising_stopped__is_not_taken_for_an_unreadable_image(monkeypatch):
    """Whatever Pillow raises while it decodes makes a bad image, but Ctrl-C in the meantime does not."""
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: signal.raise_signal(signal.SIGINT))
    photograph = next((ROOT / "data/samples/photographs/train").glob("*.jpg"))
    with pytest.raises(Stopped, match="SIGINT"), raising_stopped("in between"):
        decode(photograph, 3)

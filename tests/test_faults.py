"""Faults of the environment while a command runs: each ends in one message, or costs only the images that it meets."""

import errno
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import ROOT
from pretraining_command import pretrain
from transformers import TrainerCallback

import run_evaluation
import run_pretraining
from commands.evaluation_settings import EvaluationSettings
from commands.launch import join, run
from commands.parsing import make_parser
from training import trainer as trainer_module

PHOTOGRAPHS = sorted((ROOT / "data" / "samples" / "photographs" / "train").glob("*.jpg"))
SMALL = ["--model", "vit-nano", "--image_size", "32", "--per_device_train_batch_size", "8", "--use_cpu"]
NO_NAME = os.fsdecode(b"\xe9t")  # not Unicode


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for photograph in PHOTOGRAPHS[:24]:
        shutil.copy(photograph, folder)
    return folder


@pytest.fixture
def at_step(monkeypatch):
    """Return a function that lets the next pre-training call `act` before a step."""

    acted = []

    def set_up(step: int, act) -> None:
        class Act(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == step and not acted:
                    acted.append(step)
                    act()

        def build_trainer(*args, build=run_pretraining.build_trainer):
            trainer = build(*args)
            trainer.add_callback(Act())
            return trainer

        monkeypatch.setattr(run_pretraining, "build_trainer", build_trainer)

    return set_up


@pytest.fixture
def full_disk():
    """Return a function from which on files cannot grow beyond a size, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def fault(capsys, *argv: str, exit_code: int = 4) -> str:
    """The only line of a command that ends with a fault."""
    resource_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert pretrain([*SMALL, *argv]) == exit_code
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource_limits[1], resource_limits[1]))
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    (message,) = [line for line in errors.splitlines() if line.startswith("run_pretraining.py: ")]
    assert message == errors.rstrip().splitlines()[-1]
    return message


# ---- images ----


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_dataset__that_is_removed_in_training_is_one_message(photos, tmp_path, capsys, at_step, num_workers):
    out = tmp_path / "out"
    at_step(2, lambda: shutil.rmtree(photos))
    argv = ["--dataset", str(photos), "--output_dir", str(out), "--max_steps", "30", "--save_steps", "1"]
    message = fault(capsys, *argv, "--dataloader_num_workers", num_workers, exit_code=2)
    assert "cannot be read, nor can any of 10 others drawn in its place; is the storage still available?" in message
    assert f"; {out / 'checkpoint-'}" in message
    assert message.endswith(" is complete: the same command continues from there")


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_images__that_become_something_else_in_training_are_replaced(photos, tmp_path, at_step, num_workers):
    names = sorted(path.name for path in photos.iterdir())[:5]

    def replace() -> None:
        for name in names:
            (photos / name).unlink()
        os.mkfifo(photos / names[0])
        (photos / names[1]).mkdir()
        (photos / names[2]).symlink_to(names[2])
        (photos / names[3]).symlink_to("/proc/self/mem")
        (photos / names[4]).symlink_to("/dev/zero")

    at_step(0, replace)
    argv = ["--dataset", str(photos), "--output_dir", str(tmp_path / "out"), "--max_steps", "9"]
    argv += ["--max_bad_fraction", "0.5", "--dataloader_num_workers", num_workers, "--validation_fraction", "0"]
    assert pretrain([*SMALL, *argv]) == 0
    lines = (tmp_path / "out" / "bad_images.jsonl").read_text().splitlines()
    reasons = {Path(entry["name"]).name: entry["reason"] for entry in map(json.loads, lines)}
    assert sorted(reasons) == names
    assert [reasons[name].partition(": ")[2] for name in names] == [
        "it is a FIFO, not a regular file",
        "it is a folder, not a regular file",
        os.strerror(errno.ELOOP),
        os.strerror(errno.EIO),
        "it is a device, not a regular file",
    ]


def test_storage__that_is_stuck_ends_the_wait_of_the_trainer(photos, tmp_path, capsys, at_step, monkeypatch):
    monkeypatch.setattr(trainer_module, "_SECONDS_UNTIL_STUCK", 3)
    read = run_pretraining.ImageDataset.__getitems__

    def stuck(dataset, counters):
        if max(counters) > 100:
            import time

            time.sleep(600)
        return read(dataset, counters)

    monkeypatch.setattr(run_pretraining.ImageDataset, "__getitems__", stuck)
    argv = ["--dataset", str(photos), "--output_dir", str(tmp_path / "out"), "--max_steps", "40"]
    message = fault(capsys, *argv, "--dataloader_num_workers", "2", "--save_steps", "2")
    assert "no images arrived for 3 seconds" in message
    assert "is the storage still available?" in message
    assert "is complete: the same command continues from there" in message


def test_names__that_are_not_unicode_are_trained_on_and_embedded(photos, tmp_path, capsys):
    folder = photos.rename(tmp_path / NO_NAME)
    for number, path in enumerate(sorted(folder.iterdir())):
        path.rename(folder / f"{NO_NAME}{number}.jpg")
    (folder / f"{NO_NAME}.jpg").write_bytes(b"")
    out = tmp_path / "out"
    argv = ["--dataset", str(folder), "--max_bad_fraction", "0.5", "--max_steps", "2"]
    assert pretrain([*SMALL, *argv, "--output_dir", str(out)]) == 0
    assert "\\xe9t.jpg: empty file" in capsys.readouterr().out
    assert "\\xe9t" not in (out / "settings.yaml").read_text()  # YAML has an escape of its own
    argv = ["--model", str(out), "--dataset", str(folder), "--embed", str(tmp_path / "features.parquet"), "--use_cpu"]
    assert run(argv, run_evaluation.main, partial(make_parser, EvaluationSettings)) == 0
    names = pa.parquet.read_table(tmp_path / "features.parquet")["name"].to_pylist()
    assert f"{tmp_path}/\\xe9t/\\xe9t0.jpg" in names


# ---- checkpoints ----


def test_checkpoint__of_another_model_is_one_message_and_is_not_changed(tmp_path, capsys):
    """Without the file of settings that would tell: `Trainer` would train on with random weights."""
    argv = ["--max_steps", "2", "--save_steps", "1", "--save_total_limit", "3"]
    assert pretrain([*SMALL, *argv, "--output_dir", str(tmp_path / "mae")]) == 0
    foreign = tmp_path / "out" / "checkpoint-1"
    shutil.copytree(tmp_path / "mae" / "checkpoint-1", foreign)
    before = {path.name: path.read_bytes() for path in foreign.iterdir()}
    capsys.readouterr()
    message = fault(capsys, *argv, "--num_channels", "1", "--output_dir", str(tmp_path / "out"), exit_code=2)
    assert f"{foreign} holds the weights of another model: " in message
    assert "train in another --output_dir" in message
    assert {path.name: path.read_bytes() for path in foreign.iterdir()} == before


# ---- files without permission ----


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "out"
    assert pretrain([*SMALL, "--output_dir", str(out), "--max_steps", "1"]) == 0
    return out


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "preprocessor_config.json", "photos", "list.txt"]
)
def test_file__that_the_user_may_not_read_is_named(model, photos, tmp_path, capsys, monkeypatch, file):
    folder = shutil.copytree(model, tmp_path / "model")
    (tmp_path / "list.txt").write_text("\n".join(str(path) for path in photos.iterdir()))
    path = next(path for path in (folder / file, tmp_path / file) if path.exists())
    images = str(tmp_path / "list.txt") if file == "list.txt" else str(photos)
    argv = ["--model", str(folder), "--dataset", images, "--embed", str(tmp_path / "f.parquet"), "--use_cpu"]
    for parent in [tmp_path, *tmp_path.parents[:-1]]:
        if parent.stat().st_mode & 0o055 != 0o055 and parent.is_relative_to(tempfile.gettempdir()):
            parent.chmod(0o755)
    for each in folder.rglob("*"):
        each.chmod(0o755 if each.is_dir() else 0o644)  # safetensors writes files that only their owner may read
    path.chmod(0)
    capsys.readouterr()
    is_root = os.geteuid() == 0
    if is_root:  # who may read everything
        os.seteuid(65534)
    try:
        code = run(argv, run_evaluation.main, partial(make_parser, EvaluationSettings))
    finally:
        if is_root:
            os.seteuid(0)
        path.chmod(0o755)
    assert code in (2, 4)
    (message,) = capsys.readouterr().err.splitlines()[-1:]
    assert f"{os.strerror(errno.EACCES)}: " in message
    assert str(path) in message


# ---- the data workers ----


def run_in_a_shell(script: str, folder: Path) -> str:
    """Return the last line of the pre-training command `$RUN`, which must end with exit code 4."""
    more = ["--max_steps", "4", "--dataloader_num_workers", "2", "--image_size", "96"]
    words = [sys.executable, "run_pretraining.py", *SMALL, *more]
    command = shlex.join([*words, "--output_dir", str(folder / "out")])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "RUN": command}
    result = subprocess.run(
        ["sh", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert "Traceback" not in result.stderr
    assert result.returncode == 4, result.stderr[-2000:]
    return result.stderr.rstrip().splitlines()[-1]


def test_shared_memory__that_is_too_small_for_the_workers_is_one_message(tmp_path):
    small = "mount -t tmpfs -o size=64k tmpfs /dev/shm"
    if subprocess.run(["unshare", "--mount", "sh", "-c", small], capture_output=True, check=False).returncode:
        pytest.skip("/dev/shm can only be replaced by a smaller one in a mount namespace")
    message = run_in_a_shell(f"exec unshare --mount sh -c '{small} && exec $RUN'", tmp_path)
    assert message == (
        "run_pretraining.py: the data workers have no shared memory left: enlarge /dev/shm (docker run --shm-size "
        f"8g), or lower --dataloader_num_workers; 0 needs none; {tmp_path / 'out' / 'checkpoint-0'} is complete: the "
        "same command continues from there"
    )


def test_open_files__that_are_too_few_are_one_message(tmp_path):
    message = run_in_a_shell("ulimit -n 60; exec $RUN", tmp_path)
    assert message == (
        "run_pretraining.py: only 60 files may be open at once, at least 256 are needed; raise the limit with "
        "`ulimit -n 65536`, or lower --dataloader_num_workers"
    )


def test_open_files__may_be_as_many_as_the_user_is_allowed():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
    try:
        join(use_cpu=True)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(65536, hard), hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that", "enlarge /dev/shm"),
        ("unable to open shared memory object </torch_7_1_0> in read-write mode: Too many open files (24)", "ulimit"),
        ("received 0 items of ancdata", "ulimit -n"),
        ("DataLoader worker (pid 7) is killed by signal: Killed. ", "probably because memory ran out"),
    ],
)
def test_workers__that_fail_in_other_ways_are_one_message(capsys, text, message):
    def main(argv: list[str]) -> None:
        raise RuntimeError(text)

    assert run([], main, partial(make_parser, EvaluationSettings)) == 4
    assert message in capsys.readouterr().err


# ---- the disk ----


def test_full_disk__at_the_first_checkpoint(tmp_path, capsys, full_disk):
    full_disk(2**16)
    message = fault(capsys, "--output_dir", str(tmp_path / "out"), "--max_steps", "4")
    assert "; no checkpoint is complete yet: the same command starts again" in message


def test_full_disk__at_a_later_checkpoint(tmp_path, capsys, full_disk, at_step):
    out = tmp_path / "out"
    argv = ["--output_dir", str(out), "--max_steps", "4", "--save_steps", "2"]
    at_step(3, lambda: full_disk(2**16))
    message = fault(capsys, *argv)
    assert message.endswith(f"; {out / 'checkpoint-2'} is complete: the same command continues from there")
    assert pretrain([*SMALL, *argv]) == 0


def test_full_disk__while_the_result_is_written(tmp_path, capsys, full_disk, monkeypatch):
    out = tmp_path / "out"
    argv = ["--output_dir", str(out), "--max_steps", "2"]
    with monkeypatch.context() as patch:
        finish = run_pretraining.Artifacts.finish
        patch.setattr(run_pretraining.Artifacts, "finish", lambda *args: (full_disk(2**16), finish(*args))[1])
        message = fault(capsys, *argv)
    assert message.endswith(f"; {out / 'checkpoint-2'} is complete: the same command continues from there")
    assert not (out / "pretraining").exists()
    assert not list(out.glob(".export*"))
    assert pretrain([*SMALL, *argv]) == 0


def test_full_disk__while_features_are_written(photos, tmp_path, capsys, full_disk, monkeypatch):
    assert pretrain([*SMALL, "--output_dir", str(tmp_path / "out"), "--max_steps", "1"]) == 0
    file = tmp_path / "features.parquet"
    file.write_bytes(b"earlier")
    argv = ["--model", str(tmp_path / "out"), "--dataset", str(photos), "--embed", str(file), "--use_cpu"]
    capsys.readouterr()
    full_disk(2**12)
    assert run(argv, run_evaluation.main, partial(make_parser, EvaluationSettings)) == 4
    (message,) = capsys.readouterr().err.splitlines()[-1:]
    assert message.startswith("run_evaluation.py: ")
    assert os.strerror(errno.EFBIG) in message
    assert f"; {file} was not changed" in message
    assert file.read_bytes() == b"earlier"
    assert not file.with_name(file.name + ".part").exists()

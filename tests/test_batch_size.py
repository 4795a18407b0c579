"""`--per_device_train_batch_size auto`: what is tried, what the plan says, and that resume and processes agree."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forked import run_forked

import run_finetune
import run_pretraining
import run_tokenizer
from commands import batch_size
from commands.arithmetic import Hardware
from commands.batch_size import largest
from commands.launch import run

ROOT = Path(__file__).resolve().parent.parent
PHOTOGRAPHS = str(ROOT / "data/samples/photographs")
AUTO = ["--per_device_train_batch_size", "auto"]
SHORT = ["--max_steps", "2", "--report_to", "none", "--validation_fraction", "0"]
PRETRAINING = ["--dataset", PHOTOGRAPHS, "--model", "vit-nano", "--image_size", "32", *SHORT]


@pytest.fixture
def sizes(monkeypatch) -> list[int]:
    """A GPU, by name, that has no memory for more than 10 images; returns the sizes that are tried."""
    tried: list[int] = []
    train = batch_size._Steps.train

    def limited(self: Any, size: int) -> None:
        tried.append(size)
        train(self, size)
        if size > 10:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(batch_size._Steps, "train", limited)
    for command in (run_pretraining, run_finetune, run_tokenizer):
        monkeypatch.setattr(command, "find_hardware", lambda state: Hardware("gpu", num_cpus=2))
    return tried


@pytest.mark.parametrize(
    ("fitting", "most", "expected"),
    [(0, 64, 0), (1, 64, 1), (2, 64, 2), (3, 64, 3), (10, 64, 8), (12, 64, 12), (500, 64, 64), (500, 100, 100)],
)
def test_largest__is_a_power_of_two_the_middle_above_it_or_the_most(fitting, most, expected):
    assert largest(lambda size: size <= fitting, most) == expected


def test_gpu__tries_growing_steps_and_the_plan_has_the_number_and_its_learning_rate(sizes, capsys):
    published = ["--schedule", "published"]
    assert run([*PRETRAINING, *AUTO, *published, "--dry_run"], run_pretraining.main, None) == 0
    plan = capsys.readouterr().out
    assert sizes == [1, 2, 4, 8, 16, 12]
    assert "8 x 1 process x 1 accumulation = 8" in plan
    assert "1.5e-4 x 8 / 256 = 4.6875e-6" in plan
    assert "note: 8 images per device (auto): more might not fit into" in plan


def test_other_errors__are_not_taken_for_a_lack_of_memory(sizes, monkeypatch):
    def fail(self: Any, size: int) -> None:
        raise RuntimeError("the shapes differ")

    monkeypatch.setattr(batch_size._Steps, "train", fail)
    with pytest.raises(RuntimeError, match="the shapes differ"):
        run([*PRETRAINING, *AUTO, "--dry_run"], run_pretraining.main, None)


def plans_on_cpu(monkeypatch, free: float) -> list[Any]:
    """The plan of an MAE ViT-B on a computer with so many free bytes."""
    plans: list[Any] = []
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: free)
    monkeypatch.setattr(run_pretraining, "train", lambda plan, *args, **kwargs: plans.append(plan))
    run_pretraining.main(["--dataset", PHOTOGRAPHS, "--repeated_aug", "8", *SHORT, *AUTO, "--use_cpu"])
    return plans


def test_cpu__takes_what_the_estimate_allows(monkeypatch):
    (plan,) = plans_on_cpu(monkeypatch, free=6e9)
    assert plan.batch_size == 12
    assert plan.bytes_for_weights + plan.bytes_for_activations <= 6e9 / 2
    assert plan.bytes_for_weights + plan.footprint.bytes_for_activations(16, "float32") > 6e9 / 2


def test_cpu__takes_at_most_64(monkeypatch):
    (plan,) = plans_on_cpu(monkeypatch, free=1e15)
    assert plan.batch_size == 64
    assert "64 images per device (auto): larger batches are not faster per image on a CPU" in plan.describe()


def test_cpu__without_memory_for_one_image_is_an_error(monkeypatch):
    with pytest.raises(
        ValueError, match=r"one image does not fit into 0\.2 GiB of free memory.*--gradient_checkpoint"
    ):
        plans_on_cpu(monkeypatch, free=200e6)


@pytest.mark.slow
def test_tokenizer_and_fine_tuning__take_the_number_too(sizes, tmp_path, capsys):
    size = ["--image_size", "32"]
    run_tokenizer.main(["--dataset", PHOTOGRAPHS, "--model", "dvae-nano", *size, *SHORT, *AUTO, "--dry_run"])
    assert sizes == [1, 2, 4, 8, 16, 12]
    assert "8 x 1 process" in capsys.readouterr().out
    run_pretraining.main([*PRETRAINING, "--output_dir", str(tmp_path / "out")])
    sizes.clear()
    fashion = ["--dataset", "sample-fashion", "--model", str(tmp_path / "out"), *size, *SHORT, *AUTO, "--dry_run"]
    run_finetune.main(fashion)
    assert sizes == [1, 2, 4, 8, 16, 12]
    assert "8 x 1 process" in capsys.readouterr().out


def test_small_data__has_eight_steps_in_an_epoch(sizes, capsys):
    run_pretraining.main([*PRETRAINING[2:], "--dataset", f"{PHOTOGRAPHS}/held_out", *AUTO, "--dry_run"])
    assert "(auto): an epoch should have at least 8 steps" in capsys.readouterr().out


def test_resume__keeps_the_number_of_the_run(sizes, tmp_path, monkeypatch, capsys):
    flags = [*PRETRAINING, *AUTO, "--output_dir", str(tmp_path / "out"), "--save_steps", "1"]
    run_pretraining.main(flags)
    assert yaml.safe_load((tmp_path / "out/settings.yaml").read_text())["per_device_train_batch_size"] == 8
    (tmp_path / "out/pretraining/config.json").unlink()  # interrupted after step 1
    for path in (tmp_path / "out/checkpoint-2").iterdir():
        path.unlink()
    sizes.clear()
    capsys.readouterr()
    run_pretraining.main(flags)
    out = capsys.readouterr().out
    assert sizes == []
    assert "note: 8 images per device, as before the interruption" in out
    assert "checkpoint-1" in out
    assert "continuing with other settings" not in out


@pytest.mark.slow
def test_two_processes__take_the_smaller_number(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES, encoding="utf-8")
    ran = run_forked([script, *PRETRAINING, *AUTO], os.environ | {"PYTHONPATH": str(ROOT)}, num_processes=2)
    assert ran.returncode == 0, ran.stderr[-3000:]
    # 13 x 2 processes x 8 steps are the 218 images.
    assert (tmp_path / "0.txt").read_text() == "tried [1, 2, 4, 8, 13], has 4"
    assert (tmp_path / "1.txt").read_text() == "tried [1, 2, 4, 8, 6], has 4"


TWO_PROCESSES = """
import os, sys
from pathlib import Path
import torch
import run_pretraining
from commands import batch_size
from commands.arithmetic import Hardware

rank, tried = int(os.environ["RANK"]), []

def train(self, size):
    tried.append(size)
    if size > (10, 5)[rank]:
        raise torch.OutOfMemoryError("CUDA out of memory.")

batch_size._Steps.train = train
run_pretraining.find_hardware = lambda state: Hardware("gpu", 2, state.num_processes)

def report(plan, *args, **kwargs):
    Path(__file__).with_name(f"{rank}.txt").write_text(f"tried {tried}, has {plan.batch_size}")

run_pretraining.train = report
run_pretraining.main(sys.argv[1:])
torch.distributed.destroy_process_group()
"""

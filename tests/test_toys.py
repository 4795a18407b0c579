"""Toy methods and tasks are added as files of their own, without edits elsewhere, and work by the real commands."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from forked import run_forked
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModel

SMALL = [*("--model", "vit-nano", "--image_size", "32", "--report_to", "none", "--use_cpu")]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the project with the files of tests/toys in their places, as CONTRIBUTING.md says."""
    tree = tmp_path_factory.mktemp("with_toys") / "project"
    ignored = shutil.ignore_patterns(".*", "outputs", "__pycache__", "golden")
    shutil.copytree(ROOT, tree, ignore=ignored)
    for file in sorted((tree / "tests" / "toys").glob("*/*")):
        target = tree / file.parent.name / file.name
        assert not target.exists(), f"{target} would be edited, not added"
        shutil.copy(file, target)
    return tree


def run(tree: Path, *words: str, returncode: int = 0, num_processes: int | None = None) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = run_forked(words, environment, tree, num_processes)
    assert result.returncode == returncode, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


def panel_is_drawn(folder: Path) -> bool:
    with Image.open(folder / "reconstructions.png") as panel:
        return panel.width > 200 and len(panel.convert("RGB").getcolors(maxcolors=2**24)) > 100


@pytest.mark.slow
def test_hog__is_pretrained_drawn_exported_and_fine_tuned(tree):
    steps = ["--max_steps", "4", "--per_device_train_batch_size", "8"]
    run(tree, "run_pretraining.py", "--method", "hog", *SMALL, *steps, "--output_dir", "out-hog")
    out = tree / "out-hog"
    assert panel_is_drawn(out)
    assert type(AutoModel.from_pretrained(out)).__name__ == "ViTModel"
    assert "Masked Feature Prediction" in (out / "README.md").read_text()
    labeled = ["--dataset", "sample-fashion", "--labels_per_class", "4", "--use_cpu", "--report_to", "none"]
    run(tree, "run_finetune.py", "--model", "out-hog", *labeled, *steps, "--output_dir", "out-hog-cls")
    results = json.loads((tree / "out-hog-cls" / "metrics.json").read_text())["results"]
    assert results[0]["metric"] == "accuracy"
    assert "Masked Feature Prediction" in (tree / "out-hog-cls" / "README.md").read_text()


@pytest.mark.slow
def test_two_crops__equal_in_one_and_two_processes_and_export_the_teacher(tree):
    flags = ["run_pretraining.py", "--method", "two-crops", *SMALL, "--max_steps", "6", "--optim", "sgd"]
    flags += ["--gradient_accumulation_steps", "2", "--learning_rate", "0.05", "--warmup_steps", "0"]
    one = run(tree, *flags, "--per_device_train_batch_size", "8", "--output_dir", "one")
    run(tree, *flags, "--per_device_train_batch_size", "4", "--output_dir", "two", num_processes=2)
    weights, other = (load_file(tree / name / "pretraining" / "model.safetensors") for name in ("one", "two"))
    for name, expected in weights.items():
        assert_close(other[name], expected, rtol=1e-4, atol=1e-5)
    assert "teacher entropy" in one
    history = json.loads((tree / "one" / "trainer_state.json").read_text())["log_history"]
    logged = [entry for entry in history if "loss" in entry]
    assert logged[0]["teacher_temperature"] == pytest.approx(0.04)
    assert logged[-1]["teacher_momentum"] > 0.99
    student, teacher = (
        {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
        for prefix in ("encoder.", "teacher.")
    )
    assert not torch.equal(student["layers.0.mlp.fc1.weight"], teacher["layers.0.mlp.fc1.weight"])
    exported = AutoModel.from_pretrained(tree / "one").state_dict()
    assert torch.equal(exported["layers.0.mlp.fc1.weight"], teacher["layers.0.mlp.fc1.weight"])


@pytest.mark.slow
def test_two_crops__teacher_starts_other_runs_and_is_logged_as_such(tree):
    few = ["--image_size", "32", "--report_to", "none", "--use_cpu", "--per_device_train_batch_size", "8"]
    start = [*SMALL, "--max_steps", "1", "--per_device_train_batch_size", "8", "--output_dir", "source"]
    run(tree, "run_pretraining.py", "--method", "two-crops", *start)
    shutil.copytree(tree / "source", tree / "teacher", ignore=shutil.ignore_patterns("pretraining", "checkpoint-*"))
    few += ["--max_steps", "1", "--mask_unit", "8"]
    output = run(tree, "run_pretraining.py", "--method", "simmim", "--init_from", "source", *few, "--output_dir", "a")
    notes = [line for line in output.splitlines() if line.startswith(("note: new", "note: not taken over"))]
    assert notes == [
        "note: new, since the source has none that fits: decoder",
        "note: not taken over: student, head, teacher_head",
    ]
    output = run(
        tree, "run_pretraining.py", "--method", "two-crops", "--init_from", "teacher", *few[:-2], "--output_dir", "b"
    )
    assert "note: begins from teacher (BEiT): encoder\n" in output
    assert "note: new, since the source has none that fits: head\n" in output  # the teacher is copied
    first = load_file(tree / "b" / "checkpoint-0" / "model.safetensors")
    exported = AutoModel.from_pretrained(tree / "teacher").state_dict()
    for name in ("embeddings.cls_token", "layers.0.mlp.fc1.weight"):
        assert torch.equal(first[f"teacher.{name}"], exported[name])


@pytest.mark.slow
def test_contract__holds_for_the_toys(tree, monkeypatch):
    """The battery of test_contract.py, unchanged, in the tree that has the toys."""
    only = "hog or two-crops or two_processes or tiny_configuration"
    words = ["pytest", "tests/test_contract.py", "tests/test_recipes.py", "-p", "no:xdist", "-k", only]
    monkeypatch.setenv("TINY_VARIANTS", "hog two-crops")  # the others pass it in the tree without toys
    output = run(tree, "-m", *words)
    assert "[100%]" in output
    assert output.count(".") > 40


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """Photographs, with their bright pixels as the foreground."""
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    (tmp_path / "classes.txt").write_text("dark\nbright\n")
    for photograph in sorted((ROOT / "data" / "samples" / "photographs" / "train").glob("*.jpg"))[:24]:
        with Image.open(photograph) as image:
            brightness = np.asarray(image.convert("L"))
        (tmp_path / "images" / photograph.name).symlink_to(photograph)
        mask = Image.fromarray((brightness > np.median(brightness)).astype(np.uint8))
        mask.save(tmp_path / "masks" / f"{photograph.stem}.png")
    return tmp_path


@pytest.mark.slow
def test_segmentation_task__is_trained_measured_drawn_exported_and_resumed(tree, masked):
    few = ["--max_steps", "4", "--per_device_train_batch_size", "8"]
    run(tree, "run_pretraining.py", *SMALL, *few, "--output_dir", "out-mae")
    words = ["--task", "patch_classes", "--model", "out-mae", "--dataset", str(masked), "--use_cpu"]
    words += [*few, "--save_steps", "2", "--eval_steps", "2", "--report_to", "none", "--learning_rate", "1e-2"]
    output = run(tree, "run_finetune.py", *words, "--output_dir", "whole")
    assert "validation IoU" in output
    whole = tree / "whole"
    metrics = json.loads((whole / "metrics.json").read_text())
    values = {entry["metric"]: entry["value"] for entry in metrics["results"]}
    assert (metrics["part"], metrics["num_labels"], metrics["weights"][:13]) == ("validation", 22, "best mean_iou")
    assert values["pixel_accuracy"] > 0.55  # the classes are equally frequent
    assert 0.3 < values["mean_iou"] < values["pixel_accuracy"]
    with Image.open(whole / "segmentations.png") as figure:
        assert figure.width > 200
    assert yaml.safe_load((whole / "settings.yaml").read_text())["task"] == "patch_classes"
    assert "Classes: dark, bright." in (whole / "README.md").read_text()
    assert type(AutoModel.from_pretrained(whole)).__name__ == "ViTModel"
    assert load_file(whole / "head.safetensors")["weight"].shape == (2, 192)

    die = "import runpy; runpy.run_path('tests/finetune_and_die.py', run_name='__main__')"
    run(tree, "-c", die, "3", *words, "--output_dir", "killed", returncode=-9)
    assert "continuing from killed/checkpoint-2" in run(tree, "run_finetune.py", *words, "--output_dir", "killed")
    for file in ("model.safetensors", "head.safetensors"):
        for name, expected in load_file(whole / file).items():
            assert torch.equal(load_file(tree / "killed" / file)[name], expected), name

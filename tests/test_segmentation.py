"""Segmentation as a user types it: what comes out opens without this project, and resumes exactly."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import OLDEST, ROOT
from forked import run_forked
from masked import PHOTOGRAPHS, masked_folder
from PIL import Image
from safetensors.torch import load_file
from sklearn.metrics import confusion_matrix, jaccard_score
from test_run_finetune import finetune, logged
from torch.testing import assert_close
from transformers import AutoModelForSemanticSegmentation, ViTConfig

from data.decoding import decode
from data.dense_views import whole
from data.mask_codes import IGNORED
from evaluation.iou import class_areas, pixel_confusion
from evaluation.segmentation import segmentation_metrics
from evaluation.segmentation_pictures import ranked
from hub.export.native import export_native
from modeling.mae import MaeEncoder
from modeling.patches import standardize
from tasks.segmentation import SegmentationTask, class_weights

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
STATS = {"image_mean": [0.5] * 3, "image_std": [0.25] * 3}
FLAGS = ["--task", "segmentation", "--drop_path", "0", "--max_steps", "4", "--save_steps", "2", "--eval_steps", "2"]
FILES = ("model.safetensors", "config.json", "preprocessor_config.json", "segmentations.png", "class_iou.json")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """An encoder, images with masks, and models of both modes that were trained on them."""
    folder = tmp_path_factory.mktemp("segmentation")
    torch.manual_seed(0)
    encoder = MaeEncoder(ViTConfig(**SIZES, image_size=32, patch_size=8), add_pooling_layer=False)
    export_native(encoder, folder / "encoder", method="mae", recipe={}, **STATS)
    masked_folder(folder / "labeled")
    for mode in ("finetune", "linear"):
        finetune(folder / "encoder", folder / "labeled", folder / mode, *FLAGS, "--mode", mode)
    return folder


def test_result__has_metrics_figures_and_a_card(workspace):
    for mode in ("finetune", "linear"):
        out = workspace / mode
        assert all((out / file).stat().st_size > 100 for file in FILES)
        metrics = json.loads((out / "metrics.json").read_text())
        values = {entry["metric"]: entry["value"] for entry in metrics["results"]}
        assert set(values) == {"mean_iou", "pixel_accuracy", "mean_accuracy"}
        assert metrics["part"] == "validation"
        by_class = json.loads((out / "class_iou.json").read_text())
        assert [row["class"] for row in by_class] == ["rest", "red", "blue"]
        present = [row["iou"] for row in by_class if row["iou"] is not None]
        assert values["mean_iou"] == pytest.approx(np.mean(present), abs=1e-4)
        assert max(logged(out, "eval_mean_iou")) == pytest.approx(values["mean_iou"], abs=1e-6)
        with Image.open(out / "segmentations.png") as figure:
            assert figure.width > 800
        card = (out / "README.md").read_text()
        assert "image-segmentation" in card
        assert "Classes: rest, red, blue." in card


def test_boundary_f__is_measured_when_it_is_asked_for(workspace, tmp_path):
    out = tmp_path / "out"
    finetune(workspace / "encoder", workspace / "labeled", out, *FLAGS, "--boundary_f", "--max_steps", "1")
    values = {entry["metric"]: entry["value"] for entry in json.loads((out / "metrics.json").read_text())["results"]}
    rows = json.loads((out / "class_iou.json").read_text())
    present = [row["boundary_f"] for row in rows if row["boundary_f"] is not None]
    assert values["mean_boundary_f"] == pytest.approx(np.mean(present), abs=1e-4)
    assert 0 < values["mean_boundary_f"] < 1


PIPELINE = """
import sys, warnings
warnings.simplefilter("error")
import numpy as np
from transformers import pipeline
for folder in sys.argv[2:]:
    segment = pipeline("image-segmentation", model=folder)
    found = {part["label"]: np.asarray(part["mask"]) > 0 for part in segment(sys.argv[1])}
    np.savez(f"{folder}.npz", **found)
"""


@pytest.mark.skipif(OLDEST, reason="5.17 opens no image processor without torchvision")
def test_result__a_pipeline_without_this_project_gives_our_masks_and_says_nothing(workspace):
    modes = ("finetune", "linear")
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PIPELINE, str(PHOTOGRAPHS[40]), *(str(workspace / mode) for mode in modes)]
    done = subprocess.run(command, cwd=workspace, env=environment, capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line] == []
    image = decode(PHOTOGRAPHS[40], 3)
    pixels = whole(*image.size, (32, 32), "stretch").image(image, (0, 0, 0), Image.Resampling.BILINEAR)
    for mode in modes:
        model = AutoModelForSemanticSegmentation.from_pretrained(workspace / mode).eval()
        with torch.no_grad():
            logits = model(standardize(pixels, *STATS.values())[None]).logits
        size = (image.height, image.width)
        ours = torch.nn.functional.interpolate(logits, size, mode="bilinear", align_corners=False)[0].argmax(0).numpy()
        theirs = np.load(workspace / f"{mode}.npz")
        assert sum(mask.sum() for mask in theirs.values()) == ours.size
        for name, mask in theirs.items():
            assert (mask == (ours == model.config.label2id[name])).mean() > 0.9999


def interrupted(finished: Path, out: Path) -> Path:
    """Write what a run that was killed after its second step leaves behind."""
    shutil.copytree(finished / "checkpoint-2", out / "checkpoint-2")
    shutil.copy(finished / "settings.yaml", out)
    return out


def test_resume__gives_the_same_weights(workspace, tmp_path, capsys):
    out = interrupted(workspace / "finetune", tmp_path / "resumed")
    finetune(workspace / "encoder", workspace / "labeled", out, *FLAGS)
    assert f"continuing from {out / 'checkpoint-2'}" in capsys.readouterr().out
    weights, resumed = (load_file(folder / "model.safetensors") for folder in (workspace / "finetune", out))
    for name, expected in weights.items():
        assert torch.equal(resumed[name], expected), name


def test_step__does_not_depend_on_how_its_images_are_spread(workspace, tmp_path):
    """Over micro-batches or processes; the head's BatchNorms have fixed statistics."""
    flags = [*FLAGS, "--optim", "sgd", "--lr_scheduler_type", "constant", "--class_weights", "balanced"]
    flags += ["--load_best_model_at_end", "false"]
    encoder, dataset = workspace / "encoder", workspace / "labeled"
    one = finetune(encoder, dataset, tmp_path / "one", *flags, "--per_device_train_batch_size", "8")
    accumulated = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"]
    finetune(encoder, dataset, tmp_path / "accumulated", *flags, *accumulated)
    words = [ROOT / "run_finetune.py", "--model", encoder, "--dataset", dataset, "--output_dir", tmp_path / "two"]
    words += [*flags, "--use_cpu", "--report_to", "none", "--learning_rate", "1e-3"]
    words += ["--per_device_train_batch_size", "4"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = run_forked(list(map(str, words)), environment, num_processes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = load_file(one / "model.safetensors")
    for name in ("accumulated", "two"):
        weights = load_file(tmp_path / name / "model.safetensors")
        for key, value in expected.items():
            assert_close(weights[key], value, rtol=1e-4, atol=1e-5)
        assert logged(tmp_path / name, "eval_mean_iou") == pytest.approx(logged(one, "eval_mean_iou"), abs=1e-4)


def test_linear_mode__leaves_the_encoder_as_it_was(workspace):
    before = load_file(workspace / "encoder" / "model.safetensors")
    after = load_file(workspace / "linear" / "model.safetensors")
    kept = {tuple(tensor.shape): tensor for name, tensor in after.items() if "fc1.weight" in name}
    assert kept
    assert any(
        torch.equal(tensor, other)
        for name, tensor in before.items()
        if name.endswith(("fc1.weight", "intermediate.dense.weight"))
        for other in kept.values()
    )


def test_classes__of_an_unfinished_run_must_be_the_same(workspace, tmp_path, capsys):
    out = interrupted(workspace / "finetune", tmp_path / "out")
    (tmp_path / "names.txt").write_text("rest\nred\ngreen\n")
    flags = [*FLAGS, "--class_file", str(tmp_path / "names.txt")]
    finetune(workspace / "encoder", workspace / "labeled", out, *flags, code=2)
    assert "other classes (number 2 was 'blue' and is now 'green')" in capsys.readouterr().err


def test_metrics__equal_a_case_by_hand_and_scikit_learn():
    labels = np.array([[0, 0, 1], [1, 2, IGNORED]])
    found = np.array([[0, 1, 1], [1, 0, 2]])
    confusion = pixel_confusion(labels, found, 3)
    assert confusion.tolist() == [[1, 1, 0], [0, 2, 0], [1, 0, 0]]
    metrics = segmentation_metrics(class_areas(confusion))
    assert metrics["mean_iou"] == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert metrics["pixel_accuracy"] == pytest.approx(3 / 5)
    assert metrics["mean_accuracy"] == pytest.approx((1 / 2 + 1 + 0) / 3)
    rng = np.random.default_rng(0)
    labels, found = rng.integers(0, 5, (2, 40, 50))
    confusion = pixel_confusion(labels, found, 5)
    np.testing.assert_array_equal(confusion, confusion_matrix(labels.ravel(), found.ravel()))
    expected = jaccard_score(labels.ravel(), found.ravel(), average="macro")
    assert segmentation_metrics(class_areas(confusion))["mean_iou"] == pytest.approx(expected)


def test_windows__are_stitched_and_images_of_one_window_are_evaluated_together():
    """A model whose scores depend on a pixel only: stitched windows are the scores of the whole image."""
    settings = SimpleNamespace(image_size=16, boundary_f=False)
    splits = SimpleNamespace(class_names=("a", "b", "c"))
    task = SegmentationTask(settings, SimpleNamespace(), {}, splits)

    def model(pixels):
        assert pixels.shape[-2:] == (16, 16)
        return {"logits": pixels}

    images = torch.randn(2, 3, 16, 40, generator=torch.Generator().manual_seed(0))
    assert_close(task.scores(model, images[0], (16, 40), 2), images[0])
    for width in (40, 16):
        sizes = torch.tensor([[16, width]] * 2)
        labels = torch.randint(0, 3, (2, 16, width), dtype=torch.uint8)
        batch = {"pixel_values": images[..., :width], "labels": labels, "sizes": sizes, "mask_sizes": sizes}
        loss, outputs = task.loss(model, batch, None)
        assert_close(loss, torch.nn.functional.cross_entropy(images[..., :width], labels.long()))
        expected = [
            class_areas(pixel_confusion(one.numpy(), image.argmax(0).numpy(), 3))
            for one, image in zip(labels, images[..., :width], strict=True)
        ]
        np.testing.assert_array_equal(outputs["areas"].numpy(), expected)


def test_evaluation__of_a_mask_without_a_pixel_that_counts_has_no_loss():
    settings = SimpleNamespace(image_size=8, boundary_f=False)
    task = SegmentationTask(settings, SimpleNamespace(), {}, SimpleNamespace(class_names="ab"))
    labels = torch.zeros(2, 8, 8, dtype=torch.uint8)
    labels[0] = IGNORED
    sizes = torch.tensor([[8, 8]] * 2)
    batch = {"pixel_values": torch.zeros(2, 2, 8, 8), "labels": labels, "sizes": sizes, "mask_sizes": sizes}
    loss, outputs = task.loss(lambda pixels: {"logits": pixels}, batch, None)
    assert_close(loss, torch.tensor(2.0).log() / 2)
    assert outputs["areas"][:, 1].sum(1).tolist() == [0, 64]


def test_class_weights__have_a_mean_of_1_over_the_pixels():
    pixels = np.array([800, 200, 0])
    weights = class_weights(pixels).numpy()
    assert (weights * pixels).sum() / pixels.sum() == pytest.approx(1)
    assert weights[1] / weights[0] == pytest.approx(2)  # the root of 4
    assert weights[2] == 0
    assert class_weights(np.array([10**9, 1])).max() == 10


def test_ranked__names_the_best_median_and_worst():
    scores = np.array([0.1, 0.9, 0.5, 0.7, 0.3])
    names = ("best", "upper quartile", "median", "lower quartile", "worst")
    assert ranked(scores) == list(zip(names, (1, 3, 2, 4, 0), strict=True))
    assert ranked(np.array([0.3])) == [("best", 0)]

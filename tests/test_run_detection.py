"""Object detection by the command: from boxes to a pipeline, resumed, on two processes."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import OLDEST, ROOT, tiny_model
from forked import run_forked
from PIL import Image
from safetensors.torch import load_file
from test_run_finetune import finetune
from torch.testing import assert_close
from train_detector import tiny_detector, write_scenes
from transformers import (
    AutoModelForObjectDetection,
    RfDetrForObjectDetection,
    ViTConfig,
    pipeline,
)

from commands.finetune_settings import load_finetune_settings
from evaluation.box_pictures import draw_detections
from hub.export.native import export
from modeling.detection import best_boxes
from tasks import SETTINGS
from tasks.detection import DetectionSettings

RUN = [
    "--task",
    "detection",
    "--num_queries",
    "8",
    "--resize_scale",
    "0.5",
    "1.5",
    "--per_device_train_batch_size",
    "4",
]
PIPELINE = """
import json, sys, warnings
warnings.simplefilter("error")
from transformers import pipeline
print(json.dumps(pipeline("object-detection", model=sys.argv[2])(sys.argv[1], threshold=0.0)))
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    pytest.importorskip("faster_coco_eval")
    return write_scenes(tmp_path_factory.mktemp("scenes"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("encoder")
    export(tiny_model("mae"), folder, method="mae", recipe={"mask_ratio": 0.75})
    return folder


@pytest.fixture(scope="module")
def trained(encoder, scenes, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "out"
    return finetune(encoder, scenes, out, *RUN, "--eval_steps", "3", "--save_steps", "3")


def test_run__writes_metrics_a_figure_and_a_card(trained):
    content = json.loads((trained / "metrics.json").read_text())
    found = {entry["metric"]: entry["value"] for entry in content["results"]}
    assert content["part"] == "validation"
    assert {"ap", "ap50", "ap75"} <= set(found)
    assert all(0 <= value <= 1 for value in found.values())
    assert Image.open(trained / "detections.png").width > 500
    card = (trained / "README.md").read_text()
    assert "pipeline_tag: object-detection" in card
    assert "the quality of the features has not been measured" not in card.lower()
    assert "detections.png" in card


@pytest.mark.parametrize(("scores", "drawn"), [((0.1, 0.2), [1]), ((0.4, 0.2), [0]), ((0.4, 0.5), [0, 1]), ((), [])])
def test_figure__has_certain_predictions_or_else_the_best_one(tmp_path, scores, drawn):
    places = np.array([[8, 8, 24, 24], [40, 40, 56, 56]], dtype=float)  # of an image of 64 pixels
    predictions = np.full((1, 2, 6), -100.0)
    for number, score in enumerate(scores):
        predictions[0, number] = [*places[number], score, number]
    gray = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    path, sizes = tmp_path / "figure.png", np.array([[64.0, 64.0]])
    draw_detections([gray], sizes, predictions, np.full((1, 1, 7), -100.0), ["a", "b"], path, "title")
    found = np.asarray(Image.open(path).convert("RGB")).astype(int)
    colors = [(0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)]
    assert [number for number, color in enumerate(colors) if (abs(found - color).sum(2) < 9).any()] == drawn


@pytest.mark.skipif(OLDEST, reason="5.17 opens no image processor without torchvision")
def test_result__a_pipeline_without_this_project_gives_our_boxes_and_says_nothing(trained, scenes, tmp_path):
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    photograph = sorted((scenes / "val").glob("*.png"))[0]
    command = [sys.executable, "-c", PIPELINE, str(photograph), str(trained)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if line.strip() and "Loading weights" not in line] == []
    theirs = json.loads(done.stdout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = AutoModelForObjectDetection.from_pretrained(trained, output_loading_info=True)
    assert not any(info.values())
    assert type(model) is RfDetrForObjectDetection
    detector = tiny_detector(model.config)
    detector.load_state_dict(model.state_dict())
    inputs = pipeline("object-detection", model=str(trained)).image_processor(
        Image.open(photograph).convert("RGB"), return_tensors="pt"
    )
    with torch.no_grad():
        outputs = detector.eval()(**inputs)
    width, height = Image.open(photograph).size
    ours = best_boxes(outputs.logits, outputs.pred_boxes)[0]
    assert len(ours) == len(theirs)
    for row, found in zip(ours.tolist(), theirs, strict=True):
        assert found["score"] == pytest.approx(row[4], abs=1e-4)
        assert found["label"] == model.config.id2label[int(row[5])]
        corners = [row[0] * width, row[1] * height, row[2] * width, row[3] * height]
        assert list(found["box"].values()) == pytest.approx(corners, abs=1.001)  # the pipeline cuts off decimals


def test_killed_run__ends_with_the_weights_of_an_undisturbed_one(trained, encoder, scenes, tmp_path):
    out = tmp_path / "out"
    named = ["--model", str(encoder), "--dataset", str(scenes), "--output_dir", str(out), "--max_steps", "6"]
    flags = ["--use_cpu", "--learning_rate", "1e-3", "--report_to", "none", "--schedule", "published", *RUN]
    flags += ["--eval_steps", "3", "--save_steps", "3"]
    killed = run_forked(
        [ROOT / "tests/finetune_and_die.py", "5", *named, *flags], os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT
    )
    assert killed.returncode != 0
    assert not (out / "config.json").exists()
    finetune(encoder, scenes, out, *RUN, "--eval_steps", "3", "--save_steps", "3")
    expected, resumed = (load_file(folder / "model.safetensors") for folder in (trained, out))
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())
    metrics = [json.loads((folder / "metrics.json").read_text())["results"] for folder in (trained, out)]
    assert metrics[0] == metrics[1]


def test_accumulation_and_two_processes__equal_one_process_with_one_batch(tmp_path):
    script, environment = ROOT / "tests" / "train_detector.py", os.environ | {"PYTHONPATH": str(ROOT)}
    for name, num_processes in (("one", None), ("parts", None), ("two", 2)):
        done = run_forked([script, tmp_path, name], environment, num_processes=num_processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, parts, two = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("one", "parts", "two"))
    assert two["world_size"] == 2
    assert one["losses"][0] != one["losses"][-1]
    for other in (parts, two):
        assert other["losses"] == pytest.approx(one["losses"], rel=1e-4)
        for name, expected in one["weights"].items():
            assert_close(other["weights"][name], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "width", "decay", "epochs"), [("base", 768, 0.7, 100), ("large", 1024, 0.8, 100), ("huge", 1280, 0.9, 75)]
)
def test_recipe__has_the_published_settings(size, width, decay, epochs):
    config = ViTConfig(hidden_size=width, intermediate_size=4 * width)
    assert DetectionSettings.recipe_for(config, "finetune") == f"finetune_vitdet_vit-{size}"
    text = (ROOT / f"recipes/finetune_vitdet_vit-{size}.yaml").read_text()
    recipe = yaml.safe_load(text)
    assert recipe["base_learning_rate"] == pytest.approx(1e-4 * 256 / 64)
    assert (recipe["layer_decay"], recipe["num_train_epochs"], recipe["weight_decay"]) == (decay, epochs, 0.1)
    assert recipe["warmup_epochs"] == pytest.approx(250 * 64 / 118_000, abs=1e-3)
    assert recipe["resize_scale"] == [0.1, 2.0]
    argv = text.split("run_finetune.py ")[1].splitlines()[0].split()
    settings = load_finetune_settings(argv, SETTINGS, lambda name: config)
    assert (settings.image_size, settings.layer_decay) == (1024, decay)
    own_size = load_finetune_settings(argv[2:8], SETTINGS, lambda name: config)  # 224 pixels, which need less jitter
    assert own_size.resize_scale == pytest.approx((102.4 / 224, 2.0), abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--drop_path", "0.1"], "--drop_path 0.1: a detector is trained without drop path"),
        (["--crop_scale", "0.5", "1"], "--crop_scale has no effect with masks or boxes"),
        (["--image_size", "60"], "60"),
    ],
)
def test_run__refuses_flags_that_it_cannot_follow(encoder, scenes, tmp_path, capsys, flags, message):
    finetune(encoder, scenes, tmp_path / "out", "--task", "detection", *flags, code=2)
    assert message in capsys.readouterr().err


def test_queries__are_no_more_than_the_patches_and_the_plan_says_so(encoder, scenes, tmp_path, capsys):
    finetune(encoder, scenes, tmp_path / "out", *RUN, "--num_queries", "50", "--dry_run")
    said = " ".join(capsys.readouterr().out.split())
    assert "num_queries is 16, the number of patches: --image_size gives more of them" in said
    assert "at most 16 are found in an image" in said

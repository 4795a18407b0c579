"""Fine-tuning as a user types it: what comes out opens without this project, resumes exactly, and refuses mistakes."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import IMAGE_PROCESSOR, OLDEST, ROOT, tiny_model
from forked import run_forked
from hubstub import HubStub, connect
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ResNetConfig

import run_finetune
from commands.finetune_settings import load_finetune_settings
from commands.parsing import make_parser
from data.sources import BUNDLED
from hub.export.native import export
from tasks import SETTINGS

PHOTOGRAPHS = sorted((BUNDLED["sample"] / "train").glob("*.jpg"))
NAMES = ("small", "wide", "tall")
SHORT = ["--use_cpu", "--per_device_train_batch_size", "8", "--learning_rate", "1e-3", "--report_to", "none"]
SHORT += ["--schedule", "published"]
build_parser = partial(make_parser, SETTINGS["classification"])


@pytest.fixture(scope="module")
def labeled(tmp_path_factory) -> Path:
    """Photographs in three class folders: eight each to train on, three each to validate on."""
    folder = tmp_path_factory.mktemp("labeled")
    for index, photograph in enumerate(PHOTOGRAPHS[:33]):
        part = "train" if index < 24 else "val"
        path = folder / part / NAMES[index % 3] / photograph.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(photograph)
    return folder


@pytest.fixture(scope="module")
def encoders(tmp_path_factory) -> dict[str, Path]:
    folders = {}
    for variant in ("mae", "simmim", "simmim+swin"):
        folders[variant] = tmp_path_factory.mktemp("encoders") / variant
        export(tiny_model(variant), folders[variant], method=variant.split("+")[0], recipe={"mask_ratio": 0.75})
    return folders


def finetune(encoder: Path, dataset: Path | str, output_dir: Path, *argv: str, code: int = 0) -> Path:
    named = ["--model", str(encoder), "--dataset", str(dataset), "--output_dir", str(output_dir)]
    steps = [] if "--max_steps" in argv else ["--max_steps", "6"]
    assert run_finetune.run([*named, *SHORT, *steps, *argv], run_finetune.main, build_parser) == code
    return output_dir


def logged(folder: Path, name: str) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


# ---- what comes out ----

PIPELINE = """
import json, sys, warnings
warnings.simplefilter("error")
from transformers import pipeline
settings = {"function_to_apply": "none", "top_k": 99}
classifiers = [pipeline("image-classification", model=folder, **settings) for folder in sys.argv[2:]]
print(json.dumps([classify(sys.argv[1]) for classify in classifiers]))
"""


@pytest.fixture(scope="module")
def classified_elsewhere(encoders, labeled, tmp_path_factory):
    """A classifier of each encoder, and what they say in one process that cannot import this project."""
    folder = tmp_path_factory.mktemp("classifiers")
    outs = {variant: finetune(encoder, labeled, folder / variant) for variant, encoder in encoders.items()}
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", PIPELINE, str(PHOTOGRAPHS[40]), *map(str, outs.values())]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return outs, dict(zip(outs, json.loads(done.stdout), strict=True)), done.stderr


@pytest.mark.skipif(OLDEST, reason="5.17 opens no image processor without torchvision")
@pytest.mark.parametrize("variant", ["mae", "simmim", "simmim+swin"])
def test_result__a_pipeline_without_this_project_gives_our_logits_and_says_nothing(
    variant, encoders, labeled, classified_elsewhere
):
    outs, answers, errors = classified_elsewhere
    assert [line for line in errors.splitlines() if line.strip() and "Loading weights" not in line] == []
    theirs = {entry["label"]: entry["score"] for entry in answers[variant]}

    # Ours: the view that training evaluated with, standardized as the trainer does.
    argv = ["--model", str(encoders[variant]), "--dataset", str(labeled)]
    settings = load_finetune_settings(argv, SETTINGS, run_finetune.encoder_config)
    pixel_values = settings.evaluation_view(PHOTOGRAPHS[40], 3).unsqueeze(0)  # (1, C, H, W) uint8
    stats, _ = run_finetune.image_stats(str(encoders[variant]))
    mean, std = (torch.tensor(stats[name]).view(1, 3, 1, 1) * 255 for name in ("image_mean", "image_std"))
    native = AutoModelForImageClassification.from_pretrained(outs[variant]).eval()
    with torch.no_grad():
        logits = native((pixel_values - mean) / std).logits[0].tolist()
    ours = {native.config.id2label[number]: logit for number, logit in enumerate(logits)}
    assert set(ours) == set(NAMES)
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("mode", ["linear", "partial"])
def test_result__of_a_part_that_trains_leaves_the_rest_as_it_was(mode, encoders, labeled, tmp_path):
    out = finetune(encoders["mae"], labeled, tmp_path / "out", "--mode", mode, "--num_trained_blocks", "1")
    before, after = load_file(encoders["mae"] / "model.safetensors"), load_file(out / "model.safetensors")
    frozen = {"partial": ("embeddings.", "encoder.layer.0."), "linear": ("embeddings.", "encoder.layer.")}[mode]
    names = [name for name in before if name.startswith(frozen) and not name.endswith("key.bias")]
    prefix = "beit." if mode == "partial" else "vit."
    assert len(names) > 10
    assert all(torch.equal(before[name], after[prefix + name]) for name in names)
    if mode == "partial":
        moved = [name for name in before if name.startswith("encoder.layer.1.") and not name.endswith("key.bias")]
        assert any(not torch.equal(before[name], after[prefix + name]) for name in moved)


def test_result__from_scratch_has_the_architecture_and_none_of_the_weights(encoders, labeled, tmp_path):
    out = finetune(encoders["simmim"], labeled, tmp_path / "out", "--from_scratch", "--seed", "7", "--max_steps", "1")
    before, after = load_file(encoders["simmim"] / "model.safetensors"), load_file(out / "model.safetensors")
    name = "encoder.layer.0.intermediate.dense.weight"
    assert before[name].shape == after[f"beit.{name}"].shape
    assert (before[name] - after[f"beit.{name}"]).abs().mean() > 0.005
    card = (out / "README.md").read_text()
    assert "trained from random weights" in card
    assert "pre-trained" not in card.split("## Use it")[0]


def test_result__folder_holds_results_labels_and_pictures(encoders, labeled, tmp_path):
    argv = ("--labels_per_class", "4", "--class_weights", "balanced", "--ema_decay", "0.9", "--image_size", "48")
    out = finetune(encoders["mae"], labeled, tmp_path / "out", *argv)
    metrics = json.loads((out / "metrics.json").read_text())
    values = {entry["metric"]: entry for entry in metrics["results"]}
    assert set(values) == {"accuracy", "balanced_accuracy", "macro_f1", "calibration_error"}
    assert (metrics["part"], metrics["num_labels"], values["accuracy"]["n"]) == ("validation", 12, 9)
    low, high = values["accuracy"]["interval"]
    assert low <= values["accuracy"]["value"] <= high
    assert metrics["weights"] == "best accuracy on the validation part"
    lines = (out / "labelled_images.txt").read_text().splitlines()
    assert sorted(line.split("\t")[1] for line in lines) == sorted(NAMES * 4)
    for picture in ("confusion_matrix.png", "training_curve.png"):
        assert Image.open(out / picture).size[0] > 300
    assert json.loads((out / "config.json").read_text())["mim_method"] == "mae"
    assert "accuracy" in (out / "README.md").read_text()
    assert str(labeled) not in (out / "README.md").read_text() + (out / "metrics.json").read_text()


def test_evaluation__sees_plain_images_whatever_training_does_to_them(encoders, labeled, tmp_path):
    """One evaluation before any update: augmentation, mixing and dropped paths would change its loss."""
    argv = ("--eval_on_start", "--max_steps", "1", "--load_best_model_at_end", "false")
    strong = finetune(encoders["mae"], labeled, tmp_path / "strong", *argv, "--erasing", "1", "--drop_path", "0.5")
    off = ("--mixup", "0", "--cutmix", "0", "--rand_augment", "0", "--erasing", "0", "--drop_path", "0")
    weak = finetune(encoders["mae"], labeled, tmp_path / "weak", *argv, *off, "--label_smoothing_factor", "0")
    assert logged(strong, "eval_loss")[0] == logged(weak, "eval_loss")[0]


def test_result__goes_to_the_hub_when_it_is_finished(encoders, labeled, tmp_path, monkeypatch):
    with HubStub() as hub:
        connect(monkeypatch, hub, tmp_path)
        flags = ("--push_to_hub", "--hub_model_id", "ann/birds", "--max_steps", "1")
        finetune(encoders["mae"], labeled, tmp_path / "out", *flags)
        files = hub.repos["ann/birds"].files
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "metrics.json"} <= set(files)
    assert not any("checkpoint" in name or "training_args" in name for name in files)
    assert 'checkpoint = "ann/birds"' in bytes(files["README.md"]).decode()


# ---- resume and the best weights ----

EVERY_TWO = (
    "--max_steps",
    "10",
    "--eval_steps",
    "2",
    "--save_steps",
    "2",
    "--save_total_limit",
    "9",
    "--ema_decay",
    "0.8",
)


@pytest.fixture(scope="module", params=["mae", "simmim+swin"])
def undisturbed(request, encoders, labeled, tmp_path_factory) -> tuple[Path, Path]:
    encoder = encoders[request.param]
    return encoder, finetune(encoder, labeled, tmp_path_factory.mktemp("run") / "out", *EVERY_TWO)


def test_resume__after_a_kill_gives_the_undisturbed_weights_and_results_bit_by_bit(undisturbed, labeled, tmp_path):
    encoder, expected = undisturbed
    out = tmp_path / "out"
    argv = ["--model", str(encoder), "--dataset", str(labeled), "--output_dir", str(out), *SHORT, *EVERY_TWO]
    script = ROOT / "tests" / "finetune_and_die.py"
    killed = run_forked([script, "5", *argv], os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)
    assert killed.returncode == -9, killed.stderr[-2000:]
    assert (out / "checkpoint-4").is_dir()
    finetune(encoder, labeled, out, *EVERY_TWO)
    for name, tensor in load_file(expected / "model.safetensors").items():
        assert torch.equal(tensor, load_file(out / "model.safetensors")[name]), name
    assert (out / "metrics.json").read_text() == (expected / "metrics.json").read_text()
    assert logged(out, "eval_loss") == logged(expected, "eval_loss")


def test_best__every_weight_is_that_of_the_best_checkpoint_and_gives_its_accuracy(undisturbed):
    _, out = undisturbed
    state = json.loads((out / "trainer_state.json").read_text())
    best = out / Path(state["best_model_checkpoint"]).name
    assert state["best_metric"] == max(logged(out, "eval_accuracy"))
    averaged, exported = load_file(best / "weight_average.safetensors"), load_file(out / "model.safetensors")
    sums = sorted(tensor.double().sum().item() for tensor in averaged.values())
    assert sums == sorted(tensor.double().sum().item() for name, tensor in exported.items() if "index" not in name)
    results = json.loads((out / "metrics.json").read_text())["results"]
    assert results[0]["value"] == state["best_metric"]


def test_best__is_never_chosen_by_a_loss_that_is_nan(encoders, labeled, tmp_path, nan_in_evaluation):
    argv = ("--eval_steps", "2", "--save_steps", "2", "--metric_for_best_model", "loss")
    folder = finetune(encoders["mae"], labeled, tmp_path / "out", *argv)
    assert json.loads((folder / "metrics.json").read_text())["weights"] == "last step"
    assert "**Warning: eval_loss was NaN or infinite at step 2, 4, 6.**" in (folder / "README.md").read_text()


def test_early_stopping__ends_after_evaluations_without_a_better_one(encoders, labeled, tmp_path):
    argv = ("--max_steps", "20", "--eval_steps", "1", "--early_stopping_patience", "2", "--learning_rate", "1e-12")
    out = finetune(encoders["mae"], labeled, tmp_path / "out", *argv)
    assert len(logged(out, "eval_loss")) == 3
    weights = (out / "model.safetensors").read_bytes()
    (out / "config.json").unlink()  # as if killed while the result was written
    finetune(encoders["mae"], labeled, out, *argv)
    assert len(logged(out, "eval_loss")) == 3
    assert (out / "model.safetensors").read_bytes() == weights


def test_start__is_the_best_if_training_makes_the_model_worse_and_a_killed_run_knows_it(encoders, labeled, tmp_path):
    argv = ("--schedule", "auto", "--learning_rate", "0.3", "--metric_for_best_model", "loss")
    argv += ("--max_steps", "4", "--eval_steps", "2", "--save_steps", "2")
    out = finetune(encoders["mae"], labeled, tmp_path / "out", *argv)
    state = json.loads((out / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]).name == "checkpoint-0"
    losses = logged(out, "eval_loss")
    assert len(losses) == 3
    assert state["best_metric"] == losses[0] < min(losses[1:])
    weights = (out / "model.safetensors").read_bytes()
    (out / "config.json").unlink()  # as if killed while the result was written
    shutil.rmtree(out / "checkpoint-4")
    finetune(encoders["mae"], labeled, out, *argv)
    assert logged(out, "eval_loss") == losses
    assert (out / "model.safetensors").read_bytes() == weights


# ---- mistakes ----


def refusal(capsys, *argv: str) -> str:
    assert run_finetune.run([*SHORT, *argv], run_finetune.main, build_parser) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def write_images(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(np.full((32, 32), 40 * number, np.uint8)).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"cat": 4}, "have the class 'cat'"),
        ({"cat": 4, "dog": 1}, "class 'dog' has one image"),
        (
            {"train/cat": 4, "train/dog": 4, "val/cat": 2, "val/owl": 2},
            "classes that the training split does not have: owl",
        ),
    ],
)
def test_data__that_cannot_be_learned_from_is_refused(counts, message, encoders, tmp_path, capsys):
    folder = write_images(tmp_path / "images", counts)
    argv = ("--model", str(encoders["mae"]), "--dataset", str(folder), "--output_dir", str(tmp_path / "out"))
    assert message in refusal(capsys, *argv)
    assert not (tmp_path / "out").exists()


def test_data__column_of_a_regression_is_refused(encoders, tmp_path, capsys):
    gray = [Image.fromarray(np.full((32, 32), 40 * number, np.uint8)) for number in range(4)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("float32")})
    rows = datasets.Dataset.from_dict({"image": gray, "label": [0.1, 0.5, 0.7, 1.3]}, features=features)
    rows.to_parquet(tmp_path / "train.parquet")
    argv = ("--dataset", str(tmp_path / "train.parquet"), "--output_dir", str(tmp_path / "out"))
    message = refusal(capsys, "--model", str(encoders["mae"]), *argv)
    assert "label" in message
    assert "float" in message


def test_encoder__folder_that_is_none_is_refused_with_what_it_is(encoders, labeled, tmp_path, capsys):
    data = ("--dataset", str(labeled), "--output_dir", str(tmp_path / "out"))
    assert "it has no config.json" in refusal(capsys, "--model", str(labeled), *data)
    (tmp_path / "unfinished" / "checkpoint-20").mkdir(parents=True)
    assert "has not finished" in refusal(capsys, "--model", str(tmp_path / "unfinished"), *data)
    whole = encoders["mae"] / "pretraining"
    assert "its encoder is in the parent folder" in refusal(capsys, "--model", str(whole), *data)
    assert "is neither a folder nor a Hub id" in refusal(capsys, "--model", str(tmp_path / "nothing"), *data)


def test_gray_images__are_shown_to_a_color_encoder_in_three_equal_channels(encoders, tmp_path, capsys):
    folder = write_images(tmp_path / "gray", {"train/cat": 4, "train/dog": 4, "val/cat": 2, "val/dog": 2})
    out = finetune(encoders["mae"], folder, tmp_path / "out", "--max_steps", "1")
    processor = IMAGE_PROCESSOR.from_pretrained(out)
    pixels = processor(Image.open(folder / "val" / "cat" / "1.png"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 32, 32)
    assert "8 gray images are shown to the encoder in three equal channels" in capsys.readouterr().out


def test_finished__folder_is_not_touched_and_a_label_count_too_large_names_the_class(
    encoders, labeled, tmp_path, capsys
):
    out = finetune(encoders["mae"], labeled, tmp_path / "out", "--max_steps", "1")
    argv = ("--model", str(encoders["mae"]), "--dataset", str(labeled))
    assert "--overwrite" in refusal(capsys, *argv[:2], "--dataset", "nowhere", "--output_dir", str(out))
    message = refusal(capsys, *argv, "--output_dir", str(tmp_path / "more"), "--labels_per_class", "9")
    assert "labels_per_class is 9, but class 'small' has only 8 training images" in message


def test_encoder__of_a_kind_that_cannot_be_tuned_or_with_lost_weights_is_refused(encoders, labeled, tmp_path, capsys):
    data = ("--dataset", str(labeled), "--output_dir", str(tmp_path / "out"))
    ResNetConfig().save_pretrained(tmp_path / "resnet")
    message = refusal(capsys, "--model", str(tmp_path / "resnet"), *data)
    assert f": --model {tmp_path / 'resnet'} is a resnet, expected one of beit" in message
    shutil.copytree(encoders["mae"], tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert f"--model {tmp_path / 'cut'} cannot be opened" in refusal(capsys, "--model", str(tmp_path / "cut"), *data)
    weights.unlink()
    assert f"--model {tmp_path / 'cut'} cannot be opened" in refusal(capsys, "--model", str(tmp_path / "cut"), *data)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--early_stopping_patience", "3", "--validation_fraction", "0"), "needs validation images"),
        (("--metric_for_best_model", "top5_accuracy"), "top5_accuracy, expected one of: accuracy, balanced_accuracy"),
        (("--metric_for_best_model", "acuracy"), "is acuracy, expected one of"),
    ],
)
def test_choice__that_nothing_is_measured_for_is_refused(flags, message, encoders, tmp_path, capsys):
    folder = write_images(tmp_path / "images", {"cat": 4, "dog": 4})
    argv = ("--model", str(encoders["mae"]), "--dataset", str(folder), "--output_dir", str(tmp_path / "out"))
    assert message in refusal(capsys, *argv, *flags)
    assert not (tmp_path / "out").exists()


def test_continuing__with_other_classes_or_another_head_is_refused(encoders, tmp_path, capsys):
    folder = write_images(tmp_path / "images", {"cat": 4, "dog": 4})
    out = finetune(encoders["mae"], folder, tmp_path / "out", "--save_steps", "2", "--eval_steps", "2")
    (out / "config.json").unlink()  # as if it had been interrupted
    argv = ["--model", str(encoders["mae"]), "--dataset", str(folder), "--output_dir", str(out)]
    argv += ["--max_steps", "6", "--save_steps", "2", "--eval_steps", "2"]
    assert "pooling mean -> class" in refusal(capsys, *argv, "--pooling", "class")
    write_images(folder, {"owl": 4})
    settings = (out / "settings.yaml").read_text()
    assert "other classes (number 2 was 'none' and is now 'owl')" in refusal(capsys, *argv, "--seed", "1")
    assert (out / "settings.yaml").read_text() == settings


def test_tensorboard__has_one_folder_of_the_run_itself(encoders, labeled, tmp_path):
    out = finetune(encoders["mae"], labeled, tmp_path / "out", "--max_steps", "1", "--report_to", "tensorboard")
    assert list((out / "runs").glob("events*"))
    assert not [path for path in (out / "runs").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("variant", "size", "share"),
    [("mae", 224, 0.875), ("mae", 256, 1.0), ("simmim", 384, 0.875), ("beit", 352, 0.875), ("beit", 384, 1.0)],
)
def test_evaluation__sees_the_share_of_the_picture_that_the_method_published(variant, size, share, tmp_path):
    export(tiny_model(variant), tmp_path / "encoder", method=variant, recipe={})
    argv = ["--model", str(tmp_path / "encoder"), "--dataset", "images", "--image_size", str(size)]
    settings = load_finetune_settings(argv, SETTINGS, run_finetune.encoder_config)
    assert settings.eval_crop_share == share

"""Online evaluation: the same weights with and without it, and its log entries, figures and messages."""

import json

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_model
from fashion import fashion_pixels
from matplotlib.figure import Figure
from PIL import Image
from pretraining_command import pretrain
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from data.labeled import open_labeled
from evaluation.class_balance import BALANCED
from evaluation.knn import Knn
from evaluation.online import OnlineEvaluation, open_online_evaluation
from evaluation.online_history import (
    BALANCED_KNN,
    BALANCED_LINEAR,
    FEATURE_STD,
    KNN,
    LINEAR,
    RANKME,
    OnlineHistory,
    describe_trend,
    draw_history,
    error_of,
    results_at,
    summarize,
)
from evaluation.pictures import training_curve
from hub.card_results import NOT_MEASURED

SMALL = [
    *("--model", "vit-nano", "--image_size", "32", "--use_cpu", "--per_device_train_batch_size", "8"),
    *("--max_steps", "4", "--save_steps", "2", "--eval_steps", "2", "--dataset", "sample-fashion"),
]


@pytest.fixture(autouse=True)
def fewer_images(monkeypatch):
    monkeypatch.setattr("evaluation.online._NUM_TRAIN", 100)
    monkeypatch.setattr("evaluation.online._NUM_TEST", 100)


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "pretraining" / "model.safetensors")


def history(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


@pytest.fixture(scope="module")
def unbalanced(tmp_path_factory):
    """50 bags and 10 trousers of the bundled clothes."""
    folder, split = tmp_path_factory.mktemp("unbalanced"), open_labeled("sample-fashion").train
    for label, name, count in ((8, "Bag", 50), (1, "Trouser", 10)):
        (folder / name).mkdir()
        for position in np.flatnonzero(split.labels == label)[:count]:
            (folder / name / f"{position}.png").write_bytes(split.source.read(split.indices[position]))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "out"
    assert pretrain([*SMALL, "--output_dir", str(folder)]) == 0
    return folder


def test_pretraining__has_the_same_weights_with_and_without_online_evaluation(plain, tmp_path, capsys):
    folder = tmp_path / "out"
    assert pretrain([*SMALL, "--output_dir", str(folder), "--eval_dataset", "sample-fashion"]) == 0
    said = capsys.readouterr()
    assert "online evaluation: mean of patches, 100 training and 100 validation images, 10 classes" in said.out
    assert "step 4/4  linear probe" in said.err
    ours, theirs = weights(folder), weights(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    optimizers = [torch.load(f / "checkpoint-4" / "optimizer.pt", weights_only=True) for f in (folder, plain)]
    moments = [[state["exp_avg"] for state in optimizer["state"].values()] for optimizer in optimizers]
    assert all(torch.equal(one, other) for one, other in zip(*moments, strict=True))

    entries = [entry for entry in history(folder) if LINEAR in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 4]
    assert all(0 <= entry[key] <= 1 for entry in entries for key in (LINEAR, KNN))
    for key in (LINEAR, KNN):
        errors = [np.sqrt(entry[key] * (1 - entry[key]) / 100) for entry in entries]
        assert [entry[error_of(key)] for entry in entries] == pytest.approx(errors, rel=0.1)
    losses = [[entry["loss"] for entry in history(each) if "loss" in entry] for each in (folder, plain)]
    assert losses[0] == losses[1]
    cards = [(each / "README.md").read_text() for each in (folder, plain)]
    assert f"| online linear probe, mean of patches | accuracy | {entries[-1][LINEAR]:.4g} |" in cards[0]
    assert [NOT_MEASURED in card for card in cards] == [False, True]
    events = EventAccumulator(str(next(folder.glob("runs/events*"))))
    events.Reload()
    assert [event.step for event in events.Scalars("eval/linear_accuracy")] == [0, 2, 4]
    with Image.open(folder / "training_curve.png") as with_panel, Image.open(plain / "training_curve.png") as without:
        assert with_panel.height > 1.4 * without.height


def test_pretraining__evaluates_online_without_a_validation_split_and_after_a_resume(tmp_path):
    folder, flags = tmp_path / "out", ["--validation_fraction", "0", "--eval_dataset", "sample-fashion"]
    command = [*SMALL, *flags, "--output_dir", str(folder)]
    assert pretrain(command) == 0
    before = [entry for entry in history(folder) if LINEAR in entry]
    assert [entry["step"] for entry in before] == [0, 2, 4]
    for name in ("checkpoint-4", "pretraining"):
        for path in sorted((folder / name).rglob("*"), reverse=True):
            path.unlink()
        (folder / name).rmdir()
    assert pretrain(command) == 0
    assert [entry for entry in history(folder) if LINEAR in entry] == before


def test_pretraining__of_unbalanced_classes_reports_balanced_accuracy(unbalanced, tmp_path, capsys):
    folder, command = tmp_path / "out", [*SMALL, "--eval_dataset", str(unbalanced), "--output_dir"]
    assert pretrain([*command, str(folder)]) == 0
    said = capsys.readouterr()
    assert f"48 training and 12 validation images, 2 classes; {BALANCED}\n" in said.out
    lines = [line for line in said.err.splitlines() if "linear probe" in line]
    assert len(lines) == 3
    assert all(f"({BALANCED}): too few evaluations" in line for line in lines)
    assert [" untrained (" in line for line in lines] == [False, True, True]
    entries = [entry for entry in history(folder) if BALANCED_LINEAR in entry]
    assert [entry["step"] for entry in entries] == [0, 2, 4]
    assert not any(LINEAR in entry for entry in history(folder))
    assert {value for entry in entries for value in (entry[BALANCED_LINEAR], entry[BALANCED_KNN])} <= {
        (bags / 10 + trousers / 2) / 2 for bags in range(11) for trousers in range(3)
    }
    value = f"{entries[-1][BALANCED_LINEAR]:.4g}"
    row = f"| online linear probe, mean of patches (unbalanced classes) | balanced accuracy | {value} | "
    assert row in (folder / "README.md").read_text()
    assert NOT_MEASURED not in (folder / "README.md").read_text()


def test_pretraining__a_dataset_that_cannot_be_opened_is_refused_before_training(tmp_path, capsys):
    photographs = str(ROOT / "data" / "samples" / "photographs")
    for dataset, words in ((photographs, "directly in"), (str(tmp_path / "nowhere"), "nowhere")):
        assert pretrain([*SMALL, "--output_dir", str(tmp_path / "o"), "--eval_dataset", dataset]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_online_evaluation__uses_a_part_of_the_training_split_and_never_the_test_split(monkeypatch):
    opened = open_labeled("sample-fashion")
    assert opened.validation is None
    shown = []
    monkeypatch.setattr("evaluation.online.StackedImages", lambda images, num_threads: shown.append(images) or images)
    open_online_evaluation(["sample-fashion"], (28, 28), 1, seed=0)
    files = [{images.name(index) for index in range(len(images))} for images in shown]
    assert not files[0] & files[1]
    assert not (files[0] | files[1]) & {opened.test.name(index) for index in range(len(opened.test))}


def test_online_evaluation__takes_a_label_column(tmp_path, capsys):
    features = {name: datasets.ClassLabel(names=["a", "b"]) for name in ("fine_label", "coarse_label")}
    pictures = [Image.new("RGB", (32, 32), (10 * number, 0, 0)) for number in range(20)]
    rows = {"image": pictures, "fine_label": [0, 1] * 10, "coarse_label": [0] * 10 + [1] * 10}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), **features}))
    table.to_parquet(tmp_path / "train.parquet")
    flags = ["--output_dir", str(tmp_path / "o"), "--eval_dataset", str(tmp_path / "train.parquet"), "--dry_run"]
    assert pretrain([*SMALL, *flags]) == 2
    assert "--eval_label_column" in capsys.readouterr().err
    assert pretrain([*SMALL, *flags, "--eval_label_column", "coarse_label"]) == 0
    assert pretrain([*SMALL, "--eval_label_column", "coarse_label"]) == 2
    assert "no effect without --eval_dataset" in capsys.readouterr().err


@pytest.mark.parametrize("variant", ["mae", "simmim", "simmim+swin", "beit"])
def test_online_evaluation__does_not_change_the_model(variant):
    model = tiny_model(variant).train()
    next(model.encoder.children()).eval()
    before = {name: module.training for name, module in model.named_modules()}
    online_evaluation, state = open_online_evaluation(["sample-fashion"], (32, 32), 3, seed=0), torch.get_rng_state()
    first, second = online_evaluation(model), online_evaluation(model)
    assert first == second
    assert set(first) == {LINEAR, error_of(LINEAR), KNN, error_of(KNN), RANKME, FEATURE_STD}
    assert {name: module.training for name, module in model.named_modules()} == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_online_evaluation__a_diverged_model_is_not_measured():
    model = tiny_model("mae")
    with torch.no_grad():
        model.encoder.layernorm.weight.fill_(float("nan"))
    assert open_online_evaluation(["sample-fashion"], (32, 32), 3, seed=0)(model) == {}


def test_online_evaluation__keeps_the_same_images_of_every_class():
    online_evaluation = open_online_evaluation(["sample-fashion"], (32, 32), 1, seed=0)
    assert isinstance(online_evaluation, OnlineEvaluation)
    assert online_evaluation.train.pixel_values.shape == (100, 1, 32, 32)
    assert torch.equal(torch.bincount(online_evaluation.train.labels), torch.full((10,), 10))
    again = open_online_evaluation(["sample-fashion"], (32, 32), 1, seed=0)
    assert torch.equal(online_evaluation.train.pixel_values, again.train.pixel_values)


# ---- summary and results ----


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        ([0.5, 0.6], "too few evaluations for a trend"),
        ([0.30, 0.45, 0.55, 0.61, 0.66, 0.70], "still improving"),
        ([0.3, 0.6, 0.70, 0.701, 0.699, 0.70, 0.702, 0.698, 0.70, 0.70], "no significant improvement"),
        ([0.7, 0.7, 0.7, 0.68, 0.65, 0.61], "getting worse"),
        ([0.7] * 8, "no significant improvement"),
    ],
)
def test_trend__is_described(accuracies, words):
    assert words in describe_trend(list(range(0, 100 * len(accuracies), 100)), accuracies)


def test_trend__scatter_alone_is_rarely_called_improvement():
    generator = np.random.default_rng(0)
    said = [describe_trend(range(12), 0.7 + 0.01 * generator.standard_normal(12)) for _ in range(400)]
    assert np.mean(["still improving" in text for text in said]) < 0.04


@pytest.mark.parametrize("num_evaluations", [4, 6, 9, 12])
def test_trend__is_found_in_one_of_20_histories_without_any(num_evaluations):
    """With 4 points there are 2 degrees of freedom: 2 standard errors would be exceeded by 18 % of such histories."""
    generator = np.random.default_rng(0)
    steps = range(num_evaluations)
    said = [describe_trend(steps, 0.7 + 0.01 * generator.standard_normal(num_evaluations)) for _ in range(1000)]
    assert 0.03 < np.mean(["no significant" not in text for text in said]) < 0.07


def test_trend__of_features_that_do_not_change_is_not_called_one():
    """kNN on 343 images after random projections of their pixels: an encoder that does not learn."""
    (train, labels), (test, truth) = (fashion_pixels(part, number) for part, number in (("train", 500), ("test", 343)))
    accuracies, generator = [], torch.Generator().manual_seed(0)
    for _ in range(4 * 60):
        projection = torch.randn(train.shape[1], 32, generator=generator)
        bank, queries = (torch.nn.functional.normalize(images @ projection, dim=1) for images in (train, test))
        found = Knn(bank, labels, 10, 20, 0.07, None)(queries).argmax(1)
        accuracies.append((found == truth).double().mean().item())
    error = np.sqrt(np.mean(accuracies) * (1 - np.mean(accuracies)) / len(test))
    said = [describe_trend(range(4), accuracies[start : start + 4], error) for start in range(0, len(accuracies), 4)]
    assert all("no significant" in text for text in said)


def test_trend__must_exceed_the_sampling_error_of_the_images():
    accuracies = [0.829, 0.820, 0.810, 0.800]  # of 343 images, nearly on a line
    assert describe_trend(range(4), accuracies).startswith("getting worse (-2.9 points")
    error = np.sqrt(0.8 * 0.2 / 343)
    assert describe_trend(range(4), accuracies, error).startswith("no significant improvement (-2.9 points")
    assert describe_trend(range(4), accuracies, error / 2).startswith("getting worse")


def entry_at(step: int, accuracy: float, num_images: int = 1000, names=(LINEAR, KNN)) -> dict:
    error = np.sqrt(accuracy * (1 - accuracy) / num_images)
    return {"step": step, names[0]: accuracy, error_of(names[0]): error, names[1]: 0.4, RANKME: 12.34}


def test_summarize__is_one_line():
    entries = [entry_at(step, 0.5 + step / 1000) for step in (0, 100, 200, 300)]
    text = summarize([{"loss": 1.0, "step": 5}, *entries])
    assert text.startswith(
        "linear probe 80.0%, 30.0 points better than untrained (95 % interval +26.0 to +34.0), kNN 40.0%, "
        "RankMe 12.3: still improving (+30.0 points over"
    )
    assert "\n" not in text
    assert "no online evaluation yet" in summarize([{"loss": 1.0, "step": 5}])


def test_summarize__compares_with_the_untrained_encoder_before_the_trend():
    """The accuracies of 343 images that were once called "getting worse (-2.9 points)"."""
    entries = [entry_at(step, value, 343) for step, value in enumerate((0.790, 0.829, 0.820, 0.810, 0.800))]
    text = summarize(entries)
    assert text.startswith(
        "linear probe 80.0%, not significantly different from untrained (+1.0 points, 95 % interval -5.0 to +7.0), kNN"
    )
    assert "getting worse" not in text
    assert "12.0 points worse than untrained (95 % interval" in summarize([entry_at(0, 0.9), entry_at(100, 0.78)])
    assert "3.0 points better than the initial weights" in summarize(
        [entry_at(0, 0.95), entry_at(100, 0.98)], "the initial weights"
    )


def test_summarize__without_the_untrained_encoder_or_its_error_compares_less():
    assert summarize([entry_at(100, 0.8)]).startswith("linear probe 80.0%, kNN 40.0%")
    assert summarize([entry_at(0, 0.8)]).startswith("linear probe 80.0%, kNN 40.0%")
    kept = summarize([entry_at(0, 0.8), entry_at(100, 0.8)], "the initial weights")
    assert "kNN 40.0% (the initial weights 40.0%), RankMe" in kept
    old = {"step": 0, LINEAR: 0.5, KNN: 0.4, RANKME: 3.0}  # logged by version 0.1.0
    assert summarize([old, entry_at(100, 0.8)]).startswith("linear probe 80.0% (untrained 50.0%), kNN")
    assert summarize([old | {"step": step} for step in range(4)]).endswith(
        "no significant improvement (+0.0 points over the last 4 evaluations)"
    )


def test_summarize__of_unbalanced_classes_names_the_metric_and_ignores_plain_accuracies():
    entries = [entry_at(step, 0.6 + step / 1000, names=(BALANCED_LINEAR, BALANCED_KNN)) for step in (0, 100)]
    assert f"RankMe 12.3 ({BALANCED}): too few" in summarize(entries)
    assert "untrained" in summarize(entries)
    assert "untrained" not in summarize([entry_at(0, 0.9), entries[1]])
    assert [(row["metric"], row["value"]) for row in results_at(entries, 100, "parts")] == [
        ("balanced_accuracy", 0.7),
        ("balanced_accuracy", 0.4),
        ("effective rank", 12.34),
    ]


@pytest.mark.parametrize(
    ("names", "label"),
    [((LINEAR, KNN), "accuracy on frozen"), ((BALANCED_LINEAR, BALANCED_KNN), "balanced accuracy, b")],
)
def test_history__labels_its_axis_with_the_metric(names, label):
    axes = Figure().subplots()
    draw_history(axes, OnlineHistory.of([entry_at(step, 0.6, names=names) for step in (0, 100)]))
    assert axes.get_ylabel().replace("\n", " ").startswith(label)


def test_results__are_those_of_the_step_itself_and_not_of_an_older_model():
    entries = [{"step": step, LINEAR: 0.5 + step / 1000, KNN: 0.4, RANKME: 12.34} for step in (0, 100)]
    assert [entry["value"] for entry in results_at(entries, 100, "photos")] == [0.6, 0.4, 12.34]
    (linear, *_) = results_at([entry_at(100, 0.6, 96)], 100, "photos")
    assert (linear["metric"], linear["interval"]) == ("accuracy", pytest.approx([0.502, 0.698]))
    assert results_at(entries, 150, "photos") == []
    *_, reference = results_at(entries, 100, "photos", "initial weights")[:4]
    assert (reference["name"], reference["value"]) == ("initial weights: online linear probe, mean of patches", 0.5)
    assert reference["reference"]
    assert results_at(entries[1:], 100, "photos", "initial weights") == results_at(entries[1:], 100, "photos")


def test_training_curve__has_a_second_panel(tmp_path):
    entries = [{"loss": 1 / (1 + s / 50), "learning_rate": 1e-3, "step": s} for s in range(0, 300, 10)]
    training_curve(entries, tmp_path / "one.png")
    online = [{"step": s, LINEAR: 0.5 + 0.2 * (1 - 0.99**s), KNN: 0.4, RANKME: 12.0} for s in range(0, 300, 30)]
    training_curve(entries + online, tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert two.width == one.width
        assert two.height > one.height

"""The command `run_evaluation.py`: its files, messages and errors."""

import json
import re
import shutil
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import ROOT, tiny_model
from fashion import fashion_pixels
from PIL import Image

import run_evaluation
from commands.evaluation_settings import EvaluationSettings, load_evaluation_settings
from commands.launch import run
from commands.parsing import make_parser
from evaluation.features import collect
from evaluation.frozen import Row, difference
from evaluation.knn import fit_knn
from evaluation.metrics import balanced_accuracy
from evaluation.preprocessing import batches
from evaluation.report import accuracy_by_class, comparisons
from hub.card_results import read_results, results_section
from hub.export.native import export

FASHION = ROOT / "data" / "samples" / "fashion_mnist"
NAMES = ("Trouser", "Bag", "Ankle boot")
LABELS = (1, 8, 9)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("encoder") / "tiny-mae"
    export(tiny_model("mae"), folder, method="mae", recipe={})
    return str(folder)


@pytest.fixture(scope="module")
def labeled(tmp_path_factory) -> Path:
    """Three classes of the bundled clothes: 12 training and 8 test images each."""
    folder = tmp_path_factory.mktemp("labeled") / "clothes"
    for part, count in (("train", 12), ("test", 8)):
        table = pq.read_table(FASHION / f"{part}.parquet").slice(0, 400)
        of_class = {label: [] for label in LABELS}
        for cell, label in zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True):
            if label in of_class:
                of_class[label].append(cell["bytes"])
        for name, label in zip(NAMES, LABELS, strict=True):
            (folder / part / name).mkdir(parents=True)
            for number, data in enumerate(of_class[label][:count]):
                Image.open(BytesIO(data)).save(folder / part / name / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def unbalanced(tmp_path_factory) -> Path:
    """Two classes of the bundled clothes: 60 and 6 training, 24 and 4 test images."""
    folder = tmp_path_factory.mktemp("unbalanced") / "clothes"
    for part, counts in (("train", (60, 6)), ("test", (24, 4))):
        table = pq.read_table(FASHION / f"{part}.parquet")
        for label, name, count in zip((8, 1), ("Bag", "Trouser"), counts, strict=True):
            cells = [row["image"] for row in table.to_pylist() if row["label"] == label][:count]
            (folder / part / name).mkdir(parents=True)
            for number, cell in enumerate(cells):
                (folder / part / name / f"{number:02d}.png").write_bytes(cell["bytes"])
    return folder


def evaluate(*argv: object) -> int:
    return run([str(word) for word in argv], run_evaluation.main, partial(make_parser, EvaluationSettings))


def refusal(capsys, *argv: object) -> str:
    assert evaluate(*argv) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert message.count("run_evaluation.py:") == 1
    return message


@pytest.mark.parametrize("flags", [[], ["--embed", "features.parquet"]], ids=["probes", "embed"])
def test_features__that_are_not_finite_are_refused_before_anything_is_written(
    encoder, labeled, tmp_path, monkeypatch, capsys, flags
):
    folder = shutil.copytree(encoder, tmp_path / "encoder")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_std": [0.0, 0.0, 0.0]}))
    monkeypatch.chdir(tmp_path)
    assert "features of the encoder are NaN or infinite" in refusal(
        capsys, "--model", folder, "--dataset", labeled, *flags
    )
    assert {path.name for path in tmp_path.iterdir()} == {"encoder"}


@pytest.fixture(scope="module")
def finished(encoder, labeled, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    assert evaluate("--model", encoder, "--dataset", labeled, "--output-dir", folder, "--labels_per_class", 6) == 0
    return folder


# ---- files ----


def test_evaluation__writes_all_files(finished):
    assert {path.name for path in finished.iterdir()} == {
        *("metrics.json", "report.html", "feature_maps.png", "labels.txt")
    }
    lines = (finished / "labels.txt").read_text().splitlines()
    assert sorted(line.split("\t")[1] for line in lines) == sorted(NAMES * 6)


def test_evaluation__metrics_contain_every_row_with_its_interval(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    rows = [row for row in metrics["results"] if row["metric"] == "accuracy"]
    own = [row["name"] for row in rows if not row["reference"]]
    kinds = ("class token", "mean of patches", "class token and mean")
    expected = {f"{probe}, {kind}" for probe in ("kNN", "linear probe", "logistic regression") for kind in kinds}
    assert set(own) == expected | {"attentive probe, patches"}
    references = [row["name"] for row in rows if row["reference"]]
    assert {"kNN, raw pixels", "logistic regression, raw pixels"} <= set(references)
    assert sum(name.endswith("untrained") for name in references) == 3
    for row in rows:
        low, high = row["interval"]
        assert 0 <= low <= row["value"] <= high <= 1
        assert row["n"] == 24
    assert metrics["headline"] in own
    assert metrics["num_train"] == 18
    names = {row["name"] for row in metrics["results"]}
    assert "RankMe, mean of patches" in names
    assert "feature std, class token" in names


def test_evaluation__the_report_is_self_contained_and_shows_the_rows(finished):
    page = (finished / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "http" not in re.sub(r"data:image/png;base64,[^\"]*", "", page)
    assert 'name="viewport"' in page
    for text in (
        "kNN, raw pixels",
        "untrained",
        "Ankle boot",
        "RankMe",
        "tiny-mae",
        "clothes",
        "--labels_per_class 6",
    ):
        assert text in page
    assert str(finished) not in page  # no folders of the user
    assert "{{" not in page


def test_evaluation__of_unbalanced_classes_leads_with_balanced_accuracy(encoder, unbalanced, tmp_path, capsys):
    assert evaluate("--model", encoder, "--dataset", unbalanced, "--output_dir", tmp_path, "--probes", "knn") == 0
    said = capsys.readouterr().out
    metrics, page = json.loads((tmp_path / "metrics.json").read_text()), (tmp_path / "report.html").read_text()
    of_headline = {row["metric"]: row for row in metrics["results"] if row["name"] == metrics["headline"]}
    plain, balanced = of_headline["accuracy"], of_headline["balanced_accuracy"]
    assert plain["balanced_accuracy"] == balanced["value"] < plain["value"]  # nearly all images are bags
    low, high = balanced["interval"]
    assert low < balanced["value"] < high
    assert f"{metrics['headline']}: {balanced['value']:.1%} balanced accuracy\n" in said
    assert f"{tmp_path}: {metrics['headline']} {balanced['value']:.1%} balanced accuracy; metrics.json" in said

    headline = re.sub(r"\s+", " ", re.sub("<[^>]*>", "", page[page.index('<div class="headline">') :]))
    assert headline.startswith(
        f" {balanced['value']:.1%} balanced accuracy, because the classes are unbalanced, on 28 test images "
        f"(95 % confidence interval {100 * low:.1f}\N{EN DASH}{100 * high:.1f}) accuracy {plain['value']:.1%} ("
    )
    found = re.search(r"lowest class recall ([\d.]+)%: Trouser \(4 of 28 images\)", headline)
    assert found is not None
    assert float(found[1]) < 100 * balanced["value"] < 100
    assert "<h2>Balanced accuracy</h2>" in page
    assert "<h2>Recall by class</h2>" in page
    card = results_section(read_results(tmp_path))
    assert f"| {metrics['headline']} | balanced accuracy | {balanced['value']:.4g} |" in card
    assert f"| {metrics['headline']} | accuracy | {plain['value']:.4g} |" in card


def test_evaluation__of_balanced_classes_leads_with_accuracy(finished):
    metrics, page = json.loads((finished / "metrics.json").read_text()), (finished / "report.html").read_text()
    assert {row["metric"] for row in metrics["results"]} == {"accuracy", "effective rank", "standard deviation"}
    headline = next(row for row in metrics["results"] if row["name"] == metrics["headline"])
    assert f"<strong>{headline['value']:.1%}</strong>\naccuracy on 24 test images" in page
    assert "unbalanced" not in page
    assert "<h2>Accuracy</h2>" in page


def test_evaluation__knn_is_that_of_the_features(finished, encoder, labeled):
    metrics = json.loads((finished / "metrics.json").read_text())
    row = next(row for row in metrics["results"] if row["name"] == "kNN, mean of patches")
    opened, preprocess = run_evaluation.open_encoder(encoder)
    parts = {}
    for part in ("train", "test"):
        task = run_evaluation.find_task(
            load_evaluation_settings(["--model", encoder, "--dataset", str(labeled), "--labels_per_class", "6"])
        )
        images = getattr(task, part)
        _, features, _ = collect(
            {"it": opened}, batches(images.source, images.indices, preprocess, pytest.fail, batch_size=5), preprocess
        )
        parts[part] = features["it"].by_kind["mean of patches"], torch.from_numpy(images.labels)
    knn = fit_knn(*parts["train"], 3, seed=0)
    assert row["chosen"] == {"k": knn.k, "temperature": knn.temperature}
    assert row["value"] == pytest.approx((knn(parts["test"][0]).argmax(1) == parts["test"][1]).double().mean().item())


def test_evaluation__selects_nothing_on_the_test_labels(encoder, labeled, finished, tmp_path):
    """With permuted test labels, all selections are the same, but the scores differ."""
    turned = tmp_path / "clothes"
    (turned / "test").mkdir(parents=True)
    (turned / "train").symlink_to(labeled / "train")
    for name, other in zip(NAMES, NAMES[1:] + NAMES[:1], strict=True):
        (turned / "test" / name).symlink_to(labeled / "test" / other)
    arguments = ("--labels_per_class", 6, "--probes", "knn", "linear")
    assert evaluate("--model", encoder, "--dataset", turned, "--output_dir", tmp_path / "out", *arguments) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    before = {row["name"]: row for row in json.loads((finished / "metrics.json").read_text())["results"]}
    scores = []
    for row in metrics["results"]:
        if row["metric"] == "accuracy" and row["name"] in before:
            assert row["chosen"] == before[row["name"]]["chosen"]
            assert row["accuracy_where_chosen"] == before[row["name"]]["accuracy_where_chosen"]
            scores.append((row["value"], before[row["name"]]["value"]))
    assert np.mean([turned for turned, _ in scores]) < np.mean([right for _, right in scores])


def test_evaluation__holds_out_a_part_if_there_is_no_test_split(encoder, labeled, tmp_path, capsys):
    arguments = ("--probes", "knn", "--output_dir", tmp_path)
    assert evaluate("--model", encoder, "--dataset", labeled / "train", *arguments) == 0
    assert "note: tested on 20% of each class" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert (metrics["num_train"], metrics["num_test"]) == (30, 6)


def test_evaluation__a_swin_has_no_class_token(labeled, tmp_path):
    export(tiny_model("simmim+swin"), tmp_path / "swin", method="simmim", recipe={})
    arguments = ("--labels_per_class", 1, "--output_dir", tmp_path / "out")
    assert evaluate("--model", tmp_path / "swin", "--dataset", labeled, *arguments) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert {row["features"] for row in metrics["results"]} == {"mean of patches", "patches", "pixels"}
    assert all(row["accuracy_where_chosen"] is None for row in metrics["results"] if row["metric"] == "accuracy")


def test_embed__writes_features_of_unlabeled_images(encoder, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    source = ROOT / "data" / "samples" / "photographs" / "train"
    for path in sorted(source.glob("*.jpg"))[:5]:
        (folder / path.name).symlink_to(path)
    (folder / "zz.jpg").write_bytes(b"\xff\xd8 no picture")
    file = tmp_path / "features.parquet"
    assert evaluate("--model", encoder, "--dataset", folder, "--embed", file, "--embed_patches") == 0
    assert "features of 5 images" in (said := capsys.readouterr().out)
    assert "1 cannot be read: zz.jpg: " in said
    (folder / "zz.jpg").unlink()
    table = pq.read_table(file)
    assert [Path(name).name for name in table["name"].to_pylist()] == sorted(path.name for path in folder.iterdir())
    assert {"class_token", "mean", "patches"} < set(table.column_names)


# ---- errors ----


def test_evaluation__names_the_problem(encoder, labeled, tmp_path, capsys):
    assert "--model" in refusal(capsys, "--dataset", labeled)
    assert "did you mean --labels_per_class" in refusal(
        capsys, "--model", encoder, "--dataset", labeled, "--label_per_class", 3
    )
    assert "is not a saved model: it has no config.json" in refusal(capsys, "--model", tmp_path, "--dataset", labeled)
    one = labeled / "train" / "Bag"
    assert "directly in" in refusal(capsys, "--model", encoder, "--dataset", one)
    asked = refusal(capsys, "--model", encoder, "--dataset", labeled, "--labels_per_class", 13)
    assert "has only 12 training images" in asked
    assert ".parquet" in refusal(capsys, "--model", encoder, "--dataset", labeled, "--embed", "out.csv")
    assert "no effect" in refusal(capsys, "--model", encoder, "--dataset", labeled, "--embed_patches")
    named = ("--model", encoder, "--dataset", labeled)
    assert "--per_device_eval_batch_size is 0" in refusal(capsys, *named, "--per_device_eval_batch_size", 0)
    assert "use --per_device_eval_batch_size" in refusal(capsys, *named, "--batch_size", 8)
    assert "did you mean knn?" in refusal(capsys, *named, "--probes", "kn")


def test_evaluation__takes_a_recipe_that_the_command_line_overrides(encoder, labeled, tmp_path):
    recipe = tmp_path / "few.yaml"
    recipe.write_text("labels_per_class: 3\nprobes: [knn]\nseed: 5\n")
    argv = ["--model", encoder, "--dataset", str(labeled), "--config", str(recipe), "--labels-per-class", "2"]
    settings = load_evaluation_settings(argv)
    assert (settings.labels_per_class, settings.probes, settings.seed) == (2, ["knn"], 5)
    assert (settings.is_on_command_line("labels_per_class"), settings.is_on_command_line("seed")) == (True, False)
    assert settings.as_recipe()["dataset"] == [str(labeled)]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help__fits_in_100_columns_and_exits(flag, capsys):
    with pytest.raises(SystemExit) as caught:
        load_evaluation_settings([flag])
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert max(map(len, text.splitlines())) <= 100
    assert "--per_device_eval_batch_size X" in text
    assert "--help_all" not in text


def test_evaluation__does_not_overwrite_results_of_other_programs(encoder, labeled, tmp_path, capsys):
    (tmp_path / "metrics.json").write_text('{"results": []}')
    message = refusal(capsys, "--model", encoder, "--dataset", labeled, "--output_dir", tmp_path)
    assert "is not overwritten" in message
    assert (tmp_path / "metrics.json").read_text() == '{"results": []}'


# ---- calculations of the report ----


def row_of(correct: np.ndarray, source: str = "trained", **changes) -> Row:
    settings = {
        "probe": "knn",
        "features": "mean of patches",
        "source": source,
        "chosen": {"k": 5},
        "validation_accuracy": 0.5,
    }
    labels = changes.pop("labels", np.arange(len(correct)) % 2)
    predictions = changes.pop("predictions", np.where(correct, labels, 1 - labels))
    balanced = balanced_accuracy(predictions, labels)
    return Row(**settings, labels=labels, predictions=predictions, interval=(0.4, 0.6), balanced_accuracy=balanced)


def test_difference__is_paired():
    better = np.arange(1000) < 700
    slightly = np.arange(1000) < 680  # wrong on 20 more of the same images
    gain, (low, high) = difference(row_of(better), row_of(slightly))
    assert gain == pytest.approx(0.02)
    assert 0.01 < low < 0.02 < high < 0.03
    sentences = comparisons([row_of(better), row_of(slightly, "pixels")], row_of(better))
    assert sentences[0].startswith("2.0 points better than raw pixels (kNN, raw pixels, 68.0%)")
    mixed = np.random.default_rng(0).permutation(better)
    same = comparisons([row_of(mixed, "untrained")], row_of(better))
    assert same[0].startswith("Not significantly different from the untrained encoder")


def test_difference__of_unbalanced_classes_counts_each_class_equally():
    """343 images of which 22 are defect: what gains 8 points of accuracy can lose a third of the defects."""
    labels = (np.arange(343) >= 321).astype(np.int64)
    defects = np.flatnonzero(labels)
    careless, careful = np.ones(343, bool), np.ones(343, bool)
    careless[defects[:15]] = False
    careful[defects[:3]], careful[: 343 // 8] = False, False
    rows = [row_of(careless, "pixels", labels=labels), row_of(careful, labels=labels)]
    assert careless.mean() > careful.mean() + 0.07
    gain, (low, high) = difference(rows[1], rows[0])
    assert gain == pytest.approx(rows[1].balanced_accuracy - rows[0].balanced_accuracy)
    assert 0 < low < gain < high
    (sentence,) = comparisons(rows, rows[1])
    assert sentence.startswith("20.7 points better than raw pixels (kNN, raw pixels, 65.9% balanced accuracy)")
    same = row_of(careful, "pixels", labels=labels)
    assert comparisons([same], rows[1])[0].startswith("Not significantly different from raw pixels")


def test_accuracy_by_class__lists_the_lowest_first_with_the_confused_class():
    labels = fashion_pixels("test", 300)[1].numpy()
    predictions = labels.copy()
    shirts = np.flatnonzero(labels == 6)
    predictions[shirts[::2]] = 0
    shown, num_left_out = accuracy_by_class(
        row_of(predictions == labels, labels=labels, predictions=predictions), labels, list("abcdefghij")
    )
    assert (shown[0]["name"], shown[0]["confused_with"], num_left_out) == ("g", "a", 0)
    assert shown[1]["confused_with"] is None

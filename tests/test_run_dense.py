"""The command `run_evaluation.py --dense`: its files, messages and errors."""

import json
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import tiny_model
from PIL import Image

import run_evaluation
from commands.evaluation_settings import EvaluationSettings
from commands.launch import run
from commands.parsing import make_parser
from hub.card_results import eval_results, read_results
from hub.export.native import export

FILES = {"metrics.json", "report.html", "segmentation.png", "patch_similarity.png", "feature_maps.png"}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("encoder") / "tiny-mae"
    export(tiny_model("mae"), folder, method="mae", recipe={})
    return str(folder)


def draw(folder: Path, split: str, num_images: int) -> None:
    """Images of noise with a red or a blue square, on a grid of half patches, and their masks."""
    numbers = np.random.default_rng(len(split))
    for kind in ("images", "masks"):
        (folder / split / kind).mkdir(parents=True)
    for number in range(num_images):
        pixels, mask = numbers.integers(100, 150, (32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8)
        label, row, column = 1 + number % 2, *(4 * numbers.integers(0, 5, 2))
        square = slice(row, row + 12), slice(column, column + 12)
        pixels[square], mask[square] = ([220, 30, 30], [30, 30, 220])[label - 1], label
        Image.fromarray(pixels).save(folder / split / "images" / f"{number}.png")
        Image.fromarray(mask).save(folder / split / "masks" / f"{number}.png")


@pytest.fixture(scope="module")
def masked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("masked") / "squares"
    draw(folder, "train", 10)
    draw(folder, "test", 4)
    (folder / "classes.txt").write_text("background\nred\nblue\n")
    return folder


def evaluate(*argv: object) -> int:
    return run([str(word) for word in argv], run_evaluation.main, partial(make_parser, EvaluationSettings))


@pytest.fixture(scope="module")
def finished(encoder, masked, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    named = ("--dense", "--model", encoder, "--dataset", masked, "--output_dir", folder)
    assert evaluate(*named, "--compare_with", encoder) == 0
    return folder


def test_dense__writes_all_files_and_no_path_of_the_user(finished):
    assert {path.name for path in finished.iterdir()} == FILES
    page = (finished / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert page.count("data:image/png;base64") == 3
    for text in ("mean IoU", "raw pixels", "untrained", "The encoder tiny-mae", "background", "4 x 4 of each image"):
        assert text in page
    assert str(finished) not in page
    assert "{{" not in page


def test_dense__metrics_have_every_row_and_its_interval(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    rows = {row["name"]: row for row in metrics["results"]}
    sources = ("patches", "patches, compared", "patches, untrained", "raw pixels")
    kinds = {f"{probe}, {source}" for probe in ("kNN", "linear probe") for source in sources}
    assert set(rows) == kinds | {"the best possible classes of the patches"}
    for row in rows.values():
        low, high = row["interval"]
        assert 0 <= low <= row["value"] <= high <= 1
        assert (row["n"], len(row["class_ious"])) == (4, 3)
    best = rows["the best possible classes of the patches"]["value"]
    assert rows["kNN, raw pixels"]["value"] > 0.5 * best  # colors are enough here
    own, same = rows["kNN, patches"], rows["kNN, patches, compared"]
    assert (own["value"], own["chosen"], own["reference"]) == (same["value"], same["chosen"], False)
    assert metrics["headline"] in ("kNN, patches", "linear probe, patches")
    assert metrics["class_names"] == ["background", "red", "blue"]
    (shown, *_) = eval_results(read_results(finished))
    assert (shown.task_type, shown.metric_type) == ("image-segmentation", "mean_iou")


def test_dense__holds_out_images_without_a_test_split(encoder, masked, tmp_path, capsys):
    (tmp_path / "only").mkdir()
    for name in ("images", "masks"):
        (tmp_path / "only" / name).symlink_to(masked / "train" / name)
    named = ("--dense", "--model", encoder, "--dataset", tmp_path / "only", "--output_dir", tmp_path / "out")
    assert evaluate(*named, "--probes", "knn") == 0
    assert "note: tested on 20% of the images" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (metrics["num_train"], metrics["num_test"], metrics["class_names"]) == (8, 2, ["0", "1", "2"])


def test_dense__names_the_problem(encoder, masked, tmp_path, capsys):
    named = ("--model", encoder, "--dataset", masked, "--output_dir", tmp_path / "out")

    def refusal(*more: object) -> str:
        assert evaluate(*named, *more) == 2
        message = capsys.readouterr().err
        assert "Traceback" not in message
        return message

    assert "none of --probes attentive classifies patches; expected knn or linear" in refusal(
        "--dense", "--probes", "attentive"
    )
    assert "--compare_with has no effect without --dense" in refusal("--compare_with", encoder)
    assert "--labels_per_class has no effect with --dense" in refusal("--dense", "--labels_per_class", 3)
    assert "is not a saved model" in refusal("--dense", "--compare_with", tmp_path)
    (tmp_path / "classes.txt").write_text("background\nred\n")
    message = refusal("--dense", "--class_file", tmp_path / "classes.txt")
    assert "no class: 2" in message
    assert not (tmp_path / "out").exists()

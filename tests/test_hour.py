"""The table of equal time: how speeds and scores are read, which commands run again, and what the table says."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import hour, hour_report, image_sets, resumable


def test_run__repeats_a_failed_command_unless_its_exit_code_is_final(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "ROOT", tmp_path)
    (tmp_path / "fail.py").write_text(
        f"open('{tmp_path}/ran', 'a').write('x'); print('it collapsed'); raise SystemExit(5)"
    )
    flags = ("--output_dir", str(tmp_path / "out"))
    for final in ((), (), (5,), (5,)):
        outcome = resumable.run("fail.py", *flags, final=final)
        assert (outcome.exit_code, outcome.output) == (5, "it collapsed\n")
    assert (tmp_path / "ran").read_text() == "xx"
    assert resumable.run("fail.py", *flags, "--other").exit_code == 5  # nothing belongs to the first command


def test_speed__is_that_after_the_warm_up(tmp_path):
    speeds = (1.0, 2.0, 50.0, 70.0, 60.0)
    entries = [{"step": n, "images_seen": 8 * n, "images_per_second": speed} for n, speed in enumerate(speeds, 1)]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [{"loss": 0.1}, *entries]}))
    speed = hour.read_speed(tmp_path)
    assert speed == {"images_per_second": 60.0, "images_per_step": 8.0}
    assert hour.steps_of(0.5, speed) == 225


def test_speeds__are_medians_of_the_rounds_and_a_failure_is_kept():
    failure = "run_pretraining.py: exit code 2"
    rounds = [[{"images_per_second": speed, "images_per_step": 8.0}] for speed in (10.0, 40.0, 20.0)]
    (stage,) = hour.merge_speeds(rounds, scale=0.5)["stages"]
    assert (stage["images_per_second"], stage["rounds"]) == (10.0, [5.0, 20.0, 10.0])
    assert hour.merge_speeds([rounds[0], failure]) == {"failed": failure}


def entry(name: str, probe: str, features: str, value: float, chosen: float, reference: bool = False) -> dict:
    values = {"value": value, "accuracy_where_chosen": chosen, "metric": "accuracy"}
    return {"name": name, "probe": probe, "features": features, "reference": reference, **values}


def frozen(folder: Path) -> dict:
    results = []
    for probe in ("knn", "logistic"):
        results += [
            entry(f"{probe} class", probe, "class token", 0.9, 0.3),
            entry(f"{probe} mean", probe, "mean of patches", 0.5, 0.4),
            entry(f"{probe} mean, untrained", probe, "mean of patches", 0.6, 0.8, reference=True),
            entry(f"{probe}, raw pixels", probe, "pixels", 0.2, 0.9, reference=True),
        ]
    results += [
        {"name": f"RankMe, {kind}", "metric": "effective rank", "value": rank}
        for kind, rank in (("class token", 3.0), ("mean of patches", 7.0))
    ]
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({"results": results}))
    return hour.read_frozen(folder)


def test_features__are_chosen_on_training_images(tmp_path):
    found = frozen(tmp_path)
    assert (found["knn"], found["knn on"], found["rankme"]) == (0.5, "mean of patches", 7.0)
    assert (found["logistic"], found["logistic, raw pixels"]) == (0.5, 0.2)


def test_table__has_means_over_the_seeds_and_names_failures(tmp_path):
    scores = frozen(tmp_path) | {"fine-tuned": 0.7, "steps": [500]}
    speeds = {"dino": {"stages": [{"images_per_second": 80.0, "images_per_step": 8.0}]}}
    half = {key: value for key, value in scores.items() if key != "fine-tuned"} | {
        "knn": 0.6,
        "fine-tuning failed": "2",
    }
    of_dino = {"0": scores, "1": half, "2": {"failed": "run_pretraining.py: exit code 5"}}
    found = {
        "speeds": speeds,
        "scores": {"dino": {"test": of_dino}, "mae": {"test": {"0": {"failed": "exit code 2"}}}},
    }
    lines = hour_report.table(found, "test", {"ours": ["mae", "dino"], "references": []})
    assert "| dino | 80.0 | 8 | 4 | 0.550 +- 0.071 | 0.500 +- 0.000 | 0.700 | 7.0 +- 0.0 | 0, 1 |" in lines
    assert "| mae |  |  |  |  |  |  |  | failed |" in lines
    assert "| raw pixels |  |  |  | 0.200 +- 0.000 | 0.200 +- 0.000 |  |  | 0, 1 |" in lines
    failures = ["mae, seed 0: exit code 2", "dino, seed 1: 2", "dino, seed 2: run_pretraining.py: exit code 5"]
    assert lines[-3:] == [f"- {failure}" for failure in failures]


def test_fashion_mnist__holds_back_training_images_of_each_class(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sets, "_NUM_VALIDATION", 2)
    monkeypatch.setattr(image_sets, "_NUM_LABELED", 3)
    labels = np.arange(60, dtype=np.uint8) % 10
    images = np.broadcast_to(labels[:, None, None], (60, 4, 4))
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
        (tmp_path / f"train-{name}-ubyte").write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())
    image_sets.fashion_mnist(tmp_path, tmp_path / "images")
    files = {split: sorted((tmp_path / "images" / "labeled" / split).glob("*/*.png")) for split in ("train", "val")}
    assert {split: len(found) for split, found in files.items()} == {"train": 30, "val": 20}
    assert not {file.name for file in files["train"]} & {file.name for file in files["val"]}
    classes = {file.parent.name: Image.open(file).getpixel((0, 0)) for file in files["val"]}
    assert classes == {str(label): label for label in range(10)}
    assert all((tmp_path / "images" / "unlabeled" / file.name).samefile(file) for file in files["val"])


def test_rows__need_another_environment_if_they_are_not_ours(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["hour", "--rows", "mae", "lightly-mae"])
    with pytest.raises(SystemExit):
        hour.main()
    assert "lightly-mae need --rivals or --reference" in capsys.readouterr().err

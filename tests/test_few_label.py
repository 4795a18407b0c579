"""Few-label benchmark: which results are reused, and rows that exist for all seeds."""

import json
import shutil
import sys
from types import SimpleNamespace

import pytest

from benchmarks import few_label, resumable


def test_run__skips_a_finished_command_and_refuses_another_one(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "ROOT", tmp_path)
    script = "open('ran', 'a').write('x'); import os; os.makedirs('results/out'); open('results/out/README.md', 'w')"
    (tmp_path / "count.py").write_text(script)
    monkeypatch.chdir(tmp_path)
    flags = ("--output_dir", str(tmp_path / "results" / "out"), "--seed", "0")
    seconds = few_label.run("count.py", *flags)
    assert few_label.run("count.py", *flags) == seconds
    assert (tmp_path / "ran").read_text() == "x"
    with pytest.raises(SystemExit, match="belongs to another command"):
        few_label.run("count.py", *flags[:-1], "1")
    shutil.rmtree(tmp_path / "results" / "out")
    few_label.run("count.py", *flags)
    assert (tmp_path / "ran").read_text() == "xx"


def test_run__reports_a_failed_command_and_runs_it_again(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "ROOT", tmp_path)
    (tmp_path / "fail.py").write_text("raise SystemExit('no such data')")
    flags = ("--output_dir", str(tmp_path / "out"))
    with pytest.raises(SystemExit, match="no such data"):
        few_label.run("fail.py", *flags)
    (tmp_path / "fail.py").write_text("print('now it is there')")
    assert few_label.run("fail.py", *flags) > 0


def test_result_file__has_one_row_for_the_untrained_encoder_whatever_its_kind_of_features(tmp_path, monkeypatch):
    options = SimpleNamespace(dataset="images", labels_per_class=20, grid=[(0.001, 0.75)])
    frozen = []
    for kind in ("class token", "mean of patches"):
        names = {f"kNN, {kind}, untrained": 0.5, "kNN, class token": 0.7, "kNN, mean of patches": 0.6}
        folder = tmp_path / kind
        folder.mkdir()
        results = [{"name": name, "metric": "accuracy", "value": value} for name, value in names.items()]
        (folder / "metrics.json").write_text(json.dumps({"results": results}))
        monkeypatch.setattr(few_label, "run", lambda *flags: 1.0)
        frozen.append(few_label.evaluate(tmp_path, folder, 0, options))
    part = {
        "recipe": "mae",
        "tuned": {arm: {(0.001, 0.75): 0.8} for arm in few_label.ARMS},
        "accuracies": {"pre-trained": [0.8, 0.7]},
        "frozen": frozen,
        "seconds": [1.0, 2.0],
    }
    table = few_label.table(part, {"reference: kNN": [0.9]}, options)
    assert "| kNN, untrained encoder | 0.5000 +- 0.0000 | 0.5000, 0.5000 |" in table
    assert "| fine-tuned, pre-trained | 0.7500 +- 0.0707 | 0.8000, 0.7000 |" in table
    assert "| reference: kNN | 0.9000 | 0.9000 |" in table


def test_all_labels__need_a_tuning_dataset(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["few_label", "--labels_per_class", "all"])
    with pytest.raises(SystemExit):
        few_label.main()
    assert "add a --tuning_dataset" in capsys.readouterr().err

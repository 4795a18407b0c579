"""Training states on the Hub: what is staged of a checkpoint, and which one another machine gets."""

import json
import os
from pathlib import Path

import pytest
from hubstub import Repo

from hub.checkpoints import fetch_checkpoint, stage_checkpoint
from hub.push import HubError, Repository

SETTINGS = "settings.yaml"


def stored(*folders: str) -> Repo:
    """A repository with training states in which the step is part of every file."""
    files = {"README.md": b"", "checkpoint-99/notes.txt": b"no training state"}
    for folder in folders:
        step = 7 if folder == "last-checkpoint" else int(folder.removeprefix("checkpoint-"))
        files[f"{folder}/trainer_state.json"] = json.dumps({"global_step": step}).encode()
        files[f"{folder}/optimizer.pt"] = b"%d" % step
        files[f"{folder}/{SETTINGS}"] = b"seed: %d" % step
    return Repo(files)


def test_stage__links_everything_but_the_pickle_and_shortens_the_settings(tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    (checkpoint / "shards").mkdir(parents=True)
    for name in ("optimizer.pt", "training_args.bin", "shards/0.pt"):
        (checkpoint / name).write_text(name)
    settings_file = tmp_path / SETTINGS
    settings_file.write_text("dataset: [/home/ann/photos]\nseed: 3\n")
    target = tmp_path / "staged" / "last-checkpoint"
    stage_checkpoint(checkpoint, settings_file, target)
    names = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert names == {"optimizer.pt", "shards/0.pt", SETTINGS}
    assert (target / SETTINGS).read_text() == "dataset:\n- photos\nseed: 3\n"
    assert (target / "optimizer.pt").samefile(checkpoint / "optimizer.pt")


def test_stage__copies_where_there_are_no_links(tmp_path, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError("Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "optimizer.pt").write_text("state")
    (tmp_path / SETTINGS).write_text("seed: 3\n")
    stage_checkpoint(tmp_path / "checkpoint-3", tmp_path / SETTINGS, tmp_path / "staged")
    assert (tmp_path / "staged" / "optimizer.pt").read_text() == "state"


@pytest.mark.parametrize(
    ("folders", "step"),
    [(["last-checkpoint"], 7), (["checkpoint-9", "checkpoint-10", "last-checkpoint"], 10), (["checkpoint-2"], 2)],
)
def test_fetch__brings_the_newest_with_its_settings(hub, tmp_path, folders, step):
    hub.repos["ann/enc"] = stored(*folders)
    found = fetch_checkpoint(Repository("ann/enc"), tmp_path / "out", SETTINGS)
    assert found == tmp_path / "out" / f"checkpoint-{step}"
    assert {path.name for path in found.iterdir()} == {"trainer_state.json", "optimizer.pt"}
    assert (found / "optimizer.pt").read_text() == str(step)
    assert (tmp_path / "out" / SETTINGS).read_text() == f"seed: {step}"


def test_fetch__finds_nothing_where_there_is_nothing(hub, tmp_path):
    hub.repos["ann/enc"] = stored()
    for repo_id in ("ann/enc", "ann/not-there"):
        assert fetch_checkpoint(Repository(repo_id), tmp_path / "out", SETTINGS) is None
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("step", "how"), [("tree", 401), ("tree", 503), ("resolve", 503), ("resolve", "drop")])
def test_fetch__leaves_nothing_behind_when_it_fails(hub, tmp_path, step, how):
    hub.repos["ann/enc"] = stored("checkpoint-2")
    hub.fail(step, how)
    with pytest.raises(HubError, match="ann/enc"):
        fetch_checkpoint(Repository("ann/enc"), tmp_path / "out", SETTINGS)
    assert not [path for path in Path(tmp_path / "out").rglob("*") if path.is_file()]

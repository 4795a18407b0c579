"""The Hub, as `hubstub` plays it: what goes up, what never does, and that no failure of it reaches the training."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import ROOT, tiny_arguments, tiny_collator, tiny_images, tiny_model, write_card
from hubstub import STEPS, TOKEN, HubStub, wait_until
from pretraining_command import pretrain
from safetensors.torch import load_file, save_file

from commands.job import bring_back, open_repository
from commands.pretraining_settings import load_pretraining_settings
from hub import push as hub_push
from hub.export.native import export
from hub.push import HubError, Repository, public_files
from modeling import CONFIGS
from run_pretraining import WRITTEN_LAST
from training.hub_push import STAGING, HubPush
from training.trainer import MimTrainer

CODE = (
    *("mae.py", "adaptive_masks.py", "base.py", "block_by_block.py", "dino_encoders.py", "ema.py", "encoders.py"),
    *("patches.py", "positions.py", "processes.py", "reconstruction.py", "schedules.py", "views.py"),
)
PUBLIC = {
    *("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "training_curve.png"),
    "reconstructions.png",
    *CODE,
    *("pretraining/config.json", "pretraining/model.safetensors", "pretraining/preprocessor_config.json"),
    *(f"pretraining/{name}" for name in CODE),
}


def write_model(folder: Path, head=None, **card) -> Path:
    export(head or tiny_model("mae"), folder, method="mae", recipe={})
    write_card(folder, **card)
    return folder


def write_little(folder: Path, head) -> Path:
    """In place of `write_model` where only the protocol matters."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    save_file({"weight": next(head.parameters()).detach().clone()}, folder / "model.safetensors")
    write_card(folder)
    return folder


def train(output_dir: Path, destination=None, pusher_class=HubPush, write=write_little) -> tuple[dict, list[str]]:
    """Nine steps with a save at each, pushed; returns the weights and what was said."""
    said: list[str] = []
    trainer = MimTrainer(
        model=tiny_model("mae", hidden_dropout_prob=0.1),
        args=tiny_arguments(output_dir, max_steps=9, save_strategy="steps", save_steps=1, save_total_limit=1),
        train_dataset=tiny_images(),
        data_collator=tiny_collator(with_image_index=True),
    )

    if destination is None:
        trainer.train()
        return trainer.model.state_dict(), said
    pusher = pusher_class(destination, output_dir, lambda folder, _: write(folder, trainer.model), said.append)
    trainer.add_callback(pusher)
    trainer.train()
    write(output_dir, trainer.model)
    pusher.finish()
    return trainer.model.state_dict(), said


def assert_same(weights: dict, expected: dict) -> None:
    for name, value in expected.items():
        assert torch.equal(weights[name], value), name


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict:
    return train(tmp_path_factory.mktemp("undisturbed"))[0]


# ---- what goes up ----


def test_push__uploads_what_others_need_and_nothing_else(hub, tmp_path):
    folder = write_model(tmp_path / "out")
    for name in ("settings.yaml", "trainer_state.json", "training_args.bin", "notes.txt", "bad_images.jsonl", "my.py"):
        (folder / name).write_text("{}")
    for name in ("checkpoint-3", "runs", "panels"):
        (folder / name).mkdir()
        (folder / name / "x.png").touch()
    Repository("ann/enc").push(folder, "first")
    assert set(hub.repos["ann/enc"].files) - {".gitattributes"} == PUBLIC - {
        "training_curve.png",
        "reconstructions.png",
    }
    assert b'checkpoint = "ann/enc"' in hub.repos["ann/enc"].files["README.md"]
    assert 'checkpoint = "path/to/this/folder"' in (folder / "README.md").read_text()  # the local one stays
    assert hub.repos["ann/enc"].commits == ["first"]
    assert not hub.repos["ann/enc"].private


def test_push__a_second_one_replaces_and_takes_away_what_is_gone(hub, tmp_path):
    folder = write_model(tmp_path / "out")
    repository = Repository("ann/enc")
    repository.push(folder, "first")
    (folder / "pretraining" / "patches.py").unlink()
    hub.repos["ann/enc"].files["LICENSE"] = b"theirs"
    repository.push(folder, "second")
    files = hub.repos["ann/enc"].files
    assert "pretraining/patches.py" not in files
    assert "patches.py" in files
    assert files["LICENSE"] == b"theirs"


def test_push__shortens_paths_in_json_and_refuses_a_token(hub, tmp_path):
    folder = write_model(tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mim_recipe": {"dataset": [str(tmp_path / "photos")]}}))
    Repository("ann/enc").push(folder, "first")
    assert json.loads(hub.repos["ann/enc"].files["config.json"])["mim_recipe"] == {"dataset": ["photos"]}
    (folder / "mae.py").write_text(f"# {TOKEN}")
    with pytest.raises(ValueError, match=r"mae\.py contains your Hub token"):
        Repository("ann/enc").push(folder, "second")
    assert hub.repos["ann/enc"].commits == ["first"]


def test_push__brings_what_was_measured_since_into_the_card(hub, tmp_path):
    folder = write_model(tmp_path / "out")
    result = {"name": "kNN", "metric": "accuracy", "value": 0.5, "interval": [0.4, 0.6], "n": 100}
    (folder / "metrics.json").write_text(json.dumps({"dataset": "sample-fashion", "results": [result]}))
    Repository("ann/enc").push(folder, "first")
    card = hub.repos["ann/enc"].files["README.md"].decode()
    assert "| kNN | accuracy | 0.5 | 0.4 to 0.6 | 100 |" in card
    assert "value: 0.5" in card
    assert "has not been measured" not in card


@pytest.mark.parametrize(
    "line", ["license: my-own", "license: mit\nlicense: mit", "tags: [1", "model-index: [{name: x}]"]
)
def test_push__a_card_that_the_hub_would_refuse_is_refused_before_anything_is_sent(hub, tmp_path, line):
    folder = write_model(tmp_path / "out")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("library_name:", f"{line}\nlibrary_name:"))
    with pytest.raises(ValueError, match="card"):
        Repository("ann/enc").push(folder, "first")
    assert hub.steps == []


def test_push__private_is_kept_private_and_a_public_repository_is_not_written_to(hub, tmp_path):
    folder = write_model(tmp_path / "out")
    Repository("ann/secret", private=True).push(folder, "first")
    assert hub.repos["ann/secret"].private
    Repository("ann/open").push(folder, "first")
    with pytest.raises(HubError, match="ann/open is public"):
        Repository("ann/open", private=True).push(folder, "second")
    assert hub.repos["ann/open"].commits == ["first"]


# ---- the command ----


def test_command__pushes_and_prints_the_address(hub, tmp_path, capsys):
    folder = write_model(tmp_path / "out")
    capsys.readouterr()
    assert hub_push.main([str(folder), "--to", "lab/enc", "--private"]) == 0
    assert capsys.readouterr().out == f"{hub.url}/lab/enc\n"
    assert hub.repos["lab/enc"].private


def test_command__tells_mistakes_in_one_line(hub, tmp_path, capsys, monkeypatch):
    folder = write_model(tmp_path / "out")
    (tmp_path / "running" / "checkpoint-3").mkdir(parents=True)
    capsys.readouterr()
    messages = []
    for argv in (
        [str(tmp_path / "nowhere"), "--to", "ann/enc"],
        [str(tmp_path / "running"), "--to", "ann/enc"],
        [str(folder), "--to", "enc"],
        [str(folder), "--to", "a/b/c"],
        [str(folder), "--to", "stranger/enc"],
    ):
        assert hub_push.main(argv) == 2
        messages.append(capsys.readouterr().err)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert hub_push.main([str(folder), "--to", "ann/enc"]) == 2
    messages.append(capsys.readouterr().err)
    expected = ("has no finished model", "training is not finished", "expected organization/name", "not a valid")
    for message, part in zip(messages, (*expected, "403", "hf auth login"), strict=True):
        assert message.startswith("hub.push: ")
        assert message.count("\n") == 1
        assert part in message


def test_command__starts_without_torch():
    code = "import sys, hub.push; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ---- failures ----


class OneAfterAnother(HubPush):
    """Waits for each upload, so that none takes the place of another."""

    def on_save(self, *args, **kwargs):
        super().on_save(*args, **kwargs)
        self._uploads.wait()


class FailsAtEachStep:
    """Each push fails at the next step of the protocol, the last one at the commit."""

    def __init__(self, hub: HubStub, how: int | str) -> None:
        self.hub, self.how, self.repository = hub, how, Repository("ann/enc")
        self.repo_id, self.finishing_command = self.repository.repo_id, self.repository.finishing_command
        self.steps = iter((*STEPS, "commit"))
        self.errors: dict[str, str] = {}

    def create(self) -> None:
        self.hub.fail("create", self.how)
        self.repository.create()

    def push(self, folder: Path, message: str, checkpoint: str | None = None) -> str:
        step = next(self.steps)
        self.hub.fail(step, self.how)
        try:
            return self.repository.push(folder, message, checkpoint)
        except HubError as error:
            self.errors[step] = str(error)
            raise


@pytest.mark.parametrize("how", [401, 403, 503, "cut", "drop", "hang"])
def test_failures__at_each_step_leave_the_training_as_it_is_and_name_the_command_that_finishes(
    hub, tmp_path, undisturbed, how, capsys, monkeypatch
):
    monkeypatch.setattr(hub_push, "_TIMEOUT", 0.2 if how == "hang" else 10.0)
    destination = FailsAtEachStep(hub, how)
    weights, said = train(tmp_path / "out", destination, OneAfterAnother)
    assert_same(weights, undisturbed)
    assert set(destination.errors) == set(STEPS)
    failed = re.compile(r"warning: (creating the repository|the upload at step \d+) failed: ")
    assert all(failed.match(note) for note in said[:-1])
    assert said[0].endswith("; training continues")
    if isinstance(how, int):
        assert f"(HTTP status {how})" in said[0]
    assert said[-1].startswith("warning: the upload of the finished run failed: ann/enc: ")
    assert not (tmp_path / "out" / STAGING).exists()

    hub.heal()
    monkeypatch.setattr(hub_push, "_TIMEOUT", 10.0)
    command = shlex.split(said[-1].split("to upload it, run: ")[1])
    assert command[:3] == ["python", "-m", "hub.push"]
    assert hub_push.main(command[3:]) == 0
    uploaded = hub.repos["ann/enc"].files
    assert uploaded["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_failures__that_pass_are_tried_again_after_a_while(hub, tmp_path, monkeypatch):
    waited = []

    def sleep(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            hub.heal()

    monkeypatch.setattr(hub_push, "WAITS", (5.0, 30.0))
    monkeypatch.setattr(hub_push.time, "sleep", sleep)
    folder = write_model(tmp_path / "out")
    hub.fail("commit", 503)
    assert Repository("ann/enc").push(folder, "first") == f"{hub.url}/ann/enc"
    assert waited == [5.0, 30.0]
    hub.fail("commit", 403)  # will not pass
    (folder / "LICENSE").write_text("mine")
    with pytest.raises(HubError, match="no write permission"):
        Repository("ann/enc").push(folder, "second")
    assert len(waited) == 2


def test_failures__offline_is_said_at_once(hub, tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    weights, said = train(tmp_path / "out", Repository("ann/enc"))
    assert_same(weights, undisturbed)
    assert "HF_HUB_OFFLINE is set" in said[0]
    assert len(said) == 2  # the same reason is logged once, and at the end with the command
    assert f"python -m hub.push {tmp_path / 'out'} --to ann/enc" in said[1]


def test_failures__of_the_staging_itself_do_not_reach_the_training(hub, tmp_path, undisturbed, monkeypatch):
    calls = []

    def fails_once(folder: Path, *arguments, **keywords) -> Path:
        calls.append(folder)
        if len(calls) == 1:
            raise OSError("No space left on device")
        return write_little(folder, *arguments, **keywords)

    weights, said = train(tmp_path / "out", Repository("ann/enc"), write=fails_once)
    assert_same(weights, undisturbed)
    assert said[0] == "warning: the upload at step 1 failed: No space left on device; training continues"
    assert said[-1] == f"pushed to {hub.url}/ann/enc"


def test_uploads__never_make_the_training_wait_and_the_newest_one_wins(hub, tmp_path, undisturbed):
    hub.fail("commit", "hang")

    class Heals(HubPush):
        def finish(self) -> None:
            assert "commit" in hub.steps  # the first upload still hangs, and the training is over
            hub.heal()
            super().finish()

    weights, said = train(tmp_path / "out", Repository("ann/enc"), Heals, write_model)
    assert_same(weights, undisturbed)
    commits = hub.repos["ann/enc"].commits
    assert commits[-2:] == ["Training in progress, step 8", "End of training"]
    assert len(commits) < 9
    assert said == [
        "training is done; waiting for an upload to ann/enc (Ctrl-C cancels the upload only)",
        f"pushed to {hub.url}/ann/enc",
    ]


# ---- a whole run ----

RUN = ["--model", "vit-nano", "--max_steps", "12", "--save_steps", "4", "--per_device_train_batch_size", "4"]
RUN += ["--use_cpu"]
PUSH = ["--push_to_hub", "--hub_model_id", "lab/enc", "--hub_strategy", "checkpoint", "--license", "mit"]


@pytest.fixture(scope="module")
def undisturbed_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    assert pretrain([*RUN, "--output_dir", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_run__killed_on_one_machine_is_continued_from_the_hub_on_another(hub, tmp_path, undisturbed_run, capsys):
    photos = tmp_path / "photos of ann"
    shutil.copytree(ROOT / "data" / "samples" / "photographs" / "train", photos / "train")
    shutil.copytree(ROOT / "data" / "samples" / "photographs" / "held_out", photos / "held_out")
    command = [*RUN, *PUSH, "--hub_token", TOKEN, "--dataset", str(photos)]
    here = [sys.executable, str(ROOT / "run_pretraining.py"), *command, "--output_dir", str(tmp_path / "here")]
    environment = os.environ | hub.environment(str(tmp_path / "home")) | {"HF_TOKEN": ""}
    with subprocess.Popen(here, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
        wait_until(lambda: process.poll() is not None or "commit" in hub.steps, seconds=300)
        wait_until(lambda: hub.repos["lab/enc"].commits)
        process.send_signal(signal.SIGKILL)
    repo = hub.repos["lab/enc"]
    assert repo.commits == ["Training in progress, step 4"]
    assert "Training continues: this is step 4 of 12." in repo.files["README.md"].decode()
    assert json.loads(repo.files["last-checkpoint/trainer_state.json"])["global_step"] == 4

    assert pretrain([*command, "--output_dir", str(tmp_path / "there")]) == 0
    said = capsys.readouterr().out
    assert f"found a checkpoint of this run in {hub.url}/lab/enc: {tmp_path / 'there' / 'checkpoint-4'}" in said
    assert f"continuing from {tmp_path / 'there' / 'checkpoint-4'}" in said
    assert said.endswith(f"pushed to {hub.url}/lab/enc\n")
    assert repo.commits[-1] == "Training in progress, step 12"  # nothing has changed since: no commit for the end
    assert "Training continues" not in repo.files["README.md"].decode()
    expected = load_file(undisturbed_run / "model.safetensors")
    assert_same(load_file(tmp_path / "there" / "model.safetensors"), expected)
    public = {name for name in repo.files if not name.startswith(("last-checkpoint/", ".gitattributes"))}
    assert public == PUBLIC
    assert {path.relative_to(tmp_path / "there").as_posix() for path in public_files(tmp_path / "there")} <= PUBLIC
    for content in hub.received:
        for secret in (str(tmp_path), str(ROOT), TOKEN, "training_args"):
            assert secret.encode() not in content


def test_run__ends_well_without_the_hub_and_says_what_to_type(hub, tmp_path, undisturbed_run, capsys):
    hub.fail("create", 503)
    folder = tmp_path / "out"
    assert pretrain([*RUN, *PUSH, "--hub_private_repo", "--output_dir", str(folder)]) == 0
    last = capsys.readouterr().out.splitlines()[-2:]
    assert last[0].startswith("warning: the upload of the finished run failed: lab/enc: ")
    assert last[1] == f"  to upload it, run: python -m hub.push {folder} --to lab/enc --private"
    assert_same(load_file(folder / "model.safetensors"), load_file(undisturbed_run / "model.safetensors"))


def test_run__a_hub_that_does_not_answer_begins_anew_and_says_so(hub, tmp_path):
    hub.fail("tree", 503)
    settings = load_pretraining_settings([*RUN, *PUSH], CONFIGS)
    said: list[str] = []
    repository = open_repository(settings)
    assert repository is not None
    bring_back(repository, settings, tmp_path / "out", WRITTEN_LAST, said.append)
    assert len(said) == 1
    assert "so training starts from step 0" in said[0]


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--push_to_hub"], "--push_to_hub needs --hub_model_id"),
        (["--hub_model_id", "ann/enc"], "has no effect without --push_to_hub"),
        (["--push_to_hub", "--hub_model_id", "enc"], "expected organization/name"),
        (["--push_to_hub", "--hub_model_id", "ann/enc", "--hub_strategy", "often"], "hub_strategy"),
        (["--license", "MIT"], "did you mean mit?"),
    ],
)
def test_run__mistakes_are_told_before_anything_begins(hub, tmp_path, capsys, flags, part):
    assert pretrain([*RUN, *flags, "--output_dir", str(tmp_path / "out")]) == 2
    assert part in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert hub.steps == []

"""The command that trains a tokenizer, as a user types it: what it writes, how it goes on, and what it refuses."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from forked import run_forked
from transformers import AutoModel

import run_tokenizer
from commands.arithmetic import Hardware
from commands.launch import has_accelerator, run
from commands.memory import Footprint
from commands.parsing import make_parser
from commands.settings import RECIPES
from commands.tokenizer_plan import TokenizerPlan
from commands.tokenizer_settings import TokenizerSettings, load_tokenizer_settings
from hub.open_model import open_model
from modeling.dvae import DvaeConfig
from training.targets import TokenizerTargets

PHOTOGRAPHS = sorted((ROOT / "data" / "samples" / "photographs" / "train").glob("*.jpg"))
SIZES = ["--model", "dvae-nano", "--image_size", "32", "--vocab_size", "32"]
SMALL = [*SIZES, "--max_steps", "2", "--per_device_train_batch_size", "8", "--use_cpu"]
LAYOUT = {
    *("config.json", "model.safetensors", "dvae.py", "README.md", "settings.yaml", "codebook.json"),
    *("training_curve.png", "reconstructions.png", "trainer_state.json", "panels/step-0000002.png"),
}
ALL = sorted([*RECIPES.glob("dvae*.yaml"), *RECIPES.glob("vqkd*.yaml")])


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    monkeypatch.setattr(run_tokenizer, "MIN_TOKENS", 1000)


def train(*argv: str) -> int:
    return run([*SMALL, *argv], run_tokenizer.main, partial(make_parser, TokenizerSettings))


def refusal(capsys, *argv: str) -> str:
    """The message of a command that must fail, without a traceback."""
    assert train(*argv) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert message.startswith("run_tokenizer.py: ")
    return message


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([parameter.flatten() for parameter in AutoModel.from_pretrained(folder).parameters()])


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_tokenizer, "MIN_TOKENS", 1000)
        assert train("--output_dir", str(folder)) == 0
    return folder


# ---- what it writes ----


def test_run__writes_the_layout(finished):
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert {name for name in files if not name.startswith(("checkpoint-", "runs/"))} == LAYOUT


def test_run__a_finished_folder_is_refused_before_images_are_looked_for(finished, capsys):
    assert "--overwrite" in refusal(capsys, "--output_dir", str(finished), "--dataset", "nowhere")


def test_run__counts_the_codes_of_enough_held_out_tokens(finished):
    facts = json.loads((finished / "codebook.json").read_text())
    assert facts["num_tokens"] == facts["num_crops"] * 16 >= 1000
    assert 1 <= facts["perplexity"] <= facts["num_alive"] <= facts["vocab_size"] == 32
    assert f"{facts['num_alive']} of 32 codes occur" in (finished / "README.md").read_text()
    assert facts["num_images"] == len(list((ROOT / "data" / "samples" / "photographs" / "held_out").glob("*.jpg")))


def test_run__logs_the_parts_of_the_loss_and_the_schedules(finished):
    history = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    trained = [entry for entry in history if "loss" in entry]
    assert {"reconstruction_loss", "kl", "kl_weight", "temperature", "images_per_second"} <= trained[-1].keys()
    assert trained[0]["temperature"] == 1
    assert trained[0]["kl_weight"] == 6.6  # a tenth of two steps is none
    evaluated = [entry for entry in history if "eval_loss" in entry]
    assert evaluated[-1]["eval_num_tokens"] == 58 * 16
    assert {"eval_num_alive", "eval_perplexity", "eval_kl"} <= evaluated[-1].keys()


def test_run__is_a_tokenizer_that_pretraining_takes(finished):
    tokenizer = open_model(str(finished), "tokenizer").model
    targets = TokenizerTargets(tokenizer, (4, 4))
    assert (targets.view.image_size, targets.config_settings) == ((32, 32), {"vocab_size": 32})


def test_run__saves_the_average_and_not_the_last_weights(finished):
    checkpoint = finished / "checkpoint-2"
    average = torch.nn.Module.state_dict(AutoModel.from_pretrained(finished))
    last = AutoModel.from_pretrained(checkpoint).state_dict()
    assert any(not torch.equal(average[name], last[name]) for name in average)
    assert (checkpoint / "weight_average.safetensors").exists()


def test_run__a_validation_loss_that_is_nan_is_on_the_card(tmp_path, capsys, nan_in_evaluation):
    assert train("--output_dir", str(tmp_path / "out")) == 0
    problem = "eval_loss was NaN or infinite at step 2"
    assert capsys.readouterr().out.endswith(f"warning: {problem}\n")
    assert f"**Warning: {problem}.**" in (tmp_path / "out" / "README.md").read_text()


def test_run__gray_and_rectangular_starting_from_images(tmp_path):
    flags = ["--num_channels", "1", "--image_size", "32", "64", "--start_from_images", "--usage_weight", "0.1"]
    assert train(*flags, "--output_dir", str(tmp_path / "out")) == 0
    tokenizer = AutoModel.from_pretrained(tmp_path / "out")
    assert tokenizer.get_codebook_indices(torch.zeros(1, 1, 32, 64)).shape == (1, 4, 8)


def test_dry_run__prints_the_plan_and_writes_nothing(tmp_path, capsys):
    assert train("--output_dir", str(tmp_path / "out"), "--dry_run", "--max_steps", "1000") == 0
    plan = capsys.readouterr().out
    assert "32 x 32 pixels become 4 x 4 codes out of 32" in plan
    assert "note: temperature_steps is 500 instead of 150,000: the run has 1,000 steps" in plan
    assert "help" not in plan
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes__write_one_tokenizer(tmp_path):
    # Without --use_cpu transformers starts two jobs on a machine without an accelerator; the script sets it there.
    flags = SMALL if has_accelerator() else [flag for flag in SMALL if flag != "--use_cpu"]
    words = [ROOT / "run_tokenizer.py", *flags, "--output_dir", tmp_path / "out"]
    result = run_forked(words, cwd=ROOT, num_processes=2)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "8 x 2 processes x 1 accumulation = 16" in result.stdout
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {name for name in files if not name.startswith(("checkpoint-", "runs/"))} == LAYOUT


# ---- the Hub ----


def test_run__pushes_the_finished_tokenizer_with_its_code(hub, tmp_path, monkeypatch):
    flags = ["--push_to_hub", "--hub_model_id", "ann/codes", "--license", "mit", "--output_dir", str(tmp_path / "out")]
    assert train(*flags) == 0
    files = hub.repos["ann/codes"].files
    assert {"config.json", "model.safetensors", "dvae.py", "README.md", "reconstructions.png"} <= set(files)
    assert not any("checkpoint" in name or name.endswith((".yaml", ".bin")) for name in files)
    card = bytes(files["README.md"]).decode()
    assert 'checkpoint = "ann/codes"' in card
    assert "license: mit" in card


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--license", "MIT"], "--license is 'MIT', which the Hub does not know; did you mean mit?"),
        (["--push_to_hub"], "--push_to_hub needs --hub_model_id"),
        (["--push_to_hub", "--hub_model_id", "codes"], "expected organization/name"),
    ],
)
def test_run__mistakes_about_the_hub_are_reported_before_training(hub, tmp_path, capsys, flags, message):
    assert message in refusal(capsys, *flags, "--output_dir", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert hub.steps == []


# ---- going on, and refusing to ----


class _RunsAProgram:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_checkpoint__that_would_run_a_program_is_refused(finished, tmp_path, capsys, name):
    checkpoint = shutil.copytree(finished / "checkpoint-2", tmp_path / "checkpoint-2")
    (checkpoint / "checksums.json").unlink()
    torch.save({"state": _RunsAProgram(tmp_path / "ran")}, checkpoint / name)
    flags = ["--output_dir", str(tmp_path / "out"), "--resume_from_checkpoint", str(checkpoint), "--max_steps", "4"]
    capsys.readouterr()
    assert train(*flags) == 2
    assert f"run_tokenizer.py: {checkpoint} cannot be continued: " in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_run__an_interrupted_one_ends_like_an_undisturbed_one(tmp_path):
    folder = tmp_path / "out"
    command = ["--output_dir", str(folder), "--save_steps", "1", "--max_steps", "3", "--start_from_images"]
    assert train(*command) == 0
    whole = weights(folder)
    shutil.rmtree(folder / "checkpoint-3")
    (folder / "config.json").unlink()
    (folder / "checkpoint-2" / "trainer_state.json").unlink()  # as if killed inside the save
    assert train(*command) == 0
    assert torch.equal(weights(folder), whole)


@pytest.mark.parametrize("written", ["training_curve.png", "codebook.json", "config.json"])
def test_run__killed_while_the_result_is_written_ends_like_an_undisturbed_one(finished, tmp_path, written):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    for name in ("config.json", "model.safetensors", "codebook.json", "training_curve.png"):
        (folder / name).unlink()
        if name == written:
            break
    for left_behind in (folder / ".export-abc", folder / ".export"):
        left_behind.mkdir()
        (left_behind / "model.safetensors").touch()
    assert train("--output_dir", str(folder)) == 0
    assert torch.equal(weights(folder), weights(finished))
    assert not list(folder.glob(".export*"))
    assert not (folder / "checkpoint-3").exists()


def test_run__a_finished_folder_is_not_touched_without_overwrite(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert "--overwrite" in refusal(capsys, "--output_dir", str(finished))
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


def test_run__an_interrupted_one_of_another_shape_is_refused(finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "out")
    (tmp_path / "out" / "config.json").unlink()
    assert "vocab_size 32 -> 64" in refusal(capsys, "--output_dir", str(tmp_path / "out"), "--vocab_size", "64")


def test_bad_images__stop_the_run_or_are_left_out_and_listed(tmp_path, capsys):
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir()
    for photograph in PHOTOGRAPHS[:20]:
        shutil.copy(photograph, photos)
    (photos / "text.jpg").write_text("not a picture")
    (photos / "truncated.jpg").write_bytes(PHOTOGRAPHS[0].read_bytes()[:4000])
    flags = ["--dataset", str(photos), "--output_dir", str(out)]
    message = refusal(capsys, *flags)
    assert all(name in message for name in ("text.jpg", "truncated.jpg", "--max_bad_fraction"))
    assert not out.exists()
    assert train(*flags, "--max_bad_fraction", "0.2") == 0
    listed = [json.loads(line)["name"] for line in (out / "bad_images.jsonl").read_text().splitlines()]
    assert {Path(name).name for name in listed} == {"text.jpg", "truncated.jpg"}


def test_mistakes__each_get_one_clear_message(tmp_path, capsys):
    out = ["--output_dir", str(tmp_path / "out")]
    assert "did you mean --vocab_size?" in refusal(capsys, *out, "--vocab_sizes", "9")
    assert "--vocab_size is 1" in refusal(capsys, *out, "--vocab_size", "1")
    assert "stride of 8 pixels" in refusal(capsys, *out, "--image_size", "30")
    assert "--final_temperature is 0.0" in refusal(capsys, *out, "--final_temperature", "0")
    assert "did you mean dvae-nano?" in refusal(capsys, *out, "--model", "dvae_nano")
    assert not (tmp_path / "out").exists()


# ---- settings ----


def test_dvae__has_the_published_objective():
    settings = load_tokenizer_settings([])
    published = {
        "kl_weight": 6.6,
        "kl_weight_steps": 5000,
        "final_temperature": 1 / 16,
        "temperature_steps": 150_000,
        "ema_decay": 0.999,
        "usage_weight": 0,
        "start_from_images": False,
        "vocab_size": 8192,
        "image_size": 112,
        "learning_rate": 1e-4,
        "lr_scheduler_kwargs": {"min_lr": 1.25e-6},
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 1e-4,
    }
    found = {name: settings.values[name] for name in published}
    if isinstance(found["lr_scheduler_kwargs"], str):
        found["lr_scheduler_kwargs"] = json.loads(found["lr_scheduler_kwargs"])
    assert found == published
    assert DvaeConfig(**settings.config_settings()).hidden_size == 256


def test_long_run__keeps_the_published_schedules():
    settings = load_tokenizer_settings(["--max_steps", "3000000"])
    plan = TokenizerPlan.make(settings, Hardware("cuda", 16), (10**6, 1000), Footprint(1, 1, 1, 1), "images", (14, 14))
    temperature = plan.schedules["temperature"]
    assert plan.schedules["kl_weight"].at(5000) == 6.6
    assert temperature.at(150_000) == 1 / 16 < temperature.at(149_000)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipe__loads_counts_and_runs_by_the_command_in_its_header(path):
    text = path.read_text(encoding="utf-8")
    run = next(line for line in text.splitlines() if line.startswith("# Run:"))
    settings = load_tokenizer_settings(run.split("run_tokenizer.py")[1].split())
    assert f"recipes/{path.name}" in settings.labels.values()
    for name, value in yaml.safe_load(text).items():
        found = settings.values[name]
        found = json.loads(found) if isinstance(found, str) and "{" in found else found
        assert found == (float(value) if isinstance(found, float) else [value] if name == "dataset" else value), name
    for field in ("Paper:", "Run:", "Cost:", "Expected:", "Measured:", "Differs:"):
        assert len([line for line in text.splitlines() if line.startswith(f"# {field}") and len(line) > 14]) == 1, (
            field
        )

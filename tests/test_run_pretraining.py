"""The command as a user types it: what it writes, what it refuses, and with which words."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import IMAGE_PROCESSOR, ROOT
from PIL import Image
from pretraining_command import pretrain
from test_run_lock import held_by_another_process
from transformers import AutoModel

from commands import artifacts
from commands.launch import has_accelerator
from commands.run_lock import LOCK_FILE

SMALL = ["--model", "vit-nano", "--max_steps", "2", "--per_device_train_batch_size", "8", "--use_cpu"]
CODE = (
    *("mae.py", "adaptive_masks.py", "base.py", "block_by_block.py", "dino_encoders.py", "ema.py", "encoders.py"),
    *("patches.py", "positions.py", "processes.py", "reconstruction.py", "schedules.py", "views.py"),
)
LAYOUT = {
    *("config.json", "model.safetensors", "preprocessor_config.json", "README.md", "settings.yaml"),
    *("training_curve.png", "reconstructions.png", "trainer_state.json"),
    *("pretraining/config.json", "pretraining/model.safetensors", "pretraining/preprocessor_config.json"),
    "panels/step-0000002.png",
    *CODE,
    *(f"pretraining/{name}" for name in CODE),
}
PHOTOGRAPHS = sorted((ROOT / "data" / "samples" / "photographs" / "train").glob("*.jpg"))


def layout_of(folder: Path) -> set[str]:
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    return {name for name in files if not name.startswith(("checkpoint-", "runs/"))}


def refusal(capsys, *argv: str) -> str:
    """The message of a command that must fail, without a traceback."""
    assert pretrain(list(argv)) not in (0, None)
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert message.count("run_pretraining.py:") == 1
    return message


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    assert pretrain([*SMALL, "--output_dir", str(folder)]) == 0
    return folder


# ---- what it writes ----


def test_run__writes_the_layout(finished):
    assert layout_of(finished) == LAYOUT


def test_run__the_encoder_opens_and_its_processor_feeds_it(finished):
    processor, encoder = IMAGE_PROCESSOR.from_pretrained(finished), AutoModel.from_pretrained(finished)
    inputs = processor(Image.open(PHOTOGRAPHS[0]), return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64)
    output = encoder(**inputs)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])


def test_run__a_finished_folder_is_not_touched_without_overwrite(finished, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    flags = ("--output_dir", str(finished), "--dataset", "nowhere")  # refused before its images are looked for
    assert "--overwrite" in refusal(capsys, *SMALL, *flags)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before


@pytest.mark.parametrize("was_evaluated", [True, False])
def test_run__overwrite_keeps_files_that_are_not_ours(finished, tmp_path, capsys, was_evaluated):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    for name in ("notes.txt", "labels.txt"):
        (folder / name).write_text("mine")
    if was_evaluated:
        (folder / "metrics.json").write_text(json.dumps({"written_by": "run_evaluation.py", "results": []}, indent=2))
    assert pretrain([*SMALL, "--output_dir", str(folder), "--overwrite", "--max_steps", "1"]) == 0
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "labels.txt").exists() != was_evaluated  # then it was the evaluation's
    assert not (folder / "checkpoint-2").exists()
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 1
    assert "for 0 steps" not in capsys.readouterr().out


def test_run__an_interrupted_one_continues_by_itself_and_ends_like_an_undisturbed_one(finished, tmp_path, capsys):
    folder = tmp_path / "out"
    command = [*SMALL, "--output_dir", str(folder), "--save_steps", "1", "--max_steps", "3"]
    assert pretrain(command) == 0
    whole = torch.cat([p.flatten() for p in AutoModel.from_pretrained(folder).parameters()])
    for path in [folder / "checkpoint-3", folder / "pretraining"]:
        shutil.rmtree(path)
    (folder / "checkpoint-2" / "trainer_state.json").unlink()  # as if killed inside the save
    capsys.readouterr()
    assert pretrain(command) == 0
    said = capsys.readouterr().out
    assert "checkpoint-2 is skipped" in said
    assert f"continuing from {folder / 'checkpoint-1'}" in said
    assert torch.equal(torch.cat([p.flatten() for p in AutoModel.from_pretrained(folder).parameters()]), whole)


def test_run__one_that_dies_before_its_card_is_not_finished(tmp_path, monkeypatch):
    folder, write_card = tmp_path / "out", artifacts.write_card

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(artifacts, "write_card", die)
    with pytest.raises(KeyboardInterrupt):
        pretrain([*SMALL, "--output_dir", str(folder)])
    monkeypatch.setattr(artifacts, "write_card", write_card)
    assert pretrain([*SMALL, "--output_dir", str(folder)]) == 0
    assert layout_of(folder) == LAYOUT
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 2


def test_run__an_interrupted_one_of_another_shape_is_refused(finished, tmp_path, capsys):
    folder = tmp_path / "out"
    shutil.copytree(finished, folder)
    shutil.rmtree(folder / "pretraining")
    message = refusal(capsys, *SMALL, "--output_dir", str(folder), "--patch_size", "16")
    assert "patch_size 8 -> 16" in message
    assert "--resume" in refusal(capsys, *SMALL, "--output_dir", str(folder), "--resume", "never")


def test_run__gray_and_rectangular_with_measured_statistics(tmp_path):
    folder = tmp_path / "out"
    flags = ["--num_channels", "1", "--image_size", "32", "64", "--mask_ratio", "0.6", "0.8", "--seed", "3"]
    assert pretrain([*SMALL, *flags, "--output_dir", str(folder)]) == 0
    processor, encoder = IMAGE_PROCESSOR.from_pretrained(folder), AutoModel.from_pretrained(folder)
    assert encoder.config.image_size == [32, 64]
    assert len(set(processor.image_mean)) == 1
    assert 0.2 < processor.image_mean[0] < 0.7
    whole = IMAGE_PROCESSOR.from_pretrained(folder / "pretraining")
    assert whole.image_mean * 3 == processor.image_mean
    inputs = processor(Image.open(PHOTOGRAPHS[0]).convert("L"), return_tensors="pt")  # of any mode
    assert encoder(**inputs).last_hidden_state.shape == (1, 1 + 32, 192)


def test_run__a_validation_loss_that_is_nan_is_a_warning_in_the_log_at_the_end_and_on_the_card(
    tmp_path, capsys, nan_in_evaluation
):
    assert pretrain([*SMALL, "--output_dir", str(tmp_path / "out")]) == 0
    printed, problem = capsys.readouterr(), "eval_loss was NaN or infinite at step 2"
    assert "warning: NaN or infinite at step 2: eval_loss\n" in printed.err
    assert printed.out.endswith(f"warning: {problem}\n")
    assert f"**Warning: {problem}.**" in (tmp_path / "out" / "README.md").read_text()


def test_run__on_images_of_one_color_with_measured_statistics_warns_and_stays_finite(tmp_path, capsys):
    for number in range(40):
        Image.new("RGB", (64, 64), (0, 130, 255)).save(tmp_path / f"{number}.png")
    flags = ["--dataset", str(tmp_path), "--image_stats", "auto", "--output_dir", str(tmp_path / "out")]
    assert pretrain([*SMALL, *flags]) == 0
    printed = capsys.readouterr()
    assert "warning: a channel has one value in all images" in printed.out
    assert "nan" not in printed.err
    assert list(IMAGE_PROCESSOR.from_pretrained(tmp_path / "out").image_std) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("model", ["vit-nano", "swin-nano"])
def test_run__simmim_with_both_encoders(model, tmp_path):
    flags = ["--method", "simmim", "--model", model, *SMALL[2:], "--output_dir", str(tmp_path / "out")]
    assert pretrain([*flags, "--mask_strategy", "random-unit"]) == 0
    encoder = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert type(encoder).__name__ == ("SwinModel" if model == "swin-nano" else "BeitModel")
    assert list((tmp_path / "out" / "panels").glob("*.png"))
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert ("no class token" in card) is (model == "swin-nano")


def test_run__swin_with_a_window_larger_than_its_last_map_says_so_and_writes_the_whole_model(tmp_path, capsys):
    flags = ["--method", "simmim", "--model", "swin-nano", "--image_size", "64", *SMALL[2:]]  # 2 x 2 in the last stage
    assert pretrain([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    assert "note: only pretraining/ will be written" in capsys.readouterr().out
    assert not (tmp_path / "out" / "config.json").exists()
    assert (tmp_path / "out" / "pretraining" / "config.json").exists()
    assert "a window of 4 is larger" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_masks__that_would_cut_a_token_of_swin_are_refused_before_anything_is_written(tmp_path, capsys):
    flags = ["--method", "simmim", "--model", "swin-nano", "--output_dir", str(tmp_path / "out"), *SMALL[2:]]
    assert "makes one token of 32 x 32 pixels" in refusal(capsys, *flags, "--mask_strategy", "random")
    assert "--mask_unit of 32 or a multiple" in refusal(capsys, *flags, "--mask_unit", "16")
    assert not (tmp_path / "out").exists()


def test_dry_run__prints_the_plan_and_writes_nothing(tmp_path, capsys):
    folder = tmp_path / "out"
    assert pretrain([*SMALL, "--output_dir", str(folder), "--dry_run"]) == 0
    printed = capsys.readouterr()
    assert "8 x 1 process x 1 accumulation = 8" in printed.out
    assert re.search(r"\nduration: about \d+ s for \d+ steps \([\d.e-]+ s per step\)", printed.out)
    assert "step " not in printed.err
    assert not folder.exists()


def test_two_processes__write_the_same_layout(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    # Without --use_cpu transformers starts two jobs on a machine without an accelerator; the script sets it there.
    flags = SMALL if has_accelerator() else [flag for flag in SMALL if flag != "--use_cpu"]
    command = [*launcher, str(ROOT / "run_pretraining.py"), *flags, "--output_dir", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert layout_of(tmp_path / "out") == LAYOUT
    assert result.stdout.count("8 x 2 processes x 1 accumulation = 16") == 1


# ---- bad images ----


def png_header_of(width: int, height: int) -> bytes:
    """A PNG that promises width x height pixels and holds next to none."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 64))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.fixture(scope="module")
def odd_folder(tmp_path_factory) -> Path:
    """50 good photographs; five files that cannot be read and six that are merely odd."""
    folder = tmp_path_factory.mktemp("odd") / "ünïcode and spaces"
    deep = folder / "a" / "b" / "c" / "d"
    deep.mkdir(parents=True)
    for number, photograph in enumerate(PHOTOGRAPHS[:50]):
        shutil.copy(photograph, (deep if number % 2 else folder) / photograph.name)
    picture = Image.open(PHOTOGRAPHS[0])
    (folder / "text.jpg").write_text("not a picture")
    (folder / "truncated.jpg").write_bytes(PHOTOGRAPHS[1].read_bytes()[:4000])
    (folder / "zero.png").touch()
    (folder / "bomb.png").write_bytes(png_header_of(30_000, 30_000))
    (folder / "broken-link.jpg").symlink_to(folder / "nowhere.jpg")
    picture.resize((1, 1)).save(folder / "tiny.png")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(folder / "sixteen.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    frames = [picture.convert("P"), picture.rotate(90).convert("P")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    picture.save(folder / "ünï cödé (1).jpg")
    return folder


BAD = ("text.jpg", "truncated.jpg", "zero.png", "bomb.png", "broken-link.jpg")


def test_bad_images__stop_the_run_before_its_first_step_and_are_named(odd_folder, tmp_path, capsys):
    message = refusal(capsys, *SMALL, "--dataset", str(odd_folder), "--output_dir", str(tmp_path / "out"))
    assert all(name in message for name in (*BAD, "--max_bad_fraction"))
    assert "sixteen.png" not in message
    assert not (tmp_path / "out").exists()


def test_bad_images__are_left_out_and_listed_when_allowed(odd_folder, tmp_path):
    out = tmp_path / "out"
    flags = ["--dataset", str(odd_folder), "--max_bad_fraction", "0.2", "--output_dir", str(out)]
    assert pretrain([*SMALL, *flags]) == 0
    listed = [json.loads(line) for line in (out / "bad_images.jsonl").read_text().splitlines()]
    assert {Path(entry["name"]).name for entry in listed} == set(BAD)
    assert all(entry["reason"] for entry in listed)
    assert "| unreadable images left out | 5 |" in (out / "README.md").read_text()


def test_check_images__is_said_in_the_plan_with_what_becomes_of_unusual_pixels(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, photograph in enumerate(PHOTOGRAPHS[:10]):
        gray = np.asarray(Image.open(photograph).convert("L"))
        Image.fromarray(gray.astype(np.float32) if number < 3 else gray).save(folder / f"{number}.tif")
    os.mkfifo(folder / "pipe.jpg")
    flags = ["--dataset", str(folder), "--max_bad_fraction", "0.2", "--dry_run", "--output_dir", str(tmp_path / "out")]

    def plan(*more: str) -> str:
        assert pretrain([*SMALL, *flags, *more]) == 0
        return capsys.readouterr().out

    assert "note: 3 images have float pixels" in plan()
    assert "pipe.jpg: cannot be opened: it is a FIFO" in plan()
    assert "note: 3 images have float pixels" in plan("--check_images", "all")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("data.image_checks.NUM_SAMPLED", 5)
        assert "note: only a seeded sample of 5 of 11 images was checked" in plan("--check_images", "sample")
    assert "expected one of" in refusal(capsys, *SMALL, *flags, "--check_images", "none")


def test_bad_images__found_only_when_decoding_stop_the_run_when_they_are_too_many(tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, photograph in enumerate(PHOTOGRAPHS[:24]):
        png = folder / f"{photograph.stem}.png"
        Image.open(photograph).save(png)
        if number < 6:  # header and end are whole, the pixels between them are not
            content = bytearray(png.read_bytes())
            middle = len(content) // 3
            content[middle : middle + 2000] = bytes(2000)
            png.write_bytes(content)
    flags = ["--dataset", str(folder), "--output_dir", str(tmp_path / "out"), "--logging_steps", "1"]
    message = refusal(capsys, *SMALL, *flags, "--max_steps", "6", "--validation_fraction", "0")
    assert "cannot be read" in message
    assert "--max_bad_fraction" in message


# ---- mistakes ----


def test_mistakes__each_get_one_clear_message(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("mask_ration: 0.5\n")
    out = ["--output_dir", str(tmp_path / "out")]
    assert "no image" in refusal(capsys, *out, "--dataset", str(tmp_path / "empty"))
    assert str(tmp_path / "missing") in refusal(capsys, *out, "--dataset", str(tmp_path / "missing"))
    assert "did you mean --mask_ratio?" in refusal(capsys, *out, "--mask_ration", "0.5")
    assert "mask_ratio" in refusal(capsys, *out, "--config", str(recipe))
    assert "nearest that are: 224 x 224 and 240 x 240" in refusal(capsys, *out, "--image_size", "225")
    assert "exact-block" in refusal(capsys, *out, *SMALL, "--mask_strategy", "block")
    assert "no such experiment tracker" in refusal(capsys, *out, *SMALL, "--report_to", "tensorbord")
    assert not (tmp_path / "out").exists()


def test_mistakes__an_experiment_tracker_that_is_not_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("commands.job.get_available_reporting_integrations", lambda: ["tensorboard"])
    message = refusal(capsys, "--output_dir", str(tmp_path / "out"), *SMALL, "--report_to", "trackio")
    assert "--report_to trackio: this package is not installed; run `pip install trackio`" in message
    assert not (tmp_path / "out").exists()


def test_mistakes__an_output_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert pretrain([*SMALL, "--output_dir", str(tmp_path / "file" / "out")]) == 4
    assert capsys.readouterr().err.endswith(f"Not a directory, give another --output_dir: {tmp_path}/file\n")
    assert pretrain([*SMALL, "--output_dir", str(tmp_path / "file")]) == 4
    assert capsys.readouterr().err.endswith(f"Not a directory, give another --output_dir: {tmp_path}/file\n")


def test_mistakes__an_output_folder_that_another_run_uses(tmp_path, capsys):
    with held_by_another_process(tmp_path / "out"):
        assert "is in use by another run (process " in refusal(capsys, *SMALL, "--output_dir", str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_FILE]


def test_mistakes__show_their_traceback_with_debug(tmp_path):
    with pytest.raises(ValueError, match="no image"):
        pretrain(["--dataset", str(tmp_path), "--debug"])

"""What a command reports of a mistake: arguments of the library under the names of its own flags."""

import errno
import os
import resource
from argparse import ArgumentParser

import pytest
import torch
from safetensors.torch import save_file

from commands.launch import run, set_by, with_flags
from commands.parsing import SettingsError


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="run_toy.py")
    for flag in ("--model", "--mask_ratio", "--eval_label_column"):
        parser.add_argument(flag)
    return parser


def reported(capsys, error: Exception, exit_code: int = 2) -> str:
    def main(argv: list[str]) -> None:
        raise error

    assert run([], main, build_parser) == exit_code
    return capsys.readouterr().err


def test_run__names_the_flag_of_an_argument(capsys):
    assert reported(capsys, ValueError("mask_ratio is 2")) == "run_toy.py: --mask_ratio is 2\n"
    assert reported(capsys, ValueError("`model` out is empty")) == "run_toy.py: --model out is empty\n"
    assert reported(capsys, SettingsError("x.yaml: mask_ratio is 2")) == "run_toy.py: x.yaml: mask_ratio is 2\n"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("lower mask_ratio.", "lower --mask_ratio."),
        ("lower `mask_ratio`, or use mask_ratio=0.5", "lower --mask_ratio, or use --mask_ratio=0.5"),
        ("`model` is a large model", "--model is a large model"),
        ("`norm_pix_loss` and mask_unit", "`norm_pix_loss` and mask_unit"),  # no flags of this command
        *(
            (text, text)
            for text in ("--mask_ratio is 2", "'mask_ratio'", "/photos/mask_ratio/1.png", "mask_ratio.txt")
        ),
        *((text, text) for text in ("my_mask_ratio", "config.mask_ratio", "mask_ratio-2", "`model.pt`")),
    ],
)
def test_with_flags__replaces_names_that_can_only_be_arguments(message, expected):
    assert with_flags(message, {"model": "model", "mask_ratio": "mask_ratio"}) == expected


def test_set_by__names_the_flag_that_sets_an_argument_of_another_name(capsys):
    with (
        pytest.raises(ValueError, match=r"^choose one with --eval_label_column$") as caught,
        set_by(label_column="eval_label_column"),
    ):
        raise ValueError("choose one with label_column")
    assert "choose one with --eval_label_column" in reported(capsys, caught.value)


def test_run__reports_what_the_system_refuses_and_what_is_safe(capsys, tmp_path):
    refused = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/checkpoint-8")
    refused.add_note("out/checkpoint-4 is complete")
    expected = (
        "run_toy.py: No space left on device: out/checkpoint-8; free some space on this disk; out/checkpoint-4 is "
        "complete\n"
    )
    assert reported(capsys, refused, exit_code=4) == expected
    out_of_memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
    assert "lower `per_device_train_batch_size` (CUDA out of memory)" in reported(capsys, out_of_memory, exit_code=4)


@pytest.fixture
def small_files():
    """Refuse writes beyond 64 KiB of a file, in the middle of a write as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("save", [save_file, torch.save], ids=["safetensors", "torch"])
def test_run__reports_a_disk_that_takes_no_more_whichever_library_meets_it(capsys, tmp_path, small_files, save):
    with pytest.raises(Exception, match=r".") as refused:
        save({"weight": torch.zeros(100_000)}, tmp_path / "file")
    message = reported(capsys, refused.value, exit_code=4)
    assert "File too large" in message or "is the disk full?" in message


def test_run__leaves_the_traceback_of_an_error_of_its_own():
    def main(argv: list[str]) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        run([], main, build_parser)

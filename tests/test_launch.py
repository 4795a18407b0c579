"""What a command reports of a mistake: arguments of the library under the names of its own flags."""

from argparse import ArgumentParser

import pytest

from commands.launch import run, set_by, with_flags
from commands.parsing import SettingsError


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="run_toy.py")
    for flag in ("--model", "--mask_ratio", "--eval_label_column"):
        parser.add_argument(flag)
    return parser


def reported(capsys, error: Exception) -> str:
    def main(argv: list[str]) -> None:
        raise error

    assert run([], main, build_parser) == 2
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

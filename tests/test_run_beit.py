"""BEiT by the command: with an image tokenizer of one's own, with its tokens kept, and without one."""

import json
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from pretraining_command import pretrain
from transformers import AutoModel, ViTConfig, ViTModel

from modeling.dvae import DvaeConfig, DvaeModel

SMALL = [
    "--method",
    "beit",
    "--model",
    "vit-nano",
    "--max_steps",
    "2",
    "--per_device_train_batch_size",
    "8",
    "--use_cpu",
]


def save_tokenizer(folder: Path, image_size: int) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_groups": 4, "num_blocks_per_group": 1, "decoder_input_size": 16}
    DvaeModel(DvaeConfig(image_size=image_size, vocab_size=32, **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    """64 pixels to 8 x 8 tokens, as many as vit-nano has patches."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"), 64)


def refusal(capsys, *argv: str) -> str:
    assert pretrain([*SMALL, *argv]) == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--cache_tokens"], ["--cache_tokens", "--validation_fraction", "0"]])
def test_run__writes_an_encoder_a_panel_and_the_accuracy(tokenizer, tmp_path, flags):
    folder = tmp_path / "out"
    more = ["--dataset", str(ROOT / "data/samples/photographs/held_out")] if "--validation_fraction" in flags else []
    argv = [*SMALL, "--tokenizer", tokenizer, "--output_dir", str(folder), "--mask_ratio", "0.3", *flags, *more]
    assert pretrain(argv) == 0
    assert type(AutoModel.from_pretrained(folder)).__name__ == "BeitModel"
    assert json.loads((folder / "pretraining" / "config.json").read_text())["vocab_size"] == 32
    assert list(folder.glob("panels/step-*.png"))
    assert len(list(folder.glob("targets-*-labels.npy"))) == ("--cache_tokens" in flags)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert any("accuracy" in entry for entry in history)


def test_refusals__say_what_to_do(tokenizer, tmp_path, capsys):
    folder = str(tmp_path / "out")
    message = refusal(capsys, "--output_dir", folder)
    assert all(choice in message for choice in ("run_tokenizer.py", "facebook/flava-image-codebook", "any model with"))
    message = refusal(capsys, "--output_dir", folder, "--tokenizer", save_tokenizer(tmp_path / "small", 32))
    assert "32 x 32 pixels into 4 x 4 tokens, but the encoder has 8 x 8 patches" in message
    assert "is neither a folder nor a Hub id" in refusal(
        capsys, "--output_dir", folder, "--tokenizer", str(tmp_path / "missing")
    )
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=32)).save_pretrained(tmp_path / "vit")
    message = refusal(capsys, "--output_dir", folder, "--tokenizer", str(tmp_path / "vit"))
    assert "ViTModel without get_codebook_indices" in message
    message = refusal(
        capsys, "--output_dir", folder, "--tokenizer", tokenizer, "--cache_tokens", "--crop_scale", "0.5", "1"
    )
    assert "leave out --crop_scale" in message
    message = refusal(capsys, "--output_dir", folder, "--method", "mae", "--cache_tokens")
    assert "--cache_tokens has no effect with --method mae" in message
    assert not Path(folder).exists()
    message = refusal(capsys, "--output_dir", folder, "--tokenizer", tokenizer, "--num_channels", "1")
    assert "reads images of 3 channels, but --num_channels is 1: use --num_channels 3" in message

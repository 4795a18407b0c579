"""Runs with `--init_from`: where they begin, the settings that they take from the source, and mistakes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from pretraining_command import pretrain
from test_init_from import DECODER, PHOTOGRAPHS, SIZES, features_of, own_run, pixels, saved
from torch.testing import assert_close
from transformers import AutoModel, ResNetConfig, ResNetModel, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from modeling import MODELS
from modeling.dvae import DvaeConfig, DvaeModel
from modeling.patches import sincos_positions

SHORT = ["--per_device_train_batch_size", "4", "--max_steps", "5", "--validation_fraction", "0", "--use_cpu"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    for photograph in PHOTOGRAPHS[:8]:
        shutil.copy(photograph, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    sizes = {"hidden_size": 16, "num_groups": 4, "num_blocks_per_group": 1, "decoder_input_size": 16}
    DvaeModel(DvaeConfig(image_size=32, vocab_size=16, **sizes)).save_pretrained(folder)
    return folder


def run(source: Path | str, out: Path, method: str, images: Path, *flags: str) -> int:
    own = ["--mask_strategy", "random-unit", "--mask_unit", "8"] if method == "simmim" else []
    if method == "mae":
        own = [text for name, size in DECODER.items() for text in (f"--{name}", str(size))]
    names = ["--init_from", str(source), "--method", method, "--output_dir", str(out), "--dataset", str(images)]
    return pretrain([*names, *SHORT, *own, *flags])


RUNS = {
    "ViT": "mae",
    "ViTMAE": "mae",
    "DeiT classifier": "simmim",
    "BEiT": "beit",
    "BEiT classifier": "simmim",
    "DINOv2": "simmim",
    "Data2VecVision": "simmim",
    "Swin": "simmim",
    "DINOv2 with SwiGLU": "mae",
    "DINOv2 with registers": "data2vec",
    "DINOv3": "dinov2",
}


@pytest.mark.parametrize(("kind", "method"), RUNS.items())
def test_run__of_five_steps_begins_with_the_features_of_the_source(kind, method, photographs, tokenizer, tmp_path):
    source = saved(tmp_path / "source", kind)
    flags = ["--tokenizer", str(tokenizer)] if method == "beit" else []
    assert run(tmp_path / "source", tmp_path / "out", method, photographs, *flags) == 0
    first = MODELS[method].from_pretrained(tmp_path / "out" / "checkpoint-0").eval()
    last = AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        begun, ended = first.encoder(pixels()).last_hidden_state, last(pixels()).last_hidden_state
    assert_close(begun, features_of(source, pixels()), rtol=1e-5, atol=1e-5)
    assert ended.shape == begun.shape
    assert not torch.equal(ended, begun)
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 5


# ---- position tables of zeros ----


def test_zero_tables__of_a_vit_mae_from_scratch_stop_the_run_and_are_repaired_when_asked(
    photographs, tmp_path, capsys
):
    folder, out = tmp_path / "fresh", tmp_path / "out"
    torch.manual_seed(0)
    ViTMAEForPreTraining(ViTMAEConfig(**SIZES, **DECODER)).save_pretrained(folder)
    assert run(folder, out, "mae", photographs) == 2
    assert "all position embeddings are zero" in (message := capsys.readouterr().err)
    assert "--repair_positions" in message
    assert not out.exists()
    assert run(folder, out, "mae", photographs, "--repair_positions") == 0
    assert "filled with sines and cosines" in capsys.readouterr().out
    head = MODELS["mae"].from_pretrained(out / "pretraining")
    assert_close(head.encoder.embeddings.position_embeddings.data, sincos_positions((4, 4), 32))
    assert_close(head.decoder_positions, sincos_positions((4, 4), 16))


# ---- settings of a run ----


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vit")
    saved(folder, "ViT")
    stats = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.25]}
    (folder / "preprocessor_config.json").write_text(json.dumps(stats))
    return folder


def test_run__takes_sizes_and_statistics_from_the_source_and_says_so(vit, photographs, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(vit, out, "mae", photographs, "--layer_decay", "0.5") == 0
    said = capsys.readouterr().out
    assert f"mean 0.5 0.5 0.5 and std 0.5 0.5 0.25, as {vit}" in said
    assert f"note: begins from {vit} (ViT): encoder\n" in said
    assert "note: new, since the source has none that fits: mask token, decoder\n" in said
    assert "note: not taken over: pooler\n" in said
    config = json.loads((out / "pretraining" / "config.json").read_text())
    assert config["image_std"] == [0.5, 0.5, 0.25]
    assert config["encoder_config"]["num_hidden_layers"] == 2
    recipe = yaml.safe_load((out / "settings.yaml").read_text())
    assert (recipe["init_from"], recipe["image_size"], recipe["patch_size"]) == (str(vit), 32, 8)
    assert "model" not in recipe
    card = (out / "README.md").read_text()
    assert vit.name in card
    assert str(vit) not in card
    assert run(vit, tmp_path / "auto", "mae", photographs, "--image_stats", "preset") == 0
    assert "mean and std of ImageNet" in capsys.readouterr().out


def test_run__with_layer_decay_moves_lower_layers_less(vit, photographs, tmp_path):
    flags = ["--layer_decay", "0.1", "--learning_rate", "1e-3", "--warmup_steps", "0"]
    assert run(vit, tmp_path / "out", "mae", photographs, *flags) == 0
    source, trained = ViTModel.from_pretrained(vit), ViTModel.from_pretrained(tmp_path / "out")
    lower, upper = (
        (after.mlp.fc1.weight - before.mlp.fc1.weight).norm()
        for before, after in zip(source.layers, trained.layers, strict=True)
    )
    assert 0 < lower < 0.3 * upper


def test_run__that_was_interrupted_continues_without_the_source(vit, photographs, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(vit, source)
    flags = ["--save_steps", "2"]
    assert run(source, out, "mae", photographs, *flags) == 0
    whole = MODELS["mae"].from_pretrained(out / "pretraining").state_dict()
    settings = (out / "settings.yaml").read_text()
    for folder in (out / "pretraining", out / "checkpoint-5", source):
        shutil.rmtree(folder)
    capsys.readouterr()
    assert run(source, out, "mae", photographs, *flags) == 0
    said = capsys.readouterr().out
    assert "continuing from" in said
    assert "begins from" not in said
    assert "other settings" not in said
    assert (out / "settings.yaml").read_text() == settings
    again = MODELS["mae"].from_pretrained(out / "pretraining").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


def test_mistakes__each_get_one_clear_message(vit, photographs, tmp_path, capsys):
    def refusal(source: Path | str, *flags: str, method: str = "mae") -> str:
        assert run(source, tmp_path / "out", method, photographs, *flags) == 2
        message = capsys.readouterr().err
        assert message.count("run_pretraining.py:") == 1
        assert "Traceback" not in message
        return message

    assert "--model contradicts" not in refusal(vit, "--patch_size", "16")
    assert "--patch_size 16 contradicts" in refusal(vit, "--patch_size", "16")
    assert "hidden_size is 192 instead of 32" in refusal(vit, "--model", "vit-nano")
    assert "--num_channels 1 contradicts" in refusal(vit, "--num_channels", "1")
    assert "nearest that are: 32 x 32 and 40 x 40" in refusal(vit, "--image_size", "33")
    assert "is neither a folder nor a Hub id" in refusal(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refusal(tmp_path / "empty")
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])).save_pretrained(tmp_path / "resnet")
    assert "is a model of type resnet" in refusal(tmp_path / "resnet")
    cut = tmp_path / "cut"
    shutil.copytree(vit, cut)
    content = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert "cannot be opened" in refusal(cut)
    own_run(tmp_path / "own")
    assert "--decoder_hidden_size 32 contradicts" in refusal(tmp_path / "own", "--decoder_hidden_size", "32")
    saved(tmp_path / "swin", "Swin")
    message = refusal(tmp_path / "swin")
    assert "merges patches" in message
    assert "Methods that can: simmim" in message
    (tmp_path / "vit").mkdir()
    shutil.copy(vit / "config.json", tmp_path / "vit")
    shutil.copy(vit / "model.safetensors", tmp_path / "vit")
    assert "no preprocessor_config.json" in refusal(tmp_path / "vit", "--image_stats", "source")
    assert not (tmp_path / "out").exists()
    for flags in (["--repair_positions"], ["--image_stats", "source"]):
        assert pretrain([*SHORT, *flags, "--output_dir", str(tmp_path / "out")]) == 2
        assert "--init_from" in capsys.readouterr().err

"""VQ-KD by the command: trained with a teacher, continued, given to BEiT v2, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from pretraining_command import pretrain
from transformers import AutoModel, BertConfig, BertModel, ViTConfig, ViTImageProcessorPil, ViTModel

import run_tokenizer
from commands.arithmetic import Hardware
from commands.launch import run
from commands.memory import Footprint
from commands.parsing import make_parser
from commands.settings import RECIPES, SettingsError
from commands.tokenizer_plan import TokenizerPlan
from commands.tokenizer_settings import VqkdSettings, load_tokenizer_settings
from modeling.vqkd import VqkdConfig

SIZES = ["--method", "vqkd", "--model", "vit-nano", "--image_size", "32", "--vocab_size", "32", "--code_size", "8"]
SMALL = [*SIZES, "--decoder_num_hidden_layers", "1", "--per_device_train_batch_size", "8", "--use_cpu"]
_TINY = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    """A ViT with 3 x 3 patches, where the tokenizer has 4 x 4."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(0)
    ViTModel(ViTConfig(**_TINY, image_size=24, patch_size=8), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 24, "width": 24}).save_pretrained(folder)
    return str(folder)


def train(*argv: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_tokenizer, "MIN_TOKENS", 1000)
        return run([*SMALL, *argv], run_tokenizer.main, lambda: make_parser(VqkdSettings))


def refusal(capsys, *argv: str) -> str:
    assert train(*argv) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


def state(folder: Path) -> dict[str, torch.Tensor]:
    return AutoModel.from_pretrained(folder).state_dict()


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher) -> Path:
    folder = tmp_path_factory.mktemp("run") / "out"
    assert train("--teacher", teacher, "--max_steps", "3", "--save_steps", "1", "--output_dir", str(folder)) == 0
    return folder


def test_run__writes_a_tokenizer_its_card_and_the_use_of_its_codes(finished):
    files = {path.name for path in finished.iterdir()}
    assert {"config.json", "model.safetensors", "vqkd.py", "codebook.py", "reconstructions.png", "README.md"} <= files
    facts = json.loads((finished / "codebook.json").read_text())
    assert 1 < facts["perplexity"] <= facts["num_alive"] <= facts["vocab_size"] == 32
    card = (finished / "README.md").read_text()
    assert "a VQ-KD as in [BEiT v2]" in card
    assert "cosine similarity to the teacher" in card
    history = json.loads((finished / "trainer_state.json").read_text())["log_history"]
    trained = [entry for entry in history if "loss" in entry]
    assert {"feature_loss", "commitment_loss", "num_alive", "perplexity"} <= trained[-1].keys()
    assert "kl_weight" not in trained[-1]
    assert not any(name.startswith("teacher") for name in state(finished))


def test_run__an_interrupted_one_ends_like_an_undisturbed_one(finished, teacher, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "out")
    whole = state(folder)
    shutil.rmtree(folder / "checkpoint-3")
    (folder / "config.json").unlink()
    assert train("--teacher", teacher, "--max_steps", "3", "--save_steps", "1", "--output_dir", str(folder)) == 0
    continued = state(folder)
    assert whole["codebook.counts"].any()
    for name, expected in whole.items():
        assert torch.equal(continued[name], expected), name


def test_overwrite__deletes_the_code_of_the_earlier_run_and_nothing_else(finished, teacher, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "out")
    (folder / "mine.py").touch()
    flags = [
        "--teacher",
        teacher,
        "--max_steps",
        "1",
        "--output_dir",
        str(folder),
        "--overwrite",
        "--restarts_dead_codes",
    ]
    assert train(*flags) == 0
    assert (folder / "mine.py").exists()
    assert AutoModel.from_pretrained(folder).config.restarts_dead_codes


def test_beit2__predicts_its_codes(finished, tmp_path):
    flags = ["--method", "beit2", "--model", "vit-nano", "--image_size", "32", "--max_steps", "2", "--use_cpu"]
    more = ["--per_device_train_batch_size", "8", "--tokenizer", str(finished), "--output_dir", str(tmp_path / "out")]
    assert pretrain([*flags, *more]) == 0
    assert type(AutoModel.from_pretrained(tmp_path / "out")).__name__ == "BeitModel"
    assert list((tmp_path / "out").glob("panels/step-*.png"))  # tokens as colors
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert any({"accuracy", "class_token_accuracy"} <= entry.keys() for entry in history)


def test_refusals__say_what_to_do(teacher, tmp_path, capsys):
    out = ["--output_dir", str(tmp_path / "out"), "--max_steps", "1"]
    message = refusal(capsys, *out)
    assert "VQ-KD needs a teacher" in message
    assert "openai/clip-vit-base-patch16" in message
    with pytest.raises(SettingsError, match="--teacher; use --method vqkd, which has it"):
        load_tokenizer_settings(["--teacher", "x"])
    assert "--teacher is hog, expected an encoder of images" in refusal(capsys, *out, "--teacher", "hog")
    assert "is neither a folder nor a Hub id" in refusal(capsys, *out, "--teacher", str(tmp_path / "missing"))
    BertModel(BertConfig(**_TINY, vocab_size=8)).save_pretrained(tmp_path / "bert")
    message = refusal(capsys, *out, "--teacher", str(tmp_path / "bert"))
    assert "is a BertModel, which reads input_ids; expected an encoder of images" in message
    message = refusal(capsys, *out, "--teacher", teacher, "--teacher_image_size", "8")
    assert "has a grid of 1 x 1 for images of 8 x 8 pixels" in message
    assert "choose a larger" in message
    assert "no flag --kl_weight; use --method dvae" in refusal(capsys, *out, "--teacher", teacher, "--kl_weight", "1")
    assert "--codebook_decay is 1.0" in refusal(capsys, *out, "--teacher", teacher, "--codebook_decay", "1")
    few = ["--vocab_size", "100000", "--dataset", str(ROOT / "data/samples/photographs/held_out")]
    assert "to start 100,000 codes from: give more" in refusal(capsys, *out, "--teacher", teacher, *few)
    assert not (tmp_path / "out" / "config.json").exists()


# ---- settings ----


def test_vqkd__has_the_published_constants():
    settings = load_tokenizer_settings(["--config", "vqkd_vit-base_in1k"])
    published = {
        "teacher": "openai/clip-vit-base-patch16",
        "vocab_size": 8192,
        "code_size": 32,
        "decoder_num_hidden_layers": 3,
        "codebook_decay": 0.99,
        "commitment_loss_weight": 1.0,
        "start_from_images": True,
        "restarts_dead_codes": False,
        "image_size": 224,
        "patch_size": 16,
        "crop_scale": [0.08, 1.0],
        "num_train_epochs": 100,
        "warmup_epochs": 10,
        "weight_decay": 1e-4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.99,
        "max_grad_norm": 0,
    }
    assert {name: settings.values[name] for name in published} == published
    hardware = Hardware("cuda", 96, world_size=8, num_local_processes=8, has_bf16=True)
    num_images = (1_281_167, 50_000)
    plan = TokenizerPlan.make(settings, hardware, num_images, Footprint(1, 1, 1, 1), "imagenet", (14, 14))
    assert (plan.images_per_step, plan.learning_rate) == (512, pytest.approx(2e-4))
    kwargs = json.loads(settings.values["lr_scheduler_kwargs"])
    assert kwargs["min_lr_rate"] * plan.learning_rate == pytest.approx(1e-5)
    assert f"{plan.num_steps:,} steps" in (RECIPES / "vqkd_vit-base_in1k.yaml").read_text(encoding="utf-8")
    config = VqkdConfig(**settings.config_settings(), feature_size=512)
    assert (config.encoder_config.hidden_size, config.grid) == (768, (14, 14))

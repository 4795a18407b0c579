"""One function opens what a folder or a Hub id names, and says in one line why it cannot."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from hub.export.native import export
from hub.open_model import open_config, open_model, open_whole_config
from modeling import MimConfig

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
MAE_SIZES = {**SIZES, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
_CODE = """
from pathlib import Path
from transformers import ViTConfig, ViTModel

Path("{marker}").touch()


class MyConfig(ViTConfig):
    model_type = "{model_type}"


class MyModel(ViTModel):
    config_class = MyConfig
"""


def saved(folder: Path, model: PreTrainedModel | None = None) -> str:
    (model or ViTModel(ViTConfig(**SIZES))).save_pretrained(folder)
    return str(folder)


def change_config(folder: str, **changes) -> None:
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refusal(name: Path | str, role: str = "model") -> str:
    with pytest.raises(ValueError, match=f"`{role}` {name}") as caught:
        open_model(str(name), role)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_name__that_is_neither_a_folder_nor_a_hub_id_is_refused(tmp_path):
    (tmp_path / "file").write_text("{}")
    for name in (tmp_path / "missing", "./missing", "a/b/c", "missing", tmp_path / "file"):
        assert "is neither a folder nor a Hub id (org/name)" in refusal(name, "tokenizer")
    assert "cannot be opened: " in refusal("org/missing")


def test_folder__that_is_no_model_is_explained(tmp_path):
    assert "it has no config.json" in refusal(tmp_path)
    (tmp_path / "weights.pth").touch()
    assert "python -m hub.convert" in refusal(tmp_path)
    (tmp_path / "checkpoint-20").mkdir()
    assert "its training has not finished" in refusal(tmp_path)
    (tmp_path / "pretraining").mkdir()
    (tmp_path / "pretraining" / "config.json").write_text("{}")
    assert "only the whole model in pretraining/" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\0" * 100, None])
def test_weights__that_are_truncated_or_absent_are_refused(content, tmp_path):
    weights = Path(saved(tmp_path)) / "model.safetensors"
    weights.unlink()
    if content is not None:
        weights.write_bytes(content)
    assert "cannot be opened: " in refusal(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"model_type": "nobody"}'])
def test_config__that_cannot_be_read_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert "cannot be opened: " in refusal(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModel": "mine.MyModel"}},
        {"model_type": "blip_vision_model", "auto_map": {"AutoModel": "mine.MyModel"}},
    ],
    ids=["config", "model"],
)
def test_code__of_a_repository_is_run_only_on_request_and_nobody_is_asked(settings, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question="": pytest.exit(f"asked: {question}"))
    folder, marker = tmp_path / f"from-{settings['model_type']}", tmp_path / "ran"
    ViTModel(ViTConfig(**SIZES)).save_pretrained(folder, save_original_format=False)
    change_config(str(folder), **settings)
    (folder / "mine.py").write_text(_CODE.format(marker=str(marker), model_type=settings["model_type"]))
    assert refusal(folder).endswith("cannot be opened: it needs Python code from its repository, which is not run")
    with pytest.raises(ValueError, match=r"if you trust it, add `trust_remote_code`$"):
        open_model(str(folder), trust_remote_code=False)
    assert not marker.exists()
    if settings["model_type"] == "mine":
        assert type(open_model(str(folder), trust_remote_code=True).model).__name__ == "MyModel"
        assert marker.exists()


class _RunsAProgram:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_weights__that_would_run_a_program_are_refused_in_one_line(tmp_path):
    (Path(saved(tmp_path)) / "model.safetensors").unlink()
    torch.save({"embeddings.cls_token": _RunsAProgram(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    assert "hold more than tensors, which could run a program" in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_config__that_makes_transformers_fail_in_any_way_is_refused(tmp_path):
    change_config(saved(tmp_path), model_type="maskformer-swin")  # a TypeError
    assert "cannot be opened: " in refusal(tmp_path)


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_weights__that_are_missing_or_do_not_fit_the_config_are_named(prefix, tmp_path):
    model = ViTForImageClassification(ViTConfig(**SIZES)) if prefix else ViTModel(ViTConfig(**SIZES))
    state = {name: value for name, value in model.state_dict().items() if "layers.1." not in name}
    model.save_pretrained(tmp_path / "less", state_dict=state)
    assert "lacks 16 weights of its ViTModel: layers.1." in refusal(tmp_path / "less")
    change_config(saved(tmp_path / "more", model), num_hidden_layers=1)
    assert f"weights that do not fit its config: {prefix}layers.1." in refusal(tmp_path / "more")


def test_weights__of_different_shapes_are_refused(tmp_path):
    change_config(saved(tmp_path), intermediate_size=32)
    assert "cannot be opened: " in refusal(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights__that_are_not_finite_are_refused(value, tmp_path):
    model = ViTModel(ViTConfig(**SIZES))
    torch.nn.init.constant_(model.layernorm.bias[3:4], value)
    assert refusal(saved(tmp_path, model)).endswith(
        "has NaN or infinite values in 1 of its weights: layernorm.bias ..."
    )


def test_positions__that_are_all_zero_are_refused(tmp_path):
    model = ViTMAEForPreTraining(ViTMAEConfig(**MAE_SIZES))
    assert "all position embeddings are zero" in refusal(saved(tmp_path, model))


def test_vit_mae__opens_as_a_vit_that_masks_nothing(tmp_path):
    model = ViTMAEForPreTraining(ViTMAEConfig(**MAE_SIZES))
    torch.nn.init.normal_(model.vit.embeddings.position_embeddings)
    encoder = open_model(saved(tmp_path, model)).model.eval()
    assert type(encoder) is ViTModel
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(encoder(images)[0], encoder(images)[0])


def test_pooler__is_kept_only_if_the_file_holds_it_and_no_random_number_is_drawn(tmp_path):
    before = torch.get_rng_state()
    assert open_model(saved(tmp_path / "encoder")).model.pooler is not None
    torch.set_rng_state(before)
    classifier = saved(tmp_path / "classifier", ViTForImageClassification(ViTConfig(**SIZES)))
    before = torch.get_rng_state()
    opened = open_model(classifier)
    assert torch.equal(torch.get_rng_state(), before)
    assert opened.model.pooler is None
    assert opened.unused == ["classifier.bias", "classifier.weight"]
    assert type(open_model(classifier, keeps_classifier=True).model) is ViTForImageClassification


def test_dtype__is_float32(tmp_path):
    name = saved(tmp_path, ViTModel(ViTConfig(**SIZES)).half())
    assert open_model(name).model.dtype == torch.float32


def test_text__models_are_refused(tmp_path):
    CLIPConfig().save_pretrained(tmp_path)
    assert "is a clip, expected an encoder for images only" in refusal(tmp_path)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    assert type(open_model(saved(tmp_path / "bert", BertModel(BertConfig(**sizes)))).model) is BertModel


def test_own_output__is_an_encoder_at_its_root_and_a_whole_model_below(tmp_path):
    model = tiny_model("mae")
    export(model, tmp_path, method="mae", recipe={})
    whole = str(tmp_path / "pretraining")
    assert type(open_config(str(tmp_path))) is ViTConfig
    config, subfolder = open_whole_config(str(tmp_path))
    assert isinstance(config, MimConfig)
    assert subfolder == "pretraining"
    assert open_whole_config(whole)[1] == ""
    with pytest.raises(ValueError, match="is a whole pre-training model; its encoder is in the parent folder"):
        open_config(whole, accepts_whole_model=False)
    state = open_model(whole).model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.encoder.state_dict().items())
    (tmp_path / "config.json").unlink()
    assert open_whole_config(str(tmp_path))[1] == "pretraining"
    shutil.rmtree(whole)
    with pytest.raises(ValueError, match=r"it has no config\.json"):
        open_whole_config(str(tmp_path))

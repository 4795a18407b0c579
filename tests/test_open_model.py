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

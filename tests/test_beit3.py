import warnings

import pytest
import torch
import yaml
from conftest import PATCH, ROOT, SIZE, TINY_MODELS, tiny_batch, train_whole_and_resumed
from mixed import mixed_trainer
from torch.testing import assert_close
from transformers import AutoModel, BeitModel, RobertaPreLayerNormModel

from hub.export.native import export
from hub.init_from import open_starting_model
from hub.init_weights import read_weights
from modeling.beit import BeitForPreTraining, BeitMimConfig
from modeling.beit3 import IGNORED, Beit3Config, Beit3ForPreTraining
from modeling.multiway import POOLER_SCALE

PAD, MASK, NUM_WORDS = 1, 4, 40
_TEXT = {"vocab_size": NUM_WORDS, "pad_token_id": PAD, "max_text_length": 12}


def multiway_model(**settings) -> Beit3ForPreTraining:
    torch.manual_seed(0)
    given = {"num_fusion_layers": 1, "text_config": _TEXT}
    model = Beit3ForPreTraining(Beit3Config(**TINY_MODELS["beit3"] | given | settings))
    for parameter in model.parameters():  # biases, and what starts at 0
        parameter.data += 0.05 * torch.randn(parameter.shape)
    return model


def words(num_texts=8, length=10, prefix=""):
    """Texts of different lengths, whose second and fourth word are masked."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, NUM_WORDS, (num_texts, length), generator=generator)
    lengths = torch.arange(num_texts) % 4 + length - 3
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.where(mask.bool(), ids, PAD)
    labels = torch.full_like(ids, IGNORED)
    labels[:, 1:5:2] = ids[:, 1:5:2]
    masked = torch.where(labels != IGNORED, MASK, ids)
    batch = {"input_ids": masked, "attention_mask": mask, "masked_words": labels, "num_masked_words": 2 * num_texts}
    return {f"{prefix}{name}": value for name, value in batch.items()}


def pairs():
    images = {f"pair_{name}": value for name, value in tiny_batch("beit3").items() if name != "image_index"}
    return images | words(prefix="pair_")


def gradients(model, batch) -> set[str]:
    model.zero_grad()
    model(**batch).loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def test_images_only__equal_beit_with_the_same_weights():
    ours = multiway_model().eval()
    encoder_config, weights = ours.encoder.as_native()
    beit = BeitForPreTraining(BeitMimConfig(encoder_config=encoder_config, vocab_size=16)).eval()
    heads = {name: value for name, value in ours.state_dict().items() if name.startswith("lm_head")}
    beit.load_state_dict({f"encoder.{name}": value for name, value in weights.items()} | heads, strict=True)
    batch = tiny_batch("beit3")
    expected, found = beit(**batch), ours(**batch)
    assert torch.equal(found.loss, expected.loss)
    assert torch.equal(found.logits, expected.logits)
    expected.loss.backward()
    found.loss.backward()
    ours_by_name = dict(ours.named_parameters())
    for name, parameter in beit.named_parameters():
        assert torch.equal(ours_by_name[name].grad, parameter.grad), name


def test_gradients__of_each_kind_of_batch_reach_its_experts_only():
    model, images = multiway_model(), tiny_batch("beit3")
    of_images = gradients(model, images)
    of_texts = gradients(model, images | words()) - of_images
    of_pairs = gradients(model, images | pairs()) - of_images
    text_names = {name for name in dict(model.named_parameters()) if ".experts.text." in name or "text_emb" in name}
    fusion_names = {name for name in dict(model.named_parameters()) if ".experts.fusion." in name}
    assert len(text_names) == 16
    assert len(fusion_names) == 6
    assert of_texts == text_names | {"word_bias"}
    assert of_pairs == {name for name in text_names if ".layers.1." not in name} | fusion_names | {"word_bias"}
    assert gradients(model, images | words() | pairs()) == {
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    }


def test_resume__of_images_texts_and_pairs_gives_the_same_weights_bit_by_bit(tmp_path):
    def make_trainer(folder, callbacks):
        steps = {"save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": 2}
        encoder = {"hidden_dropout_prob": 0.1, "drop_path_rate": 0.3}
        return mixed_trainer(folder, encoder, callbacks=callbacks, per_device_train_batch_size=4, **steps)

    whole, resumed = train_whole_and_resumed(make_trainer, tmp_path)
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], expected), name
    assert {"accuracy", "text_accuracy", "pair_accuracy", "pair_text_accuracy"} <= set(whole.state.log_history[0])


@torch.no_grad()
def test_losses__are_means_over_what_is_masked_and_their_sum():
    model = multiway_model().eval()
    batch = tiny_batch("beit3") | words() | pairs()
    output = model(**batch)
    assert sorted(output.losses) == ["image", "pair_image", "pair_text", "text"] == sorted(model.loss_counts(batch))
    assert_close(output.loss, sum(output.losses.values()))
    features = model.encoder.encode_text(batch["input_ids"], batch["attention_mask"])
    logits = features @ model.encoder.text_embeddings.word_embeddings.weight.T + model.word_bias
    assert_close(
        output.losses["text"], torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["masked_words"])
    )
    assert 0 <= model.summarize_metrics(output.metrics)["pair_text_accuracy"] <= 1


@torch.no_grad()
def test_pairs__words_see_the_image_and_padding_changes_nothing():
    model, batch = multiway_model().eval(), tiny_batch("beit3") | pairs()
    other = batch | {"pair_pixel_values": 255 - batch["pair_pixel_values"]}
    assert model(**batch).losses["pair_text"] != model(**other).losses["pair_text"]
    padded = dict(batch)
    for name, value in (("pair_input_ids", PAD), ("pair_attention_mask", 0), ("pair_masked_words", IGNORED)):
        padded[name] = torch.nn.functional.pad(batch[name], (0, 2), value=value)
    assert_close(model(**padded).losses, model(**batch).losses)


@torch.no_grad()
def test_export__both_paths_open_quietly_and_give_the_same_features(tmp_path):
    model, batch = multiway_model().eval(), tiny_batch("beit3") | words()
    export(model, tmp_path, method="beit3", recipe={})
    opened = {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("", "text"):
            opened[name], info = AutoModel.from_pretrained(tmp_path / name, output_loading_info=True)
            assert not any(info.values())
    assert type(opened[""]) is BeitModel
    assert type(opened["text"]) is RobertaPreLayerNormModel
    pixels = model.standardize(batch["pixel_values"])
    assert_close(opened[""](pixels).last_hidden_state, model.encoder(pixels).last_hidden_state, atol=1e-5, rtol=0)
    texts = {name: batch[name] for name in ("input_ids", "attention_mask")}
    ours, theirs = model.encoder.encode_text(**texts), opened["text"](**texts)
    tokens = texts["attention_mask"].bool()
    assert_close(theirs.last_hidden_state[tokens], ours[tokens], atol=1e-5, rtol=0)
    assert_close(theirs.pooler_output / POOLER_SCALE, ours[:, 0], atol=1e-5, rtol=0)
    again = Beit3ForPreTraining.from_pretrained(tmp_path / "pretraining").eval()
    assert torch.equal(again(**batch).loss, model(**batch).loss)


def test_export__that_fails_leaves_the_texts_tokenizer_in_its_place(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "tokenizer.json").touch()  # that of the run, which continues with it

    def fail(*args):
        raise RuntimeError("the exported model differs")

    monkeypatch.setattr("hub.export.native._verify", fail)
    with pytest.raises(RuntimeError, match="differs"):
        export(multiway_model(), tmp_path, method="beit3", recipe={})
    assert [path.name for path in sorted(tmp_path.rglob("*"))] == ["text", "tokenizer.json"]


def test_sub_layernorm__trains_and_leaves_to_pretraining_only(tmp_path):
    model, batch = multiway_model(use_sub_layernorm=True), tiny_batch("beit3") | words() | pairs()
    assert {n for n, p in model.named_parameters() if p.requires_grad} == gradients(model, batch)
    assert "use_sub_layernorm" in export(model.eval(), tmp_path, method="beit3", recipe={})
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["pretraining"]
    again = Beit3ForPreTraining.from_pretrained(tmp_path / "pretraining").eval()
    assert torch.equal(again(**batch).loss, model(**batch).loss)


def test_sub_layernorm__scales_the_initial_weights_as_in_the_released_code():
    stds = {}
    for use in (False, True):
        torch.manual_seed(0)
        config = Beit3Config(**TINY_MODELS["beit3"] | {"text_config": _TEXT, "num_fusion_layers": 1})
        config.use_sub_layernorm = use
        layer = Beit3ForPreTraining(config).encoder.layers[1]
        last = layer.experts["text"].mlp.fc2
        weights = {"q": layer.attention.q_proj, "fc1": layer.experts["text"].mlp.fc1, "fc2": last[1] if use else last}
        stds[use] = {name: linear.weight.std().item() for name, linear in weights.items()}
    grown = torch.tensor(4.0).log().sqrt().item()  # ln 2L of two blocks
    assert stds[True]["q"] == pytest.approx(stds[False]["q"], rel=0.1)
    assert stds[True]["fc1"] == pytest.approx(grown * stds[False]["fc1"], rel=0.1)
    assert stds[True]["fc2"] == pytest.approx(grown * 2 * stds[False]["fc2"], rel=0.1)  # BEiT divides by sqrt(2 * 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pair_text_mask_ratio": 1.0}, "pair_text_mask_ratio is 1.0, expected above 0 and below 1"),
        ({"num_fusion_layers": 3}, "num_fusion_layers is 3, expected 0 to 2"),
        ({"encoder_config": {"layer_scale_init_value": 0.1}}, "no LayerScale"),
    ],
)
def test_config__refuses_what_cannot_be_exported_or_trained(settings, message):
    sizes = {"encoder_config": {**TINY_MODELS["beit3"]["encoder_config"], **settings.pop("encoder_config", {})}}
    with pytest.raises(ValueError, match=message):
        Beit3Config(**{"text_config": _TEXT, "num_fusion_layers": 1} | settings | sizes)


def test_recipe__has_the_published_constants():
    recipe = yaml.safe_load((ROOT / "recipes" / "beit3.yaml").read_text(encoding="utf-8"))
    assert (recipe["mask_strategy"], recipe["mask_ratio"]) == ("block", 0.4)
    assert (recipe["text_mask_ratio"], recipe["pair_text_mask_ratio"]) == (0.15, 0.5)
    assert (recipe["adam_beta1"], recipe["adam_beta2"], recipe["adam_epsilon"]) == (0.9, 0.98, 1e-6)
    assert recipe["weight_decay"] == 0.05
    assert recipe["base_learning_rate"] * 2048 / 256 == pytest.approx(1e-3)
    encoder = Beit3Config().encoder_config
    assert (encoder.drop_path_rate, encoder.layer_norm_eps, encoder.layer_scale_init_value) == (0.1, 1e-5, 0)
    assert Beit3Config().num_fusion_layers == 3


def test_rectangular__images_only_leave_as_pretraining_because_the_native_class_needs_squares():
    sizes = {**TINY_MODELS["beit3"]["encoder_config"], "image_size": (SIZE, SIZE + PATCH)}
    model = multiway_model(encoder_config=sizes)
    assert "square images" in model.encoder.native_root_problem


def test_rectangular__continues_from_its_own_weights(tmp_path):
    sizes = {**TINY_MODELS["beit3"]["encoder_config"], "image_size": (SIZE, SIZE + PATCH)}
    model = multiway_model(encoder_config=sizes)
    export(model, tmp_path, method="beit3", recipe={})
    read = read_weights(open_starting_model(str(tmp_path), "beit3"), model).state
    assert read.keys() == model.state_dict().keys()
    assert all(torch.equal(read[name], value) for name, value in model.state_dict().items())

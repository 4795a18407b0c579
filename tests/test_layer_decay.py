"""Layer ids and decayed rates are those of the authors' code, for every encoder that is fine-tuned here."""

import pytest
import torch
from conftest import tiny_model
from transformers import (
    BeitConfig,
    BeitForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from training.layer_decay import layer_decay_groups, layer_id, layer_ids, layer_scales


def on_meta(model_class, config):
    with torch.device("meta"):
        return model_class(config)


def test_vit_base__has_the_14_ids_and_rates_of_the_authors():
    model = on_meta(ViTForImageClassification, ViTConfig())
    ids, scales = layer_ids(model), layer_scales(model, 0.65)
    assert len(scales) == 14
    assert scales[0] == pytest.approx(0.65**13)
    assert scales[0] == pytest.approx(0.00370, abs=5e-6)
    assert scales[12:] == [pytest.approx(0.65), 1.0]
    for name in ("cls_token", "position_embeddings", "patch_embeddings.projection.weight"):
        assert ids[f"vit.embeddings.{name}"] == 0
    for block in range(12):
        names = [name for name in ids if name.startswith(f"vit.layers.{block}.")]
        assert len(names) == 16
        assert {ids[name] for name in names} == {block + 1}
        assert scales[block + 1] == pytest.approx(0.65 ** (12 - block))
    after = ("vit.layernorm.weight", "vit.layernorm.bias", "classifier.weight", "classifier.bias")
    assert {ids[name] for name in after} == {13}


def test_beit_base__tables_of_blocks_go_with_them_and_a_shared_one_has_the_full_rate():
    per_block = layer_ids(on_meta(BeitForImageClassification, BeitConfig(use_relative_position_bias=True)))
    assert per_block["beit.layers.4.relative_position_bias.relative_position_bias_table"] == 5
    assert per_block["beit.layers.4.lambda_1"] == 5
    assert per_block["beit.pooler.layernorm.weight"] == 13
    shared = layer_ids(on_meta(BeitForImageClassification, BeitConfig(use_shared_relative_position_bias=True)))
    assert shared["beit.shared_position_bias.relative_position_bias_table"] == 13


def test_swin_base__blocks_count_through_the_stages_and_merging_goes_with_the_last_block_of_its_stage():
    config = SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32])
    ids = layer_ids(on_meta(SwinForImageClassification, config))
    table = "attention.relative_position_bias.relative_position_bias_table"
    for name, expected in {
        "embeddings.patch_embeddings.projection.weight": 0,
        "embeddings.norm.weight": 0,
        f"encoder.layers.0.blocks.0.{table}": 1,
        "encoder.layers.0.downsample.reduction.weight": 2,
        "encoder.layers.2.blocks.17.mlp.fc1.weight": 22,
        "encoder.layers.2.downsample.norm.weight": 22,
        "encoder.layers.3.blocks.1.mlp.fc2.bias": 24,
        "layernorm.weight": 25,
    }.items():
        assert ids[f"swin.{name}"] == expected, name
    assert ids["classifier.weight"] == 25


def test_dinov2__blocks_under_their_older_names_are_found():
    ids = layer_ids(on_meta(Dinov2ForImageClassification, Dinov2Config(num_hidden_layers=3)))
    assert ids["dinov2.encoder.layer.2.layer_scale1.lambda1"] == 3
    assert ids["dinov2.embeddings.mask_token"] == 0


def test_heads__only_the_encoder_is_decayed(variant):
    head = tiny_model(variant)
    ids = layer_ids(head)
    num_blocks = sum(getattr(head.config.encoder_config, "depths", [2]))
    outside = {number for name, number in ids.items() if not name.startswith("encoder.")}
    assert outside == {num_blocks + 1}
    assert set(ids.values()) == set(range(num_blocks + 2))


def test_groups__hold_every_trained_parameter_once_with_its_rate_and_its_weight_decay():
    head = tiny_model("simmim")
    head.encoder.embeddings.requires_grad_(False)
    decayed = {name for name, parameter in head.named_parameters() if parameter.ndim > 1}
    groups = layer_decay_groups(head, 0.1, 0.05, 0.5, decayed)
    trained = {name: parameter for name, parameter in head.named_parameters() if parameter.requires_grad}
    in_groups = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, in_groups)) == sorted(map(id, trained.values()))
    rate_and_decay = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    ids = layer_ids(head)
    for name, parameter in trained.items():
        expected = 0.1 * 0.5 ** (3 - ids[name]), 0.05 if name in decayed else 0.0
        assert rate_and_decay[id(parameter)] == (pytest.approx(expected[0]), expected[1]), name
    assert groups[0]["lr"] == 0.1


def test_layer_id__of_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"stem\.conv\.weight belongs to no known layer"):
        layer_id("stem.conv.weight", [12])

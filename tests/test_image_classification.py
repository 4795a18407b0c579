"""A classifier computes what its encoder computes, and leaves as a class of transformers that computes the same."""

import pytest
import torch
from conftest import tiny_model
from transformers import (
    AutoConfig,
    BeitConfig,
    Data2VecVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    ResNetConfig,
    SwinConfig,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from hub.open_model import open_model
from modeling.image_classification import (
    add_batch_norm,
    build_classifier,
    check_family,
    native_classifier,
    random_encoder,
)

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
}
SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "image_size": 32, "patch_size": 4}
DINO = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
# encoder's config, what the head reads, class of the result
KINDS = {
    "vit mean": (ViTConfig(**TINY), "mean", "BeitForImageClassification"),
    "vit class": (ViTConfig(**TINY), "class", "ViTForImageClassification"),
    "beit mean": (BeitConfig(**TINY, use_shared_relative_position_bias=True), "mean", "BeitForImageClassification"),
    "beit class": (BeitConfig(**TINY, use_relative_position_bias=True), "class", "BeitForImageClassification"),
    "swin": (SwinConfig(**SWIN), "mean", "SwinForImageClassification"),
    "deit": (DeiTConfig(**TINY), "class", "DeiTForImageClassification"),
    "dinov2": (Dinov2Config(**DINO), "class and mean", "Dinov2ForImageClassification"),
    "dinov2 with registers": (
        Dinov2WithRegistersConfig(**DINO),
        "class and mean",
        "Dinov2WithRegistersForImageClassification",
    ),
    "data2vec": (
        Data2VecVisionConfig(**TINY, use_shared_relative_position_bias=True),
        "mean",
        "Data2VecVisionForImageClassification",
    ),
}


def encoder_with_everything_drawn(config):
    """Biases, norms and tables too, so that a lost one shows."""
    torch.manual_seed(0)
    encoder = random_encoder(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder.eval()


def classifier_of(config, pooling, image_size=32):
    encoder = encoder_with_everything_drawn(config)
    drop_path = 0.0 if config.model_type == "deit" else 0.1
    classifier = build_classifier(
        encoder, ["cat", "dog", "owl"], image_size=image_size, pooling=pooling, drop_path_rate=drop_path
    )
    torch.nn.init.normal_(classifier.classifier.weight)
    return encoder, classifier.eval()


def images(num_channels=3, size=32):
    torch.manual_seed(1)
    return torch.randn(2, num_channels, size, size)


@pytest.mark.parametrize("image_size", [32, 48])
@pytest.mark.parametrize("kind", KINDS)
def test_native__class_opens_with_every_weight_and_gives_the_same_logits(kind, image_size):
    config, pooling, class_name = KINDS[kind]
    _, classifier = classifier_of(config, pooling, image_size)
    native = native_classifier(classifier)
    assert type(native).__name__ == class_name
    assert native.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    with torch.no_grad():
        difference = (native(images(size=image_size)).logits - classifier(images(size=image_size)).logits).abs().max()
    assert difference < 1e-6


@pytest.mark.parametrize("kind", ["vit mean", "vit class", "beit mean", "swin"])
@torch.no_grad()
def test_classifier__reads_the_features_of_the_encoder(kind):
    config, pooling, _ = KINDS[kind]
    encoder, classifier = classifier_of(config, pooling)
    tokens = encoder(images(), output_hidden_states=True)
    if kind == "vit class":
        features = tokens.last_hidden_state[:, 0]
    elif kind == "swin":
        features = tokens.last_hidden_state.mean(1)
    else:  # the mean of the last block's patches, without the encoder's own final norm
        norm = torch.nn.functional.layer_norm
        features = norm(tokens.hidden_states[-1][:, 1:].mean(1), (32,), eps=1e-6)
    torch.testing.assert_close(classifier.base_model(images()).pooler_output, features, atol=1e-5, rtol=0)


@torch.no_grad()
def test_gray_encoder__sees_a_color_image_as_its_gray_version():
    encoder, classifier = classifier_of(ViTConfig(**TINY, num_channels=1), "class")
    assert classifier.config.num_channels == 3
    gray = torch.einsum("bchw,c->bhw", images(), torch.tensor([0.299, 0.587, 0.114])).unsqueeze(1)
    features = encoder(gray).last_hidden_state[:, 0]
    torch.testing.assert_close(classifier.base_model(images()).pooler_output, features, atol=1e-5, rtol=0)


def test_shared_bias__becomes_a_table_of_each_block():
    encoder, classifier = classifier_of(*KINDS["beit mean"][:2])
    shared = encoder.shared_position_bias.relative_position_bias_table
    tables = [layer.relative_position_bias.relative_position_bias_table for layer in classifier.beit.layers]
    assert classifier.beit.shared_position_bias is None
    assert len({id(table) for table in tables}) == 2
    assert all(torch.equal(table, shared) for table in tables)


def test_swin__window_grows_with_the_image_where_that_is_a_whole_number():
    encoder = encoder_with_everything_drawn(SwinConfig(**{**SWIN, "image_size": 192, "window_size": 6}))
    sizes = {
        size: build_classifier(encoder, ["a", "b"], image_size=size, pooling="mean", drop_path_rate=0.0)
        for size in (224, 208)
    }
    assert {size: classifier.config.window_size for size, classifier in sizes.items()} == {224: 7, 208: 6}


def test_swin__that_transformers_cannot_run_is_refused():
    encoder = random_encoder(SwinConfig(**SWIN))
    with pytest.raises(ValueError, match="larger than the map of stages with 3 x 3 tokens"):
        build_classifier(encoder, ["a", "b"], image_size=20, pooling="mean", drop_path_rate=0.0)


def test_new_head__starts_near_zero_as_the_authors_do():
    torch.manual_seed(0)
    encoder = random_encoder(ViTConfig(**TINY))
    classifier = build_classifier(encoder, ["a"] * 50, image_size=32, pooling="mean", drop_path_rate=0.0)
    assert classifier.classifier.weight.std().item() == pytest.approx(2e-5, rel=0.1)
    assert not classifier.classifier.bias.any()


def test_drop_path__grows_from_the_first_block_to_the_last_and_is_off_in_evaluation():
    encoder = random_encoder(ViTConfig(**{**TINY, "num_hidden_layers": 3}))
    classifier = build_classifier(encoder, ["a", "b"], image_size=32, pooling="mean", drop_path_rate=0.2)
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in classifier.beit.layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2])
    torch.nn.init.normal_(classifier.classifier.weight)
    classifier.eval()
    pixel_values = images()
    assert torch.equal(classifier(pixel_values).logits, classifier(pixel_values).logits)
    classifier.train()
    assert any(not torch.equal(classifier(pixel_values).logits, classifier(pixel_values).logits) for _ in range(9))


def test_linear_probe__normalization_is_folded_into_the_head():
    _, classifier = classifier_of(*KINDS["vit class"][:2])
    add_batch_norm(classifier)
    classifier.train()
    for seed in range(5):
        torch.manual_seed(seed)
        classifier(3 + 2 * torch.randn(8, 3, 32, 32))
    classifier.eval()
    native = native_classifier(classifier)
    assert type(native.classifier) is torch.nn.Linear
    torch.testing.assert_close(native(images()).logits, classifier(images()).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("kind", "wishes", "message"),
    [
        ("swin", {"pooling": "class"}, "`pooling` is 'class', expected 'mean' for a swin encoder"),
        (
            "deit",
            {"pooling": "class", "drop_path_rate": 0.1},
            "drop_path_rate is 0.1, but transformers' deit has no drop path",
        ),
        ("vit mean", {"image_size": 30}, "30"),
    ],
)
def test_wish__that_cannot_be_is_refused(kind, wishes, message):
    encoder = random_encoder(KINDS[kind][0])
    settings = {"image_size": 32, "pooling": "mean", "drop_path_rate": 0.0, **wishes}
    with pytest.raises(ValueError, match=message):
        build_classifier(encoder, ["a", "b"], **settings)


def test_open__takes_a_stock_vit_mae_as_a_vit_and_refuses_one_without_positions(tmp_path):
    config = ViTMAEConfig(**TINY, decoder_hidden_size=16, decoder_num_hidden_layers=1, decoder_num_attention_heads=2)
    model = ViTMAEForPreTraining(config)
    model.save_pretrained(tmp_path / "zero")
    with pytest.raises(ValueError, match="all position embeddings are zero"):
        open_model(str(tmp_path / "zero"))
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.normal_()
    model.save_pretrained(tmp_path / "drawn")
    encoder = open_model(str(tmp_path / "drawn")).model.eval()
    classifier = build_classifier(encoder, ["a", "b"], image_size=32, pooling="mean", drop_path_rate=0.0).eval()
    assert torch.equal(classifier(images()).logits, classifier(images()).logits)  # no patch is hidden at random


def test_open__refuses_missing_weights_and_other_model_types(tmp_path):
    head = tiny_model("mae")
    config = head.encoder.config
    state = {name: tensor for name, tensor in head.encoder.state_dict().items() if not name.startswith("layers.1.")}
    head.encoder.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 16 weights of its ViTModel: layers\.1\."):
        open_model(str(tmp_path))
    config.model_type = "bert"
    with pytest.raises(ValueError, match=r"^`model` is a bert, expected one of beit, .*vit"):
        check_family(config)


def test_family__that_is_not_supported_is_reported_with_the_encoder_named_once(tmp_path):
    ResNetConfig().save_pretrained(tmp_path)
    for config, model in ((ResNetConfig(), "`model`"), (AutoConfig.from_pretrained(tmp_path), f"`model` {tmp_path}")):
        with pytest.raises(ValueError, match=rf"^{model} is a resnet, expected one of beit, .*vit"):
            random_encoder(config)

"""Native models for segmentation compute the features of the encoders, and the exported ones the same scores."""

import json

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForSemanticSegmentation,
    BeitConfig,
    Data2VecVisionConfig,
    Data2VecVisionModel,
    Dinov2Config,
    Dinov2Model,
    SwinConfig,
    ViTConfig,
)

from hub.encoder_states import as_beit_model
from hub.export.dense import export_dense
from modeling.encoders import BeitEncoder, SwinEncoder
from modeling.linear_segmentation import build_linear_segmenter, native_linear_segmenter
from modeling.mae import MaeEncoder
from modeling.segmentation import build_segmenter, native_segmenter, taps
from training.finetune_trainer import freeze

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
CLASSES = ("sky", "sea", "sand")
SHARES = torch.tensor([0.5, 0.5, 0.0])


def encoder_of(kind: str):
    torch.manual_seed(0)
    if kind == "vit":
        encoder = MaeEncoder(ViTConfig(**SIZES), add_pooling_layer=False)
        for layer in encoder.layers:
            torch.nn.init.normal_(layer.attention.k_proj.bias)  # which a BEiT does not have
    elif kind == "beit":
        encoder = BeitEncoder(BeitConfig(**SIZES, use_mask_token=True, use_shared_relative_position_bias=True))
        torch.nn.init.normal_(encoder.shared_position_bias.relative_position_bias_table)
    else:
        stages = {"embed_dim": 16, "depths": [2, 2, 2], "num_heads": [2, 4, 4], "window_size": 2}
        encoder = SwinEncoder(SwinConfig(**stages, image_size=32, patch_size=2))  # 4 x 4 patches in the last stage
    return encoder.eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["vit", "beit"])
def test_carrier__of_upernet_computes_the_features_of_all_blocks(kind, images):
    encoder = encoder_of(kind)
    segmenter = build_segmenter(encoder, CLASSES, image_size=32, drop_path_rate=0.1).eval()
    states = encoder(images, output_hidden_states=True).hidden_states
    backbone = segmenter.backbone
    found = backbone.beit(images, output_hidden_states=True).hidden_states
    assert backbone.config.out_indices == [1, 2, 3, 4]
    for expected, state in zip(states, found, strict=True):
        assert_close(state, expected, atol=1e-5, rtol=1e-5)
    patches = states[3][:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    assert_close(backbone(images).feature_maps[2], patches, atol=1e-5, rtol=1e-5)  # the level without resampling


@pytest.mark.parametrize("kind", ["dinov2", "data2vec"])
def test_carrier__of_other_encoders_is_a_beit_with_the_same_features(kind, images):
    torch.manual_seed(0)
    sizes = {**SIZES, "mlp_ratio": 2} if kind == "dinov2" else {**SIZES, "use_relative_position_bias": True}
    encoder = (
        Dinov2Model(Dinov2Config(**sizes))
        if kind == "dinov2"
        else Data2VecVisionModel(Data2VecVisionConfig(**sizes, use_mean_pooling=False))
    )
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    segmenter = build_segmenter(as_beit_model(encoder.eval()), CLASSES, image_size=32, drop_path_rate=0.1).eval()
    states = encoder(images, output_hidden_states=True).hidden_states
    found = segmenter.backbone.beit(images, output_hidden_states=True).hidden_states
    assert_close(found[-1], states[-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "beit", "swin"])
def test_linear_carrier__computes_the_last_features(kind, images):
    encoder = encoder_of(kind)
    segmenter = build_linear_segmenter(encoder, CLASSES, image_size=32).eval()
    (features,) = segmenter.backbone(images).feature_maps
    if kind == "vit":
        expected = encoder(images).last_hidden_state[:, 1:]
    elif kind == "beit":  # before its last norm
        expected = encoder(images, output_hidden_states=True).hidden_states[-1][:, 1:]
    else:
        expected = encoder(images).last_hidden_state
    assert_close(features.flatten(2).transpose(1, 2), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "beit", "swin"])
def test_native__linear_model_is_a_upernet_with_the_same_scores(kind, images):
    segmenter = build_linear_segmenter(encoder_of(kind), CLASSES, image_size=32)
    segmenter.calibrate([images], SHARES)
    (features,) = segmenter.backbone(images).feature_maps
    standardized = (features - segmenter.mean) * segmenter.scale
    assert_close(standardized.mean((0, 2, 3)), torch.zeros(features.shape[1]), atol=1e-4, rtol=0)
    assert_close(standardized.var((0, 2, 3), correction=0), torch.ones(features.shape[1]), atol=1e-2, rtol=0)
    expected = segmenter(images)["logits"]
    assert expected.abs().max() > 1e-3
    assert_close(native_linear_segmenter(segmenter)(images).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_native__upernet_has_the_same_scores(kind, images):
    segmenter = build_segmenter(encoder_of(kind), CLASSES, image_size=32, drop_path_rate=0.1)
    segmenter.calibrate([images], SHARES)
    outputs = segmenter.train()(images)
    assert len(list(segmenter.losses(outputs))) == 2
    segmenter.eval()
    assert_close(native_segmenter(segmenter)(images).logits, segmenter(images)["logits"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["beit", "swin"])
def test_export__opens_with_the_same_scores(kind, tmp_path):
    for number, build in enumerate((build_segmenter, build_linear_segmenter)):
        options = {} if number else {"drop_path_rate": 0.1}
        segmenter = build(encoder_of(kind), CLASSES, image_size=32, **options)
        native = native_linear_segmenter(segmenter) if number else native_segmenter(segmenter)
        stats = {"image_mean": [0.5], "image_std": [0.25]}  # of a grayscale encoder
        export_dense(  # which compares them
            native,
            tmp_path,
            trained=segmenter,
            auto_class=AutoModelForSemanticSegmentation,
            image_processor={"image_processor_type": "SegformerImageProcessor"},
            image_stats=stats,
            image_size=32,
            outputs=["logits"],
            origin=(None, {}),
        )
        assert json.loads((tmp_path / "preprocessor_config.json").read_text())["image_mean"] == [0.5] * 3


def test_calibration__standardizes_every_layer_and_stays_fixed(images):
    segmenter = build_segmenter(encoder_of("vit"), CLASSES, image_size=32, drop_path_rate=0.0)
    segmenter.calibrate([images], SHARES)
    for classifier in segmenter.classifiers:
        assert_close(classifier.bias.softmax(0), SHARES, atol=1e-3, rtol=0)
    norm = segmenter.decode_head.fpn_bottleneck.batch_norm
    outputs = []
    norm.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    mean = norm.running_mean.clone()
    segmenter.train()(images)
    assert outputs[0].mean().abs() < 0.05
    assert 0.5 < outputs[0].std() < 1.5
    assert torch.equal(norm.running_mean, mean)
    # A step does not depend on how its images are spread over micro-batches.
    parts = torch.cat([segmenter(image[None])["logits"] for image in images])
    assert_close(parts, segmenter(images)["logits"], atol=1e-4, rtol=1e-4)


def test_training__reaches_every_parameter(images):
    for kind in ("vit", "beit", "swin"):
        segmenter = build_segmenter(encoder_of(kind), CLASSES, image_size=32, drop_path_rate=0.0)
        segmenter.calibrate([images], SHARES)
        outputs = segmenter.train()(images)
        sum(logits.square().sum() for _, logits in segmenter.losses(outputs)).backward()
        without = [name for name, p in segmenter.named_parameters() if p.requires_grad and p.grad is None]
        assert not without


def test_freeze__keeps_the_encoder_or_its_first_blocks():
    segmenter = build_segmenter(encoder_of("vit"), CLASSES, image_size=32, drop_path_rate=0.5)
    freeze(segmenter, "partial", 1)
    trained = {name for name, parameter in segmenter.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[3] for name in trained if name.startswith("backbone.beit.layers.")} == {"3"}
    assert {name.split(".")[1] for name in trained if name.startswith("backbone.")} == {"beit", "fpn"}
    assert [layer.drop_path.drop_prob for layer in segmenter.base_model.layers[1:]] == [0, 0, 0.5]
    linear = build_linear_segmenter(encoder_of("swin"), CLASSES, image_size=32)
    freeze(linear, "linear", 1)
    trained = {name for name, parameter in linear.named_parameters() if parameter.requires_grad}
    assert trained == {"classifier.weight", "classifier.bias"}


def test_gradient_checkpointing__gives_the_same_gradients(images):
    segmenter = build_segmenter(encoder_of("vit"), CLASSES, image_size=32, drop_path_rate=0.0)
    segmenter.calibrate([images], SHARES)
    gradients = []
    for is_on in (False, True):
        if is_on:
            (getattr(segmenter, "activation_checkpointing_enable", None) or segmenter.gradient_checkpointing_enable)()
        segmenter.zero_grad()
        segmenter.train()(images)["logits"].square().mean().backward()
        gradients.append(segmenter.base_model.layers[0].mlp.fc1.weight.grad.clone())
    assert segmenter.base_model.layers[0].gradient_checkpointing
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_head_hidden_size__changes_the_head_only(kind, images):
    encoder = encoder_of(kind)
    whole, narrow = (
        build_segmenter(encoder, CLASSES, image_size=32, drop_path_rate=0.0, head_hidden_size=size).eval()
        for size in (None, 4)
    )
    assert narrow.decode_head.classifier.in_channels == narrow.config.hidden_size == 4
    assert narrow(images)["logits"].shape == whole(images)["logits"].shape
    for name, weight in whole.backbone.base_model.state_dict().items():
        assert torch.equal(narrow.backbone.base_model.state_dict()[name], weight), name


def test_taps__are_those_of_the_papers():
    assert taps(12) == [4, 6, 8, 12]
    assert taps(24) == [8, 12, 16, 24]
    assert taps(5) == [1, 2, 4, 5]
    with pytest.raises(ValueError, match="has 3 blocks"):
        taps(3)

"""The detector: the encoder in RF-DETR, its first boxes and its loss."""

import pytest
import torch
from torch.testing import assert_close
from train_detector import PATCH, SIDE, tiny_detector
from transformers import (
    BeitConfig,
    BeitModel,
    DeiTConfig,
    Dinov2Config,
    Dinov2Model,
    RfDetrForObjectDetection,
    SwinConfig,
    ViTConfig,
    ViTModel,
)

from commands.memory import in_training, measure_footprint
from modeling.detection import best_boxes, build_detector, check_encoder, native_detector, num_windowed_blocks
from modeling.patches import patch_grid
from modeling.positions import resize_positions
from training.finetune_trainer import freeze
from training.layer_decay import layer_ids

SIZES = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH}
ENCODERS = {
    "vit": lambda: ViTModel(ViTConfig(**SIZES, intermediate_size=64), add_pooling_layer=False),
    "gray": lambda: ViTModel(ViTConfig(**SIZES, intermediate_size=64, num_channels=1)),
    "beit": lambda: BeitModel(
        BeitConfig(**SIZES, intermediate_size=64, use_absolute_position_embeddings=True, layer_scale_init_value=0.4)
    ),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES, mlp_ratio=2, layerscale_value=0.3)),
    "swiglu": lambda: Dinov2Model(Dinov2Config(**SIZES, use_swiglu_ffn=True)),
}
BOX_SIZE = (0.25, 0.5)


@torch.no_grad()
def hidden_states(encoder, pixels) -> list[torch.Tensor]:
    """The outputs of all blocks on the patches, (B, D, h, w), after the encoder's final norm."""
    height, width = patch_grid(pixels.shape[-2:], encoder.config.patch_size)
    found = encoder(pixels, output_hidden_states=True).hidden_states[1:]
    return [encoder.layernorm(tokens)[:, 1:].transpose(1, 2).unflatten(2, (height, width)) for tokens in found]


@torch.no_grad()
def windowed_states(encoder, pixels, num_windows, windowed) -> list[torch.Tensor]:
    """The same of a larger image, where some blocks see windows, each with a class token of its own."""
    config, (height, width) = encoder.config, patch_grid(pixels.shape[-2:], encoder.config.patch_size)
    own = patch_grid(config.image_size, config.patch_size)
    table = resize_positions(encoder.embeddings.position_embeddings, own, (height, width))
    patches = encoder.embeddings.patch_embeddings.projection(pixels).flatten(2).transpose(1, 2)
    first, patches = encoder.embeddings.cls_token + table[:, :1], patches + table[:, 1:]
    sides = (num_windows, height // num_windows, num_windows, width // num_windows)
    windows = patches.unflatten(1, sides).transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, windows, patches, D)
    tokens = torch.cat([first[:, None].expand(*windows.shape[:2], 1, -1), windows], dim=2)
    features = []
    for number, layer in enumerate(encoder.layers):
        shape = tokens.shape
        tokens = layer(tokens.flatten(0, 1) if number in windowed else tokens.flatten(1, 2)).reshape(shape)
        rows = tokens[:, :, 1:].unflatten(1, (num_windows, num_windows)).unflatten(3, (sides[1], sides[3]))
        joined = rows.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (B, h, w, D)
        features.append(encoder.layernorm(joined).permute(0, 3, 1, 2))
    return features


@pytest.mark.parametrize("kind", ENCODERS)
def test_carrier__equals_the_patch_features_of_the_encoder(kind):
    torch.manual_seed(0)
    encoder = ENCODERS[kind]().eval()
    for parameter in encoder.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    vit = build_detector(encoder, ["a", "b"], image_size=SIDE, num_queries=4, box_size=BOX_SIZE).eval().base_model
    pixels = torch.randn(2, 3, SIDE, SIDE)
    if kind == "gray":  # as ITU-R 601 weighs the channels
        weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
        expected = hidden_states(encoder, (pixels * weights).sum(1, keepdim=True))
    else:
        expected = hidden_states(encoder, pixels)
    with torch.no_grad():
        found = vit(pixels).feature_maps
    assert vit.config.out_indices == [2, 3, 4, 5]
    for block, features in zip((2, 3, 4, 5), found, strict=True):
        assert_close(features, expected[block - 1], atol=1e-5, rtol=0)


def test_carrier__of_a_larger_image_has_windows_as_large_as_the_images_of_the_encoder():
    torch.manual_seed(0)
    encoder = ENCODERS["vit"]().eval()
    vit = build_detector(encoder, ["a", "b"], image_size=2 * SIDE, num_queries=4, box_size=BOX_SIZE).eval().base_model
    assert (vit.config.num_windows, vit.config.window_block_indexes) == (2, [0, 1])
    assert num_windowed_blocks(encoder.config) == 2
    pixels = torch.randn(2, 3, 2 * SIDE, 2 * SIDE)
    expected = windowed_states(encoder, pixels, num_windows=2, windowed=[0, 1])
    with torch.no_grad():
        for block, features in zip((2, 3, 4, 5), vit(pixels).feature_maps, strict=True):
            assert_close(features, expected[block - 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["finetune", "partial"])
def test_norm__that_an_encoder_has_not_gets_no_gradient_and_is_not_trained(mode):
    detector = build_detector(ENCODERS["beit"](), ["a", "b"], image_size=SIDE, num_queries=4, box_size=BOX_SIZE)
    freeze(detector, mode, num_trained_blocks=2)
    detector.train()(torch.randn(2, 3, SIDE, SIDE), labels=targets(1, 2)).loss.backward()
    for name, parameter in detector.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    is_trained = {name: p.requires_grad for name, p in detector.base_model.named_parameters()}
    assert not is_trained["layernorm.weight"]
    assert is_trained["encoder.layer.3.norm1.weight"]
    assert is_trained["encoder.layer.2.norm1.weight"] == (mode == "finetune")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (SwinConfig(), "is a swin, expected one of vit"),
        (BeitConfig(use_shared_relative_position_bias=True), "relative position biases"),
        (DeiTConfig(), "is a deit, expected one of vit"),
        (ViTConfig(hidden_size=32, num_attention_heads=2, intermediate_size=48), "MLP 1.5 times as wide"),
    ],
)
def test_encoder__that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_encoder(config)


# ---- the loss ----


def targets(*numbers: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    boxes = [0.2 + 0.3 * torch.rand(number, 4, generator=generator) for number in numbers]
    return [{"class_labels": torch.arange(len(each)) % 2, "boxes": each} for each in boxes]


def test_boxes__of_an_untrained_detector_are_as_large_as_asked_for():
    sizes = tiny_detector().eval()(torch.randn(3, 3, SIDE, SIDE)).pred_boxes[..., 2:]
    assert_close(sizes, torch.tensor([0.3, 0.4]).expand_as(sizes))


def test_loss__equals_that_of_transformers_where_every_image_has_boxes():
    detector, pixels, labels = tiny_detector(), torch.randn(3, 3, SIDE, SIDE), targets(1, 2, 3)
    native = RfDetrForObjectDetection(detector.config)
    native.load_state_dict(detector.state_dict())
    expected = native.train()(pixels, labels=labels).loss
    assert_close(detector.train()(pixels, labels=labels).loss, expected)
    assert native_detector(detector)(pixels).logits.shape == (3, detector.config.num_queries, 2)


def test_loss__does_not_depend_on_how_images_are_batched():
    detector, pixels, labels = tiny_detector(), torch.randn(4, 3, SIDE, SIDE), targets(2, 0, 3, 1)

    def total(some: slice) -> torch.Tensor:
        loss = detector(pixels[some], labels=labels[some]).loss
        return loss * detector.loss_counts({"targets": labels[some]})["loss"]

    detector.train()
    assert detector.loss_counts({"targets": labels}) == {"loss": 7}
    whole = total(slice(None))
    assert_close(total(slice(0, 1)) + total(slice(1, 2)) + total(slice(2, 4)), whole, rtol=1e-5, atol=1e-5)
    detector.eval()
    each = [detector(pixels[[i]], labels=[labels[i]]).loss for i in range(4)]
    assert_close(detector(pixels, labels=labels).loss, torch.stack(each).mean(), rtol=1e-5, atol=1e-5)


def test_gradient_checkpointing__gives_the_same_gradients():
    pixels, labels = torch.randn(2, 3, SIDE, SIDE), targets(1, 2)
    gradients = []
    for is_checkpointed in (False, True):
        detector = tiny_detector().train()
        if is_checkpointed:
            (getattr(detector, "activation_checkpointing_enable", None) or detector.gradient_checkpointing_enable)()
            assert all(layer.gradient_checkpointing for layer in detector.base_model.encoder.layer)
        detector(pixels, labels=labels).loss.backward()
        gradients.append([parameter.grad for parameter in detector.parameters()])
    assert_close(*gradients)


def test_plan__counts_the_queries_of_all_groups():
    detector, batch = tiny_detector(), {"pixel_values": torch.zeros(1, 3, SIDE, SIDE)}
    config = detector.config
    for_an_image = measure_footprint(detector.eval(), batch).flops_per_image
    trained = measure_footprint(in_training(detector), batch).flops_per_image
    feed_forward = 2 * config.d_model * config.decoder_ffn_dim * config.decoder_layers
    more_queries = (config.group_detr - 1) * config.num_queries
    assert trained > for_an_image + 3 * 2 * feed_forward * more_queries


def test_loss__of_certain_and_wrong_predictions_is_finite():
    detector = tiny_detector().train()
    with torch.no_grad():
        for head in (detector.class_embed, *detector.model.enc_out_class_embed):
            head.bias.fill_(200.0)
    loss = detector(torch.randn(1, 3, SIDE, SIDE), labels=targets(1)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)


@pytest.mark.parametrize("trains", [True, False])
def test_loss__of_boxes_that_are_no_numbers_is_none_so_that_the_guard_can_say_why(trains):
    detector = tiny_detector().train(trains)
    with torch.no_grad():
        detector.model.reference_point_embed.weight.fill_(torch.nan)
    assert not torch.isfinite(detector(torch.randn(2, 3, SIDE, SIDE), labels=targets(1, 0)).loss)


def test_layers__are_numbered_from_the_embeddings_and_a_frozen_encoder_leaves_the_detector():
    detector = tiny_detector()
    ids = layer_ids(detector)
    assert ids["model.backbone.backbone.embeddings.position_embeddings"] == 0
    assert ids["model.backbone.backbone.encoder.layer.1.layer_scale1.lambda1"] == 2
    last = max(ids.values())
    assert {ids[name] for name in ids if ".backbone.backbone." not in name} == {last}
    freeze(detector, "linear", 4)
    trained = {name for name, parameter in detector.named_parameters() if parameter.requires_grad}
    assert trained == {name for name in ids if ".backbone.backbone." not in name}


def test_best_boxes__equal_those_of_the_image_processor():
    from transformers.models.deformable_detr.image_processing_pil_deformable_detr import (
        DeformableDetrImageProcessorPil,
    )
    from transformers.utils import ModelOutput

    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(2, 50, 3, generator=generator), torch.rand(2, 50, 4, generator=generator)
    process = DeformableDetrImageProcessorPil().post_process_object_detection
    expected = process(ModelOutput(logits=logits, pred_boxes=boxes), threshold=0.0)
    for found, one in zip(best_boxes(logits, boxes), expected, strict=True):
        assert_close(found[:, :4], one["boxes"])
        assert_close(found[:, 4], one["scores"])
        assert found[:, 5].tolist() == one["labels"].tolist()

"""An EoMT computes what its encoder computes, and leaves as a class of transformers that computes the same."""

import pytest
import torch
from transformers import AutoModel, BeitConfig, ViTConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerHungarianMatcher

from modeling.image_classification import random_encoder
from modeling.instance_segmentation import (
    NO_OBJECT,
    build_instance_segmenter,
    mask_probability,
    match,
    native_instance_segmenter,
    segmentation_loss,
)
from modeling.schedules import Progress

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
}


def drawn_encoder(**settings):
    torch.manual_seed(0)
    encoder = random_encoder(ViTConfig(**TINY | settings))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return encoder.eval()


def segmenter_of(encoder, **settings):
    return build_instance_segmenter(
        encoder, ["cat", "dog", "owl"], **{"image_size": 32, "num_queries": 5, "drop_path_rate": 0.0} | settings
    ).eval()


@pytest.mark.parametrize("settings", [{}, {"qkv_bias": False}], ids=["biases", "no biases"])
def test_features__are_the_encoders_without_queries(settings):
    encoder, images = drawn_encoder(**settings), torch.randn(2, 3, 32, 32)
    segmenter = segmenter_of(encoder)
    with torch.no_grad():
        hidden = segmenter.embeddings(images)
        for layer in segmenter.layers:
            hidden = layer(hidden)
        expected = encoder(images).last_hidden_state
        torch.testing.assert_close(segmenter.layernorm(hidden), expected, atol=1e-5, rtol=1e-5)


def test_features__of_a_larger_image_and_of_a_gray_encoder():
    gray = drawn_encoder(num_channels=1)
    segmenter = segmenter_of(gray, image_size=64)
    assert segmenter.embeddings.position_embeddings.weight.shape == (64, 32)
    image = torch.randn(1, 1, 64, 64)
    ours = segmenter.embeddings.patch_embeddings(image.expand(-1, 3, -1, -1))
    torch.testing.assert_close(ours, gray.embeddings.patch_embeddings(image), atol=1e-5, rtol=1e-5)


def test_gradient_checkpointing__gives_the_same_gradients():
    segmenter, images = segmenter_of(drawn_encoder()).train(), torch.randn(2, 3, 32, 32)
    gradients = []
    for is_on in (False, True):
        if is_on:
            (getattr(segmenter, "activation_checkpointing_enable", None) or segmenter.gradient_checkpointing_enable)()
        segmenter.zero_grad()
        outputs = segmenter(images)
        (outputs.masks_queries_logits.square().mean() + outputs.class_queries_logits.square().mean()).backward()
        gradients.append([layer.mlp.fc1.weight.grad.clone() for layer in segmenter.layers])
    assert all(layer.gradient_checkpointing for layer in segmenter.layers)
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("probability", [0.0, 0.4, 0.6, 1.0])
def test_native__computes_the_same(probability):
    segmenter, images = segmenter_of(drawn_encoder()), torch.randn(2, 3, 32, 32)
    segmenter.attn_mask_probs.fill_(probability)
    native = native_instance_segmenter(segmenter)
    assert type(native).__name__ == "EomtForUniversalSegmentation"
    with torch.no_grad():
        ours, theirs = segmenter(images), native(images)
    for name in ("masks_queries_logits", "class_queries_logits"):
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-5, rtol=1e-5)


def test_step__does_not_depend_on_how_images_are_spread():
    segmenter = segmenter_of(drawn_encoder()).train()
    segmenter.before_step(Progress(40, 100, 10))
    assert 0 < segmenter.attn_mask_probs.min() < 1
    draw = torch.Generator().manual_seed(0)
    batch = {
        "masks": (torch.rand(3, 2, 32, 32, generator=draw) < 0.3).byte(),
        "classes": torch.tensor([[0, 2], [1, NO_OBJECT], [NO_OBJECT, NO_OBJECT]]),
    }
    images = torch.randn(3, 3, 32, 32, generator=draw)

    def loss(rows):
        part = {name: value[rows] for name, value in batch.items()}
        return segmentation_loss(segmenter, segmenter(images[rows]).layers, part)

    whole = loss(slice(None))
    parts = torch.stack([loss(slice(i, i + 1)) for i in range(3)])
    torch.testing.assert_close(whole, parts.mean())
    whole.backward()
    assert all(parameter.grad is not None for parameter in segmenter.parameters())


def test_loss__is_zero_for_perfect_masks_only():
    segmenter = segmenter_of(drawn_encoder())
    masks = torch.zeros(1, 2, 32, 32, dtype=torch.uint8)
    masks[0, 0, :16], masks[0, 1, 16:, :16] = 1, 1
    batch = {"masks": masks, "classes": torch.tensor([[2, 0]])}
    logits = torch.full((1, 5, 8, 8), -30.0)
    logits[0, 3, :4], logits[0, 1, 4:, :4] = 30.0, 30.0
    classes = torch.zeros(1, 5, 4)
    classes[0, :, 3], classes[0, 3], classes[0, 1] = 30.0, torch.tensor([0, 0, 30.0, 0]), torch.tensor([30.0, 0, 0, 0])
    assert segmentation_loss(segmenter, [(logits, classes)], batch) < 1e-3
    wrong = classes.flip(1)
    assert segmentation_loss(segmenter, [(logits, wrong)], batch) > 1


def test_matching__is_that_of_mask2former():
    segmenter = segmenter_of(drawn_encoder())
    masks = torch.zeros(1, 2, 32, 32)
    masks[0, 0, :16], masks[0, 1, 16:, :16] = 1, 1
    draw = torch.Generator().manual_seed(1)
    logits, classes = torch.randn(1, 5, 8, 8, generator=draw), torch.randn(1, 5, 4, generator=draw)
    matcher = Mask2FormerHungarianMatcher(cost_class=2.0, cost_mask=5.0, cost_dice=5.0, num_points=40_000)
    labels = [torch.tensor([2, 0])]
    ((queries, objects),) = matcher(logits, classes, [masks[0]], labels)
    small = torch.nn.functional.adaptive_avg_pool2d(masks, 8)[0].flatten(1)
    ours = match(segmenter.config, logits[0].flatten(1), classes[0], small, labels[0])
    assert [tuple(pair) for pair in zip(*(each.tolist() for each in ours), strict=True)] == [
        *zip(queries.tolist(), objects.tolist(), strict=True)
    ]


def test_loss__of_masks_that_are_no_numbers_is_none_so_that_the_guard_can_say_why():
    masks, classes = torch.full((1, 5, 4, 4), torch.nan), torch.zeros(1, 5, 4)
    batch = {"masks": torch.ones(1, 1, 16, 16, dtype=torch.uint8), "classes": torch.zeros(1, 1, dtype=torch.long)}
    assert segmentation_loss(segmenter_of(drawn_encoder()), [(masks, classes)], batch).isnan()


def test_mask_probability__falls_block_by_block():
    assert [mask_probability(0, block, 2) for block in range(2)] == [1, 1]
    assert [mask_probability(0.5, block, 2) for block in range(2)] == [0, 1]
    assert 0.5 < mask_probability(0.375, 0, 2) < 0.55
    assert [mask_probability(0.75, block, 2) for block in range(2)] == [0, 0]


def test_encoder__that_is_no_vit_or_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="is a beit, expected one of vit, vit_mae"):
        segmenter_of(AutoModel.from_config(BeitConfig(**TINY)))
    with pytest.raises(ValueError, match="intermediate_size is 48, expected a multiple of hidden_size 32"):
        segmenter_of(drawn_encoder(intermediate_size=48))

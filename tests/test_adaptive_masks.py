"""Masks that a model chooses: exact numbers, the teacher's attention, hints, hard patches, and the map of losses."""

import pytest
import torch
from conftest import TINY_MODELS, model_class, tiny_batch, tiny_model
from torch.testing import assert_close

from data.collators import MaskingCollator
from modeling.adaptive_masks import LossMap, choose_masks, hide_attended, hide_hard, with_class_attention

ADAPTIVE = [variant for variant in TINY_MODELS if variant.endswith(("+hard", "+attention"))]


def scores(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def first(*counts):
    """Masks (R, 16) of as many first patches."""
    return torch.arange(16) < torch.tensor(counts)[:, None]


def test_attended__are_the_most_attended_but_for_hints():
    masks, attention, noise = first(0, 1, 8, 15), scores(4, 16), scores(4, 16, seed=1)
    assert torch.equal(hide_attended(masks, attention, noise, 0.0).sum(1), masks.sum(1))
    order = attention[2].argsort(descending=True)
    assert set(hide_attended(masks, attention, noise, 0.0)[2].nonzero().flatten().tolist()) == set(order[:8].tolist())
    hinted = hide_attended(masks, attention, noise, 0.25)  # 2 of the 4 most attended
    assert torch.equal(hinted.sum(1), masks.sum(1))
    assert hinted[2, order[:4]].sum() == 2
    assert hinted[2, order[4:10]].all()
    assert not torch.equal(hinted, hide_attended(masks, attention, scores(4, 16, seed=2), 0.25))


def test_hard__are_a_share_and_the_rest_is_random():
    masks, hardness = first(*64 * [8]), scores(64, 16)
    hidden = hide_hard(masks, hardness, scores(64, 16, seed=1), 0.5)
    assert (hidden.sum(1) == 8).all()
    ranks = hardness.argsort(descending=True).argsort()
    assert hidden[ranks < 4].all()
    share = hidden[ranks >= 4].float().mean()  # 4 of 12
    assert share == pytest.approx(1 / 3)
    by_rank = torch.stack([hidden[ranks == rank].float().mean() for rank in range(4, 16)])
    assert by_rank.min() > 0.1  # whatever their hardness


def test_units__are_hidden_as_a_whole():
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :2, :2] = True
    hardness = torch.zeros(1, 2, 2)  # coarser than the grid
    hardness[0, 1, 1] = 1
    for noise in (scores(1, 4), scores(1, 16)):  # units of 2 x 2 patches, and patches
        chosen = choose_masks(mask.flatten(1), hardness, noise, (4, 4), lambda *given: hide_hard(*given, 1.0))
        assert torch.equal(chosen.view(4, 4), mask[0].flip(0, 1))
    with pytest.raises(ValueError, match="mask_noise has 5 values"):
        choose_masks(mask.flatten(1), hardness, scores(1, 5), (4, 4), lambda *given: hide_hard(*given, 1.0))


@pytest.mark.parametrize("variant", ["ibot+attention", "dinov2"])
@torch.no_grad()
def test_attention__is_that_of_the_eager_implementation(variant):
    model, batch = tiny_model(variant), tiny_batch(variant)
    pixels = model.standardize(batch["pixel_values"]).flatten(0, 1)
    tokens, attention = with_class_attention(model.teacher, lambda: model.teacher.tokens(pixels))
    assert torch.equal(tokens, model.teacher.tokens(pixels))
    model.teacher.set_attn_implementation("eager")
    expected = model.teacher(pixels, output_attentions=True).attentions[-1][:, :, 0].mean(1)
    assert_close(attention, expected)


@pytest.mark.parametrize("variant", ADAPTIVE)
def test_model__hides_equally_many_others_in_training_and_keeps_fixed_masks_in_evaluation(variant, monkeypatch):
    seen = []
    model, batch = tiny_model(variant), tiny_batch(variant)
    plain = {name: value for name, value in batch.items() if name != "mask_noise"}
    module = __import__(f"modeling.{model_class(variant).__module__.rpartition('.')[2]}", fromlist=["x"])
    for name in ("masked_indices", "visible_and_predicted_indices"):
        if hasattr(module, name):
            original = getattr(module, name)

            def spy(masks, *args, original=original):
                seen.append(masks.flatten(0, -2))
                return original(masks, *args)

            monkeypatch.setattr(module, name, spy)
    for mode, given in ((True, batch), (True, plain), (False, batch)):
        model.train(mode)(**given)
    chosen, drawn, fixed = seen
    assert torch.equal(drawn, fixed)
    assert torch.equal(chosen.sum(1), drawn.sum(1))
    assert not torch.equal(chosen, drawn)


def test_loss_map__learns_which_patches_are_hard_and_its_average_follows():
    torch.manual_seed(0)
    losses_of = LossMap(8, 3)
    losses_of.init_weights()
    pixels = torch.rand(32, 3, 32, 32)
    rough = scores(32, 16) < 0.5
    pixels = torch.where(rough.view(32, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3), pixels, 0.5)
    known, losses = (scores(32, 16, seed=1) < 0.75).float(), rough.float() + 0.1 * scores(32, 16, seed=2)
    optimizer = torch.optim.Adam(losses_of.predictor.parameters(), lr=3e-3)
    errors = []
    for _ in range(60):
        errors.append(losses_of.loss(pixels, losses, known))
        optimizer.zero_grad()
        errors[-1].backward()
        optimizer.step()
    assert errors[0] > 0.8  # 1 if all are predicted alike
    assert errors[-1] < 0.3


def test_prediction_ratio__is_refused():
    model, batch = tiny_model("mae+hard"), tiny_batch("mae+hard")
    with pytest.raises(ValueError, match="leave out prediction_ratio"):
        model(**batch, bool_predicted_pos=batch["bool_masked_pos"])


def test_settings__without_effect_are_refused():
    for variant, wrong in (("dino", {"attention_masks": True}), ("mae", {"hard_patch_share": 1.5})):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            model_class(variant).config_class(**{**TINY_MODELS[variant], **wrong})


def test_noise__belongs_to_image_and_epoch_and_changes_no_mask():
    items = [{"pixel_values": torch.zeros(3, 8, 8), "epoch": 1, "step": 0, "image_index": i} for i in range(3)]
    settings = {"grid": (4, 4), "mask_ratio": 0.5, "num_masks": 2, "strategy": "random-unit", "mask_unit": 2}
    collate = MaskingCollator(**settings, with_noise=True)
    batch = collate(items)
    assert batch["mask_noise"].shape == (3, 2, 4)
    assert len(batch["mask_noise"].unique()) == 24
    assert torch.equal(collate(items[1:])["mask_noise"], batch["mask_noise"][1:])
    assert torch.equal(MaskingCollator(**settings)(items)["bool_masked_pos"], batch["bool_masked_pos"])

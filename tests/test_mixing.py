"""Mixup, CutMix and erasing: what they do to images and targets, how often, and that a step repeats exactly."""

import numpy as np
import pytest
import torch

from data.augmentations import single_view
from data.classification import eval_view
from data.collators import stack_items
from data.images import ImageDataset
from data.labeled import open_labeled
from training.mixing import Mixing, smoothed_targets

SIDE, NUM_CLASSES = 28, 10


@pytest.fixture(scope="module")
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Eight standardized pictures of clothes in three channels, of different classes."""
    part = open_labeled("sample-fashion").test
    assert part is not None
    images = ImageDataset(part, single_view(eval_view((SIDE, SIDE), 1.0), 3))
    found = stack_items([images[index] for index in range(8)])
    return (found["pixel_values"].float() / 255 - 0.5) / 0.5, found["labels"]


def only(**changes: float) -> Mixing:
    off = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "label_smoothing": 0.0, "erasing_prob": 0.0}
    return Mixing(NUM_CLASSES, **{**off, **changes})


def test_targets__sum_to_one_and_smoothing_spreads_over_all_classes():
    targets = smoothed_targets(torch.tensor([2, 0]), 4, 0.1)
    torch.testing.assert_close(targets, torch.tensor([[0.025, 0.025, 0.925, 0.025], [0.925, 0.025, 0.025, 0.025]]))


@pytest.mark.parametrize("step", range(6))
def test_all_together__targets_sum_to_one_and_both_true_classes_get_their_share(batch, step):
    images, targets = Mixing(NUM_CLASSES)(*batch, step)
    assert images.shape == batch[0].shape
    torch.testing.assert_close(targets.sum(1), torch.ones(8))
    off = 0.1 / NUM_CLASSES
    others = targets.clone().scatter_(1, torch.stack([batch[1], batch[1].flip(0)], 1), off)
    torch.testing.assert_close(others, torch.full_like(others, off))


def test_mixup__blends_image_i_with_image_b_minus_1_minus_i(batch):
    pixels, labels = batch
    mixed, targets = only(mixup_alpha=0.8)(pixels, labels, 3)
    different = labels != labels.flip(0)
    share = targets[different][0, labels[different][0]]
    assert 0 < share < 1
    torch.testing.assert_close(mixed, share * pixels + (1 - share) * pixels.flip(0), atol=1e-6, rtol=1e-5)
    one_hot = torch.nn.functional.one_hot(labels, NUM_CLASSES).float()
    torch.testing.assert_close(targets, share * one_hot + (1 - share) * one_hot.flip(0))


@pytest.mark.parametrize("step", range(10))
def test_cutmix__pastes_one_box_and_the_targets_are_its_true_area(batch, step):
    pixels = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 3, SIDE, SIDE)
    labels = torch.arange(8)
    mixed, targets = only(cutmix_alpha=1.0)(pixels, labels, step)
    for index in range(8):
        pasted = mixed[index] == 7 - index
        assert ((mixed[index] == index) | pasted).all()
        assert targets[index, 7 - index].item() == pytest.approx(pasted.float().mean().item(), abs=1e-6)
        rows, columns = pasted[0].any(1).nonzero().flatten(), pasted[0].any(0).nonzero().flatten()
        assert pasted[0].sum() == len(rows) * len(columns)  # a box without holes
        if len(rows):
            assert rows[-1] - rows[0] + 1 == len(rows)


def test_shares__follow_their_distributions():
    pixels, labels = torch.zeros(2, 1, 64, 64), torch.tensor([0, 1])
    expected = np.random.default_rng(0)
    shares = np.array([only(mixup_alpha=0.8)(pixels, labels, step)[1][0, 0] for step in range(2000)])
    assert np.quantile(shares, [0.1, 0.5, 0.9]) == pytest.approx(
        np.quantile(expected.beta(0.8, 0.8, 100_000), [0.1, 0.5, 0.9]), abs=0.04
    )
    kept = np.array([only(cutmix_alpha=1.0)(pixels, labels, step)[1][0, 0] for step in range(2000)])
    assert kept.mean() > 0.55  # uniform would be 0.5, but a box near the border is cut off


def test_switch__half_of_the_batches_are_cutmix_and_mix_prob_leaves_some_alone(batch):
    pixels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, SIDE, SIDE)
    labels, mixing = torch.arange(4), only(mixup_alpha=0.8, cutmix_alpha=1.0, mix_prob=0.8)
    kinds = {"untouched": 0, "mixup": 0, "cutmix": 0}
    for step in range(1000):
        values = mixing(pixels, labels, step)[0][0].unique()
        kinds["untouched" if values.equal(torch.tensor([0.0])) else "cutmix" if 3.0 in values else "mixup"] += 1
    assert kinds["mixup"] / 1000 == pytest.approx(0.4, abs=0.06)
    assert kinds["cutmix"] / 1000 == pytest.approx(0.4, abs=0.06)


def test_erasing__a_quarter_of_the_images_get_one_box_of_normal_noise():
    pixels, labels = torch.full((400, 3, 64, 64), 9.0), torch.zeros(400, dtype=torch.int64)
    erased, targets = only(erasing_prob=0.25)(pixels, labels, 0)
    changed = erased != 9.0  # (B, C, H, W)
    hit = changed.flatten(1).any(1)
    assert hit.float().mean().item() == pytest.approx(0.25, abs=0.06)
    area = changed[hit][:, 0].float().mean((1, 2))
    assert area.min() > 0.015
    assert area.max() < 0.36
    noise = erased[changed]
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    for image in changed[hit]:
        assert image[0].equal(image[1])
        rows, columns = image[0].any(1), image[0].any(0)
        assert image[0].equal(rows[:, None] & columns)  # one full box
    assert targets[:, 0].eq(1).all()
    assert pixels.eq(9).all()  # the caller's batch is left alone


def test_draws__a_step_repeats_exactly_and_steps_and_processes_differ(batch):
    mixing = Mixing(NUM_CLASSES)
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    first, again = mixing(*batch, 7, 0, 0), mixing(*batch, 7, 0, 0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    for counters in ((8, 0, 0), (7, 1, 0), (7, 0, 1)):
        assert not torch.equal(mixing(*batch, *counters)[0], first[0])
    assert not torch.equal(Mixing(NUM_CLASSES, seed=1)(*batch, 7, 0, 0)[0], first[0])


def test_all_off__images_are_untouched_and_targets_one_hot(batch):
    images, targets = only()(*batch, 0)
    assert torch.equal(images, batch[0])
    assert torch.equal(targets, torch.nn.functional.one_hot(batch[1], NUM_CLASSES).float())


@pytest.mark.parametrize("num_images", [1, 5])
def test_odd_batches__work(batch, num_images):
    images, targets = Mixing(NUM_CLASSES)(batch[0][:num_images], batch[1][:num_images], 1)
    assert len(images) == num_images
    torch.testing.assert_close(targets.sum(1), torch.ones(num_images))


def test_low_precision__images_keep_their_type(batch):
    images, targets = Mixing(NUM_CLASSES)(batch[0].bfloat16(), batch[1], 1)
    assert images.dtype == torch.bfloat16
    assert targets.dtype == torch.float32


def test_mistakes__are_told(batch):
    with pytest.raises(ValueError, match=r"label_smoothing is 1.5, expected 0 to 1"):
        Mixing(NUM_CLASSES, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"mixup_alpha is -1, expected 0 \(off\) or more"):
        Mixing(NUM_CLASSES, mixup_alpha=-1)
    with pytest.raises(ValueError, match=r"the images are torch.uint8, expected standardized floats"):
        Mixing(NUM_CLASSES)(batch[0].to(torch.uint8), batch[1], 0)

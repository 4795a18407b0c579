"""Patch labels, segmentation probes of patch features and their figures."""

import numpy as np
import pytest
import torch
from conftest import tiny_model
from transformers import BitImageProcessorPil, ViTImageProcessorPil

from data.mask_codes import IGNORED
from evaluation.dense import (
    PIXELS,
    TRAINED,
    DenseRow,
    LabeledPatches,
    MaskedBatch,
    best_row,
    collect_patches,
    difference,
    fit_probe,
    measure,
)
from evaluation.dense_figures import choose_patches, similarity_figure
from evaluation.features import FrozenEncoder
from evaluation.iou import class_areas, mean_iou, pixel_confusion
from evaluation.patch_labels import majority_labels, patch_of_pixel, prepare_masks, raw_patches
from evaluation.preprocessing import Preprocessor


def test_majority__by_hand():
    mask = np.array([[1, 1, 2, 2], [1, 0, 2, IGNORED], [3, 3, IGNORED, IGNORED], [0, 0, IGNORED, IGNORED]])
    assert majority_labels(mask[None], (2, 2), 4).tolist() == [[1, 2, 0, IGNORED]]  # of a tie, the first class
    assert majority_labels(mask[None, :3, :3], (1, 1), 4).tolist() == [[1]]


def test_patch_of_pixel__of_a_grid_that_does_not_divide_the_image():
    patch = patch_of_pixel((5, 4), (2, 2))
    assert patch.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]


def test_raw_patches__are_the_pixels_of_each_patch():
    image = torch.arange(2 * 4 * 6.0).view(1, 2, 4, 6)
    patches = raw_patches(image, (2, 3))
    assert patches.shape == (1, 6, 8)
    assert patches[0, 4].tolist() == image[0, :, 2:, 2:4].flatten().tolist()
    assert raw_patches(torch.ones(1, 3, 32, 32), (1, 2)).shape == (1, 2, 3 * 8 * 8)


def test_masks__are_moved_like_their_images():
    mask = np.zeros((10, 20), np.uint8)
    mask[:, 12:] = 200
    resized = Preprocessor(BitImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}), 3)
    prepared = prepare_masks(resized, [mask])  # 8 x 16, of which 8 x 8 in the middle
    assert prepared.tolist() == [[[0] * 6 + [200] * 2] * 8]
    stretched = Preprocessor(ViTImageProcessorPil(size={"height": 4, "width": 5}), 3)
    assert prepare_masks(stretched, [mask]).tolist() == [[[0] * 3 + [200] * 2] * 4]
    padded = Preprocessor(BitImageProcessorPil(do_resize=False, crop_size={"height": 12, "width": 20}), 3)
    assert prepare_masks(padded, [mask])[0, :, 0].tolist() == [IGNORED] + [0] * 10 + [IGNORED]


def patches(num_images: int, per_image: int = 20, seed: int = 0) -> LabeledPatches:
    """Three classes that differ in the direction of their features, with a large value that all share."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (num_images * per_image,), generator=draw)
    features = 100 + torch.eye(3)[labels].repeat(1, 2) + 0.1 * torch.randn(len(labels), 6, generator=draw)
    return LabeledPatches(features, labels, torch.arange(num_images).repeat_interleave(per_image))


@pytest.mark.parametrize("probe", ["knn", "linear"])
@pytest.mark.parametrize("num_images", [10, 1])
def test_probe__finds_the_classes(probe, num_images):
    classify, chosen, iou = fit_probe(probe, patches(num_images), 3, seed=0)
    assert set(chosen) == ({"k", "temperature"} if probe == "knn" else {"learning_rate"})
    assert iou is None if num_images == 1 else iou > 0.95  # of one image, nothing is left to select with
    test = patches(3, seed=1)
    assert (classify(test.features).argmax(1) == test.labels).float().mean() > 0.95


def row(probe: str, source: str, predicted: np.ndarray, masks: np.ndarray, validation_iou: float | None) -> DenseRow:
    areas = np.stack([class_areas(pixel_confusion(*both, 2)) for both in zip(masks, predicted, strict=True)])
    return DenseRow(probe, source, {}, validation_iou, (2, 2), np.arange(len(masks)), areas, predicted, seed=0)


def test_row__has_the_score_of_all_pixels_and_a_paired_interval():
    masks = np.random.default_rng(0).integers(0, 2, (40, 4))
    wrong = np.where(np.arange(160).reshape(40, 4) % 5 == 0, 1 - masks, masks)
    good, bad = row("knn", TRAINED, masks, masks, 0.5), row("linear", TRAINED, wrong, masks, 0.9)
    assert good.score == 1 == good.interval[0]
    assert bad.score == mean_iou(pixel_confusion(masks, wrong, 2))
    low, high = bad.interval
    assert low < bad.score < high
    gain, (low, high) = difference(good, bad)
    assert gain == 1 - bad.score
    assert 0 < low < gain < high
    assert difference(bad, bad) == (0, (0, 0))
    assert best_row([good, bad, row("knn", PIXELS, masks, masks, 1.0)]) is bad  # by the validation, not by the test
    assert bad.as_result()["pixel_accuracy"] == 0.8


def test_measure__counts_pixels_and_what_patches_can_reach():
    masks = np.zeros((2, 4, 4), np.int64)
    masks[0, :2, :2], masks[1, 0, :2], masks[1, 3] = 1, 1, IGNORED
    batch = MaskedBatch([3, 5], torch.from_numpy(masks == 1)[:, None].float(), masks)
    shrink = {PIXELS: lambda pixels: raw_patches(pixels, (2, 2)).mean(2, keepdim=True).unflatten(1, (2, 2))}
    classify = {("knn", PIXELS): lambda features: torch.cat([0.2 - features, features], 1)}  # 1 above a tenth
    positions, found = measure(classify, shrink, [batch], 2)
    assert positions == [3, 5]
    grid, areas, predicted = found["knn", PIXELS]
    assert (grid, predicted.tolist()) == ((2, 2), [[1, 0, 0, 0], [1, 0, 0, 0]])
    assert areas[:, :, 1].tolist() == [[4, 4, 4], [2, 2, 4]]  # right, labeled, predicted
    _, areas, predicted = found["", "perfect"]
    assert predicted.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]  # two of four pixels are a tie, as are rows 2 and 3
    assert areas[1, :, 1].tolist() == [0, 2, 0]


def test_collect__takes_the_same_labeled_patches_of_all_sources():
    masks = np.full((1, 4, 4), IGNORED)
    masks[0, :2], masks[0, 0, 0] = 1, 0
    batch = MaskedBatch([7], torch.arange(16.0).view(1, 1, 4, 4), masks)
    whole = {name: lambda pixels: raw_patches(pixels, (2, 2)).unflatten(1, (2, 2)) for name in (TRAINED, PIXELS)}
    found = collect_patches(whole, [batch], 2, 1, seed=0)
    assert found[TRAINED].labels.tolist() == [1, 1]
    assert found[TRAINED].images.tolist() == [7, 7]
    assert sorted(found[PIXELS].features[:, 0].tolist()) == [0, 2]
    masks[:] = IGNORED
    with pytest.raises(ValueError, match="no patch of the training images has a label"):
        collect_patches(whole, [batch], 2, 1, seed=0)


def test_chosen_patches__are_inside_of_the_most_frequent_classes():
    labels = np.zeros((6, 6), np.int64)
    labels[1:4, 1:4], labels[5, 5], labels[0, 5] = 1, 2, IGNORED
    (_, second, third) = choose_patches(labels)
    assert (second, third) == ((2, 2), (5, 5))
    assert len(set(choose_patches(np.zeros((2, 2), np.int64)))) == 3  # three different ones of a single class
    assert len(choose_patches(np.full((2, 2), IGNORED))) == 3


def test_similarity__has_a_column_for_each_chosen_patch():
    encoder = tiny_model("mae").encoder
    frozen, processor = FrozenEncoder(encoder, encoder.config), Preprocessor(ViTImageProcessorPil(), 3)
    masks = np.zeros((2, 32, 32), np.int64)
    masks[:, :20, :20] = 1
    figure, text = similarity_figure(frozen, processor, torch.rand(2, 3, 32, 32), masks, 2)
    assert "similarity to patch 3" in text
    assert figure.width > figure.height > 2 * 32

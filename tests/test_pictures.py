"""Pictures: what is pasted, un-normalized and estimated, on photographs and with rectangular and gray images."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from commands.artifacts import draw_curve
from evaluation.pictures import panel_drawer, training_curve
from modeling.patches import patchify, unpatchify
from modeling.reconstruction import (
    checkerboard,
    estimate_statistics,
    reconstruction_views,
    target_statistics,
    unnormalize,
)

PHOTOGRAPHS = sorted((Path(__file__).parents[1] / "data/samples/photographs/train").glob("*.jpg"))
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FROM_ORIGINAL = "prediction, patch mean and std taken from the original"
FROM_VISIBLE = "prediction, statistics estimated from visible patches"
PASTED_ESTIMATED = "pasted, masked patches predicted, statistics estimated"

# height, width, channels, patch size
SHAPES = [(96, 96, 3, (16, 16)), (64, 96, 3, (8, 16)), (48, 32, 1, (16, 8))]


def photographs(height: int, width: int, num_channels: int, count: int = 3) -> torch.Tensor:
    """(B, C, H, W) in [0, 1]."""
    chosen = PHOTOGRAPHS[:: len(PHOTOGRAPHS) // count][:count]
    images = [Image.open(path).convert("RGB" if num_channels == 3 else "L").resize((width, height)) for path in chosen]
    arrays = [np.asarray(image).reshape(height, width, num_channels) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def random_masks(batch: int, num_patches: int, mask_ratio: float = 0.75) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, num_patches, generator=generator).argsort(dim=1) < int(mask_ratio * num_patches)


def standardize(images: torch.Tensor) -> torch.Tensor:
    num_channels = images.shape[1]
    mean, std = (torch.tensor(values[:num_channels]).view(1, -1, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


def setup(height, width, num_channels, patch_size):
    images = photographs(height, width, num_channels)
    masks = random_masks(len(images), (height // patch_size[0]) * (width // patch_size[1]))
    options = {"patch_size": patch_size, "image_mean": MEAN[:num_channels], "image_std": STD[:num_channels]}
    return images, masks, options


def hidden_pixels(masks, images, patch_size):
    num_values = patch_size[0] * patch_size[1] * images.shape[1]
    grid = (images.shape[2] // patch_size[0], images.shape[3] // patch_size[1])
    return unpatchify(masks[..., None].expand(-1, -1, num_values), patch_size, grid)


def normalized_target(images, patch_size):
    patches = patchify(standardize(images), patch_size)
    mean, std = target_statistics(patches)
    return (patches - mean) / std


def test_patchify__puts_rows_then_columns_then_channels():
    images = photographs(64, 96, 3)
    patches = patchify(images, (8, 16))
    assert patches.shape == (3, 8 * 6, 8 * 16 * 3)
    second_of_row_one = images[1, :, 8:16, 16:32]  # (C, ph, pw)
    torch.testing.assert_close(patches[1, 6 + 1], second_of_row_one.permute(1, 2, 0).flatten(), rtol=0, atol=0)
    assert torch.equal(unpatchify(patches, (8, 16), (8, 6)), images)


@pytest.mark.parametrize(("height", "width", "num_channels", "patch_size"), SHAPES)
@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_pasted_view__is_the_input_where_visible_and_the_prediction_where_hidden(
    height, width, num_channels, patch_size, norm_pix_loss
):
    images, masks, options = setup(height, width, num_channels, patch_size)
    predictions = patchify(standardize(images.flip(-1)), patch_size)
    views = reconstruction_views(images, masks, predictions, norm_pix_loss=norm_pix_loss, **options)
    *_, (_, prediction), (label, pasted) = views.items()
    hidden = hidden_pixels(masks, images, patch_size)
    assert label.startswith("pasted")
    assert torch.equal(pasted[~hidden], images[~hidden])
    assert torch.equal(pasted[hidden], prediction[hidden])
    assert torch.equal(views["masked"][hidden], checkerboard(images).expand_as(images)[hidden])
    assert torch.equal(views["masked"][~hidden], images[~hidden])
    if not norm_pix_loss:
        torch.testing.assert_close(prediction[hidden], images.flip(-1)[hidden])


@pytest.mark.parametrize(("height", "width", "num_channels", "patch_size"), SHAPES)
def test_normalized_targets__with_the_statistics_of_the_original_give_back_the_input(
    height, width, num_channels, patch_size
):
    images, masks, options = setup(height, width, num_channels, patch_size)
    patches = patchify(standardize(images), patch_size)
    target = normalized_target(images, patch_size)
    torch.testing.assert_close(unnormalize(target, *target_statistics(patches)), patches, rtol=1e-5, atol=1e-5)
    view = reconstruction_views(images, masks, target, norm_pix_loss=True, **options)[FROM_ORIGINAL]
    hidden = hidden_pixels(masks, images, patch_size)
    torch.testing.assert_close(view[hidden], images[hidden], rtol=0, atol=1e-5)


def test_target_statistics__are_those_of_the_authors_code():
    patches = patchify(standardize(photographs(32, 32, 1)), (4, 4))
    mean, std = target_statistics(patches)
    biased = patches.var(dim=-1, unbiased=False, keepdim=True)
    torch.testing.assert_close(std, (biased * 16 / 15 + 1e-6).sqrt())
    torch.testing.assert_close(mean[..., 0], patches.sum(dim=-1) / 16)


@pytest.mark.parametrize(("height", "width", "num_channels", "patch_size"), SHAPES)
def test_estimated_view__does_not_depend_on_hidden_pixels(height, width, num_channels, patch_size):
    images, masks, options = setup(height, width, num_channels, patch_size)
    target = normalized_target(images, patch_size)
    changed = torch.where(hidden_pixels(masks, images, patch_size), 1 - images.flip(0), images)
    before = reconstruction_views(images, masks, target, norm_pix_loss=True, **options)
    after = reconstruction_views(changed, masks, target, norm_pix_loss=True, **options)
    assert torch.equal(before[FROM_VISIBLE], after[FROM_VISIBLE])
    assert torch.equal(before[PASTED_ESTIMATED], after[PASTED_ESTIMATED])
    assert not torch.allclose(before[FROM_ORIGINAL], after[FROM_ORIGINAL], atol=0.1)


def test_estimated_statistics__follow_the_nearest_visible_patch():
    mean = torch.tensor([[[0.0], [9.0], [9.0], [9.0], [9.0], [1.0]]])  # one row; only its two ends are visible
    masks = torch.tensor([[False, True, True, True, True, False]])
    estimated, _ = estimate_statistics(mean, mean, masks, grid=(1, 6), patch_size=(16, 16))
    near, far = 1 / (1 + 4**4), 1 / (1 + (2 / 3) ** 4)
    expected = torch.tensor([0, near, 1 - far, far, 1 - near, 1])
    torch.testing.assert_close(estimated[0, :, 0], expected)


def test_estimated_statistics__measure_distance_in_pixels():
    mean = torch.tensor(
        [[[9.0], [1.0], [0.0], [9.0]]]
    )  # 2 x 2; the first patch is hidden, 32 px from 0 and 4 px from 1
    masks = torch.tensor([[True, False, False, True]])
    estimated, _ = estimate_statistics(mean, mean, masks, grid=(2, 2), patch_size=(32, 4))
    assert estimated[0, 0, 0] > 0.999


def test_estimated_statistics__beat_the_average_of_the_visible_patches_on_photographs():
    images = photographs(224, 224, 3, count=12)
    mean, std = target_statistics(patchify(standardize(images), (16, 16)))
    masks = random_masks(len(images), 196)
    for truth, estimate in zip(
        (mean, std), estimate_statistics(mean, std, masks, grid=(14, 14), patch_size=(16, 16)), strict=True
    ):
        visible = (~masks)[..., None]
        average = ((truth * visible).sum(dim=1, keepdim=True) / visible.sum(dim=1, keepdim=True)).expand_as(truth)
        assert (estimate - truth)[masks].square().mean() < 0.8 * (average - truth)[masks].square().mean()


def test_whole_image_predictions__are_drawn_like_patches():
    images, masks, options = setup(*SHAPES[1])
    whole = standardize(images.flip(-1))
    from_images = reconstruction_views(images, masks, whole, norm_pix_loss=False, **options)
    from_patches = reconstruction_views(images, masks, patchify(whole, (8, 16)), norm_pix_loss=False, **options)
    for label, view in from_images.items():
        assert torch.equal(view, from_patches[label])


def draw_panel(views, masks) -> Image.Image:
    draw = panel_drawer("mae", lambda model, batch: views)
    return draw(None, {"bool_masked_pos": masks}, 1200, 0.4)


@pytest.mark.parametrize(("height", "width", "num_channels", "patch_size"), [*SHAPES, (512, 256, 3, (16, 16))])
def test_panel__has_a_column_for_each_view_and_starts_with_the_input(height, width, num_channels, patch_size):
    images, masks, options = setup(height, width, num_channels, patch_size)
    target = normalized_target(images, patch_size)
    panels = [
        draw_panel(reconstruction_views(images, masks, target, norm_pix_loss=norm_pix_loss, **options), masks)
        for norm_pix_loss in (False, True)
    ]
    assert panels[1].width - panels[0].width >= 128  # the fifth column
    assert all(500 < panel.width < 1500 for panel in panels)
    assert all(panel.height < 3 * 256 + 150 for panel in panels)  # larger images are shrunk
    colors = np.asarray(panels[0].convert("RGB")).reshape(-1, 3)
    for level in (110, 145):  # of the checkerboard on hidden patches
        assert (abs(colors.astype(int) - level) <= 1).all(axis=1).mean() > 0.03


def test_panel__shows_at_most_eight_images():
    images = photographs(32, 32, 3, count=12)
    masks, predictions = random_masks(12, 4), torch.zeros(12, 4, 768)
    views = reconstruction_views(
        images, masks, predictions, patch_size=(16, 16), norm_pix_loss=True, image_mean=MEAN, image_std=STD
    )
    heights = [
        draw_panel({label: view[:count] for label, view in views.items()}, masks[:count]).height
        for count in (7, 8, 12)
    ]
    assert heights[0] < heights[1] == heights[2]


def test_views__refuse_what_has_no_picture():
    images, masks, options = setup(*SHAPES[0])
    target = normalized_target(images, (16, 16))
    with pytest.raises(ValueError, match="bool_masked_pos"):
        reconstruction_views(images, masks[:, 1:], target, norm_pix_loss=True, **options)
    with pytest.raises(ValueError, match="predictions are"):
        reconstruction_views(images, masks, target[:, 1:], norm_pix_loss=True, **options)
    with pytest.raises(ValueError, match="NaN"):
        reconstruction_views(images, masks, target / 0, norm_pix_loss=True, **options)
    with pytest.raises(ValueError, match="patches of 7 x 16"):
        reconstruction_views(images, masks, target, norm_pix_loss=True, **{**options, "patch_size": (7, 16)})


LONG_HISTORY = [{"loss": 1 / step, "learning_rate": 1e-4, "step": step} for step in range(1, 200)]


@pytest.mark.parametrize(
    "history",
    [
        [{"loss": 0.9, "step": 5}],
        [{"eval_loss": 0.9, "step": 5}],
        [*LONG_HISTORY, {"eval_loss": 0.5, "step": 199}, {"train_loss": 0.6, "step": 199}],
    ],
    ids=["one-training-point", "one-validation-point", "long"],
)
def test_training_curve__draws_the_losses(history, tmp_path):
    training_curve(history, tmp_path / "loss.png")
    with Image.open(tmp_path / "loss.png") as picture:
        assert picture.size == (1200, 675)
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    colorful = pixels.max(axis=2) - pixels.min(axis=2) > 60  # only the loss has a color; axes and text are gray
    assert colorful.sum() > 50


def test_training_curve__has_the_models_name_of_the_training_loss(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "plot", lambda axes, *values, label, **style: drawn.append(label) or [])
    for label in ({}, {"training_loss_label": "training loss, with the coding rate"}):
        state = SimpleNamespace(log_history=[{"loss": 0.9, "step": 5}])
        draw_curve(SimpleNamespace(state=state, model=SimpleNamespace(**label)), tmp_path)
    assert drawn == ["training loss", "training loss, with the coding rate"]


def test_training_curve__without_any_loss_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="eval_loss"):
        training_curve([{"train_loss": 0.5, "step": 3}], tmp_path / "loss.png")

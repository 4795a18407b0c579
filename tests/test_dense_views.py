"""Placements move images, masks and boxes alike."""

import numpy as np
import pytest
import torch
from PIL import Image

from data.dense_views import NUM_TRIES, Placement, RandomPlacement, draw_distortion, scaled_size, whole
from data.seeds import seeded_generator


def rectangle(width: int, height: int, box: tuple[int, int, int, int]) -> tuple[Image.Image, np.ndarray]:
    """A white rectangle on black, as an image and as a mask."""
    mask = np.zeros((height, width), np.uint8)
    left, top, right, bottom = box
    mask[top:bottom, left:right] = 1
    return Image.fromarray(mask * 255).convert("RGB"), mask


@pytest.mark.parametrize("fits", ["short", "long"])
@pytest.mark.parametrize("size", [(120, 80), (50, 90), (64, 64)])
def test_placement__moves_image_mask_and_box_alike(size, fits):
    width, height = size
    box = (10, 12, 40, 36)
    image, mask = rectangle(width, height, box)
    draw = RandomPlacement((64, 96), (0.4, 2.0), fits)
    seen = set()
    for seed in range(12):
        placement = next(draw.draw(width, height, seeded_generator(seed)))
        view = placement.image(image, (0, 0, 0), Image.Resampling.BILINEAR)
        labels = placement.labels(mask, fill=0)
        assert view.shape == (3, 64, 96)
        assert labels.shape == (64, 96)
        assert ((view[0].numpy() > 127) == labels).mean() > 0.97  # they may differ at edges
        (moved,) = placement.boxes(np.array([box], np.float32))
        rows, columns = labels.nonzero()
        if len(rows) > 20:
            found = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            np.testing.assert_allclose(moved, found, atol=1.01)
        back = placement.boxes_in_image(placement.boxes(np.array([[0.0, 0, width, height]])))[0]
        np.testing.assert_allclose(back, placement.box, atol=1e-3)
        seen.add(placement.is_flipped)
    assert seen == {False, True}


def test_placement__pads_what_the_image_does_not_fill():
    image, mask = rectangle(30, 20, (0, 0, 30, 20))
    placement = whole(30, 20, (64, 64), "long")
    assert placement.shown == (43, 64)
    view = placement.image(image, (1, 2, 3))
    assert view[:, 43:].unique(dim=1).squeeze().unique().tolist() == [1, 2, 3]
    assert (view[:, :43] == 255).all()
    labels = placement.labels(mask, fill=255)
    assert set(labels[43:].ravel()) == {255}
    flipped = Placement(placement.box, (43, 30), (64, 64), is_flipped=True)
    assert (flipped.labels(mask, 255)[:43, :30] == 1).all()  # padding stays at the right and at the bottom


def test_labels__keep_the_numbers_of_many_classes_and_of_several_masks():
    masks = np.arange(2 * 6 * 6, dtype=np.int32).reshape(2, 6, 6) + 300
    view = whole(6, 6, (12, 12), "stretch").labels(masks, fill=-1)
    np.testing.assert_array_equal(view, masks.repeat(2, axis=1).repeat(2, axis=2))


def test_whole__covers_or_fits_the_view():
    assert whole(200, 100, (64, 64), "short").size == (64, 128)
    assert scaled_size(200, 100, (64, 64), "long", 0.5) == (16, 32)
    assert whole(200, 100, (64, 64), "stretch").shown == (64, 64)


def test_random_placement__numbers_do_not_depend_on_the_image():
    draw = RandomPlacement((32, 32))
    for size in ((40, 50), (500, 300)):
        generator = seeded_generator(0)
        assert len(list(draw.draw(*size, generator))) == NUM_TRIES
        following = torch.rand(1, generator=generator)
        generator = seeded_generator(0)
        torch.rand(2 + 2 * NUM_TRIES, generator=generator)
        assert torch.equal(following, torch.rand(1, generator=generator))


def test_distortion__changes_each_color_property_for_half_of_the_images():
    drawn = [{which for which, _ in draw_distortion(seeded_generator(seed)).jitters} for seed in range(200)]
    for which in range(4):
        assert 70 < sum(which in found for found in drawn) < 130

"""Views of images with boxes: resizing, jitter, and batches."""

import numpy as np
import torch
from PIL import Image
from torch.testing import assert_close

from data.box_views import BoxViews, collate_boxes
from data.seeds import seeded_generator


def scene(width=120, height=80, box=(30, 20, 90, 60)) -> dict:
    """A white box on black, as a sample with that box and a crowd."""
    pixels = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = box
    pixels[top:bottom, left:right] = 255
    return {
        "image": raw(pixels),
        "boxes": torch.tensor([[left / width, top / height, right / width, bottom / height], [0.0, 0, 1, 1]]),
        "classes": torch.tensor([1, 0]),
        "areas": torch.tensor([0.25, 1.0]),
        "is_crowd": torch.tensor([False, True]),
    }


def raw(pixels: np.ndarray) -> bytes:
    return f"P6\n{pixels.shape[1]} {pixels.shape[0]}\n255\n".encode() + pixels.tobytes()


def test_views__stretch_the_image_and_move_its_boxes():
    item = BoxViews(48, None, [0, 0, 0], Image.Resampling.BILINEAR)(scene(), seeded_generator(0))
    assert_close(item["boxes"], torch.tensor([[0.5, 0.5, 0.5, 0.5]]))
    assert item["class_labels"].tolist() == [1]
    assert_close(item["labels"], torch.tensor([[30.0, 20, 90, 60, 1, 2400, 0], [0, 0, 120, 80, 0, 9600, 1]]))
    assert item["sizes"].tolist() == [120, 80]
    batch = collate_boxes([item | {"image_index": 0}, item | {"labels": item["labels"][:1], "image_index": 1}])
    assert batch["labels"].shape == (2, 2, 7)
    assert (batch["labels"][1, 1] == -100).all()
    assert len(batch["targets"]) == 2


def test_views__jitter_boxes_with_the_pixels():
    views = BoxViews(64, (0.3, 2.0), [9, 9, 9], Image.Resampling.BILINEAR)
    num_shown = 0
    for seed in range(20):
        item = views(scene(), seeded_generator(seed))
        white = (item["pixel_values"][0] > 127).nonzero()
        if len(item["boxes"]) and len(white):
            x, y, width, height = (64 * item["boxes"][0]).tolist()
            found = [white[:, 1].min(), white[:, 0].min(), white[:, 1].max() + 1, white[:, 0].max() + 1]
            expected = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
            np.testing.assert_allclose([float(value) for value in found], expected, atol=1.01)
            num_shown += 1
        assert len(item["labels"]) == 2
    assert num_shown > 10

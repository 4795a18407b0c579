import math
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.augmentations import CenterCrop, RandomResizedCrop, to_tensor
from data.crops import Box
from data.decoding import decode
from data.seeds import seeded_generator

PHOTOGRAPHS = sorted((Path(__file__).parents[1] / "data/samples/photographs/train").glob("*.jpg"))


def png(image: Image.Image) -> bytes:
    stream = BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def random_boxes(crop: RandomResizedCrop, width: int, height: int, num_boxes: int) -> Iterator[Box]:
    numbers = torch.rand(num_boxes, 40, generator=seeded_generator("boxes")).tolist()
    return (crop.choose_box(width, height, row) for row in numbers)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (64, 64), (1, 1), (7, 3)])
def test_random_resized_crop__stays_inside_and_keeps_area_and_ratio(width: int, height: int) -> None:
    for left, top, right, bottom in random_boxes(RandomResizedCrop((32, 32)), width, height, 500):
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        if min(width, height) > 50:  # rounding to whole pixels blurs the bounds for tiny pictures
            area, ratio = (right - left) * (bottom - top), (right - left) / (bottom - top)
            assert 0.19 < area / (width * height) <= 1
            assert 0.73 < ratio < 1.36


def test_random_resized_crop__draws_as_torchvision_does() -> None:
    # 1000 x 1000, area up to a half: every first try fits, so area and log ratio are uniform.
    crop = RandomResizedCrop((32, 32), scale=(0.2, 0.5))
    boxes = np.array(list(random_boxes(crop, 1000, 1000, 20_000)))
    widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    assert np.mean(widths * heights) / 1e6 == pytest.approx(0.35, abs=0.003)
    assert np.std(widths * heights) / 1e6 == pytest.approx(0.3 / math.sqrt(12), rel=0.02)
    assert np.mean(np.log(widths / heights)) == pytest.approx(0, abs=0.006)
    assert np.std(np.log(widths / heights)) == pytest.approx(2 * math.log(4 / 3) / math.sqrt(12), rel=0.02)
    assert np.mean(boxes[:, 0] / (1000 - widths)) == pytest.approx(0.5, abs=0.01)
    assert np.mean(boxes[:, 1] / (1000 - heights)) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(("width", "height", "box"), [(1000, 10, (494, 0, 507, 10)), (10, 1000, (0, 493, 10, 506))])
def test_random_resized_crop__falls_back_to_the_center(width: int, height: int, box: Box) -> None:
    for chosen in random_boxes(RandomResizedCrop((32, 32)), width, height, 20):
        assert np.abs(np.subtract(chosen, box)).max() <= 1


def test_random_resized_crop__mirrors_half_the_time() -> None:
    crop = RandomResizedCrop((64, 64), scale=(1, 1), ratio=(1, 1))
    data = PHOTOGRAPHS[0].read_bytes()
    views = [crop(data, 3, seeded_generator("flip", number)) for number in range(200)]
    kept = sum(torch.equal(view, views[0]) for view in views)
    assert 70 < kept < 130
    assert all(torch.equal(view, views[0]) or torch.equal(view, views[0].flip(2)) for view in views)


def test_random_resized_crop__repeats_with_its_generator_only() -> None:
    crop, data = RandomResizedCrop((48, 64)), PHOTOGRAPHS[0].read_bytes()
    state = torch.get_rng_state()
    first, again, other = (crop(data, 3, seeded_generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_random_resized_crop__takes_as_many_numbers_for_every_picture() -> None:
    ends = []
    for size in ((400, 300), (1000, 5), (1, 1)):
        generator = seeded_generator("numbers")
        RandomResizedCrop((8, 8))(png(Image.new("RGB", size)), 3, generator)
        ends.append(generator.get_state())
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("crop", [RandomResizedCrop((48, 80)), CenterCrop((48, 80))])
@pytest.mark.parametrize("picture_size", [(1, 1), (20, 9), (300, 200)])
def test_crops__are_contiguous_uint8_of_the_asked_size(
    crop: RandomResizedCrop | CenterCrop, num_channels: int, picture_size: tuple[int, int]
) -> None:
    data = png(Image.open(PHOTOGRAPHS[0]).resize(picture_size))
    pixels = crop(data, num_channels, seeded_generator(0))
    assert pixels.shape == (num_channels, 48, 80)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()


@pytest.mark.parametrize("size", [(64, 64), (40, 80), (80, 40)])
def test_center_crop__is_the_middle_undistorted(size: tuple[int, int]) -> None:
    data = PHOTOGRAPHS[0].read_bytes()
    image = decode(data, 3)
    left, top, right, bottom = CenterCrop(size).choose_box(image.width, image.height)
    assert (right - left) / (bottom - top) == pytest.approx(size[1] / size[0])
    assert left + right == pytest.approx(image.width)
    assert top + bottom == pytest.approx(image.height)
    assert left == pytest.approx(0) or top == pytest.approx(0)
    view = CenterCrop(size)(png(image), 3)
    expected = to_tensor(image.resize(size[::-1], Image.Resampling.BICUBIC, (left, top, right, bottom)))
    assert (view.int() - expected.int()).abs().float().mean() < 0.5


def test_to_tensor__keeps_rows_columns_and_colors_in_place() -> None:
    pixels = np.asarray(Image.open(PHOTOGRAPHS[0]).convert("RGB").resize((30, 20)))
    assert torch.equal(to_tensor(Image.fromarray(pixels)), torch.tensor(pixels).permute(2, 0, 1))


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": (0, 8)},
        {"size": (8,)},
        {"size": (8, 8), "scale": (0.5, 0.2)},
        {"size": (8, 8), "scale": (0, 1)},
        {"size": (8, 8), "ratio": (2, 1)},
    ],
)
def test_random_resized_crop__refuses_impossible_settings(arguments: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(ValueError, match=r"expected"):
        RandomResizedCrop(**arguments)  # type: ignore[arg-type]

"""Color changes against Pillow and colorsys step by step, their draws, and views that have them."""

import colorsys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.utils.data import DataLoader

import data.crops
from data import photometric
from data.augmentations import Views, build_views
from data.crops import load_crops, load_sized_crops, to_tensor
from data.images import ImageDataset, SourceSamples
from data.photometric import ColorChanges, draw_color_changes
from data.sampling import EpochSampler
from data.seeds import seeded_generator
from data.sources import open_source
from modeling.views import Photometric, View

PHOTOGRAPHS = sorted((Path(__file__).parents[1] / "data/samples/photographs/train").glob("*.jpg"))
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def photograph(number: int = 3, side: int = 64) -> Image.Image:
    return Image.open(PHOTOGRAPHS[number]).convert("RGB").resize((side, side))


def differences(changes: ColorChanges, image: Image.Image, expected: Image.Image) -> torch.Tensor:
    return (changes.apply(to_tensor(image)).int() - to_tensor(expected).int()).abs().float()


# ---- one change ----


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("change", [-0.4, -0.1, 0.3])
def test_jitter__equals_pillows_enhancers(which: int, change: float) -> None:
    image = photograph()
    expected = ENHANCERS[which](image).enhance(1 + change)
    assert differences(ColorChanges([(which, change)]), image, expected).max() <= 1


@pytest.mark.parametrize("turns", [-0.1, 0.07, 0.5])
def test_hue__equals_colorsys(turns: float) -> None:
    pixels = to_tensor(photograph(side=24)).float()
    pixels[:, 0] = torch.tensor([[0.0], [255.0], [255.0]])  # ties between channels
    pixels[:, 1] = 100.0  # gray

    def shifted(red: float, green: float, blue: float) -> tuple[float, float, float]:
        hue, saturation, value = colorsys.rgb_to_hsv(red, green, blue)
        return colorsys.hsv_to_rgb((hue + turns) % 1, saturation, value)

    expected = [shifted(*pixel) for pixel in pixels.flatten(1).T.tolist()]
    array = pixels.numpy().copy()
    photometric.shift_hue(array, turns)
    np.testing.assert_allclose(array.reshape(3, -1).T, expected, atol=1e-3)


@pytest.mark.parametrize("radius", [0.1, 0.7, 1.3, 2.0])
def test_blur__equals_pillows(radius: float) -> None:
    image = photograph()
    found = differences(ColorChanges(blur_radius=radius), image, image.filter(ImageFilter.GaussianBlur(radius)))
    assert found.mean() < 0.8  # Pillow rounds six times
    assert found[:, 6:-6, 6:-6].max() <= 3
    weights = np.array(photometric.blur_weights(radius))
    assert weights.sum() == pytest.approx(1)
    assert weights @ np.arange(-(len(weights) // 2), len(weights) // 2 + 1) ** 2 == pytest.approx(radius**2)


def test_blur__does_not_mix_rows_channels_or_opposite_sides() -> None:
    pixels = np.zeros((3, 20, 30), np.float32)
    pixels[0, :, :10], pixels[1, 15:] = 200, 100
    blurred = photometric.blur(pixels, 2.0)
    assert blurred[0, :, :4] == pytest.approx(200, abs=0.01)
    assert blurred[0, :, 16:] == pytest.approx(0)
    assert blurred[1, :9] == pytest.approx(0)
    assert blurred[1, -1, 0] == pytest.approx(blurred[1, -1, -1])
    assert blurred[2] == pytest.approx(0)


def test_gray_and_solarized__equal_pillows() -> None:
    image = photograph()
    assert differences(ColorChanges(is_solarized=True), image, ImageOps.solarize(image)).max() == 0
    assert differences(ColorChanges(is_gray=True), image, image.convert("L").convert("RGB")).max() <= 1


def test_large_crop__is_changed_in_parts_as_if_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = to_tensor(photograph())
    changes = ColorChanges([(3, 0.1), (1, 0.2)], blur_radius=1.5)
    at_once = changes.apply(pixels)
    monkeypatch.setattr(photometric, "_MAX_PIXELS", 1000)
    assert torch.equal(changes.apply(pixels), at_once)


def test_no_change__keeps_the_pixels() -> None:
    pixels = to_tensor(photograph())
    assert torch.equal(ColorChanges().apply(pixels), pixels)


def test_gray_image__has_no_saturation_or_hue() -> None:
    image = photograph().convert("L")
    expected = image.filter(ImageFilter.GaussianBlur(1.0))
    only_blurred = ColorChanges([(2, 0.2), (3, 0.1)], is_gray=True, blur_radius=1.0)
    assert differences(only_blurred, image, expected).mean() < 0.8
    brighter = ImageEnhance.Contrast(ImageEnhance.Brightness(image).enhance(1.2)).enhance(0.7)
    assert differences(ColorChanges([(0, 0.2), (1, -0.3)]), image, brighter).max() <= 2


# ---- drawn changes ----


def with_pillow(changes: ColorChanges, image: Image.Image) -> Image.Image:
    for which, change in changes.jitters:
        if which == 3:
            hue, *others = image.convert("HSV").split()
            shifted = hue.point([(level + round(256 * change)) % 256 for level in range(256)])
            image = Image.merge("HSV", (shifted, *others)).convert("RGB")
        else:
            image = ENHANCERS[which](image).enhance(1 + change)
    image = image.convert("L").convert("RGB") if changes.is_gray else image
    image = image.filter(ImageFilter.GaussianBlur(changes.blur_radius)) if changes.blur_radius else image
    return ImageOps.solarize(image) if changes.is_solarized else image


def test_drawn_changes__equal_a_chain_of_pillows() -> None:
    settings = Photometric(solarize_probability=(0.2,))
    for number in range(40):
        image, changes = photograph(number), draw_color_changes(settings, 0, seeded_generator(number))
        found = differences(changes, image, with_pillow(changes, image))
        # At the threshold of solarization, one level more or less is another color.
        assert found.median() <= 2
        assert found.mean() < (4 if changes.is_solarized else 2)


def test_draws__have_the_probabilities_and_ranges_asked_for() -> None:
    settings = Photometric(blur_probability=(1.0, 0.1, 0.5), solarize_probability=(0.0, 0.2))
    drawn = [
        [draw_color_changes(settings, number, seeded_generator(number, draw)) for draw in range(400)]
        for number in range(4)
    ]
    for share, blurred, solarized in zip(drawn, (1.0, 0.1, 0.5, 0.5), (0.0, 0.2, 0.2, 0.2), strict=True):
        assert np.mean([bool(one.jitters) for one in share]) == pytest.approx(0.8, abs=0.06)  # standard error 0.02
        assert np.mean([one.is_gray for one in share]) == pytest.approx(0.2, abs=0.06)
        assert np.mean([one.blur_radius > 0 for one in share]) == pytest.approx(blurred, abs=0.08 * (blurred < 1))
        assert np.mean([one.is_solarized for one in share]) == pytest.approx(solarized, abs=0.06 * (solarized > 0))
    every = [one for share in drawn for one in share]
    radii = [one.blur_radius for one in every if one.blur_radius]
    assert 0.1 <= min(radii) < 0.2
    assert 1.9 < max(radii) <= 2.0
    for which, limit in enumerate(settings.color_jitter):
        changes = [dict(one.jitters)[which] for one in every if one.jitters]
        assert -limit <= min(changes) < -0.95 * limit
        assert 0.95 * limit < max(changes) <= limit
    orders = [tuple(which for which, _ in one.jitters) for one in every if one.jitters]
    assert len(set(orders)) == 24
    assert max(map(orders.count, set(orders))) < 90  # 53 on average


# ---- views ----


VIEWS = [
    View(num_crops=2, crop_scale=(0.3, 1.0), photometric=Photometric(blur_probability=(1.0, 0.1))),
    View("local_pixel_values", 3, (16, 24), (0.05, 0.3), Photometric()),
]


def transform(train: bool = True, views: list[View] = VIEWS) -> Views:
    return build_views(views, image_size=(32, 48), crop_scale=(0.2, 1.0), num_channels=3, train=train)


def dataset(train: bool = True, seed: int = 0) -> ImageDataset:
    samples = SourceSamples(open_source("sample"), np.arange(8))
    return ImageDataset(samples, transform(train), train=train, seed=seed)


def assert_same(one: dict, other: dict) -> None:
    assert one["pixel_values"].equal(other["pixel_values"])
    assert one["local_pixel_values"].equal(other["local_pixel_values"])


def test_views__depend_on_seed_epoch_and_image_only() -> None:
    images = dataset()
    sampler = EpochSampler(8)
    sampler.set_epoch(2)
    for num_workers, batch_size in ((0, 8), (1, 3)):
        for batch in DataLoader(images, batch_size, sampler=sampler, num_workers=num_workers):
            assert batch["pixel_values"].shape[1:] == (2, 3, 32, 48)
            assert batch["local_pixel_values"].shape[1:] == (3, 3, 16, 24)
            for number, image_index in enumerate(batch["image_index"].tolist()):
                assert_same(images.item(image_index, 2), {key: value[number] for key, value in batch.items()})
    for other in (images.item(5, 3), images.item(6, 2), dataset(seed=1).item(5, 2)):
        assert not images.item(5, 2)["local_pixel_values"].equal(other["local_pixel_values"])


@pytest.mark.parametrize("train", [True, False])
def test_views__decode_an_image_once(train: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bytes] = []
    opened = data.crops.opened
    monkeypatch.setattr(data.crops, "opened", lambda content: (calls.append(content), opened(content))[1])
    content = PHOTOGRAPHS[0].read_bytes()
    transform(train).several({"image": content}, [seeded_generator(number) for number in range(2)])
    assert calls == [content]


def test_views__change_colors_in_training_only_and_in_place_of_the_runs_jitter() -> None:
    content = {"image": PHOTOGRAPHS[0].read_bytes()}
    plain = [view._replace(photometric=None) for view in VIEWS]
    for number in range(4):
        assert_same(*(transform(False, views)(content, seeded_generator(number)) for views in (VIEWS, plain)))
    run = {"image_size": (32, 48), "crop_scale": (0.2, 1.0), "num_channels": 3, "train": True}
    jittered = build_views(VIEWS, color_jitter=0.4, **run)(content, seeded_generator(0))
    assert_same(transform()(content, seeded_generator(0)), jittered)
    unchanged = transform(True, plain)(content, seeded_generator(0))
    assert not unchanged["pixel_values"].equal(jittered["pixel_values"])


def test_crops__of_several_sizes_have_the_pixels_that_each_needs() -> None:
    content = PHOTOGRAPHS[0].read_bytes()
    assert Image.open(PHOTOGRAPHS[0]).size == (256, 256)
    views = [((32, 32), Image.Resampling.BICUBIC)], [((32, 32), Image.Resampling.BICUBIC)]
    boxes = (0, 0, 256, 256), (10, 20, 50, 60)  # decoded at 1/8 scale alone, and whole
    large, small = load_sized_crops(content, lambda *size: list(zip(boxes, views, strict=True)), 3)
    assert small[0].equal(load_crops(content, lambda *size: [boxes[1]], views[1], 3)[0][0])
    alone = load_crops(content, lambda *size: [boxes[0]], views[0], 3)[0][0]
    assert 0 < (large[0].float() - alone.float()).abs().mean() < 4

"""RandAugment against timm's own operations, and that its draws depend on the generator alone."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.randaugment import APPLY, ARGUMENT, NAMES, RandAugment
from data.seeds import seeded_generator

GOLDEN = Path(__file__).parent / "golden" / "randaugment.png"
TILE = 24
IMAGENET_MEAN = (0.485, 0.456, 0.406)


def tiles() -> np.ndarray:
    """(2, 16, 24, 24, 3): by sign (+, -), a photograph and what timm 1.0.31 makes of it, operation by operation."""
    pixels = np.asarray(Image.open(GOLDEN).convert("RGB"))  # (48, 384, 3)
    return pixels.reshape(2, TILE, 16, TILE, 3).transpose(0, 2, 1, 3, 4)


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("name", NAMES)
def test_golden__each_operation_at_magnitude_9_makes_timm_s_pixels(name, sign):
    photograph, *expected = tiles()[0 if sign > 0 else 1]
    image = Image.fromarray(photograph)
    result = APPLY[name](image, ARGUMENT[name](0.9, sign), (124, 116, 104))
    np.testing.assert_array_equal(np.asarray(result), expected[NAMES.index(name)])


def test_operations__are_the_increasing_set_and_their_arguments_are_the_published_ones():
    assert len(NAMES) == 15
    at_nine = {name: ARGUMENT[name](0.9, -1.0) for name in NAMES}
    assert at_nine == {
        **dict.fromkeys(("AutoContrast", "Equalize", "Invert")),
        "Rotate": -27.0,
        "Posterize": 1,
        "Solarize": 26,
        "SolarizeAdd": 99,
        **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), pytest.approx(0.19)),
        **dict.fromkeys(("ShearX", "ShearY"), pytest.approx(-0.27)),
        **dict.fromkeys(("TranslateX", "TranslateY"), pytest.approx(-0.405)),
    }
    assert [ARGUMENT["Posterize"](level, 1.0) for level in (0.0, 0.5, 1.0)] == [4, 2, 1]
    assert [ARGUMENT["Solarize"](level, 1.0) for level in (0.0, 0.5, 1.0)] == [256, 128, 0]
    assert [ARGUMENT["Color"](level, -1.0) for level in (0.0, 1.0)] == [1.0, 0.1]


def test_draws__two_of_fifteen_each_half_the_time_with_magnitudes_about_nine():
    augment = RandAugment(IMAGENET_MEAN)
    chosen = [augment.choose(seeded_generator(0, "test", index)) for index in range(6000)]
    counts = Counter(len(operations) for operations in chosen)
    assert [counts[n] / 6000 for n in range(3)] == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    names = Counter(name for operations in chosen for name, _ in operations)
    assert set(names) == set(NAMES)
    assert max(names.values()) < 1.4 * min(names.values())
    turns = np.array([argument for operations in chosen for name, argument in operations if name == "Rotate"])
    assert (turns > 0).mean() == pytest.approx(0.5, abs=0.1)
    assert np.abs(turns).mean() / 3 == pytest.approx(9.0, abs=0.1)  # degrees to magnitude
    assert np.abs(turns).std() / 3 == pytest.approx(0.5, abs=0.1)
    assert np.abs(turns).max() <= 30


def test_draws__are_the_generator_s_and_leave_the_global_one_alone():
    image, augment = Image.fromarray(tiles()[0, 0]), RandAugment(IMAGENET_MEAN)
    before = torch.random.get_rng_state()
    results = [np.asarray(augment(image, seeded_generator(0, "augment", 3, index))) for index in range(20)]
    again = [np.asarray(augment(image, seeded_generator(0, "augment", 3, index))) for index in range(20)]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(np.array_equal(*pair) for pair in zip(results, again, strict=True))
    assert len({result.tobytes() for result in results}) > 10


@pytest.mark.parametrize("name", NAMES)
def test_gray_images__are_changed_like_the_same_image_in_color(name):
    gray = Image.fromarray(tiles()[0, 0]).convert("L")
    argument = ARGUMENT[name](0.9, 1.0)
    of_gray, of_color = APPLY[name](gray, argument, 110), APPLY[name](gray.convert("RGB"), argument, (110,) * 3)
    assert of_gray.mode == "L"
    difference = np.asarray(of_gray).astype(int) - np.asarray(of_color.convert("L")).astype(int)
    assert np.abs(difference).max() <= 1
    fill = RandAugment((0.5,))
    for index in range(10):
        assert fill(gray, seeded_generator(0, index)).mode == "L"
        assert fill(gray.convert("RGB"), seeded_generator(0, index)).mode == "RGB"


def test_settings__a_magnitude_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="magnitude of RandAugment is 90, expected 0 to 10"):
        RandAugment(IMAGENET_MEAN, magnitude=90)

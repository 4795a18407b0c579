"""How images are standardized is read from an encoder's folder, for three channels."""

import json

import pytest

from hub.image_stats import image_stats
from modeling.base import IMAGENET_MEAN, IMAGENET_STD


@pytest.mark.parametrize(
    ("settings", "mean", "std"),
    [
        ({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]),
        ({"image_mean": [0.3], "image_std": [0.4]}, [0.3] * 3, [0.4] * 3),  # of a gray encoder
        ({"image_mean": 0.5, "image_std": 0.5}, [0.5] * 3, [0.5] * 3),
        ({"image_mean": [0.3], "image_std": [0.4], "do_normalize": False}, [0.0] * 3, [1.0] * 3),
    ],
)
def test_stats__are_the_processors(tmp_path, settings, mean, std):
    content = {"image_processor_type": "ViTImageProcessor", **settings}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    assert image_stats(str(tmp_path)) == ({"image_mean": mean, "image_std": std}, [])


def test_stats__of_an_encoder_that_says_none_are_imagenets_and_a_note(tmp_path):
    stats, notes = image_stats(str(tmp_path))
    assert stats == {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
    assert "ImageNet's are used" in notes[0]


@pytest.mark.parametrize("std", [[0.0, 0.5, 0.5], [float("nan"), 0.5, 0.5], [-0.5, 0.5, 0.5]])
def test_stats__that_would_make_every_image_infinite_are_refused(tmp_path, std):
    content = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.5] * 3, "image_std": std}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="expected finite numbers and an image_std above 0"):
        image_stats(str(tmp_path))

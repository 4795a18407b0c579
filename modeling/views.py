"""The inputs of a model: which crops of an image it sees, and how their colors change."""

from typing import NamedTuple


class Photometric(NamedTuple):
    """Random changes of a view's colors, after cropping and mirroring (values of DINO, iBOT and DINOv2).

    Of probabilities for each crop, the last one counts for all further crops.

    Args:
        color_jitter: Largest change of brightness, contrast and saturation as shares, and of the hue in turns.
        blur_radius: Smallest and largest standard deviation of the Gaussian in pixels.
    """

    color_jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    color_jitter_probability: float = 0.8
    grayscale_probability: float = 0.2
    blur_probability: tuple[float, ...] = (0.5,)
    blur_radius: tuple[float, float] = (0.1, 2.0)
    solarize_probability: tuple[float, ...] = (0.0,)  # inverts the pixels from 128 on


class View(NamedTuple):
    """One input of the model that is cropped from each image.

    Args:
        name: Key in the batch.
        num_crops: Random crops per image, stacked to (B, num_crops, C, H, W); None for one crop, (B, C, H, W).
        image_size: Height and width in pixels; None for the encoder's.
        crop_scale: Smallest and largest share of the image's area; None for the run's setting.
        photometric: Changes of the colors in training, in place of the run's color jitter; None for that.
    """

    name: str = "pixel_values"
    num_crops: int | None = None
    image_size: tuple[int, int] | None = None
    crop_scale: tuple[float, float] | None = None
    photometric: Photometric | None = None

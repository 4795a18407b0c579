"""Random changes of a crop's colors: jitter, grayscale, blur and solarization.

Paper: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers" (DINO), arXiv:2104.14294, after
Grill et al. 2020, "Bootstrap Your Own Latent" (BYOL), arXiv:2006.07733, App. B.
Code: the authors' chain of torchvision's ColorJitter and RandomGrayscale and of Pillow's filters, in this order.
Differs: NumPy instead of Pillow, which takes twice the time. Pixels are rounded once at the end instead of after each
change, and hues are not rounded to 1/256 turn.
Shapes: C channels, H W pixels; all arrays are float32 in [0, 255] and changed in place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ORDERS = list(permutations(range(4)))
_GRAY = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow
_NUM_BLURS = 3  # box filters in a row that Pillow takes for a Gaussian


@dataclass(frozen=True)
class ColorChanges:
    """The changes drawn for one crop.

    Args:
        jitters: Numbers of the functions in `_JITTERS` with their factors, in the order to apply them.
        blur_radius: Standard deviation in pixels; 0 for none.
    """

    jitters: Sequence[tuple[int, float]] = ()
    is_gray: bool = False
    blur_radius: float = 0.0
    is_solarized: bool = False

    def apply(self, pixels: Tensor) -> Tensor:
        """Return a changed crop, uint8 (C, H, W); one of a single channel keeps its saturation and hue."""
        num_channels = len(pixels)
        array = pixels.numpy()
        jitters = [jitter for jitter in self.jitters if num_channels == 3 or jitter[0] < 2]
        is_gray = self.is_gray and num_channels == 3
        if jitters or is_gray or self.blur_radius:
            array = array.astype(np.float32)
            for which, factor in jitters:
                _JITTERS[which](array, factor)
            if is_gray:
                array = _gray(array)[None]
            if self.blur_radius:
                array = blur(array, self.blur_radius)
            array = (array + np.float32(0.5)).astype(np.uint8)
        if self.is_solarized:
            array = np.where(array < 128, array, 255 - array)
        return torch.from_numpy(np.repeat(array, num_channels, axis=0) if len(array) < num_channels else array)


def draw_color_changes(settings: Any, number: int, generator: torch.Generator) -> ColorChanges:
    """Draw the changes of the crop `number` of a view as it asks for them (`modeling.base.Photometric`)."""
    # One call for all numbers: how many are drawn does not depend on what they decide.
    jitter, *factors, order, gray, blur, radius, solarize = torch.rand(10, generator=generator).tolist()
    jitters: list[tuple[int, float]] = []
    if jitter < settings.color_jitter_probability:
        changes = [limit * (2 * factor - 1) for limit, factor in zip(settings.color_jitter, factors, strict=True)]
        jitters = [(which, changes[which]) for which in _ORDERS[int(order * len(_ORDERS))] if changes[which]]
    smallest, largest = settings.blur_radius
    return ColorChanges(
        jitters,
        gray < settings.grayscale_probability,
        smallest + (largest - smallest) * radius if blur < _of_crop(settings.blur_probability, number) else 0.0,
        solarize < _of_crop(settings.solarize_probability, number),
    )


def _of_crop(values: Sequence[float], number: int) -> float:
    return values[min(number, len(values) - 1)]


def change_brightness(pixels: np.ndarray, change: float) -> None:
    """Multiply pixels (C, H, W) by 1 + change."""
    pixels *= np.float32(1 + change)
    if change > 0:
        np.minimum(pixels, 255, out=pixels)


def change_contrast(pixels: np.ndarray, change: float) -> None:
    """Multiply the distance of pixels (C, H, W) from the mean gray by 1 + change."""
    means = pixels.reshape(len(pixels), -1).mean(1)
    mean = float(np.dot(means, _GRAY)) if len(pixels) == 3 else float(means[0])
    pixels *= np.float32(1 + change)
    pixels -= np.float32(change * mean)
    _clip(pixels, change)


def change_saturation(pixels: np.ndarray, change: float) -> None:
    """Multiply the distance of pixels (3, H, W) from their gray by 1 + change."""
    gray = _gray(pixels)
    gray *= np.float32(change)
    pixels *= np.float32(1 + change)
    pixels -= gray
    _clip(pixels, change)


def shift_hue(pixels: np.ndarray, turns: float) -> None:
    """Shift the hue of pixels (3, H, W) in the HSV color space, which keeps their largest and smallest channel."""
    red, green, blue = pixels
    largest = np.maximum(np.maximum(red, green), blue)
    smallest = np.minimum(np.minimum(red, green), blue)
    chroma = largest - smallest
    # In sixths of a turn: 0 is red, 2 green, 4 blue.
    of_green, of_blue = (blue - red) + 2 * chroma, (red - green) + 4 * chroma
    hue = np.where(largest == red, green - blue, np.where(largest == green, of_green, of_blue))
    hue /= np.maximum(chroma, np.float32(1e-6), out=of_green)
    thirds = round(3 * turns)  # a third of a turn exchanges the channels
    for number, channel in enumerate(pixels):
        # 1 up to a sixth of a turn away from the channel's own hue, 0 from two sixths on.
        own = 2 * ((number - thirds) % 3) - 6 * (turns - thirds / 3)
        np.abs(np.subtract(hue, np.float32(own), out=channel), out=channel)
        channel -= 3
        np.abs(channel, out=channel)
        channel -= 1
        np.minimum(np.maximum(channel, 0, out=channel), 1, out=channel)
        channel *= chroma
        channel += smallest


_JITTERS = (change_brightness, change_contrast, change_saturation, shift_hue)


def blur(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Return pixels (C, H, W) after a Gaussian blur with this standard deviation; the border is repeated outwards."""
    weights = blur_weights(radius)
    reach = len(weights) // 2
    num_channels, height, width = pixels.shape
    padded = np.pad(pixels, ((0, 0), (reach, reach), (reach, reach)), "edge")
    row = padded.shape[2]
    # On the flat array, where a step of one row is a step down: what runs over the ends of the rows is in the padding.
    flat = _weigh(_weigh(padded.ravel(), weights, 1), weights, row)  # starts at the first pixel
    strides = tuple(flat.itemsize * step for step in (padded[0].size, row, 1))
    return np.lib.stride_tricks.as_strided(flat, (num_channels, height, width), strides)


def _weigh(flat: np.ndarray, weights: Sequence[float], step: int) -> np.ndarray:
    """Return the sums of `flat`, shifted by multiples of `step`, with symmetric weights."""
    reach = len(weights) // 2
    size = flat.size - 2 * reach * step
    total = flat[reach * step :][:size] * np.float32(weights[reach])
    pair = np.empty_like(total)
    for distance in range(1, reach + 1):
        before, after = flat[(reach - distance) * step :][:size], flat[(reach + distance) * step :][:size]
        np.add(before, after, out=pair)
        pair *= np.float32(weights[reach + distance])
        total += pair
    return total


def blur_weights(radius: float) -> list[float]:
    """Return the weights that Pillow's GaussianBlur has in each direction: three box filters with fractional ends.

    Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering".
    """
    variance = radius**2 / _NUM_BLURS
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
    end = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.array([end, *[1.0] * (2 * whole + 1), end])
    box /= box.sum()
    weights: list[float] = np.convolve(np.convolve(box, box), box).tolist()
    return weights


def _gray(pixels: np.ndarray) -> np.ndarray:
    """Return the gray (H, W) of pixels (3, H, W)."""
    red, green, blue = (channel * np.float32(weight) for channel, weight in zip(pixels, _GRAY, strict=True))
    red += green
    red += blue
    return red


def _clip(pixels: np.ndarray, change: float) -> None:
    if change > 0:  # others stay between values in range
        np.minimum(np.maximum(pixels, 0, out=pixels), 255, out=pixels)

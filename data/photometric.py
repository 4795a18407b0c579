"""Random changes of a crop's colors: jitter, grayscale, blur and solarization.

Paper: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers" (DINO), arXiv:2104.14294, after
Grill et al. 2020, "Bootstrap Your Own Latent" (BYOL), arXiv:2006.07733, App. B.
Code: the authors' chain of torchvision's ColorJitter and RandomGrayscale and of Pillow's filters, in this order.
Differs: NumPy instead of Pillow, which takes two to three times as long. Pixels are rounded once at the end instead of
after each change, and hues are not rounded to 1/256 turn.
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
_MAX_PIXELS = 16_384  # at a time, so that the arrays of a step stay in the processor's cache
_NUM_BLURS = 3  # box filters in a row that Pillow takes for a Gaussian


@dataclass(frozen=True)
class ColorChanges:
    """The changes drawn for one crop.

    Args:
        jitters: Index of a function in `_JITTERS` and how much it changes, in the order to apply them.
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
            for which, change in jitters:
                _JITTERS[which](array, change)
            if is_gray:
                array = _gray(array)[None]
            if self.blur_radius:
                array = blur(array, self.blur_radius)
            array += 0.5
            array = array.astype(np.uint8)
        if self.is_solarized:
            array = np.where(array < 128, array, 255 - array)
        return torch.from_numpy(np.repeat(array, num_channels, axis=0) if len(array) < num_channels else array)


def draw_color_changes(settings: Any, number: int, generator: torch.Generator) -> ColorChanges:
    """Draw the changes of the crop `number` of a view as it asks for them (`modeling.views.Photometric`)."""
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
    pixels *= 1 + change
    _clip(pixels, change)


def change_contrast(pixels: np.ndarray, change: float) -> None:
    """Multiply the distance of pixels (C, H, W) from the mean gray by 1 + change."""
    means = pixels.reshape(len(pixels), -1).mean(1)
    mean = float(np.dot(means, _GRAY)) if len(pixels) == 3 else float(means[0])
    pixels *= 1 + change
    pixels -= change * mean
    _clip(pixels, change)


def change_saturation(pixels: np.ndarray, change: float) -> None:
    """Multiply the distance of pixels (3, H, W) from their gray by 1 + change."""
    change_of_gray = _gray(pixels, change)
    pixels *= 1 + change
    pixels -= change_of_gray
    _clip(pixels, change)


def shift_hue(pixels: np.ndarray, turns: float) -> None:
    """Shift the hue of pixels (3, H, W) in the HSV color space, which keeps their largest and smallest channel."""
    num_rows = max(1, _MAX_PIXELS // pixels.shape[2])
    for top in range(0, pixels.shape[1], num_rows):
        _shift_hue(pixels[:, top : top + num_rows], turns)


def _shift_hue(pixels: np.ndarray, turns: float) -> None:
    red, green, blue = pixels
    largest = np.maximum(np.maximum(red, green), blue)
    smallest = np.minimum(np.minimum(red, green), blue)
    chroma = largest - smallest
    # The hue in sixths of a turn times chroma: 0 is red, 2 green, 4 blue. Products are faster than np.where.
    hue, offset = green - blue, 2 * chroma
    of_green, of_blue = blue - red, red - green
    of_green += offset
    of_blue += np.add(offset, offset, out=offset)
    for channel, of_channel in ((green, of_green), (blue, of_blue)):
        of_channel -= hue
        of_channel *= largest == channel
        hue += of_channel
    hue /= np.maximum(chroma, 1e-6, out=offset)
    thirds = round(3 * turns)  # a third of a turn exchanges the channels
    own = [[[2 * ((number - thirds) % 3) - 6 * (turns - thirds / 3)]] for number in range(3)]
    # 1 up to a sixth of a turn away from the channel's own hue, 0 from two sixths on.
    np.abs(np.subtract(hue, np.array(own, np.float32), out=pixels), out=pixels)
    pixels -= 3
    np.abs(pixels, out=pixels)
    pixels -= 1
    np.clip(pixels, 0, 1, out=pixels)
    pixels *= chroma
    pixels += smallest


_JITTERS = (change_brightness, change_contrast, change_saturation, shift_hue)


def blur(pixels: np.ndarray, radius: float) -> np.ndarray:
    """Return pixels (C, H, W) after a Gaussian blur with this standard deviation; the border is repeated outwards."""
    if pixels[0].size > _MAX_PIXELS and len(pixels) > 1:
        return np.concatenate([blur(channel[None], radius) for channel in pixels])
    weights = blur_weights(radius)
    reach = len(weights) // 2
    num_channels, height, width = pixels.shape
    row = width + 2 * reach
    padded = np.empty((num_channels, height + 2 * reach, row), np.float32)
    middle = padded[:, reach:-reach]
    middle[..., reach:-reach] = pixels
    middle[..., :reach], middle[..., -reach:] = pixels[..., :1], pixels[..., -1:]
    padded[:, :reach], padded[:, -reach:] = middle[:, :1], middle[:, -1:]
    # On the flat array, where a step of one row is a step down: what runs over the ends of the rows is in the padding.
    flat = _weigh(_weigh(padded.ravel(), weights, 1), weights, row)  # starts at the first pixel
    strides = tuple(flat.itemsize * step for step in (padded[0].size, row, 1))
    return np.lib.stride_tricks.as_strided(flat, (num_channels, height, width), strides)


def _weigh(flat: np.ndarray, weights: Sequence[float], step: int) -> np.ndarray:
    """Return the sums of `flat`, shifted by multiples of `step`, with symmetric weights."""
    reach = len(weights) // 2
    size = flat.size - 2 * reach * step
    total = flat[reach * step :][:size] * weights[reach]
    pair = np.empty_like(total)
    for distance in range(1, reach + 1):
        before, after = flat[(reach - distance) * step :][:size], flat[(reach + distance) * step :][:size]
        np.add(before, after, out=pair)
        pair *= weights[reach + distance]
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


def _gray(pixels: np.ndarray, share: float = 1.0) -> np.ndarray:
    """Return a share of the gray (H, W) of pixels (3, H, W)."""
    red, green, blue = (channel * (share * weight) for channel, weight in zip(pixels, _GRAY, strict=True))
    red += green
    red += blue
    return red


def _clip(pixels: np.ndarray, change: float) -> None:
    if change > 0:  # others stay between values in range
        np.clip(pixels, 0, 255, out=pixels)

"""Views of images with masks or boxes: what moves the pixels of an image moves everything that belongs to it.

A `Placement` is drawn for an image of a known size and then applied to the image, its masks and its boxes.

Code: open-mmlab/mmsegmentation (Resize with ratio_range, RandomCrop, RandomFlip, PhotoMetricDistortion, Pad), which
the authors of BEiT, MAE and iBOT use for ADE20K; facebookresearch/detectron2 (ResizeScale, FixedSizeCrop) for
large-scale jitter.
Differs: Brightness and contrast change as in `data.photometric`, around black and around the mean gray.
Shapes: C channels, H W pixels of the image, h w pixels of the view, N boxes or masks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.crops import Box, to_tensor
from data.photometric import ColorChanges

NUM_TRIES = 10  # positions of a crop that a caller may choose from
_DISTORTIONS = (0.25, 0.5, 0.5, 0.1)  # largest changes: brightness 32 of 128, contrast, saturation, turns of the hue


@dataclass(frozen=True)
class Placement:
    """Which part of an image a view shows, and how.

    Args:
        box: The part, in pixels of the image.
        shown: Height and width of the part in the view, at the top left; the rest of the view is padding.
        size: Height and width of the view.
    """

    box: Box
    shown: tuple[int, int]
    size: tuple[int, int]
    is_flipped: bool = False

    def image(
        self, image: Image.Image, fill: Sequence[int], interpolation: Image.Resampling = Image.Resampling.BICUBIC
    ) -> Tensor:
        """Return the view of an RGB or L image, uint8 (C, h, w); `fill` is the color of the padding."""
        height, width = self.shown
        pixels = to_tensor(image.resize((width, height), interpolation, self.box))
        view = torch.tensor(list(fill), dtype=torch.uint8)[:, None, None].expand(-1, *self.size).clone()
        view[:, :height, :width] = pixels.flip(2) if self.is_flipped else pixels
        return view

    def labels(self, labels: np.ndarray, fill: int) -> np.ndarray:
        """Return the view of numbers (..., H, W), each that of the nearest pixel: (..., h, w)."""
        left, top, right, bottom = self.box
        rows, columns = (
            ((np.arange(number) + 0.5) * ((high - low) / number) + low).astype(np.int64).clip(0, limit - 1)
            for low, high, number, limit in zip(
                (top, left), (bottom, right), self.shown, labels.shape[-2:], strict=True
            )
        )
        shown = labels[..., rows[:, None], columns]
        view = np.full((*labels.shape[:-2], *self.size), fill, labels.dtype)
        view[..., : self.shown[0], : self.shown[1]] = shown[..., ::-1] if self.is_flipped else shown
        return view

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """Move boxes (N, 4), left, top, right, bottom, into the view; cut off what it does not show.

        A box that it does not show at all has no area.
        """
        height, width = self.shown
        moved = (boxes - self._corner) * self._scale
        if self.is_flipped:
            moved[:, [0, 2]] = width - moved[:, [2, 0]]
        return moved.clip(0, [width, height, width, height]).astype(np.float32)

    def boxes_in_image(self, boxes: np.ndarray) -> np.ndarray:
        """Move boxes (N, 4) of the view back into the image."""
        moved = np.array(boxes, np.float64)
        if self.is_flipped:
            moved[:, [0, 2]] = self.shown[1] - moved[:, [2, 0]]
        return moved / self._scale + self._corner

    @property
    def _corner(self) -> np.ndarray:
        return np.array([*self.box[:2]] * 2, np.float64)

    @property
    def _scale(self) -> np.ndarray:
        left, top, right, bottom = self.box
        height, width = self.shown
        return np.array([width / (right - left), height / (bottom - top)] * 2)


@dataclass(frozen=True)
class RandomPlacement:
    """The image at a random scale, then a random crop of it, padded if it is smaller, flipped half of the time.

    Args:
        size: Height and width of the view.
        scale: Smallest and largest scale. At 1, the side of the image that `fits` names is as long as the view's.
        fits: "short" shows a crop at scale 1 (segmentation), "long" the whole image (detection).
        tile: Pixels of an image that are as long as a side of the view at scale 1, where the image has more.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.5, 2.0)
    fits: Literal["short", "long"] = "short"
    tile: int | None = None

    def draw(self, width: int, height: int, generator: torch.Generator) -> Iterator[Placement]:
        """Yield `NUM_TRIES` placements that differ in the position of the crop; the first one is as good as any."""
        # One call for all numbers: how many are drawn does not depend on the size of the image.
        scale, flip, *positions = torch.rand(2 + 2 * NUM_TRIES, generator=generator).tolist()
        factor = self.scale[0] + (self.scale[1] - self.scale[0]) * scale
        factor *= tile_factor(width, height, self.tile)
        rows, columns = scaled_size(width, height, self.size, self.fits, factor)
        shown = min(rows, self.size[0]), min(columns, self.size[1])
        for for_top, for_left in zip(positions[::2], positions[1::2], strict=True):
            top, left = int(for_top * (rows - shown[0] + 1)), int(for_left * (columns - shown[1] + 1))
            x, y = width / columns, height / rows
            box = (left * x, top * y, min((left + shown[1]) * x, width), min((top + shown[0]) * y, height))
            yield Placement(box, shown, self.size, flip < 0.5)


def scaled_size(
    width: int, height: int, size: tuple[int, int], fits: Literal["short", "long"], factor: float = 1.0
) -> tuple[int, int]:
    """Return height and width of an image scaled to cover `size` ("short") or to fit into it ("long"), by `factor`."""
    choose = max if fits == "short" else min
    scale = factor * choose(size[0] / height, size[1] / width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def tile_factor(width: int, height: int, tile: int | None) -> float:
    """Return how much larger an image is shown for a tile of it to be as large as the view; at least 1."""
    return 1.0 if tile is None else max(1.0, min(width, height) / tile)


def whole(
    width: int,
    height: int,
    size: tuple[int, int],
    fits: Literal["short", "long", "stretch"],
    tile: int | None = None,
) -> Placement:
    """Return the placement of the whole image for evaluation.

    Args:
        fits: "short": at least as large as `size`, which the view then is too; "long": fits into `size` and is padded;
            "stretch": both sides are resized, as image processors do.
        tile: For "short", as in `RandomPlacement`.
    """
    box = (0.0, 0.0, float(width), float(height))
    if fits == "stretch":
        return Placement(box, size, size)
    shown = scaled_size(width, height, size, fits, tile_factor(width, height, tile))
    return Placement(box, shown, shown if fits == "short" else size)


def draw_distortion(generator: torch.Generator) -> ColorChanges:
    """Draw random changes of brightness, contrast, saturation and hue, each for half of the images."""
    numbers = torch.rand(8, generator=generator).tolist()
    order = torch.randperm(4, generator=generator).tolist()
    strengths = [limit * (2 * number - 1) for limit, number in zip(_DISTORTIONS, numbers[4:], strict=True)]
    return ColorChanges([(which, strengths[which]) for which in order if numbers[which] < 0.5])

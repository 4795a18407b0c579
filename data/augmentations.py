"""Crops that turn an encoded image of any size into uint8 tensors of one size, and the named views of a sample.

Random resized crop: torchvision's sampling rule.  Defaults: He et al. 2021, "Masked Autoencoders Are Scalable Vision
Learners", arXiv:2111.06377, appendix A.1 and the authors' code: scale (0.2, 1), ratio (3/4, 4/3), bicubic, flip 0.5.
Shapes: C channels, H W pixels of the crop.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from PIL import Image, ImageEnhance
from torch import Tensor

from data.crops import Box, SizedCrop, View, load_sized_crops, to_image, to_tensor
from data.measured import Encoded, mirrored
from data.photometric import ColorChanges, draw_color_changes

_NUM_TRIES = 10
_NUMBERS_PER_TRY = 4  # area, ratio, top, left


class Crop(Protocol):
    """Turns encoded bytes (or a file) into a uint8 tensor (C, H, W) of one size; measurements keep their precision."""

    @property
    def size(self) -> tuple[int, int]: ...

    def __call__(self, data: Encoded, num_channels: int, generator: torch.Generator) -> Tensor: ...


@dataclass(frozen=True)
class _Draw:
    """The random choices of one crop; `factors` and `order` are those of `jitter_colors`."""

    numbers: Sequence[float] = ()
    is_flipped: bool = False
    factors: Sequence[float] = ()
    order: Sequence[int] = ()
    color_changes: ColorChanges | None = None

    def apply(self, pixels: Tensor) -> Tensor:
        """Flip a crop (C, H, W) and change its colors."""
        pixels = mirrored(pixels) if self.is_flipped else pixels
        if self.color_changes is not None:
            return self.color_changes.apply(pixels)
        return to_tensor(jitter_colors(to_image(pixels), self.factors, self.order)) if self.order else pixels


@dataclass(frozen=True)
class RandomResizedCrop:
    """A random part of the image, resized to `size` (height, width) and flipped half of the time.

    Args:
        photometric: What `draw_color_changes` takes, in place of `color_jitter`; None for that.
    """

    size: tuple[int, int]
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: Image.Resampling = Image.Resampling.BICUBIC
    color_jitter: float = 0.0
    photometric: Any = None

    def __post_init__(self) -> None:
        _check_size(self.size)
        if not 0 <= self.color_jitter < 1:
            raise ValueError(f"color_jitter is {self.color_jitter}, expected 0 (none) to below 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale is {self.scale}, expected 0 < smallest <= largest <= 1, the share of the area")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio is {self.ratio}, expected 0 < smallest <= largest, width over height")

    def __call__(self, data: Encoded, num_channels: int, generator: torch.Generator) -> Tensor:
        return _load_crop(self, data, num_channels, generator)

    def draw(self, generator: torch.Generator, number: int) -> _Draw:
        """Draw the choices of the crop `number` of a view."""
        # One call for all numbers that any image could need: the draws do not depend on its size.
        *numbers, flip = torch.rand(_NUM_TRIES * _NUMBERS_PER_TRY + 1, generator=generator).tolist()
        if self.photometric is not None:
            changes = draw_color_changes(self.photometric, number, generator)
            return _Draw(numbers, flip < 0.5, color_changes=changes)
        if not self.color_jitter:
            return _Draw(numbers, flip < 0.5)
        factors = (1 + self.color_jitter * (2 * torch.rand(3, generator=generator) - 1)).tolist()
        return _Draw(numbers, flip < 0.5, factors, torch.randperm(3, generator=generator).tolist())

    def choose_box(self, width: int, height: int, numbers: Sequence[float]) -> Box:
        """Return the first of ten tries that fits, else the largest central part with an allowed ratio."""
        log_ratio = (math.log(self.ratio[0]), math.log(self.ratio[1]))
        for start in range(0, len(numbers), _NUMBERS_PER_TRY):
            for_area, for_ratio, for_top, for_left = numbers[start : start + _NUMBERS_PER_TRY]
            area = width * height * _between(self.scale, for_area)
            ratio = math.exp(_between(log_ratio, for_ratio))
            crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < crop_width <= width and 0 < crop_height <= height:
                left, top = int(for_left * (width - crop_width + 1)), int(for_top * (height - crop_height + 1))
                return left, top, left + crop_width, top + crop_height
        return self._central_box(width, height)

    def _central_box(self, width: int, height: int) -> Box:
        crop_width, crop_height = width, height
        if width / height < self.ratio[0]:
            crop_height = max(1, round(width / self.ratio[0]))
        elif width / height > self.ratio[1]:
            crop_width = max(1, round(height * self.ratio[1]))
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
        return left, top, left + crop_width, top + crop_height


def random_crop(
    size: tuple[int, int],
    scale: tuple[float, float],
    interpolation: Image.Resampling = Image.Resampling.BICUBIC,
    color_jitter: float = 0.0,
    photometric: Any = None,
) -> RandomResizedCrop:
    """Return a crop with about the aspect ratio of `size`, so that a wide input is not distorted."""
    height, width = size
    ratio = (3 / 4 * width / height, 4 / 3 * width / height)
    return RandomResizedCrop(size, scale, ratio, interpolation, color_jitter, photometric)


@dataclass(frozen=True)
class CenterCrop:
    """The largest central part with the aspect ratio of `size` (height, width), resized to it; never random."""

    size: tuple[int, int]
    interpolation: Image.Resampling = Image.Resampling.BICUBIC

    def __post_init__(self) -> None:
        _check_size(self.size)

    def __call__(self, data: Encoded, num_channels: int, generator: torch.Generator | None = None) -> Tensor:
        return _load_crop(self, data, num_channels, generator)

    def draw(self, generator: torch.Generator | None, number: int) -> _Draw:
        """Return the choices of a crop that has none."""
        return _Draw()

    def choose_box(self, width: int, height: int, numbers: Sequence[float] = ()) -> Box:
        scale = min(height / self.size[0], width / self.size[1])
        crop_height, crop_width = scale * self.size[0], scale * self.size[1]
        left, top = max(0.0, (width - crop_width) / 2), max(0.0, (height - crop_height) / 2)  # not -1e-15
        return left, top, left + crop_width, top + crop_height


DrawnCrop = RandomResizedCrop | CenterCrop  # crops whose boxes are known before the image is decoded


def _load_crop(crop: DrawnCrop, data: Encoded, num_channels: int, generator: Any) -> Tensor:
    return single_view(crop, num_channels)({"image": data}, generator)["pixel_values"]


class OtherSize(NamedTuple):
    """A second size at which a crop is shown: the key in the item, (height, width) and the filter."""

    name: str
    size: tuple[int, int]
    interpolation: Image.Resampling


@dataclass(frozen=True)
class CropView:
    """A crop as one named view, at a second size too where the targets need it (same box, flip and colors).

    Args:
        num_crops: Random crops that are stacked to (num_crops, C, H, W); None for a single one, (C, H, W).
        other_size: Of a tokenizer or teacher. BEiT (Bao et al. 2021, arXiv:2106.08254, App. C) resizes it by Lanczos.
            Differs: Colors are jittered after the crop and not before it, so contrast is relative to the crop's mean.
    """

    crop: Crop
    name: str = "pixel_values"
    num_crops: int | None = None
    other_size: OtherSize | None = None

    @property
    def sizes(self) -> dict[str, View]:
        """Size and filter by key in the item."""
        assert isinstance(self.crop, DrawnCrop)
        sizes = {self.name: (self.crop.size, self.crop.interpolation)}
        if self.other_size is not None:
            sizes[self.other_size.name] = (self.other_size.size, self.other_size.interpolation)
        return sizes

    @property
    def shortest_side(self) -> int:
        """As in `Views`."""
        smallest = self.crop.scale[0] if isinstance(self.crop, RandomResizedCrop) else 1.0
        sides = self.crop.size if self.other_size is None else (*self.crop.size, *self.other_size.size)
        return math.ceil(max(sides) / math.sqrt(smallest))


@dataclass(frozen=True)
class Views:
    """The transform of a data set: the views of a sample's "image", beside the sample's other entries."""

    views: tuple[CropView, ...]
    num_channels: int

    def __call__(self, sample: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        return self.several(sample, [generator])[0]

    @property
    def shortest_side(self) -> int:
        """The shortest side in pixels of images that are large enough for the smallest crop to need no enlarging."""
        return max(view.shortest_side for view in self.views)

    def several(self, sample: Mapping[str, Any], generators: Sequence[torch.Generator]) -> list[dict[str, Any]]:
        """Return the views drawn by each generator; the image is decoded once for all of them."""
        data = sample["image"]
        others = {key: value for key, value in sample.items() if key != "image"}
        crops = [(view, view.crop) for view in self.views if isinstance(view.crop, DrawnCrop)]
        if not crops:  # it decodes the image itself
            (view,) = self.views
            return [{**others, view.name: view.crop(data, self.num_channels, one)} for one in generators]
        planned = [
            [(view, crop, crop.draw(one, number)) for view, crop in crops for number in range(view.num_crops or 1)]
            for one in generators
        ]

        def choose_crops(width: int, height: int) -> list[SizedCrop]:
            return [
                (crop.choose_box(width, height, draw.numbers), list(view.sizes.values()))
                for plan in planned
                for view, crop, draw in plan
            ]

        loaded = iter(load_sized_crops(data, choose_crops, self.num_channels))
        return [{**others, **_finish([(view, draw) for view, _, draw in plan], loaded)} for plan in planned]


def _finish(plan: Sequence[tuple[CropView, _Draw]], loaded: Iterator[Sequence[Tensor]]) -> dict[str, Tensor]:
    """Return the views of an item, made of the next of the loaded crops."""
    crops: dict[str, list[Tensor]] = {}
    for view, draw in plan:
        for name, pixels in zip(view.sizes, next(loaded), strict=True):
            crops.setdefault(name, []).append(draw.apply(pixels))
    single = {name for view, _ in plan if view.num_crops is None for name in view.sizes}
    return {name: found[0] if name in single else torch.stack(found) for name, found in crops.items()}


def build_views(
    views: Iterable[Any],
    *,
    image_size: tuple[int, int],
    crop_scale: tuple[float, float],
    num_channels: int,
    train: bool,
    interpolation: Image.Resampling = Image.Resampling.BICUBIC,
    color_jitter: float = 0.0,
    other_size: OtherSize | None = None,
    has_colors: bool = True,
) -> Views:
    """Return the transform to a method's views: random crops in training, central ones in evaluation.

    Views of several crops are random in evaluation too, without the view's changes of color; the choice then depends
    on the image only.

    Args:
        views: What the method's config lists (`modeling.views.View`), with names, sizes and numbers of crops.
        color_jitter: For views that do not ask for other changes of color.
        other_size: Second size of the first view.
        has_colors: False for measurements, which are cropped and flipped only.
    """
    found: list[CropView] = []
    for view in views:
        size = view.image_size or image_size
        crop: Crop = CenterCrop(size, interpolation)
        if train or view.num_crops is not None:
            jitter = color_jitter if view.photometric is None and has_colors else 0.0
            photometric = view.photometric if train and has_colors else None
            crop = random_crop(size, view.crop_scale or crop_scale, interpolation, jitter, photometric)
        found.append(CropView(crop, view.name, view.num_crops, None if found else other_size))
    return Views(tuple(found), num_channels)


def single_view(crop: Crop, num_channels: int) -> Views:
    """Return the transform to {"pixel_values": crop} of most methods."""
    return Views((CropView(crop),), num_channels)


def jitter_colors(image: Image.Image, factors: Sequence[float], order: Sequence[int]) -> Image.Image:
    """Multiply brightness, contrast and saturation by their factors (1 = unchanged), in the given order."""
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for which in order:
        image = enhancers[which](image).enhance(factors[which])
    return image


def _between(bounds: tuple[float, float], number: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * number


def _check_size(size: tuple[int, int]) -> None:
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"the size of a crop is {size}, expected (height, width) in pixels, both at least 1")

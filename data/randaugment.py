"""RandAugment in the variant that fine-tuning recipes call `rand-m9-mstd0.5-inc1`, with Pillow's operations.

Paper: Cubuk et al. 2019, "RandAugment: Practical automated data augmentation with a reduced search space",
arXiv:1909.13719.  Differs from the paper in the same ways as timm's version, which MAE, SimMIM and BEiT use: each of
the two operations is applied with probability 0.5, the magnitude varies from image to image, every operation gets
stronger with the magnitude, and areas outside the image are filled with the mean color.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image, ImageEnhance, ImageOps

Fill = int | tuple[int, ...]
Argument = float | int | None  # degrees, factor, threshold, ... of an operation

_LARGEST_MAGNITUDE = 10.0
_APPLY_PROBABILITY = 0.5
_MIN_FACTOR = 0.1  # of an enhancement: a factor of 0 leaves a single color
_SOLARIZE_ADD_BELOW = 128


@dataclass(frozen=True)
class RandAugment:
    """Apply two operations, drawn with replacement, to an image of mode RGB or L.

    Args:
        image_mean: Mean of each channel in [0, 1], the color of areas outside the image.
        magnitude: Mean magnitude of the operations, 0 to 10.
        magnitude_std: Standard deviation of the magnitude.
    """

    image_mean: tuple[float, ...]
    magnitude: float = 9.0
    magnitude_std: float = 0.5
    num_operations: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude <= _LARGEST_MAGNITUDE:
            raise ValueError(f"the magnitude of RandAugment is {self.magnitude}, expected 0 to 10 (9 is usual)")
        if self.num_operations < 1:
            raise ValueError(f"num_operations of RandAugment is {self.num_operations}, expected at least 1")

    def __call__(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        for name, argument in self.choose(generator):
            image = APPLY[name](image, argument, self._fill(image))
        return image

    def choose(self, generator: torch.Generator) -> list[tuple[str, Argument]]:
        """Draw the operations for one image, with their arguments; the number of draws does not depend on them."""
        numbers = torch.rand(self.num_operations, 3, generator=generator).tolist()
        noise = torch.randn(self.num_operations, generator=generator).tolist()
        chosen = []
        for (for_name, for_apply, for_sign), z in zip(numbers, noise, strict=True):
            if for_apply >= _APPLY_PROBABILITY:
                continue
            magnitude = min(max(self.magnitude + self.magnitude_std * z, 0.0), _LARGEST_MAGNITUDE)
            name = NAMES[int(for_name * len(NAMES))]
            chosen.append((name, ARGUMENT[name](magnitude / _LARGEST_MAGNITUDE, -1.0 if for_sign < 0.5 else 1.0)))
        return chosen

    def _fill(self, image: Image.Image) -> Fill:
        levels = tuple(min(255, round(255 * mean)) for mean in self.image_mean)
        if image.mode == "L":
            return round(sum(levels) / len(levels))
        return levels if len(levels) == 3 else levels * 3


def _shift(image: Image.Image, coefficients: tuple[float, ...], fill: Fill) -> Image.Image:
    return image.transform(
        image.size, Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BICUBIC, fillcolor=fill
    )


def _solarize_add(image: Image.Image, add: int) -> Image.Image:
    """Brighten dark pixels and keep bright ones."""
    table = [min(255, level + add) if level < _SOLARIZE_ADD_BELOW else level for level in range(256)]
    return image.point(table * len(image.getbands()))


def _enhancement(strength: float, sign: float) -> float:
    """Return an enhancement factor above or below 1, the identity."""
    return max(_MIN_FACTOR, 1.0 + sign * 0.9 * strength)


# By operation: strength (magnitude / 10) and sign (-1 or 1) -> argument.
ARGUMENT: dict[str, Callable[[float, float], Argument]] = {
    "AutoContrast": lambda strength, sign: None,
    "Equalize": lambda strength, sign: None,
    "Invert": lambda strength, sign: None,
    "Rotate": lambda strength, sign: sign * strength * 30.0,  # degrees
    "Posterize": lambda strength, sign: max(1, 4 - int(strength * 4)),  # bits to keep; Pillow refuses 0
    "Solarize": lambda strength, sign: 256 - int(strength * 256),  # threshold above which pixels are inverted
    "SolarizeAdd": lambda strength, sign: int(strength * 110),
    "Color": _enhancement,
    "Contrast": _enhancement,
    "Brightness": _enhancement,
    "Sharpness": _enhancement,
    "ShearX": lambda strength, sign: sign * strength * 0.3,
    "ShearY": lambda strength, sign: sign * strength * 0.3,
    "TranslateX": lambda strength, sign: sign * strength * 0.45,  # fraction of the width
    "TranslateY": lambda strength, sign: sign * strength * 0.45,
}
# By operation: image, argument and fill color -> image.
APPLY: dict[str, Callable[..., Image.Image]] = {
    "AutoContrast": lambda image, _, fill: ImageOps.autocontrast(image),
    "Equalize": lambda image, _, fill: ImageOps.equalize(image),
    "Invert": lambda image, _, fill: ImageOps.invert(image),
    "Rotate": lambda image, degrees, fill: image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=fill),
    "Posterize": lambda image, bits, fill: ImageOps.posterize(image, bits),
    "Solarize": lambda image, threshold, fill: ImageOps.solarize(image, threshold),
    "SolarizeAdd": lambda image, add, fill: _solarize_add(image, add),
    "Color": lambda image, factor, fill: ImageEnhance.Color(image).enhance(factor),
    "Contrast": lambda image, factor, fill: ImageEnhance.Contrast(image).enhance(factor),
    "Brightness": lambda image, factor, fill: ImageEnhance.Brightness(image).enhance(factor),
    "Sharpness": lambda image, factor, fill: ImageEnhance.Sharpness(image).enhance(factor),
    "ShearX": lambda image, factor, fill: _shift(image, (1, factor, 0, 0, 1, 0), fill),
    "ShearY": lambda image, factor, fill: _shift(image, (1, 0, 0, factor, 1, 0), fill),
    "TranslateX": lambda image, share, fill: _shift(image, (1, 0, share * image.width, 0, 1, 0), fill),
    "TranslateY": lambda image, share, fill: _shift(image, (1, 0, 0, 0, 1, share * image.height), fill),
}
NAMES = tuple(ARGUMENT)

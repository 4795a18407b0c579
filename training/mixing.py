"""Random erasing, then mixup or CutMix of a batch on its device, with soft targets.

Papers: Zhang et al. 2017 (mixup), arXiv:1710.09412; Yun et al. 2019 (CutMix), arXiv:1905.04899; Zhong et al. 2017
(random erasing), arXiv:1708.04896.
As in timm, which MAE, SimMIM and BEiT fine-tune with: one choice and one lambda per batch, image i is mixed with image
B-1-i, and erased pixels become normal noise.
Shapes: B images, C channels, H W pixels, K classes.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.seeds import seeded_generator

_ERASED_AREA = (0.02, 1 / 3)  # share of the image
_ERASED_LOG_RATIO = (math.log(0.3), math.log(1 / 0.3))  # height over width
_NUM_TRIES = 10  # boxes drawn until one fits in the image
_NUMBERS_PER_TRY = 4  # area, ratio, top, left


@dataclass(frozen=True)
class Mixing:
    """Augmentation of a standardized training batch; all choices depend on the seed and the counters only.

    Args:
        mixup_alpha: Parameter of mixup's lambda ~ Beta(alpha, alpha); 0 for no mixup.
        cutmix_alpha: The same for CutMix.
        mix_prob: Probability that a batch is mixed.
        switch_prob: Probability of CutMix instead of mixup in a mixed batch.
        label_smoothing: Share of the target that is spread over all classes.
        erasing_prob: Probability that a box of an image is erased.
    """

    num_classes: int
    mixup_alpha: float = 0.8
    cutmix_alpha: float = 1.0
    mix_prob: float = 1.0
    switch_prob: float = 0.5
    label_smoothing: float = 0.1
    erasing_prob: float = 0.25
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("mix_prob", "switch_prob", "label_smoothing", "erasing_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        for name in ("mixup_alpha", "cutmix_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 (off) or more")

    def __call__(self, pixel_values: Tensor, labels: Tensor, *counters: int) -> tuple[Tensor, Tensor]:
        """Return images and soft targets (B, K) for standardized images (B, C, H, W) and labels (B,).

        `counters` identify the batch: the optimizer step, the micro-batch and the process.
        """
        if not pixel_values.is_floating_point():
            raise ValueError(
                f"the images are {pixel_values.dtype}, expected standardized floats: erased boxes get noise with std 1"
            )
        generator = seeded_generator(self.seed, "mix", *counters)
        pixel_values = self._erase(pixel_values, generator)
        pixel_values, share = self._mix(pixel_values, generator)
        targets = smoothed_targets(labels, self.num_classes, self.label_smoothing)  # (B, K)
        return pixel_values, torch.lerp(targets.flip(0), targets, share)

    def _mix(self, pixel_values: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
        """Return the mixed images, and the share that each keeps of itself."""
        for_mix, for_switch, *for_center = torch.rand(4, generator=generator).tolist()
        if for_mix >= self.mix_prob or not (self.mixup_alpha or self.cutmix_alpha):
            return pixel_values, 1.0
        if self.cutmix_alpha and (for_switch < self.switch_prob or not self.mixup_alpha):
            return cutmix(pixel_values, _draw_beta(self.cutmix_alpha, generator), for_center)
        share = _draw_beta(self.mixup_alpha, generator)
        return torch.lerp(pixel_values.flip(0), pixel_values, share), share

    def _erase(self, pixel_values: Tensor, generator: torch.Generator) -> Tensor:
        if not self.erasing_prob:
            return pixel_values
        num_images, num_channels, height, width = pixel_values.shape
        numbers = torch.rand(num_images, 1 + _NUM_TRIES * _NUMBERS_PER_TRY, generator=generator).tolist()
        # The noise is drawn on the images' device: on the CPU it would take longer than the rest of the step.
        noise_seed = int(torch.randint(2**63 - 1, (), generator=generator))
        noise_generator = torch.Generator(pixel_values.device).manual_seed(noise_seed)
        pixel_values = pixel_values.clone()
        for image, (for_erase, *for_box) in zip(pixel_values, numbers, strict=True):
            box = _choose_box(height, width, for_box) if for_erase < self.erasing_prob else None
            if box is not None:
                top, left, box_height, box_width = box
                image[:, top : top + box_height, left : left + box_width] = torch.randn(
                    (num_channels, box_height, box_width),
                    generator=noise_generator,
                    device=image.device,
                    dtype=image.dtype,
                )
        return pixel_values


def smoothed_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Return targets (B, K) for labels (B,); `smoothing` is spread over all classes, including the true one."""
    off = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, device=labels.device)  # (B, K)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + off)


def cutmix(pixel_values: Tensor, share: float, center: list[float]) -> tuple[Tensor, float]:
    """Paste a box of image B-1-i into image i; return the images and the share that is really kept."""
    height, width = pixel_values.shape[-2:]
    side = math.sqrt(1 - share)
    rows, columns = _span(int(height * side), height, center[0]), _span(int(width * side), width, center[1])
    mixed = pixel_values.clone()
    mixed[..., rows, columns] = pixel_values.flip(0)[..., rows, columns]
    area = (rows.stop - rows.start) * (columns.stop - columns.start)
    return mixed, 1 - area / (height * width)


def _span(length: int, whole: int, position: float) -> slice:
    """Return `length` pixels around a center anywhere in the image, clipped to it."""
    middle = int(position * whole)
    return slice(max(0, middle - length // 2), min(whole, middle + (length + 1) // 2))


def _choose_box(height: int, width: int, numbers: list[float]) -> tuple[int, int, int, int] | None:
    """Return top, left, height and width of the first box that fits in the image, if any."""
    for start in range(0, len(numbers), _NUMBERS_PER_TRY):
        for_area, for_ratio, for_top, for_left = numbers[start : start + _NUMBERS_PER_TRY]
        area = height * width * _between(_ERASED_AREA, for_area)
        ratio = math.exp(_between(_ERASED_LOG_RATIO, for_ratio))
        box_height, box_width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if box_height < height and box_width < width:
            return (
                int(for_top * (height - box_height + 1)),
                int(for_left * (width - box_width + 1)),
                box_height,
                box_width,
            )
    return None


def _between(bounds: tuple[float, float], number: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * number


def _draw_beta(alpha: float, generator: torch.Generator) -> float:
    """Draw from Beta(alpha, alpha) with NumPy, because torch's distributions take no generator."""
    return float(np.random.default_rng(int(torch.randint(2**63 - 1, (), generator=generator))).beta(alpha, alpha))

"""Makes a training or evaluation batch out of images: stacks them and draws one mask per image.

Shapes: B images, C channels, H W pixels, N patches of the grid.
"""

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.data import default_collate, get_worker_info

from data.masks import FIXED_RATIO_STRATEGIES, MASK_STRATEGIES, UNEQUAL_COUNT_STRATEGIES
from data.seeds import seeded_generator

COUNTERS = ("epoch", "step", "image_index")


@dataclass
class MaskingCollator:
    """Items of one batch -> {"pixel_values" (B, C, H, W), "bool_masked_pos" bool (B, N)}; True = hidden.

    "num_masked_patches" is an int, of the whole batch: counted on the device, it would cost a wait.

    Items of `PretrainingImages` carry `epoch`, `step` and `image_index`. The mask then depends on (seed, epoch,
    image_index) only: the same on any rank and worker, after a resume, and at every evaluation, where epoch is 0.

    Items with nothing but `pixel_values` get masks that differ per rank, worker, epoch and call. These are not the
    same after a resume, nor at every evaluation. The stock Trainer also takes the three counters away from items that
    have them, unless `remove_unused_columns=False`.

    Args:
        grid: patch rows and patch columns.
        mask_ratio: share of the patches to hide, or (lowest, highest) to draw it from uniformly.
        strategy: a name in `MASK_STRATEGIES`.
        mask_unit: side in patches of the cells of "random-unit".
        equal_num_masked: all masks of a batch hide equally many patches, as methods need whose encoder sees the
            visible patches only. A ratio range is then drawn from once per step, else once per image.
        with_image_index: also returns "image_index", int64 (B,).
    """

    grid: tuple[int, int]
    mask_ratio: float | tuple[float, float]
    strategy: str = "random"
    seed: int = 0
    mask_unit: int = 1
    equal_num_masked: bool = True
    with_image_index: bool = False
    _draw_mask: Callable[..., torch.Tensor] = field(init=False, repr=False, compare=False)
    _num_calls: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_strategy()
        self._draw_mask = MASK_STRATEGIES[self.strategy]
        if self.strategy == "random-unit":
            self._draw_mask = partial(self._draw_mask, unit=self.mask_unit)
        self._check_grid_and_ratio()

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = {"pixel_values": _stack_images(features)}  # (B, C, H, W)
        for name in ("tokenizer_pixel_values", "labels"):
            if name in features[0]:
                batch[name] = default_collate([item[name] for item in features])
        if all(name in feature for feature in features for name in COUNTERS):
            masks = self._masks_by_counters(features)
        else:
            masks = self._masks_by_call(len(features))
        batch["bool_masked_pos"] = torch.stack(masks)  # (B, N)
        batch["num_masked_patches"] = int(batch["bool_masked_pos"].sum())
        if self.with_image_index:
            batch["image_index"] = _stack_image_indices(features)  # (B,)
        return batch

    def _masks_by_counters(self, features: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
        ratio = self._batch_ratio(self.seed, "ratio", features[0]["step"])
        return [
            self._mask(ratio, seeded_generator(self.seed, "mask", feature["epoch"], feature["image_index"]))
            for feature in features
        ]

    def _masks_by_call(self, num_images: int) -> list[torch.Tensor]:
        """One generator for the whole call, as nothing tells the images apart."""
        worker = get_worker_info()
        if self._num_calls == 0 and (worker is None or worker.id == 0):
            warnings.warn(
                f"The items lack some of {', '.join(COUNTERS)}: masks differ after a resume and at each evaluation."
                " If the data set gives them, the stock Trainer removed them: set remove_unused_columns=False.",
                stacklevel=3,
            )
        # The worker's seed is new in every epoch; a worker that is not persistent starts counting calls anew.
        place = (int(os.environ.get("RANK", 0)), worker.id if worker else -1, worker.seed if worker else 0)
        call = (self.seed, "call", *place, self._num_calls)
        self._num_calls += 1
        ratio, generator = self._batch_ratio(*call, "ratio"), seeded_generator(*call)
        return [self._mask(ratio, generator) for _ in range(num_images)]

    def _batch_ratio(self, *counters: int | str) -> float | None:
        """The ratio that all images of the batch share; None when each image draws its own."""
        if not isinstance(self.mask_ratio, tuple):
            return self.mask_ratio
        return self._draw_ratio(seeded_generator(*counters)) if self.equal_num_masked else None

    def _draw_ratio(self, generator: torch.Generator) -> float:
        low, high = self._ratio_range()
        return low + (high - low) * torch.rand((), generator=generator).item()

    def _mask(self, ratio: float | None, generator: torch.Generator) -> torch.Tensor:
        ratio = self._draw_ratio(generator) if ratio is None else ratio
        return self._draw_mask(self.grid, ratio, generator)

    def _ratio_range(self) -> tuple[float, float]:
        return self.mask_ratio if isinstance(self.mask_ratio, tuple) else (self.mask_ratio, self.mask_ratio)

    def _check_strategy(self) -> None:
        if self.strategy not in MASK_STRATEGIES:
            raise ValueError(f"Unknown mask strategy {self.strategy!r}. Known: {', '.join(MASK_STRATEGIES)}.")
        if self.mask_unit != 1 and self.strategy != "random-unit":
            raise ValueError(
                f"mask_unit {self.mask_unit} has no effect with the strategy {self.strategy!r}. Use 'random-unit'."
            )
        if self.equal_num_masked and self.strategy in UNEQUAL_COUNT_STRATEGIES:
            equal = ", ".join(name for name in MASK_STRATEGIES if name not in UNEQUAL_COUNT_STRATEGIES)
            raise ValueError(
                f"The strategy {self.strategy!r} hides a different number of patches in each image, but this method "
                f"needs equal numbers within a batch (equal_num_masked). Strategies that give them: {equal}."
            )
        if isinstance(self.mask_ratio, tuple) and self.strategy in FIXED_RATIO_STRATEGIES:
            raise ValueError(
                f"The strategy {self.strategy!r} has only a few ratios, so none can be drawn from {self.mask_ratio}. "
                "Give one ratio, such as 0.75."
            )

    def _check_grid_and_ratio(self) -> None:
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid must be (patch rows, patch columns), both positive, got {self.grid}.")
        if isinstance(self.mask_ratio, tuple) and len(self.mask_ratio) != 2:
            raise ValueError(f"A range of mask_ratio is (lowest, highest), got {self.mask_ratio}.")
        low, high = self._ratio_range()
        if not 0 < low <= high < 1:
            raise ValueError(f"mask_ratio must lie between 0 and 1, the lowest first, got {self.mask_ratio}.")
        for ratio in (low, high):  # the number hidden grows with the ratio, so the ends speak for the range
            self._draw_mask(self.grid, ratio, torch.Generator().manual_seed(0))


def _stack_images(features: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """(C, H, W) each -> (B, C, H, W) of the same dtype; inside a worker straight into shared memory."""
    for number, feature in enumerate(features):
        if "pixel_values" not in feature:
            raise ValueError(
                f"Item {number} of the batch has no 'pixel_values', only {sorted(feature)}. The data set must return "
                "{'pixel_values': tensor (C, H, W)}."
            )
    images = [feature["pixel_values"] for feature in features]
    for number, image in enumerate(images):
        if image.shape != images[0].shape:
            raise ValueError(
                f"{_name(features, number)} has shape {tuple(image.shape)}, but {_name(features, 0)} has "
                f"{tuple(images[0].shape)}. Crop or resize all images to one size and one number of channels."
            )
    return default_collate(images)


def _stack_image_indices(features: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    for number, feature in enumerate(features):
        if "image_index" not in feature:
            raise ValueError(
                f"with_image_index=True, but item {number} of the batch has no 'image_index', only {sorted(feature)}."
            )
    return torch.tensor([feature["image_index"] for feature in features])  # (B,)


def _name(features: Sequence[Mapping[str, Any]], number: int) -> str:
    image_index = features[number].get("image_index")
    return f"item {number} of the batch" + ("" if image_index is None else f" (image_index {image_index})")

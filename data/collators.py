"""Turn items into batches: stack their views and draw a mask for each image or crop.

Shapes: B images, C channels, H W pixels, N patches of the grid, k masks per image.
"""

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils.data import default_collate, get_worker_info

from data.masks import FIXED_RATIO_STRATEGIES, MASK_STRATEGIES, UNEQUAL_COUNT_STRATEGIES, choose_predicted
from data.seeds import seeded_generator

COUNTERS = ("epoch", "step", "image_index")
Masks = tuple[list[torch.Tensor], Iterable[torch.Generator]]  # and for each the generator of its noise


def stack_items(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stack the items of `ImageDataset`, without the counters but "image_index" (B,)."""
    for number, item in enumerate(items):
        if "pixel_values" not in item:
            raise ValueError(
                f"item {number} of the batch has no 'pixel_values', only {sorted(item)}; the data set must return "
                "{'pixel_values': tensor (C, H, W)}"
            )
    first = items[0]["pixel_values"].shape
    for number, item in enumerate(items):
        if item["pixel_values"].shape != first:
            raise ValueError(
                f"{_name(items, number)} has shape {tuple(item['pixel_values'].shape)}, but {_name(items, 0)} has "
                f"{tuple(first)}: crop or resize all images to one size and one number of channels"
            )
    keys = [key for key in items[0] if key not in ("epoch", "step", "crop") and all(key in item for item in items)]
    return default_collate([{key: item[key] for key in keys} for item in items])


@dataclass
class MaskingCollator:
    """Stack the views of a batch and add "bool_masked_pos" bool (B, N), or (B, k, N) with `num_masks`; True = masked.

    "num_masked_patches" is an int, for the whole batch: counting on the device would wait for it. With a
    `prediction_ratio` below 1, "bool_predicted_pos" and "num_predicted_patches" do the same for the part of the masked
    patches that the model is to predict.

    Items of `ImageDataset` contain `epoch`, `step` and `image_index`, and the number of a further crop. Masks then
    depend on (seed, epoch, image_index, number of the mask) only: they are the same on any rank and worker, after a
    resume, and at every evaluation, where epoch is 0. Items with nothing but views get masks that differ per rank,
    worker, epoch and call, and that are the same neither after a resume nor at every evaluation. The stock Trainer
    removes the counters from items unless `remove_unused_columns=False`.

    Args:
        grid: Rows and columns of patches.
        mask_ratio: Share of the patches to mask, or (lowest, highest) to draw it from uniformly.
        strategy: A name in `MASK_STRATEGIES`.
        mask_unit: Side in patches of the units of "random-unit".
        equal_num_masked: All masks of a batch cover equally many patches, as needed where the encoder sees the visible
            patches only. A ratio range is then drawn from once per step, otherwise once per mask.
        num_masks: Masks per image, for several crops or several masks of one; None for one without that axis.
        prediction_ratio: Share of the masked patches to predict, in training and in evaluation. It does not change
            which patches are masked.
        image_size: Height and width of the images that have this grid; images of another size get the grid of patches
            of the same size. None for this grid at any size.
        with_image_index: Return "image_index" int64 (B,) as well.
        mask_probability: Share of the masks that mask anything; each is decided on its own.
        spreads_ratios: Mask exactly that share of a batch, rounded, with ratios spread evenly over the range of
            `mask_ratio` (DINOv2). A mask then depends on its batch too.
        with_noise: Add "mask_noise" float (B, U) or (B, k, U), random numbers in [0, 1) for the U mask units of each
            mask, for models that choose themselves which patches are masked (`modeling/adaptive_masks.py`).
    """

    grid: tuple[int, int]
    mask_ratio: float | tuple[float, float]
    strategy: str = "random"
    seed: int = 0
    mask_unit: int = 1
    equal_num_masked: bool = True
    num_masks: int | None = None
    with_image_index: bool = False
    prediction_ratio: float = 1.0
    image_size: tuple[int, int] | None = None
    mask_probability: float = 1.0
    spreads_ratios: bool = False
    with_noise: bool = False
    _draw_mask: Callable[..., torch.Tensor] = field(init=False, repr=False, compare=False)
    _num_calls: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_strategy()
        self._draw_mask = MASK_STRATEGIES[self.strategy]
        if self.strategy == "random-unit":
            self._draw_mask = partial(self._draw_mask, unit=self.mask_unit)
        self._check_grid_and_ratio()

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = stack_items(features)
        has_counters = all(name in feature for feature in features for name in COUNTERS)
        grid = self._grid_of(batch["pixel_values"])
        draw = self._masks_by_counters(features, grid) if has_counters else self._masks_by_call(len(features), grid)
        masks, generators = draw
        stacked = torch.stack(masks)  # (B * k, 1, N), or (B * k, 2, N) with the predicted ones
        for name, mask in zip(("masked", "predicted"), stacked.unbind(1), strict=False):
            batch[f"bool_{name}_pos"] = mask if self.num_masks is None else mask.unflatten(0, (-1, self.num_masks))
            batch[f"num_{name}_patches"] = int(mask.sum())
        if self.with_noise:
            num_units = math.prod(grid) // self.mask_unit**2
            noise = torch.stack([torch.rand(num_units, generator=generator) for generator in generators])
            batch["mask_noise"] = noise if self.num_masks is None else noise.unflatten(0, (-1, self.num_masks))
        if not self.with_image_index:
            batch.pop("image_index", None)
        elif "image_index" not in batch:
            number = next(number for number, feature in enumerate(features) if "image_index" not in feature)
            raise ValueError(f"with_image_index=True, but item {number} of the batch has no 'image_index'")
        return batch

    def _grid_of(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        if self.image_size is None:
            return self.grid
        sides = zip(pixel_values.shape[-2:], self.grid, self.image_size, strict=True)
        rows, columns = (length * number // whole for length, number, whole in sides)
        return rows, columns

    def _masks_by_counters(self, features: Sequence[Mapping[str, Any]], grid: tuple[int, int]) -> Masks:
        num_masks = self.num_masks or 1
        keys = [
            (feature["epoch"], feature["image_index"], *((number,) if number else ()))
            for feature in features
            for number in range(num_masks * feature.get("crop", 0), num_masks * (feature.get("crop", 0) + 1))
        ]
        if self.spreads_ratios:
            ratios = self._spread_ratios(len(keys), seeded_generator(self.seed, "ratios", *keys[0]))
        else:
            ratios = [self._batch_ratio(self.seed, "ratio", features[0]["step"])] * len(keys)
        generators = (seeded_generator(self.seed, "mask", *key) for key in keys)
        masks = [self._mask(grid, *pair) for pair in zip(ratios, generators, strict=True)]
        return masks, (seeded_generator(self.seed, "mask noise", *key) for key in keys)

    def _masks_by_call(self, num_images: int, grid: tuple[int, int]) -> Masks:
        """Draw all masks from one generator, as nothing distinguishes the images."""
        worker = get_worker_info()
        if self._num_calls == 0 and (worker is None or worker.id == 0):
            warnings.warn(
                f"The items lack some of {', '.join(COUNTERS)}: masks differ after a resume and at each evaluation."
                " If the data set returns them, the stock Trainer removed them: set remove_unused_columns=False.",
                stacklevel=3,
            )
        # The worker's seed is new in every epoch; a worker that is not persistent starts counting calls anew.
        place = (int(os.environ.get("RANK", 0)), worker.id if worker else -1, worker.seed if worker else 0)
        call = (self.seed, "call", *place, self._num_calls)
        self._num_calls += 1
        num_masks, generator = num_images * (self.num_masks or 1), seeded_generator(*call)
        if self.spreads_ratios:
            ratios = self._spread_ratios(num_masks, generator)
        else:
            ratios = [self._batch_ratio(*call, "ratio")] * num_masks
        return [self._mask(grid, ratio, generator) for ratio in ratios], [generator] * num_masks

    def _batch_ratio(self, *counters: int | str) -> float | None:
        """Return the ratio that all masks of the batch share; None if each draws its own."""
        if not isinstance(self.mask_ratio, tuple):
            return self.mask_ratio
        return self._draw_ratio(seeded_generator(*counters)) if self.equal_num_masked else None

    def _spread_ratios(self, num_masks: int, generator: torch.Generator) -> list[float | None]:
        """Return a ratio from each of equally wide bins of the range and zeros, in random order."""
        num_masked = round(self.mask_probability * num_masks)
        low, high = self._ratio_range()
        places = (torch.arange(num_masked) + torch.rand(num_masked, generator=generator)) / max(num_masked, 1)
        ratios = [low + (high - low) * place for place in places.tolist()] + [0.0] * (num_masks - num_masked)
        return [ratios[index] for index in torch.randperm(num_masks, generator=generator).tolist()]

    def _draw_ratio(self, generator: torch.Generator) -> float:
        low, high = self._ratio_range()
        return low + (high - low) * torch.rand((), generator=generator).item()

    def _mask(self, grid: tuple[int, int], ratio: float | None, generator: torch.Generator) -> torch.Tensor:
        """Return the masked patches and, if not all are predicted, those that are: (1, N) or (2, N).

        A ratio of 0 masks nothing.
        """
        if not self.spreads_ratios and self.mask_probability < 1:
            ratio = ratio if torch.rand((), generator=generator).item() < self.mask_probability else 0.0
        if ratio == 0:
            return torch.zeros(1 if self.prediction_ratio == 1 else 2, math.prod(grid), dtype=torch.bool)
        ratio = self._draw_ratio(generator) if ratio is None else ratio
        mask = self._draw_mask(grid, ratio, generator)
        if self.prediction_ratio == 1:
            return mask[None]
        return torch.stack([mask, choose_predicted(mask, self.prediction_ratio, generator)])

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
                f"The strategy {self.strategy!r} masks a different number of patches in each image, but this method "
                f"needs equal numbers within a batch (equal_num_masked). Strategies with equal numbers: {equal}."
            )
        if isinstance(self.mask_ratio, tuple) and self.strategy in FIXED_RATIO_STRATEGIES:
            raise ValueError(
                f"The strategy {self.strategy!r} has only a few ratios, so none can be drawn from {self.mask_ratio}. "
                "Give one ratio, such as 0.75."
            )

        if self.equal_num_masked and (self.mask_probability < 1 or self.spreads_ratios):
            name = "spreads_ratios" if self.spreads_ratios else f"mask_probability {self.mask_probability}"
            raise ValueError(
                f"{name} masks a different number of patches in each image, but this method needs equal numbers "
                "within a batch (equal_num_masked)."
            )

    def _check_grid_and_ratio(self) -> None:
        if len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"grid must be (patch rows, patch columns), both positive, got {self.grid}.")
        if isinstance(self.mask_ratio, tuple) and len(self.mask_ratio) != 2:
            raise ValueError(f"A range of mask_ratio is (lowest, highest), got {self.mask_ratio}.")
        if not 0 < self.prediction_ratio <= 1:
            raise ValueError(f"prediction_ratio must be above 0 and at most 1, got {self.prediction_ratio}.")
        if not 0 <= self.mask_probability <= 1:
            raise ValueError(f"mask_probability must be from 0 to 1, got {self.mask_probability}.")
        low, high = self._ratio_range()
        if not 0 < low <= high < 1:
            raise ValueError(f"mask_ratio must lie between 0 and 1, the lowest first, got {self.mask_ratio}.")
        for ratio in (low, high):  # the number masked grows with the ratio, so the ends represent the range
            self._draw_mask(self.grid, ratio, torch.Generator().manual_seed(0))


def _name(features: Sequence[Mapping[str, Any]], number: int) -> str:
    image_index = features[number].get("image_index")
    return f"item {number} of the batch" + ("" if image_index is None else f" (image_index {image_index})")

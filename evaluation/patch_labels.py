"""Labels of patches from masks of pixels, and masks from labels of patches.

Shapes: B batch size, C channels, H, W height and width in pixels, h, w rows and columns of patches, K classes,
D feature dimension.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.mask_codes import IGNORED
from evaluation.preprocessing import Preprocessor

_MAX_PATCH_SIDE = 8  # pixels of a raw patch; larger patches are reduced


def prepare_masks(preprocessor: Preprocessor, masks: Sequence[np.ndarray]) -> np.ndarray:
    """Resize and crop masks, B of uint8 (H, W), just like the encoder's image processor does with their images.

    What the processor pads is `IGNORED`.
    """
    ones = [np.ones_like(mask) for mask in masks]
    images = [Image.fromarray(np.stack([mask, one, one], -1)) for mask, one in zip(masks, ones, strict=True)]
    as_they_are = {"do_rescale": False, "do_normalize": False, "resample": Image.Resampling.NEAREST}
    if hasattr(preprocessor.processor, "do_flip_channel_order"):
        as_they_are["do_flip_channel_order"] = False
    prepared = preprocessor.processor(images, **as_they_are, return_tensors="np")["pixel_values"].astype(np.int64)
    return np.where(prepared[:, 1] == 1, prepared[:, 0], IGNORED)


def patch_of_pixel(size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Return the number (H, W) of the patch that contains each pixel, in rows; `size` is (H, W), `grid` (h, w)."""
    rows, columns = (np.arange(pixels) * patches // pixels for pixels, patches in zip(size, grid, strict=True))
    return rows[:, None] * grid[1] + columns


def majority_labels(masks: np.ndarray, grid: tuple[int, int], num_classes: int) -> np.ndarray:
    """Return the most frequent class (B, h * w) of the pixels of each patch, `IGNORED` if all of them are ignored."""
    patch, num_patches = patch_of_pixel(masks.shape[1:], grid), grid[0] * grid[1]
    labels = np.empty((len(masks), num_patches), np.int64)
    for number, mask in enumerate(masks):
        counted = mask != IGNORED
        cells = patch[counted] * num_classes + mask[counted]
        counts = np.bincount(cells, minlength=num_patches * num_classes).reshape(num_patches, num_classes)
        labels[number] = np.where(counts.any(1), counts.argmax(1), IGNORED)
    return labels


def raw_patches(images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the pixels (B, h * w, D) of the patches of images (B, C, H, W), reduced to 8 x 8 if they are larger."""
    sizes = zip(images.shape[2:], grid, strict=True)
    sides = [min(_MAX_PATCH_SIDE, max(1, pixels // patches)) for pixels, patches in sizes]
    small = F.adaptive_avg_pool2d(images, (grid[0] * sides[0], grid[1] * sides[1]))
    cells = small.unflatten(3, (grid[1], sides[1])).unflatten(2, (grid[0], sides[0]))  # (B, C, h, side, w, side)
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

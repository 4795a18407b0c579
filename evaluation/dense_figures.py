"""A figure of patch features: the similarity of all patches to a few chosen ones.

Shapes: B images, C channels, H, W height and width in pixels, h, w rows and columns of patches, K classes,
D feature dimension.
"""

import numpy as np
import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data.mask_codes import IGNORED
from evaluation.features import FrozenEncoder
from evaluation.patch_labels import majority_labels
from evaluation.pictures import labeled_grid
from evaluation.preprocessing import Preprocessor
from modeling.feature_panel import enlarged

_NUM_CLICKS = 3  # in an image
_DARK_SHARE = 0.02  # of the similarities, which have the darkest color: few low ones would leave no contrast
_CLICK_COLORS = torch.tensor([[0.835, 0.369, 0.0], [0.0, 0.620, 0.451], [0.8, 0.475, 0.655]])  # Okabe and Ito


def similarity_figure(
    encoder: FrozenEncoder, preprocessor: Preprocessor, pixel_values: Tensor, masks: np.ndarray, num_classes: int
) -> tuple[Image.Image, str]:
    """Draw how similar all patches of images (B, C, H, W) are to a few chosen ones, and describe the columns.

    In each of the most frequent classes of an image, the patch in the middle of the class's patches is chosen.
    """
    patches = F.normalize(encoder(pixel_values).patches, dim=3).cpu()  # (B, h, w, D)
    size, grid = (pixel_values.shape[2], pixel_values.shape[3]), (patches.shape[1], patches.shape[2])
    labels = majority_labels(masks, grid, num_classes).reshape(-1, *grid)
    clicks = [choose_patches(each) for each in labels]  # for each image, (row, column) of three patches
    at = torch.tensor(clicks)  # (B, 3, 2)
    clicked = patches[torch.arange(len(patches))[:, None], at[..., 0], at[..., 1]]  # (B, 3, D)
    similarity = torch.einsum("bhwd,bnd->bnhw", patches, clicked)
    low = float(similarity.quantile(_DARK_SHARE))
    shades = ((similarity - low) / max(1 - low, 1e-6)).clamp(min=0)
    images = preprocessor.unnormalize(pixel_values).expand(-1, 3, -1, -1).clone()
    views = {"input and chosen patches": images}
    for number in range(_NUM_CLICKS):
        colors = torch.from_numpy(colormaps["viridis"](shades[:, number].numpy())[..., :3]).float()  # (B, h, w, 3)
        views[f"similarity to patch {number + 1}"] = enlarged(colors.permute(0, 3, 1, 2), size).clone()
        for image, view, (row, column) in zip(images, list(views.values())[-1], at[:, number].tolist(), strict=True):
            for canvas in (image, view):
                _frame(canvas, row, column, grid, _CLICK_COLORS[number])
    footer = (
        f"{len(images)} test images; cosine similarity of patches' features, from {low:.2f} and less (dark) to 1 "
        "(bright); a frame marks each chosen patch, orange, green and pink"
    )
    return labeled_grid(views, footer), f"From left to right: {'; '.join(views)}. {footer}."


def choose_patches(labels: np.ndarray) -> list[tuple[int, int]]:
    """Return (row, column) of three patches, given classes (h, w): one in each of the most frequent classes.

    It is the patch of the class that is farthest from other classes, the first of several. Classes repeat, with
    their other patches, if there are fewer than three.
    """
    classes, counts = np.unique(labels[labels != IGNORED], return_counts=True)
    distances = {label: _distance_to_others(labels == label) for label in classes[np.argsort(-counts, kind="stable")]}
    chosen: list[tuple[int, int]] = []
    while len(chosen) < _NUM_CLICKS:
        if not distances:  # everything is ignored
            distances = {IGNORED: np.ones(labels.shape)}
        for distance in distances.values():
            row, column = np.unravel_index(distance.argmax(), distance.shape)
            chosen.append((int(row), int(column)))
            distance[row, column] = 0
    return chosen[:_NUM_CLICKS]


def _distance_to_others(of_class: np.ndarray) -> np.ndarray:
    """Return each patch's number of steps to a patch outside `of_class` (h, w) or to the border."""
    distance, inside = np.zeros(of_class.shape), of_class
    while inside.any():
        distance += inside
        padded = np.pad(inside, 1)
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return distance


def _frame(canvas: Tensor, row: int, column: int, grid: tuple[int, int], color: Tensor) -> None:
    """Draw the border of a patch on an image (C, H, W)."""
    height, width = canvas.shape[1:]
    top, bottom = row * height // grid[0], (row + 1) * height // grid[0]
    left, right = column * width // grid[1], (column + 1) * width // grid[1]
    thick = max(1, min(height, width) // 100)
    for rows, columns in (
        (slice(top, top + thick), slice(left, right)),
        (slice(bottom - thick, bottom), slice(left, right)),
        (slice(top, bottom), slice(left, left + thick)),
        (slice(top, bottom), slice(right - thick, right)),
    ):
        canvas[:, rows, columns] = color[:, None, None]

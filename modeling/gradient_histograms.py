"""Histograms of oriented gradients (HOG) of the patches, as targets that need no model.

Paper: Wei et al. 2021, "Masked Feature Prediction for Self-Supervised Visual Pre-Training" (MaskFeat),
arXiv:2112.09133, Sec. 3.2 and App. A.
Code: facebookresearch/SlowFast (slowfast/models/operators.py); open-mmlab/mmpretrain (selfsup/maskfeat.py).
Differs: cells have 8 pixels as there where the patches allow it (2 x 2 cells in a patch of 16), else as near to 8 as
possible; the Gaussian window covers 2 x 2 cells of any size.
Shapes: B images, C channels, H W pixels, N patches, c cells along the side of a patch, O orientations.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .ema import full_precision

NUM_ORIENTATIONS = 9
_CELL_SIDE = 8


def cells_per_side(patch_size: int) -> int:
    """Return c: the largest divisor of a patch's side for which cells have at least 8 pixels, 1 if there is none."""
    return next(c for c in range(max(1, patch_size // _CELL_SIDE), 0, -1) if patch_size % c == 0)


def histogram_size(patch_size: int, num_channels: int) -> int:
    """Return how many numbers describe a patch: 108 for a patch of 16 pixels in three channels."""
    return num_channels * NUM_ORIENTATIONS * cells_per_side(patch_size) ** 2


@torch.no_grad()
def gradient_histograms(images: Tensor, patch_size: int) -> Tensor:
    """Return the histograms of each patch, (B, N, C * O * c * c), of norm 1 within each cell and channel.

    Args:
        images: (B, C, H, W). A factor for each channel has no effect; with whole numbers, sums are exact.
    """
    cells = cells_per_side(patch_size)
    side, (height, width) = patch_size // cells, images.shape[2:]
    padded = F.pad(images.float(), (1, 1, 1, 1), mode="reflect").flatten(0, 1)[:, None]  # (B*C, 1, H+2, W+2)
    steps = torch.arange(-1.0, 2.0, device=images.device)
    sobel = torch.outer(2 - steps.abs(), -steps)  # 1 2 1 down and 1 0 -1 across, without a copy to the device
    with full_precision(images.device):  # half precision turns gradients into other bins, or overflows
        horizontal, vertical = F.conv2d(padded, torch.stack([sobel, sobel.T])[:, None]).unbind(1)  # (B*C, H, W)
    phase = torch.atan2(horizontal, vertical) / math.pi * NUM_ORIENTATIONS  # opposite directions are one orientation
    bins = phase.floor().long() % NUM_ORIENTATIONS
    magnitude = (horizontal.square() + vertical.square()).sqrt() * _window(2 * side, height, width, images.device)
    shape = (len(bins), NUM_ORIENTATIONS, height, width)
    votes = torch.zeros(shape, device=images.device).scatter_(1, bins[:, None], magnitude[:, None])
    histograms = F.normalize(F.avg_pool2d(votes, side, divisor_override=1), dim=1)  # (B*C, O, h*c, w*c)
    patches = histograms.view(len(images), -1, height // patch_size, cells, width // patch_size, cells)
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(1, 2).flatten(2)


def _window(side: int, height: int, width: int, device: torch.device) -> Tensor:
    """Return Gaussian windows (H, W) side by side, each with a std of half its side."""
    steps = (torch.arange(side, device=device) - (side - 1) / 2) / (side // 2)
    line = torch.exp(-0.5 * steps.square())
    window = torch.outer(line, line)
    rows, columns = -(-height // side), -(-width // side)
    return (window / window.sum()).repeat(rows, columns)[:height, :width]

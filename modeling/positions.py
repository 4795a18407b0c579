"""Resizing of position tables: absolute ones in two dimensions, relative ones by offset.

Code: facebookresearch/mae/util/pos_embed.py at efb2a80; microsoft/SimMIM/utils.py at d3e29bc, microsoft/unilm/beit at
768a3c8 (both enlarge bias tables with a cubic spline over a geometric progression, and do not shrink them).
Shapes: N tokens, D width, T rows of a bias table, K attention heads.
"""

import torch
from torch import nn

from .patches import sincos_positions


@torch.compiler.disable  # type: ignore[untyped-decorator]  # the comparison waits for the device
@torch.no_grad()
def positions_of_grid(
    table: torch.Tensor, old: tuple[int, int], new: tuple[int, int], *, antialias: bool = False
) -> torch.Tensor:
    """Return a table (1, 1+N, D) for a new grid of patches: sines and cosines computed anew, learned ones resized."""
    dim = table.shape[-1]
    if dim % 4 == 0 and torch.allclose(table, sincos_positions(old, dim).to(table), atol=1e-5):
        return sincos_positions(new, dim).to(table)
    return resize_positions(table, old, new, antialias=antialias)


def resize_positions(
    table: torch.Tensor, old: tuple[int, int], new: tuple[int, int], *, antialias: bool = False
) -> torch.Tensor:
    """Resize position embeddings (1, E+N, D) to a new grid of patches; the E rows of extra tokens are kept."""
    if old == new:
        return table
    num_extra = table.shape[1] - old[0] * old[1]
    extra, patches = table[:, :num_extra], table[:, num_extra:]
    grid = patches.unflatten(1, old).permute(0, 3, 1, 2)  # (1, D, h, w)
    resized = nn.functional.interpolate(
        grid.float(), size=new, mode="bicubic", align_corners=False, antialias=antialias
    ).to(table.dtype)
    return torch.cat([extra, resized.flatten(2).transpose(1, 2)], dim=1)


def resize_relative_bias(table: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Resize a bias table (T, K) to a window of new rows and columns; rows after those of the offsets are kept."""
    if old == new:
        return table
    sides = tuple(2 * length - 1 for length in old)
    offsets, extra = table[: sides[0] * sides[1]], table[sides[0] * sides[1] :]
    grid = offsets.double().unflatten(0, sides)  # (2h-1, 2w-1, K)
    by_row, by_column = (_resampling(a, b).to(table.device) for a, b in zip(old, new, strict=True))
    resized = torch.einsum("ia,jb,abk->ijk", by_row, by_column, grid)
    return torch.cat([resized.flatten(0, 1).to(table.dtype), extra])


def _resampling(old: int, new: int) -> torch.Tensor:
    """Return the matrix (2 new - 1, 2 old - 1) that maps values at the old offsets to values at the new ones."""
    if old == 1:
        return torch.ones(2 * new - 1, 1, dtype=torch.float64)
    if new <= old:  # crop to the offsets that remain
        return torch.eye(2 * old - 1, dtype=torch.float64)[old - new : old + new - 1]
    ratio = _growth(old - 1, new - 1)
    one_side = torch.tensor([ratio**n for n in range(old - 1)], dtype=torch.float64).cumsum(0)
    known = torch.cat([-one_side.flip(0), torch.zeros(1, dtype=torch.float64), one_side])
    wanted = torch.arange(-(new - 1), new, dtype=torch.float64)
    return _cubic_spline(known, wanted)


def _growth(num_terms: int, total: int) -> float:
    """Solve 1 + q + q^2 + ... (`num_terms` terms) = `total` for q by bisection."""
    low, high = 1.0, float(total)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**n for n in range(num_terms)) < total else (low, middle)
    return (low + high) / 2


def _cubic_spline(known: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the weights (wanted, known) of an interpolating not-a-knot cubic spline."""
    if len(known) < 4:  # one parabola through three points
        powers = torch.arange(len(known), dtype=known.dtype)
        bases = [x[:, None] ** powers for x in (known, wanted)]
    else:  # truncated powers at the inner points, without the second and the last but one
        known, wanted = known / known[-1], wanted / known[-1]
        bases = [
            torch.cat([x[:, None] ** torch.arange(4), (x[:, None] - known[2:-2]).clamp(min=0) ** 3], dim=1)
            for x in (known, wanted)
        ]
    weights: torch.Tensor = torch.linalg.solve(*bases, left=False)
    return weights

"""Which patches of an image are hidden: the mask strategies of the masked-image-modeling papers.

Every strategy takes `(grid, mask_ratio, generator)`, grid = (patch rows, patch columns), and returns a bool tensor
(N,), row-major, True = hidden, with at least one patch hidden and one visible. A ratio that cannot is a ValueError.

Paper: random and grid: He et al. 2021 (MAE), arXiv:2111.06377, Sec. 3 and Fig. 6.  random-unit: Xie et al. 2021
(SimMIM), arXiv:2111.09886, Sec. 3.2.  block: Bao et al. 2021 (BEiT), arXiv:2106.08254, Alg. 1.  exact-block: Peng et
al. 2022 (BEiT v2), arXiv:2208.06366.  inverse-block: Darcet et al. 2025 (CAPI), arXiv:2502.08769.
Code: counts and loops follow the authors' code where it differs from the paper.
Shapes: N patches = rows * columns of the grid.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

BLOCK_ATTEMPTS = 10  # tries to place one block before the mask is taken as it is
BLOCK_MIN_AREA = 16  # patches; BEiT's value for a 14x14 grid
BLOCK_MIN_ASPECT = 0.3  # height / width lies between this and its inverse
INVERSE_BLOCK_MIN_ASPECT = 0.5  # same, CAPI
GRID_RATIO_TOLERANCE = 0.005  # so that 0.89 may be written for 8/9


def random_mask(grid: tuple[int, int], mask_ratio: float, generator: torch.Generator) -> torch.Tensor:
    """Hides patches uniformly at random, always N - int(N * (1 - mask_ratio)) of them -> (N,)."""
    num_patches = math.prod(grid)
    num_visible = _num_visible(grid, mask_ratio)
    return torch.randperm(num_patches, generator=generator) >= num_visible


def random_unit_mask(
    grid: tuple[int, int], mask_ratio: float, generator: torch.Generator, unit: int = 1
) -> torch.Tensor:
    """Hides whole cells of unit x unit patches, ceil(mask_ratio * cells) of them -> (N,).

    SimMIM's cells are 32 pixels wide whatever the patch size: unit 2 for patches of 16, unit 8 for patches of 4.
    """
    rows, columns = grid
    if unit < 1 or rows % unit or columns % unit:
        raise ValueError(
            f"A {rows}x{columns} grid of patches does not divide into cells of {unit}x{unit} patches. Choose a unit "
            f"that divides both sides: {_common_divisors(grid)}."
        )
    cell_rows, cell_columns = rows // unit, columns // unit
    num_cells = cell_rows * cell_columns
    num_masked = math.ceil(mask_ratio * num_cells)
    _check_num_masked(num_masked, num_cells, f"mask_ratio {mask_ratio}", f"cells of {unit}x{unit} patches")
    hidden = torch.randperm(num_cells, generator=generator) < num_masked
    hidden = hidden.view(cell_rows, 1, cell_columns, 1).expand(-1, unit, -1, unit)
    return hidden.reshape(-1)  # (N,)


def block_mask(
    grid: tuple[int, int],
    mask_ratio: float,
    generator: torch.Generator,
    num_masked: int | None = None,
    max_block_area: int | None = None,
) -> torch.Tensor:
    """Hides overlapping rectangles, at most `num_masked` patches and often a few less -> (N,).

    Blocks have 16 patches or more, until less is left to hide. On small grids they start at a square of a third of the
    shorter side (iBOT's rule, which gives 16 for 14x14), and never above `num_masked`.

    Args:
        num_masked: replaces round(mask_ratio * N). BEiT's "about 40 %" of 14x14 is 75 patches: say 75 here, or 75/196
            as the ratio, because 0.4 gives 78.
        max_block_area: largest block drawn, in patches. None: no limit but `num_masked`.
    """
    uniforms = _uniforms(generator)
    num_masked = _num_masked_in_blocks(grid, mask_ratio, num_masked)
    hidden = _hide_blocks(grid, num_masked, uniforms, max_block_area)
    if not hidden.any():  # ten failures in a row on a small grid: an image without a hidden patch has no loss
        hidden.flat[int(next(uniforms) * hidden.size)] = True
    return torch.from_numpy(hidden.reshape(-1))


def exact_block_mask(
    grid: tuple[int, int],
    mask_ratio: float,
    generator: torch.Generator,
    num_masked: int | None = None,
    max_block_area: int | None = None,
) -> torch.Tensor:
    """`block_mask`, then uniformly random single patches until exactly `num_masked` are hidden -> (N,).

    BEiT v2's code can also take patches back; blocks never hide too many, so there is nothing to take.
    """
    num_masked = _num_masked_in_blocks(grid, mask_ratio, num_masked)
    hidden = _hide_blocks(grid, num_masked, _uniforms(generator), max_block_area).reshape(-1)
    visible = np.flatnonzero(~hidden)
    num_missing = num_masked - (hidden.size - visible.size)
    if num_missing:
        hidden[visible[torch.randperm(visible.size, generator=generator)[:num_missing].numpy()]] = True
    return torch.from_numpy(hidden)


def inverse_block_mask(grid: tuple[int, int], mask_ratio: float, generator: torch.Generator) -> torch.Tensor:
    """Leaves one rectangle of int(N * (1 - mask_ratio)) patches visible, at any place -> (N,).

    The rectangle goes over the border and comes in at the other side, so that every patch is equally often visible.
    When the count does not fill it, the end of its last column is hidden.
    """
    rows, columns = grid
    num_visible = _num_visible(grid, mask_ratio)
    u_aspect, u_top, u_left = torch.rand(3, generator=generator).tolist()
    height = round(math.sqrt(num_visible * _log_uniform(INVERSE_BLOCK_MIN_ASPECT, u_aspect)))
    height = min(max(height, math.ceil(num_visible / columns)), rows)
    width = math.ceil(num_visible / height)
    block_rows = (int(u_top * rows) + np.arange(height)) % rows
    block_columns = (int(u_left * columns) + np.arange(width)) % columns
    hidden = np.ones(rows * columns, dtype=bool)
    hidden[(block_columns[:, None] + columns * block_rows).reshape(-1)[:num_visible]] = False
    return torch.from_numpy(hidden)


def grid_mask(grid: tuple[int, int], mask_ratio: float, generator: torch.Generator) -> torch.Tensor:
    """Leaves one patch of every k x k visible, mask_ratio = 1 - 1/k**2 (MAE: k = 2, 75 %) -> (N,).

    Which one of the k x k is drawn per image, so that every position is seen; the paper does not say.
    """
    rows, columns = grid
    ratios = {step: 1 - 1 / step**2 for step in _common_divisors(grid) if step > 1}
    step = min(ratios, key=lambda step: abs(ratios[step] - mask_ratio), default=0)
    if not step or abs(ratios[step] - mask_ratio) > GRID_RATIO_TOLERANCE:
        allowed = ", ".join(f"{ratio:.4g}" for ratio in ratios.values()) or "none, its sides have no common divisor"
        raise ValueError(
            f"mask_ratio {mask_ratio} is no regular grid on {rows}x{columns} patches. Ratios that are: {allowed}."
        )
    top, left = divmod(int(torch.randint(step**2, (), generator=generator)), step)
    hidden = torch.ones(rows, columns, dtype=torch.bool)
    hidden[top::step, left::step] = False
    return hidden.view(-1)


MASK_STRATEGIES: dict[str, Callable[..., torch.Tensor]] = {
    "random": random_mask,
    "random-unit": random_unit_mask,
    "block": block_mask,
    "exact-block": exact_block_mask,
    "inverse-block": inverse_block_mask,
    "grid": grid_mask,
}
UNEQUAL_COUNT_STRATEGIES = frozenset({"block"})  # two masks of one ratio may hide different numbers of patches
FIXED_RATIO_STRATEGIES = frozenset({"grid"})  # only a few ratios exist, so none can be drawn from a range


def _num_visible(grid: tuple[int, int], mask_ratio: float) -> int:
    num_patches = math.prod(grid)
    num_visible = int(num_patches * (1 - mask_ratio))  # float truncation and all: MAE authors' code
    _check_num_masked(num_patches - num_visible, num_patches, f"mask_ratio {mask_ratio}", "patches")
    return num_visible


def _num_masked_in_blocks(grid: tuple[int, int], mask_ratio: float, num_masked: int | None) -> int:
    if min(grid) < 2:
        raise ValueError(f"Blocks need at least 2x2 patches, got {grid[0]}x{grid[1]}. Use the strategy 'random'.")
    cause = f"mask_ratio {mask_ratio}" if num_masked is None else f"num_masked {num_masked}"
    num_masked = round(mask_ratio * math.prod(grid)) if num_masked is None else num_masked
    _check_num_masked(num_masked, math.prod(grid), cause, "patches")
    return num_masked


def _check_num_masked(num_masked: int, num_total: int, cause: str, what: str) -> None:
    if not 0 < num_masked < num_total:
        raise ValueError(
            f"{cause} hides {num_masked} of {num_total} {what}; at least one must be hidden and one visible. "
            f"Choose a ratio closer to 0.5 or smaller patches."
        )


def _common_divisors(grid: tuple[int, int]) -> list[int]:
    return [divisor for divisor in range(1, min(grid) + 1) if math.gcd(*grid) % divisor == 0]


def _hide_blocks(
    grid: tuple[int, int], num_masked: int, uniforms: Iterator[float], max_block_area: int | None
) -> np.ndarray:
    """BEiT's loop: blocks until `num_masked` patches are hidden or no block fits any more -> (rows, columns)."""
    if max_block_area is not None and max_block_area < 1:
        raise ValueError(f"max_block_area must be at least 1 patch, got {max_block_area}. Use None for no limit.")
    min_area = min(BLOCK_MIN_AREA, max(1, (min(grid) // 3) ** 2), num_masked)
    hidden = np.zeros(grid, dtype=bool)
    num_hidden = 0
    while num_hidden < num_masked:
        room = min(num_masked - num_hidden, max_block_area or num_masked)
        num_new = _hide_one_block(hidden, min_area, room, uniforms)
        if num_new == 0:
            break
        num_hidden += num_new
    return hidden


def _hide_one_block(hidden: np.ndarray, min_area: int, room: int, uniforms: Iterator[float]) -> int:
    """Hides one rectangle in place and returns how many patches that newly hides, 0 when no attempt fitted."""
    rows, columns = hidden.shape
    for _ in range(BLOCK_ATTEMPTS):
        area = min_area + (room - min_area) * next(uniforms)  # room < min_area: between the two all the same
        aspect = _log_uniform(BLOCK_MIN_ASPECT, next(uniforms))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:  # a block never spans the image: authors' code
            continue
        top = int(next(uniforms) * (rows - height + 1))
        left = int(next(uniforms) * (columns - width + 1))
        block = hidden[top : top + height, left : left + width]
        num_new = block.size - int(np.count_nonzero(block))
        if 0 < num_new <= room:
            block[:] = True
            return num_new
    return 0


def _log_uniform(low: float, uniform: float) -> float:
    """A number between `low` and 1 / `low`, uniform in its logarithm."""
    return low ** (1 - 2 * uniform)


def _uniforms(generator: torch.Generator) -> Iterator[float]:
    """Numbers in [0, 1), drawn 64 at a time because one call into torch costs as much as a whole block."""
    while True:
        yield from torch.rand(64, generator=generator).tolist()

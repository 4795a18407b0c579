"""Mask strategies of the masked-image-modeling papers.

Every strategy takes `(grid, mask_ratio, generator)` with grid = (patch rows, patch columns), and returns a bool tensor
(N,) in row-major order, True = masked. At least one patch is masked and one visible; a mask ratio that does not allow
this raises a ValueError.

Paper: random and grid: He et al. 2021 (MAE), arXiv:2111.06377, Sec. 3 and Fig. 6.  random-unit: Xie et al. 2021
(SimMIM), arXiv:2111.09886, Sec. 3.2.  block: Bao et al. 2021 (BEiT), arXiv:2106.08254, Alg. 1.  exact-block: Peng et
al. 2022 (BEiT v2), arXiv:2208.06366.  inverse-block: Darcet et al. 2025 (CAPI), arXiv:2502.08769.  visible-blocks:
Baevski et al. 2022 (data2vec 2.0), arXiv:2212.07525, who call it inverse block masking.
Code: counts and loops follow the authors' code where it differs from the paper.
Shapes: N patches = rows * columns of the grid.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

BLOCK_ATTEMPTS = 10  # attempts to place a block before the mask is left as it is
BLOCK_MIN_AREA = 16  # in patches; BEiT's value for a 14x14 grid
BLOCK_MIN_ASPECT = 0.3  # height / width lies between this and its reciprocal
INVERSE_BLOCK_MIN_ASPECT = 0.5  # the same for CAPI
VISIBLE_BLOCK_SIDE = 3  # in patches; data2vec 2.0's value for a 14x14 grid
VISIBLE_BLOCK_SURPLUS = 0.07  # fraction of the patches that blocks cover beyond the visible ones, as they overlap
GRID_RATIO_TOLERANCE = 0.005  # so that 8/9 can be written as 0.89


def random_mask(grid: tuple[int, int], mask_ratio: float, generator: torch.Generator) -> torch.Tensor:
    """Mask N - int(N * (1 - mask_ratio)) patches, chosen uniformly at random -> (N,)."""
    num_patches = math.prod(grid)
    num_visible = _num_visible(grid, mask_ratio)
    return torch.randperm(num_patches, generator=generator) >= num_visible


def random_unit_mask(
    grid: tuple[int, int], mask_ratio: float, generator: torch.Generator, unit: int = 1
) -> torch.Tensor:
    """Mask whole units of unit x unit patches, ceil(mask_ratio * num_units) of them -> (N,).

    SimMIM's mask units are 32 pixels wide whatever the patch size: unit 2 for patches of 16, unit 8 for patches of 4.
    """
    rows, columns = grid
    if unit < 1 or rows % unit or columns % unit:
        raise ValueError(
            f"A {rows}x{columns} grid of patches cannot be divided into mask units of {unit}x{unit} patches. Choose a "
            f"unit that divides both sides: {_common_divisors(grid)}."
        )
    unit_rows, unit_columns = rows // unit, columns // unit
    num_units = unit_rows * unit_columns
    num_masked = math.ceil(mask_ratio * num_units)
    _check_num_masked(num_masked, num_units, f"mask_ratio {mask_ratio}", f"mask units of {unit}x{unit} patches")
    mask = torch.randperm(num_units, generator=generator) < num_masked
    return mask.view(unit_rows, 1, unit_columns, 1).expand(-1, unit, -1, unit).reshape(-1)  # (N,)


def block_mask(
    grid: tuple[int, int],
    mask_ratio: float,
    generator: torch.Generator,
    num_masked: int | None = None,
    max_block_area: int | None = None,
) -> torch.Tensor:
    """Mask overlapping rectangles, at most `num_masked` patches in total and often a few less -> (N,).

    Blocks cover at least 16 patches, except the last ones. On small grids the minimum is the square of a third of the
    shorter side (iBOT's rule, which gives 16 for 14x14), and never above `num_masked`.

    Args:
        num_masked: Replaces round(mask_ratio * N). BEiT's "about 40 %" of 14x14 means 75 patches: pass 75 here or a
            mask ratio of 75/196, because 0.4 gives 78.
        max_block_area: Largest block, in patches. None limits it to `num_masked` only.
    """
    uniforms = _uniforms(generator)
    num_masked = _num_masked_in_blocks(grid, mask_ratio, num_masked)
    mask = _mask_blocks(grid, num_masked, uniforms, max_block_area)
    if not mask.any():  # ten failures in a row on a small grid: an image without a masked patch has no loss
        mask.flat[int(next(uniforms) * mask.size)] = True
    return torch.from_numpy(mask.reshape(-1))


def exact_block_mask(
    grid: tuple[int, int],
    mask_ratio: float,
    generator: torch.Generator,
    num_masked: int | None = None,
    max_block_area: int | None = None,
) -> torch.Tensor:
    """Apply `block_mask`, then mask random single patches until exactly `num_masked` are masked -> (N,).

    BEiT v2's code can also unmask patches; this is not needed, because blocks never mask too many.
    """
    num_masked = _num_masked_in_blocks(grid, mask_ratio, num_masked)
    mask = _mask_blocks(grid, num_masked, _uniforms(generator), max_block_area).reshape(-1)
    visible = np.flatnonzero(~mask)
    num_missing = num_masked - (mask.size - visible.size)
    if num_missing:
        mask[visible[torch.randperm(visible.size, generator=generator)[:num_missing].numpy()]] = True
    return torch.from_numpy(mask)


def inverse_block_mask(grid: tuple[int, int], mask_ratio: float, generator: torch.Generator) -> torch.Tensor:
    """Leave one rectangle of int(N * (1 - mask_ratio)) patches visible, at a random position -> (N,).

    The rectangle wraps around the border of the grid, so that every patch is visible equally often. If the count does
    not fill it, the end of its last column is masked.
    """
    rows, columns = grid
    num_visible = _num_visible(grid, mask_ratio)
    u_aspect, u_top, u_left = torch.rand(3, generator=generator).tolist()
    height = round(math.sqrt(num_visible * _log_uniform(INVERSE_BLOCK_MIN_ASPECT, u_aspect)))
    height = min(max(height, math.ceil(num_visible / columns)), rows)
    width = math.ceil(num_visible / height)
    block_rows = (int(u_top * rows) + np.arange(height)) % rows
    block_columns = (int(u_left * columns) + np.arange(width)) % columns
    mask = np.ones(rows * columns, dtype=bool)
    mask[(block_columns[:, None] + columns * block_rows).reshape(-1)[:num_visible]] = False
    return torch.from_numpy(mask)


def visible_blocks_mask(grid: tuple[int, int], mask_ratio: float, generator: torch.Generator) -> torch.Tensor:
    """Leave squares of 3 x 3 patches visible, then change single patches until int(N * (1 - mask_ratio)) are -> (N,).

    Squares may overlap and are cut off at the border. `inverse_block_mask` leaves one rectangle visible instead.
    """
    rows, columns = grid
    num_visible = _num_visible(grid, mask_ratio)
    num_blocks = int(rows * columns * (1 - mask_ratio + VISIBLE_BLOCK_SURPLUS) / VISIBLE_BLOCK_SIDE**2)
    visible, reach = np.zeros(grid, dtype=bool), VISIBLE_BLOCK_SIDE // 2
    for center in torch.randint(rows * columns, (max(1, num_blocks),), generator=generator).tolist():
        row, column = divmod(center, columns)
        visible[max(0, row - reach) : row + reach + 1, max(0, column - reach) : column + reach + 1] = True
    mask = ~visible.reshape(-1)
    num_missing = num_visible - int(np.count_nonzero(visible))
    candidates = np.flatnonzero(mask == (num_missing > 0))
    mask[candidates[torch.randperm(candidates.size, generator=generator)[: abs(num_missing)].numpy()]] ^= True
    return torch.from_numpy(mask)


def grid_mask(grid: tuple[int, int], mask_ratio: float, generator: torch.Generator) -> torch.Tensor:
    """Leave one patch of every k x k patches visible, mask_ratio = 1 - 1/k**2 (MAE: k = 2, 75 %) -> (N,).

    Which of the k x k patches is drawn for each image, so that every position is seen; the paper does not specify it.
    """
    rows, columns = grid
    ratios = {step: 1 - 1 / step**2 for step in _common_divisors(grid) if step > 1}
    step = min(ratios, key=lambda step: abs(ratios[step] - mask_ratio), default=0)
    if not step or abs(ratios[step] - mask_ratio) > GRID_RATIO_TOLERANCE:
        allowed = ", ".join(f"{ratio:.4g}" for ratio in ratios.values()) or "none, its sides have no common divisor"
        raise ValueError(
            f"mask_ratio {mask_ratio} does not give a regular grid on {rows}x{columns} patches. Possible ratios: "
            f"{allowed}."
        )
    top, left = divmod(int(torch.randint(step**2, (), generator=generator)), step)
    mask = torch.ones(rows, columns, dtype=torch.bool)
    mask[top::step, left::step] = False
    return mask.view(-1)


MASK_STRATEGIES: dict[str, Callable[..., torch.Tensor]] = {
    "random": random_mask,
    "random-unit": random_unit_mask,
    "block": block_mask,
    "exact-block": exact_block_mask,
    "inverse-block": inverse_block_mask,
    "visible-blocks": visible_blocks_mask,
    "grid": grid_mask,
}
UNEQUAL_COUNT_STRATEGIES = frozenset({"block"})  # the number of masked patches differs between images
FIXED_RATIO_STRATEGIES = frozenset({"grid"})  # only a few ratios are possible, so none can be drawn from a range


def choose_predicted(mask: torch.Tensor, prediction_ratio: float, generator: torch.Generator) -> torch.Tensor:
    """Choose round(prediction_ratio * masked) of the masked patches (N,) uniformly at random, at least one -> (N,)."""
    masked = mask.nonzero().squeeze(1)
    num_predicted = max(1, round(prediction_ratio * len(masked)))
    predicted = torch.zeros_like(mask)
    predicted[masked[torch.randperm(len(masked), generator=generator)[:num_predicted]]] = True
    return predicted


def _num_visible(grid: tuple[int, int], mask_ratio: float) -> int:
    num_patches = math.prod(grid)
    num_visible = int(num_patches * (1 - mask_ratio))  # with float truncation, as in the authors' code of MAE
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
            f"{cause} masks {num_masked} of {num_total} {what}; at least one must be masked and one visible. "
            "Choose a mask ratio closer to 0.5 or smaller patches."
        )


def _common_divisors(grid: tuple[int, int]) -> list[int]:
    return [divisor for divisor in range(1, min(grid) + 1) if math.gcd(*grid) % divisor == 0]


def _mask_blocks(
    grid: tuple[int, int], num_masked: int, uniforms: Iterator[float], max_block_area: int | None
) -> np.ndarray:
    """Place blocks until `num_masked` patches are masked or no block fits (BEiT's loop) -> (rows, columns)."""
    if max_block_area is not None and max_block_area < 1:
        raise ValueError(f"max_block_area must be at least 1 patch, got {max_block_area}. Use None for no limit.")
    min_area = min(BLOCK_MIN_AREA, max(1, (min(grid) // 3) ** 2), num_masked)
    mask = np.zeros(grid, dtype=bool)
    num_left, limit = num_masked, max_block_area or num_masked
    while num_left and (num_new := _mask_one_block(mask, min_area, min(num_left, limit), uniforms)):
        num_left -= num_new
    return mask


def _mask_one_block(mask: np.ndarray, min_area: int, max_new: int, uniforms: Iterator[float]) -> int:
    """Mask one rectangle in place and return the number of newly masked patches, 0 if no attempt succeeded."""
    rows, columns = mask.shape
    for _ in range(BLOCK_ATTEMPTS):
        area = min_area + (max_new - min_area) * next(uniforms)  # also between the two if max_new < min_area
        aspect = _log_uniform(BLOCK_MIN_ASPECT, next(uniforms))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:  # a block never spans the image, as in the authors' code
            continue
        top = int(next(uniforms) * (rows - height + 1))
        left = int(next(uniforms) * (columns - width + 1))
        block = mask[top : top + height, left : left + width]
        num_new = block.size - int(np.count_nonzero(block))
        if 0 < num_new <= max_new:
            block[:] = True
            return num_new
    return 0


def _log_uniform(low: float, uniform: float) -> float:
    """Map a uniform number in [0, 1) to one between `low` and 1 / `low` whose logarithm is uniform."""
    return low ** (1 - 2 * uniform)


def _uniforms(generator: torch.Generator) -> Iterator[float]:
    """Yield random numbers in [0, 1), drawn 64 at a time because a call into torch costs as much as a whole block."""
    while True:
        yield from torch.rand(64, generator=generator).tolist()

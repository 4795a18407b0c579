"""Tests of masks: exact counts, the papers' statistics, and random numbers that depend on their counters only."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.nn.functional import max_pool2d

from data.masks import (
    MASK_STRATEGIES,
    UNEQUAL_COUNT_STRATEGIES,
    block_mask,
    exact_block_mask,
    grid_mask,
    random_mask,
    random_unit_mask,
)
from data.seeds import seeded_generator

GRIDS = [(14, 14), (6, 6), (7, 10), (10, 7), (2, 3), (2, 2), (5, 5), (16, 24)]
RATIOS = [0.3, 0.5, 0.6, 0.75]


def draw_masks(
    strategy: str, grid: tuple[int, int], mask_ratio: float, num_draws: int, **options: int | None
) -> torch.Tensor:
    """(num_draws, N)"""
    draw = MASK_STRATEGIES[strategy]
    generators = (seeded_generator(strategy, draw_index) for draw_index in range(num_draws))
    return torch.stack([draw(grid, mask_ratio, generator, **options) for generator in generators])


def bounding_box(cells: torch.Tensor) -> tuple[int, int]:
    """Height and width of the smallest rectangle around the True cells of a (rows, columns) mask."""
    rows, columns = cells.nonzero(as_tuple=True)
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("mask_ratio", RATIOS)
@pytest.mark.parametrize("strategy", ["random", "inverse-block", "visible-blocks"])
def test_visible_patches__are_counted_as_in_the_mae_code(strategy, mask_ratio, grid):
    num_patches = math.prod(grid)
    masks = draw_masks(strategy, grid, mask_ratio, 20)
    assert masks.dtype == torch.bool
    assert masks.shape == (20, num_patches)
    assert (num_patches - masks.sum(1)).tolist() == [int(num_patches * (1 - mask_ratio))] * 20


@pytest.mark.parametrize(
    ("grid", "mask_ratio", "num_visible"), [((14, 14), 0.75, 49), ((6, 6), 0.6, 14), ((10, 10), 0.9, 9)]
)
def test_random_mask__keeps_the_float_truncation_of_the_mae_code(grid, mask_ratio, num_visible):
    assert (~random_mask(grid, mask_ratio, seeded_generator(0))).sum() == num_visible


def test_random_mask__hides_every_patch_equally_often_and_independently():
    masks = draw_masks("random", (4, 7), 0.75, 4000).float()
    assert masks.mean(0).sub(0.75).abs().max() < 0.03  # standard error 0.007
    # Without replacement, 21 of 28: two patches are both hidden with probability 21/28 * 20/27.
    both_hidden = (masks.T @ masks / 4000)[~torch.eye(28, dtype=torch.bool)]
    assert both_hidden.sub(21 / 28 * 20 / 27).abs().max() < 0.04  # standard error 0.008, 378 pairs


@pytest.mark.parametrize(
    ("grid", "unit", "num_masked"),
    [((14, 14), 2, 120), ((48, 48), 8, 22 * 64), ((4, 6), 2, 4 * 4), ((7, 10), 1, 42)],
)
def test_random_unit_mask__masks_whole_units_counted_as_in_the_simmim_code(grid, unit, num_masked):
    for mask in draw_masks("random-unit", grid, 0.6, 20, unit=unit):
        assert mask.sum() == num_masked
        units = mask.view(grid[0] // unit, unit, grid[1] // unit, unit)
        assert (units == units[:, :1, :, :1]).all()


def test_random_unit_mask__masks_every_unit_equally_often():
    rates = draw_masks("random-unit", (4, 6), 0.5, 4000, unit=2).float().mean(0)
    assert rates.sub(0.5).abs().max() < 0.04  # standard error 0.008


def test_random_unit_mask__names_the_units_that_divide_the_grid():
    with pytest.raises(ValueError, match=r"14x21 .* mask units of 4x4 .*\[1, 7\]"):
        random_unit_mask((14, 21), 0.6, seeded_generator(0), unit=4)


def test_block_mask__has_the_statistics_of_the_beit_code():
    masks = draw_masks("block", (14, 14), 75 / 196, 5000).float()
    counts, rates = masks.sum(1), masks.mean(0).view(14, 14)
    assert counts.mean().item() == pytest.approx(74.5, abs=0.15)
    assert counts.min() >= 60
    assert counts.max() == 75
    assert (counts == 75).float().mean().item() == pytest.approx(0.67, abs=0.02)
    corners = rates[[0, 0, -1, -1], [0, -1, 0, -1]]
    edges = torch.cat([rates[0, 1:-1], rates[-1, 1:-1], rates[1:-1, 0], rates[1:-1, -1]])
    assert corners.mean().item() == pytest.approx(0.04, abs=0.01)
    assert edges.mean().item() == pytest.approx(0.15, abs=0.01)
    assert rates[6:8, 6:8].mean().item() == pytest.approx(0.72, abs=0.02)


def test_block_mask__never_draws_a_block_as_long_as_the_grid():
    # On 2x2 that leaves blocks of one patch, and two of those lie on a diagonal in 2 of 6 cases.
    pairs = [mask for mask in draw_masks("block", (2, 2), 0.5, 3000) if mask.sum() == 2]
    num_diagonal = sum(bool(mask[0] == mask[3]) for mask in pairs)
    assert num_diagonal / len(pairs) == pytest.approx(1 / 3, abs=0.04)  # standard error 0.009


def test_block_mask__has_the_mean_of_the_data2vec_code():
    counts = draw_masks("block", (14, 14), 0.6, 2000, num_masked=120).sum(1).float()
    assert counts.mean().item() == pytest.approx(119.5, abs=0.1)
    assert counts.max() == 120


def test_block_mask__rounds_the_ratio_and_lets_num_masked_replace_it():
    assert draw_masks("block", (14, 14), 0.4, 200).sum(1).max() == 78
    assert draw_masks("block", (14, 14), 0.4, 200, num_masked=75).sum(1).max() == 75


def test_block_mask__limits_each_block_to_max_block_area():
    def largest_square(max_block_area: int | None) -> int:
        """Side of the largest fully hidden square in 100 masks."""
        masks = draw_masks("block", (14, 14), 75 / 196, 100, max_block_area=max_block_area).view(-1, 1, 14, 14)
        return max(side for side in range(1, 15) if max_pool2d((~masks).float(), side, stride=1).min() == 0)

    assert largest_square(None) >= 7
    assert largest_square(16) < largest_square(None)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("mask_ratio", RATIOS)
def test_block_mask__comes_near_the_target_on_small_grids(mask_ratio, grid):
    num_masked = round(mask_ratio * math.prod(grid))
    counts = draw_masks("block", grid, mask_ratio, 200).sum(1)
    assert counts.min() >= 1
    assert counts.max() <= num_masked
    assert counts.float().mean() >= 0.85 * num_masked  # 0.88 on 2x2, above 0.95 from 6x6 on


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("mask_ratio", RATIOS)
def test_exact_block_mask__hides_exactly_the_rounded_ratio(mask_ratio, grid):
    assert set(draw_masks("exact-block", grid, mask_ratio, 50).sum(1).tolist()) == {
        round(mask_ratio * math.prod(grid))
    }


def test_exact_block_mask__adds_single_patches_to_the_blocks_of_block_mask():
    num_added = []
    for draw_index in range(300):
        blocks = block_mask((14, 14), 75 / 196, seeded_generator(draw_index))
        exact = exact_block_mask((14, 14), 75 / 196, seeded_generator(draw_index))
        assert exact.sum() == 75
        assert (exact | blocks).equal(exact)
        num_added.append(int(exact.sum() - blocks.sum()))
    assert min(num_added) == 0
    assert max(num_added) > 0


def test_inverse_block_mask__leaves_one_rectangle_visible_across_the_border():
    for mask in draw_masks("inverse-block", (14, 14), 0.65, 200):
        visible = ~mask.view(14, 14)
        num_rows, num_columns = int(visible.any(1).sum()), int(visible.any(0).sum())
        assert 0 <= num_rows * num_columns - 68 < num_rows  # full but for the end of one column
        assert num_rows / num_columns == pytest.approx(1, abs=1.1)
        # Rolled so that a hidden row and column come first, the rectangle is in one piece.
        rolled = visible.roll((-int(visible.any(1).int().argmin()), -int(visible.any(0).int().argmin())), (0, 1))
        assert bounding_box(rolled) == (num_rows, num_columns)


def test_inverse_block_mask__shows_every_patch_equally_often():
    rates = draw_masks("inverse-block", (7, 10), 0.6, 4000).float().mean(0)
    assert rates.sub(0.6).abs().max() < 0.04  # standard error 0.008


def test_visible_blocks_mask__leaves_whole_squares_and_few_single_patches():
    """As data2vec 2.0 on a 14x14 grid: five squares of 3x3, and 39 of 196 patches visible in the end."""
    whole, lonely = [], []
    for mask in draw_masks("visible-blocks", (14, 14), 0.8, 200):
        visible = (~mask).float().view(1, 1, 14, 14)
        around = torch.nn.functional.conv2d(visible, torch.ones(1, 1, 3, 3), padding=1)
        whole.append(int((around == 9).sum()))
        lonely.append(int(((around == 1) & (visible == 1)).sum()))
    assert np.mean(whole) > 2.5  # of five; random masks of this ratio have 0.00008
    assert np.mean(lonely) < 3  # of 39; random masks have about 7


@pytest.mark.parametrize(
    ("grid", "mask_ratio", "step"), [((14, 14), 0.75, 2), ((6, 12), 8 / 9, 3), ((6, 12), 0.89, 3), ((4, 8), 0.9375, 4)]
)
def test_grid_mask__leaves_one_patch_of_each_square_visible(grid, mask_ratio, step):
    masks = draw_masks("grid", grid, mask_ratio, 200)
    squares = (~masks).view(-1, grid[0] // step, step, grid[1] // step, step)
    assert (squares.sum((2, 4)) == 1).all()
    assert (squares == squares[:, :1, :, :1]).all()  # the same place in every square
    assert not masks.all(0).any()  # and over the images every place


@pytest.mark.parametrize(
    ("grid", "mask_ratio", "message"),
    [((14, 14), 0.6, r"0\.6 .* 14x14 .* 0\.75, 0\.9796, 0\.9949"), ((7, 10), 0.75, "7x10 .* none")],
)
def test_grid_mask__names_the_possible_ratios(grid, mask_ratio, message):
    with pytest.raises(ValueError, match=message):
        grid_mask(grid, mask_ratio, seeded_generator(0))


@pytest.mark.parametrize("strategy", [name for name in MASK_STRATEGIES if name != "grid"])
@pytest.mark.parametrize("mask_ratio", [0.0, 1.0])
def test_every_strategy__refuses_to_hide_nothing_or_everything(strategy, mask_ratio):
    with pytest.raises(ValueError, match=f"mask_ratio {mask_ratio} masks .* at least one"):
        MASK_STRATEGIES[strategy]((4, 4), mask_ratio, seeded_generator(0))


@pytest.mark.parametrize("draw", [block_mask, exact_block_mask])
def test_blocks__refuse_what_they_cannot_do(draw):
    with pytest.raises(ValueError, match="at least 2x2 patches, got 1x8"):
        draw((1, 8), 0.5, seeded_generator(0))
    with pytest.raises(ValueError, match="num_masked 16 masks 16 of 16"):
        draw((4, 4), 0.5, seeded_generator(0), num_masked=16)
    with pytest.raises(ValueError, match="max_block_area must be at least 1 patch, got 0"):
        draw((4, 4), 0.5, seeded_generator(0), max_block_area=0)


@pytest.mark.parametrize("strategy", MASK_STRATEGIES)
def test_every_strategy__draws_from_its_generator_only(strategy):
    draw = MASK_STRATEGIES[strategy]
    state = torch.get_rng_state()
    first = draw((14, 14), 0.75, seeded_generator(0, "mask", 1, 5))
    torch.rand(3)
    assert first.equal(draw((14, 14), 0.75, seeded_generator(0, "mask", 1, 5)))
    torch.set_rng_state(state)
    draw((14, 14), 0.75, seeded_generator(0))
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("strategy", [name for name in MASK_STRATEGIES if name not in UNEQUAL_COUNT_STRATEGIES])
def test_equal_count_strategies__hide_equal_numbers(strategy):
    assert draw_masks(strategy, (16, 24), 0.75, 100).sum(1).unique().numel() == 1


@pytest.mark.parametrize(("next_epoch", "next_image"), [(0, 1), (1, 0), (1, -1)])
def test_masks_of_neighboring_counters__are_independent(next_epoch, next_image):
    def masks(epoch: int, first_image: int) -> torch.Tensor:
        generators = (seeded_generator(0, "mask", epoch, first_image + i) for i in range(1000))
        return torch.stack([random_mask((14, 14), 0.75, generator) for generator in generators])

    both_hidden = (masks(0, 5) & masks(next_epoch, 5 + next_image)).float().mean().item()
    assert both_hidden == pytest.approx(0.75**2, abs=0.003)  # standard error 0.0005


def test_seeded_generator__differs_whenever_a_counter_differs():
    tuples: list[tuple[int | str, ...]] = [(0, epoch, i) for epoch in range(50) for i in range(50)]
    tuples += [
        (1, 23),
        (12, 3),
        (123,),
        ("1", 23),
        ("12", 3),
        (1, "23"),
        (),
        ("",),
        (0,),
        ("mask",),
        ("mask", 0),
        (-1,),
    ]
    assert len({seeded_generator(*counters).initial_seed() for counters in tuples}) == len(tuples)
    # torch's generator keeps the low 32 bits of a seed, so those must differ too: 0.0007 collisions expected here.
    assert len({seeded_generator(*counters).initial_seed() % 2**32 for counters in tuples}) == len(tuples)


def test_seeded_generator__is_the_same_in_every_process():
    code = "from data.seeds import seeded_generator as g; print(g(7, 'mask', 3, 2**40).initial_seed())"
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert int(run.stdout) == seeded_generator(7, "mask", 3, 2**40).initial_seed()
    assert seeded_generator(0, "mask", 0, 0).initial_seed() == 10154573509988429358


def test_seeded_generator__takes_numpy_and_torch_integers_as_plain_ones():
    seed = seeded_generator(0, 5).initial_seed()
    assert seeded_generator(np.int64(0), torch.tensor(5)).initial_seed() == seed
    with pytest.raises(TypeError, match="float"):
        seeded_generator(0, 5.0)

"""Tables of positions keep what they say about each place when the image or the window changes its size.

golden/relative_bias.safetensors: scipy's `RectBivariateSpline` on the authors' coordinates (SimMIM, d3e29bc), windows
6 -> 7 and 14 -> 24; scipy replaced the `interp2d` that they used.
"""

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from torch import nn

from modeling.patches import sincos_positions
from modeling.positions import resize_positions, resize_relative_bias


def test_positions__are_resized_in_two_dimensions_beside_the_class_token():
    table = sincos_positions((4, 6), 32)
    resized = resize_positions(table, (4, 6), (8, 3))
    assert resized.shape == (1, 1 + 24, 32)
    assert torch.equal(resized[:, 0], table[:, 0])
    by_column = resized[0, 1:].view(8, 3, 32)[..., :16]  # the same in every row, as in the table itself
    torch.testing.assert_close(by_column, by_column[:1].expand(8, -1, -1), atol=1e-5, rtol=0)
    expected = nn.functional.interpolate(table[:, 1:].view(1, 4, 6, 32).permute(0, 3, 1, 2), (8, 3), mode="bicubic")
    torch.testing.assert_close(resized[0, 1:].T.view(32, 8, 3), expected[0])


def test_positions__of_the_same_size_are_untouched():
    table = torch.randn(1, 17, 8)
    assert resize_positions(table, (4, 4), (4, 4)) is table


@pytest.mark.parametrize(("old", "new"), [(6, 7), (14, 24)])
def test_relative_bias__grows_as_the_authors_code_does(old, new):
    golden = load_file(ROOT / "tests/golden/relative_bias.safetensors")
    table, expected = golden[f"{old}_to_{new}.before"], golden[f"{old}_to_{new}.after"]
    resized = resize_relative_bias(table, (old, old), (new, new))
    torch.testing.assert_close(resized, expected, atol=2e-6, rtol=0)


def test_relative_bias__near_offsets_stay_near_and_rows_of_the_class_token_stay():
    distance = torch.arange(-13.0, 14)
    table = torch.cat([(distance[:, None] * 0 + distance).reshape(-1, 1), torch.tensor([[1.0], [2.0], [3.0]])])
    for new in (8, 20):
        resized = resize_relative_bias(table, (14, 14), (new, new))
        by_column = resized[:-3].view(2 * new - 1, 2 * new - 1)
        assert torch.equal(resized[-3:], table[-3:])
        # One patch further means what it meant; the ends of a larger table are those of the smaller one.
        assert by_column[0, new] == pytest.approx(1.0, abs=0.03)
        assert by_column[0, -1] == pytest.approx(min(new - 1, 13), abs=1e-4)


def test_relative_bias__sizes_of_rows_and_columns_are_independent():
    table = torch.randn(3 * 7, 2)
    resized = resize_relative_bias(table, (2, 4), (2, 6))
    assert resized.shape == (3 * 11, 2)
    assert torch.equal(resized.view(3, 11, 2)[:, 5], table.view(3, 7, 2)[:, 3])


@pytest.mark.parametrize(("old", "new"), [(1, 3), (2, 3), (2, 9), (3, 4), (7, 2), (4, 1)])
def test_relative_bias__a_constant_stays_that_constant(old, new):
    table = torch.full(((2 * old - 1) ** 2, 2), 0.5)
    resized = resize_relative_bias(table, (old, old), (new, new))
    torch.testing.assert_close(resized, torch.full(((2 * new - 1) ** 2, 2), 0.5))

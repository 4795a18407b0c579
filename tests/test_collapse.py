"""Collapse: what the statistics of targets are, and who is warned and stopped."""

import math

import pytest
import torch

from modeling.collapse import (
    distribution_sums,
    marginal_entropy,
    mean_entropy,
    row_moments,
    std_between_rows,
)


def test_statistics__add_up_over_micro_batches():
    torch.manual_seed(0)
    rows, probabilities = torch.randn(12, 5), torch.randn(12, 7).softmax(1)
    std = std_between_rows(row_moments(rows[:4]) + row_moments(rows[4:]))
    assert std.item() == pytest.approx(rows.std(0, correction=0).mean().item(), rel=1e-5)
    first, second = distribution_sums(probabilities[:4]), distribution_sums(probabilities[4:])
    sums = {name: first[name] + second[name] for name in first}
    expected = -(probabilities * probabilities.log()).sum(1).mean()
    assert mean_entropy(sums["entropy"]).item() == pytest.approx(expected.item(), rel=1e-5)
    mean = probabilities.mean(0)
    assert marginal_entropy(sums["marginal"]).item() == pytest.approx(-(mean * mean.log()).sum().item(), rel=1e-5)


def test_entropies__tell_equal_rows_from_uniform_ones():
    sharp, one, uniform = torch.eye(8), torch.eye(8)[:1].repeat(8, 1), torch.full((8, 8), 1 / 8)
    values = []
    for rows in (sharp, one, uniform):
        sums = distribution_sums(rows)
        values.extend((mean_entropy(sums["entropy"]).item(), marginal_entropy(sums["marginal"]).item()))
    assert values == pytest.approx([0, math.log(8), 0, 0, math.log(8), math.log(8)], abs=1e-6)

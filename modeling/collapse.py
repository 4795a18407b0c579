"""Statistics that show whether a teacher's targets collapse: all rows equal, or all in the same few classes.

All sums stay on the device and can be added up over micro-batches and processes, as `MimOutput.metrics` are.
Shapes: M rows, D features, K classes or prototypes.
"""

import torch


@torch.no_grad()
def row_moments(rows: torch.Tensor) -> torch.Tensor:
    """Return the sums over rows (M, D) of values, squares and ones, (3, D)."""
    rows = rows.float()
    return torch.stack([rows.sum(0), rows.square().sum(0), torch.ones_like(rows).sum(0)])


def std_between_rows(moments: torch.Tensor) -> torch.Tensor:
    """Return the std over rows, averaged over features, from sums of `row_moments`; 0 if all rows are equal."""
    mean, mean_square = moments[0] / moments[2], moments[1] / moments[2]
    return (mean_square - mean.square()).clamp(min=0).sqrt().mean()


@torch.no_grad()
def distribution_sums(probabilities: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the sums over rows (M, K) for `mean_entropy`, "entropy" (2,), and `marginal_entropy`, "marginal" (K+1,).

    The last value of each is the number of rows.
    """
    probabilities = probabilities.float()
    num_rows = probabilities.new_full((1,), len(probabilities))
    entropy = torch.special.entr(probabilities).sum()
    return {
        "entropy": torch.cat([entropy[None], num_rows]),
        "marginal": torch.cat([probabilities.sum(0), num_rows]),
    }


def mean_entropy(sums: torch.Tensor) -> torch.Tensor:
    """Return the mean entropy of a row in nats: ln K if every row is uniform, 0 if each has one class."""
    return sums[0] / sums[1]


def marginal_entropy(sums: torch.Tensor) -> torch.Tensor:
    """Return the entropy in nats of the mean distribution: ln K if all classes are used alike, 0 if only one is."""
    entropy: torch.Tensor = torch.special.entr(sums[:-1] / sums[-1]).sum()
    return entropy

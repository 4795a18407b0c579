"""Runs of neighboring indices: how images that are read together are chosen and ordered without listing them all."""

from collections.abc import Iterator
from typing import Any, overload

import numpy as np
import torch

from data.seeds import seeded_generator

_MIN_RUNS = 64  # of a small data set, so that its order and its validation images are mixed well


class Runs:
    """The indices of runs `start, start + 1, ... start + size - 1`, one run after another; needs memory per run only.

    Where an array is expected, `numpy` makes one of all indices.
    """

    def __init__(self, starts: np.ndarray, sizes: np.ndarray) -> None:
        self.starts, self.sizes = starts, sizes
        self._ends = np.cumsum(sizes)  # positions, not indices

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, position: int) -> int: ...
    @overload
    def __getitem__(self, position: Any) -> np.ndarray: ...
    def __getitem__(self, position: Any) -> Any:
        if isinstance(position, slice):
            position = np.arange(*position.indices(len(self)))
        run = np.searchsorted(self._ends, position, side="right")
        found = self.starts[run] + position - (self._ends[run] - self.sizes[run])
        return int(found) if np.ndim(found) == 0 else found

    def __iter__(self) -> Iterator[int]:
        for start, size in zip(self.starts.tolist(), self.sizes.tolist(), strict=True):
            yield from range(start, start + size)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[np.arange(len(self))].astype(dtype or np.int64)


def cut_into_runs(block_sizes: np.ndarray) -> Runs:
    """Return all indices, in runs that do not cross blocks; blocks of a small data set are cut into several."""
    largest = max(1, int(block_sizes.sum()) // _MIN_RUNS)
    num_parts = np.maximum(1, -(-block_sizes // largest))
    block = np.repeat(np.arange(len(block_sizes)), num_parts)
    part = np.arange(len(block)) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
    begins = part * block_sizes[block] // num_parts[block]
    ends = (part + 1) * block_sizes[block] // num_parts[block]
    first = np.cumsum(block_sizes) - block_sizes
    return Runs(first[block] + begins, ends - begins)


def split_runs(runs: Runs, fraction: float, seed: int) -> tuple[Runs, Runs]:
    """Return runs for training and for validation, the latter with about `fraction` of the images.

    At least one run each if there are two, and no validation run if `fraction` is 0.
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"validation_fraction is {fraction}, expected at least 0 and less than 1")
    order = torch.randperm(len(runs.sizes), generator=seeded_generator(seed, "held_out")).numpy()
    num_before = np.cumsum(runs.sizes[order]) - runs.sizes[order]
    num_runs = int((num_before < fraction * len(runs)).sum())
    num_runs = min(num_runs, len(order) - 1)
    chosen = [np.sort(order[num_runs:]), np.sort(order[:num_runs])]
    train, validation = (Runs(runs.starts[rows], runs.sizes[rows]) for rows in chosen)
    return train, validation

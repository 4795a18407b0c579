"""Exponential moving averages of weights, as for teachers and for the weights that are evaluated."""

from collections.abc import Iterable

import torch


@torch.no_grad()
def update_ema_(averages: Iterable[torch.Tensor], values: Iterable[torch.Tensor], momentum: float) -> None:
    """Set each average to momentum * average + (1 - momentum) * value, in place and for all tensors at once."""
    torch._foreach_lerp_(list(averages), [value.detach() for value in values], 1 - momentum)

"""What processes that train together compute as one: sums, rows of all of them, and batch statistics.

Shapes: n rows of this process, A rows of all processes, D features.
"""

from typing import Any, Literal

import torch
from torch import distributed, nn


def this_process() -> tuple[int, int]:
    """Return the rank of this process and the number of processes."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def over_processes(tensor: torch.Tensor, operation: Literal["sum", "max"]) -> torch.Tensor:
    """Return the sum or the maximum of a tensor over all processes."""
    if this_process()[1] > 1 and not tensor.is_meta:
        tensor = tensor.clone()
        distributed.all_reduce(tensor, getattr(distributed.ReduceOp, operation.upper()))
    return tensor


def own_share(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process has of a tensor that FSDP2 shards; another tensor as it is."""
    share: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return share


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        return over_processes(tensor, "sum")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return over_processes(gradient, "sum")


def gathered(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows (n, ...) of all processes by rank, (A, ...); each process gets the gradient of its own rows."""
    rank, num_processes = this_process()
    if num_processes == 1:
        return rows
    others = torch.zeros_like(rows)
    padded = torch.cat([rows if number == rank else others for number in range(num_processes)])
    result: torch.Tensor = _SumOverProcesses.apply(padded)
    return result


class BatchNorm(nn.BatchNorm1d):
    """A BatchNorm1d over the rows of all processes, on any device."""

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor
    momentum: float

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """(n, D) -> (n, D)."""
        num_processes = this_process()[1]
        if not self.training or num_processes == 1:
            normalized: torch.Tensor = super().forward(rows)
            return normalized
        # In double precision, as on one CPU: the mean of similar rows is much larger than their differences.
        count, values = len(rows) * num_processes, rows.double()
        mean = _SumOverProcesses.apply(values.sum(0)) / count  # (D,)
        variance = _SumOverProcesses.apply((values - mean).square().sum(0)) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean.float(), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).float(), self.momentum)
        normalized = ((values - mean) * (variance + self.eps).rsqrt()).float()
        return normalized if self.weight is None else normalized * self.weight + self.bias

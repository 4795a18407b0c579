"""Detect the first non-finite loss or gradient, and the step and images that caused it.

It raises a flag on the device for good. The optimizer reads the flag there and skips this and every later update, so
that the weights stay as they were before. The host reads it only where it waits for the device anyway (when logging)
and before each save, so that no step waits for it.

Shapes: B images of a micro-batch.
"""

import torch
from accelerate.utils import gather_object
from torch import nn

from modeling.processes import over_processes, own_share


class NonFiniteError(RuntimeError):
    """The loss, the gradient or a weight is NaN or infinite; the message names the step and the images."""


class NonFiniteGuard:
    """The flag of one process.

    Args:
        gradients_may_overflow: True under fp16 loss scaling, where infinite gradients are part of the method.
    """

    def __init__(self, device: torch.device, gradients_may_overflow: bool) -> None:
        self.gradients_may_overflow = gradients_may_overflow
        self.flag = torch.zeros((), dtype=torch.float32, device=device)  # 1 = raised; float32 as fused optimizers want
        self.step = torch.full((), -1, dtype=torch.int64, device=device)
        self.image_index = torch.empty(0, dtype=torch.int64, device=device)  # (B,) of the first bad micro-batch

    def watch_loss(self, loss: torch.Tensor, image_index: torch.Tensor | None, step: int) -> None:
        """Check the loss of a micro-batch; `image_index` (B,) is kept if it is the first bad one."""
        is_first = ~torch.isfinite(loss.detach()) & (self.flag == 0)
        if image_index is not None:
            if self.image_index.shape != image_index.shape:  # the first call, or a smaller last batch
                self.image_index = self._resized(image_index.shape[0])
            self.image_index = torch.where(is_first, image_index, self.image_index)
        self._raise_flag(is_first, step)

    def watch_gradient(self, grad_norm: torch.Tensor, step: int) -> None:
        """Check the norm of a step's gradient, averaged over the processes, so that all of them raise the flag."""
        if not self.gradients_may_overflow:
            self._raise_flag(~torch.isfinite(grad_norm.detach()) & (self.flag == 0), step)

    def skip_update_if_raised(self, optimizer: torch.optim.Optimizer) -> bool:
        """Let a fused optimizer skip its update on the device; return whether this optimizer can do that."""
        if not getattr(optimizer, "_step_supports_amp_scaling", False):
            return False
        if not self.gradients_may_overflow:  # under fp16 GradScaler sets it, from the same infinities
            optimizer.found_inf = self.flag  # type: ignore[attr-defined]
        return True

    def is_raised_anywhere(self) -> bool:
        """Return whether any process raised the flag; waits for the device."""
        flag = self.flag
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            flag = flag.clone()
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        return bool(flag.item())

    def first_bad_step(self) -> int:
        steps = [step for step in gather_object([int(self.step)]) if step >= 0]
        return min(steps)

    def _raise_flag(self, is_first: torch.Tensor, step: int) -> None:
        # Not `torch.where`, which would copy the number to the device and wait for that.
        self.step = self.step.masked_fill(is_first, step)
        self.flag = self.flag.masked_fill(is_first, 1.0)

    def _resized(self, size: int) -> torch.Tensor:
        resized = self.image_index.new_full((size,), -1)
        resized[: min(size, len(self.image_index))] = self.image_index[:size]
        return resized


def has_only_finite_weights(model: nn.Module) -> bool:
    """Return whether all weights are finite, on every process; waits for the device."""
    shares = [own_share(parameter.detach()) for parameter in model.parameters()]
    norms = torch._foreach_norm([share for share in shares if share.numel()], ord=float("inf"))
    are_bad = ~torch.isfinite(torch.stack(norms)).all()
    return not over_processes(are_bad.float(), "max").item()

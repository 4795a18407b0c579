"""First steps in which new parts of a model train on an encoder that stays as it was loaded.

Random heads would otherwise spoil a trained encoder before they have learned anything (Alkin et al. 2024, MIM-Refiner,
arXiv:2402.10093, begins in this way).
"""

from collections.abc import Callable

from torch import nn
from transformers import PreTrainedModel


class HeadWarmup:
    """The first `num_steps` steps of a training, in which the encoder gets no gradient, but for a mask token.

    Its optimizer state begins when it trains, and a teacher that averages it stays what it follows.
    """

    def __init__(self, model: PreTrainedModel, num_steps: int) -> None:
        self.model, self.num_steps = model, num_steps
        self._names = {
            name
            for name, parameter in (model.base_model.named_parameters() if num_steps else ())
            if parameter.requires_grad and not name.endswith("mask_token")
        }

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of the encoder; FSDP2 replaces them by shares."""
        named = self.model.base_model.named_parameters() if self._names else ()
        return [parameter for name, parameter in named if name in self._names]

    def hold(self, step: int, can_skip: bool) -> None:
        """Before a forward pass: compute no gradients that are not needed, unless DDP expects them."""
        for parameter in self.parameters:
            parameter.requires_grad_(step >= self.num_steps or not can_skip)

    def drop_gradients(self, step: int) -> None:
        """After a backward pass."""
        if step < self.num_steps:
            for parameter in self.parameters:
                parameter.grad = None

    def restarted(self, factor: Callable[[int], float], warmup_steps: int) -> Callable[[int], float]:
        """Return a schedule of the learning rate: constant at first, then anew, so that the encoder warms up as well.

        Args:
            factor: The schedule of the steps that follow, by their number.
            warmup_steps: Of the new parts; at most a tenth of their steps.
        """
        rise = max(1, min(warmup_steps, self.num_steps // 10))

        def both(step: int) -> float:
            return min(1.0, step / rise) if step < self.num_steps else factor(step - self.num_steps)

        return both

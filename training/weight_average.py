"""An exponential moving average of the weights, for evaluation and export."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


class WeightAverage:
    """Average of a model's parameters over its last 1 / (1 - decay) steps or so.

    In the first steps the decay is (1 + n) / (10 + n), or the weights that the model was made with would stay in the
    average of a short run.
    """

    FILE = "weight_average.safetensors"

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """After an optimizer step; `num_updates` counts the steps before it."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        now = [parameter.detach() for _, parameter in self.model.named_parameters()]
        torch._foreach_lerp_(list(self.values.values()), now, 1 - decay)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Inside, the model has the average; afterwards its own weights again."""
        own = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self._give(self.values)
        try:
            yield
        finally:
            self._give(own)

    def save(self, folder: Path) -> None:
        save_file({name: value.contiguous() for name, value in self.values.items()}, folder / self.FILE)

    def load(self, folder: Path) -> None:
        for name, value in load_file(folder / self.FILE).items():
            self.values[name].copy_(value)

    @torch.no_grad()
    def _give(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(values[name])

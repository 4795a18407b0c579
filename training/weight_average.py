"""An exponential moving average of the weights, for evaluation and export."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from modeling.ema import update_ema_
from modeling.processes import this_process
from training.sharding import shard_like, whole


class WeightAverage:
    """Average of a model's parameters over about the last 1 / (1 - decay) steps.

    In the first steps the decay is (1 + n) / (10 + n): otherwise the initial weights would stay in the average of a
    short run.
    """

    FILE = "weight_average.safetensors"

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def update(self, num_updates: int) -> None:
        """Update the average after an optimizer step; `num_updates` counts the steps before it."""
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        self._share()
        update_ema_(self.values.values(), self.model.parameters(), decay)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Give the model the average inside a block, and its own weights again afterwards."""
        self._share()
        own = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        self._load_weights(self.values)
        try:
            yield
        finally:
            self._load_weights(own)

    def save(self, folder: Path) -> None:
        """Write the average on the main process; every process calls it."""
        state = {name: whole(value).cpu().contiguous() for name, value in self.values.items()}
        if this_process()[0] == 0:
            save_file(state, folder / self.FILE)

    def load(self, folder: Path) -> None:
        for name, value in load_file(folder / self.FILE).items():
            self.values[name] = value.to(self.values[name].device)

    def _share(self) -> None:
        """Keep only this process's share of what FSDP2 has sharded since."""
        for name, parameter in self.model.named_parameters():
            self.values[name] = shard_like(self.values[name], parameter)

    @torch.no_grad()
    def _load_weights(self, values: dict[str, torch.Tensor]) -> None:
        for name, parameter in self.model.named_parameters():
            parameter.copy_(values[name])

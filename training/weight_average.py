"""An exponential moving average of the weights, for evaluation and export."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback


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


class AveragesWeights:
    """Mix-in for a `Trainer`: with `keep_average`, evaluation uses the average and every checkpoint has it too."""

    average: WeightAverage | None = None
    model: Any
    args: Any
    state: Any
    add_callback: Any

    def keep_average(self, decay: float) -> None:
        self.average = WeightAverage(self.model, decay)
        self.add_callback(_UpdateAverage(self.average))

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, the model has the average, if one is kept."""
        return self.average.in_place_of_weights() if self.average else nullcontext()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.averaged():
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)  # type: ignore[misc]
        if self.average and self.args.should_save:  # Trainer comes here in every process
            self.average.save(Path(output_dir or self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        if self.average:
            self.average.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        super()._load_best_model()  # type: ignore[misc]
        if self.average:
            self.average.load(Path(self.state.best_model_checkpoint))


class _UpdateAverage(TrainerCallback):
    def __init__(self, average: WeightAverage) -> None:
        self.average = average

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.average.update(state.global_step)

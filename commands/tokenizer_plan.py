"""The plan of a tokenizer's training."""

from dataclasses import dataclass
from typing import Any

from commands.plan import Plan, in_millions
from commands.tokenizer_settings import TokenizerSettings
from modeling.schedules import Schedule


@dataclass(frozen=True)
class TokenizerPlan(Plan):
    """The plan of a tokenizer's training; `grid` holds the codes of one image."""

    settings: TokenizerSettings
    schedules: dict[str, Schedule]

    @classmethod
    def scheduled(
        cls, settings: TokenizerSettings, steps_per_epoch: int, num_steps: int, notes: list[str]
    ) -> dict[str, Any]:
        return {"schedules": settings.schedules(num_steps, notes)}

    def task_rows(self) -> dict[str, str]:
        height, width = self.settings.image_size
        codes = f"{self.grid[0]} x {self.grid[1]} codes out of {self.settings.vocab_size:,}"
        return {
            "model": f"{self.settings.model}, {in_millions(self.footprint.num_parameters)}",
            "input": f"{height} x {width} pixels become {codes}",
            **self.settings.plan_rows(self.schedules),
        }

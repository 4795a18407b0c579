"""The plan of a tokenizer's training."""

import math
from dataclasses import dataclass
from typing import Any

from commands.plan import Plan, in_millions
from commands.tokenizer_settings import TokenizerSettings
from modeling.schedules import Schedule, constant

# Fractions of all steps. DALL-E's schedules end after 0.2 % and 5 % of 3 million steps, and must end in short runs.
_MOST_KL_WEIGHT_SHARE, _MOST_TEMPERATURE_SHARE = 0.1, 0.5


@dataclass(frozen=True)
class TokenizerPlan(Plan):
    """The plan of a tokenizer's training; `grid` holds the codes of one image."""

    settings: TokenizerSettings
    schedules: dict[str, Schedule]

    @classmethod
    def scheduled(
        cls, settings: TokenizerSettings, steps_per_epoch: int, num_steps: int, notes: list[str]
    ) -> dict[str, Any]:
        """Return the arguments of the model's forward that change during training, all by half a cosine.

        Paper: Ramesh et al. 2021 (DALL-E), arXiv:2102.12092, App. A.2.
        """

        def steps(name: str, most_share: float) -> int:
            given: float = getattr(settings, name)
            wanted = math.ceil(given * num_steps) if given < 1 else int(given)
            most = num_steps if settings.is_users(name) else int(most_share * num_steps)
            if wanted > most:
                notes.append(f"{name} is {most:,} instead of {wanted:,}: the run has {num_steps:,} steps")
            return min(wanted, most)

        kl_weight_steps = steps("kl_weight_steps", _MOST_KL_WEIGHT_SHARE)
        temperature_steps = steps("temperature_steps", _MOST_TEMPERATURE_SHARE)
        schedules = {
            "kl_weight": Schedule(0.0, settings.kl_weight, kl_weight_steps),
            "temperature": Schedule(1.0, settings.final_temperature, temperature_steps),
            "usage_weight": constant(settings.usage_weight),
        }
        return {"schedules": schedules}

    def task_rows(self) -> dict[str, str]:
        height, width = self.settings.image_size
        codes = f"{self.grid[0]} x {self.grid[1]} codes out of {self.settings.vocab_size:,}"
        schedules = self.schedules
        return {
            "model": f"{self.settings.model}, {in_millions(self.footprint.num_parameters)}",
            "input": f"{height} x {width} pixels become {codes}",
            "KL weight": f"0 to {schedules['kl_weight'].end:g} in {schedules['kl_weight'].num_steps:,} steps",
            "temperature": f"1 to {schedules['temperature'].end:g} in {schedules['temperature'].num_steps:,} steps",
        }

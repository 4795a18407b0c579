"""What changes from step to step while a discrete VAE trains.

Paper: Ramesh et al. 2021 (DALL-E), arXiv:2102.12092, App. A.2: all its schedules are halves of a cosine.
"""

import math
from dataclasses import dataclass


def half_cosine(step: int, num_steps: int, start: float, end: float) -> float:
    """From `start` at step 0 to `end` at step `num_steps`, level at both; `end` from there on."""
    if step >= num_steps:
        return end
    return end + (start - end) * (1 + math.cos(math.pi * step / num_steps)) / 2


@dataclass(frozen=True)
class TokenizerSchedules:
    """Weight of the divergence from 0 to `kl_weight`, temperature of the relaxation from 1 to `final_temperature`.

    `usage_weight` stays as it is.
    """

    kl_weight: float
    kl_weight_steps: int
    final_temperature: float
    temperature_steps: int
    usage_weight: float = 0.0

    def at(self, step: int) -> dict[str, float]:
        """Keyword arguments of the model's forward."""
        return {
            "kl_weight": half_cosine(step, self.kl_weight_steps, 0.0, self.kl_weight),
            "temperature": half_cosine(step, self.temperature_steps, 1.0, self.final_temperature),
            "usage_weight": self.usage_weight,
        }

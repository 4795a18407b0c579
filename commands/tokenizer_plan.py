"""The numbers of a tokenizer's run, said aloud before training; `commands.arithmetic` has the rules behind them."""

import math
from dataclasses import dataclass
from pathlib import Path

from commands.arithmetic import Hardware, training_schedule
from commands.memory import Footprint
from commands.plan import Plan, data_name, in_millions
from commands.tokenizer_settings import TokenizerSettings
from modeling.schedules import Schedule, constant

# Of the run. DALL-E's schedules end after 0.2 % and 5 % of 3 million steps; in a short run they still need to end.
_MOST_KL_WEIGHT_SHARE, _MOST_TEMPERATURE_SHARE = 0.1, 0.5


@dataclass(frozen=True)
class TokenizerPlan(Plan):
    """`grid` holds the codes of one image; nothing is hidden."""

    settings: TokenizerSettings
    schedules: dict[str, Schedule]

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


def make_tokenizer_plan(
    settings: TokenizerSettings,
    hardware: Hardware,
    num_train_images: int,
    num_validation_images: int,
    footprint: Footprint,
    grid: tuple[int, int],
    data: str,
) -> TokenizerPlan:
    """Every number of the run; `data` says what was found.

    Raises:
        ValueError: fewer images than processes, or a precision that the device has not.
    """
    notes: list[str] = []
    numbers = training_schedule(settings, hardware, num_train_images, notes)
    if not num_validation_images and settings.eval_strategy != "no":
        notes.append("no image is held out, so nothing is evaluated during training")
    schedules = _schedules(settings, numbers["num_steps"], notes)
    return TokenizerPlan(
        settings=settings,
        hardware=hardware,
        data=data,
        num_train_images=num_train_images,
        num_validation_images=num_validation_images,
        footprint=footprint,
        grid=grid,
        lr_drop_step=None,
        output_dir=Path(settings.output_dir or f"outputs/{settings.model}-{data_name(settings.dataset)}"),
        notes=tuple(notes),
        schedules=schedules,
        **numbers,
    )


def _schedules(settings: TokenizerSettings, num_steps: int, notes: list[str]) -> dict[str, Schedule]:
    """Return the keyword arguments of the model's forward that change during training, all by half a cosine.

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
    return {
        "kl_weight": Schedule(0.0, settings.kl_weight, kl_weight_steps),
        "temperature": Schedule(1.0, settings.final_temperature, temperature_steps),
        "usage_weight": constant(settings.usage_weight),
    }

"""A run that begins from another model: which settings that decides, and which may not contradict it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from commands.parsing import SettingsError
from commands.presets import ENCODER_SIZES


class StartingPoint(Protocol):
    """What is known of that model (`hub.init_from`)."""

    @property
    def encoder(self) -> Mapping[str, Any]:
        """Keyword arguments of the encoder's native config."""

    @property
    def fixed(self) -> Mapping[str, Any]:
        """Flags by name that follow from its weights."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Flags by name that the user may set otherwise."""

    @property
    def image_stats(self) -> Mapping[str, list[float]]:
        """Mean and deviation by which it standardizes, or nothing."""


# Opens what `--init_from` names; given what the user chose.
OpenStart = Callable[[Mapping[str, Any]], StartingPoint]


def short_name(init_from: str) -> str:
    """Of a folder or a Hub id, as part of the names of this run."""
    path = Path(init_from).resolve()
    return path.parent.name if path.name == "pretraining" else path.name


def check_against_start(values: Mapping[str, Any], users: set[str], start: StartingPoint | None) -> None:
    """`users`: names of what the user gave.

    Raises:
        SettingsError: a size that the weights to begin from do not have, or a setting without effect.
    """
    name = values["init_from"]
    if start is None:
        if values["repair_positions"]:
            raise SettingsError("--repair_positions has no effect without --init_from; leave it out")
        if values["image_stats"] == "source":
            raise SettingsError("--image_stats source needs --init_from; use preset or auto")
        return
    if values["image_stats"] == "source" and not start.image_stats:
        raise SettingsError(
            f"--image_stats source: {name} has no preprocessor_config.json with image_mean and image_std; "
            "use preset or auto"
        )
    for flag in sorted(users & start.fixed.keys()):
        if values[flag] != start.fixed[flag]:
            raise SettingsError(
                f"--{flag} {values[flag]} contradicts --init_from {name}, whose weights are made for "
                f"{start.fixed[flag]}; leave it out"
            )
    if "model" in users:
        for size, wanted in ENCODER_SIZES[values["model"]].items():
            if size not in (*start.defaults, *start.fixed, "model_type") and start.encoder.get(size) != wanted:
                raise SettingsError(
                    f"--model {values['model']} contradicts --init_from {name}: {size} is {wanted}, and there "
                    f"{start.encoder.get(size)}; leave --model out"
                )

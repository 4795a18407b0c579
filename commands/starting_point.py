"""Starting a run from another model: the settings that follow from it, and those that must not contradict it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from commands.parsing import SettingsError
from commands.presets import ENCODER_SIZES


class StartingPoint(Protocol):
    """What is known about that model (`hub.init_from`)."""

    @property
    def encoder(self) -> Mapping[str, Any]:
        """Return the keyword arguments of the encoder's native config."""

    @property
    def fixed(self) -> Mapping[str, Any]:
        """Return the settings that its weights require, by flag name."""

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Return the settings that the user may change, by flag name."""

    @property
    def image_stats(self) -> Mapping[str, list[float]]:
        """Return image_mean and image_std if the model has them, else an empty mapping."""


# Opens what --init_from names; called with `CommandLine.chosen`.
OpenStart = Callable[[Mapping[str, Any]], StartingPoint]


def short_name(init_from: str) -> str:
    """Return the last part of a folder or a Hub id, to name a run by."""
    path = Path(init_from).resolve()
    return path.parent.name if path.name == "pretraining" else path.name


def check_against_start(values: Mapping[str, Any], users: set[str], start: StartingPoint | None) -> None:
    """Check the settings against the model that the run starts from.

    Args:
        users: Names of the settings that the user gives.

    Raises:
        SettingsError: If the weights have another size, or a setting has no effect.
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
                f"--{flag} {values[flag]} contradicts --init_from {name}, whose weights require "
                f"{start.fixed[flag]}; leave it out"
            )
    if "model" in users:
        for size, wanted in ENCODER_SIZES[values["model"]].items():
            if size not in (*start.defaults, *start.fixed, "model_type") and start.encoder.get(size) != wanted:
                raise SettingsError(
                    f"--model {values['model']} contradicts --init_from {name}: {size} is {wanted} instead of "
                    f"{start.encoder.get(size)}; leave --model out"
                )

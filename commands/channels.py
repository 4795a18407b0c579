"""Flags for images whose values are measurements, and what they mean."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from commands.flags import COUNT, flag
from commands.settings import Origin, SettingsError
from data.images import ImageDataset
from data.measured import Measured
from data.value_ranges import PERCENTILES, measure_value_range

_EIGHT_BITS = "fixed", (0.0, 255.0)
_IN_WORDS = {
    "percentile": "the percentiles {:g} and {:g} of each channel in a sample of training images".format(*PERCENTILES),
    "minmax": "the smallest and largest value of each channel in a sample of training images",
}
_RANGE_HELP = "percentile, minmax, or fixed with two numbers or with two for each channel"


@dataclass(frozen=True, kw_only=True)
class ChannelFlags:
    title: ClassVar = "channels"

    channel_files: list[str] | None = flag(
        None,
        "for images with a file for each channel: name=pattern of each, in order, such as red=*_B04.tif "
        "nir=*_B08.tif; what * stands for names the image",
    )


@dataclass(frozen=True, kw_only=True)
class MeasurementFlags(ChannelFlags):
    value_range: list[str] | None = flag(
        None,
        "keep uint8, uint16 or float32 values as they are stored, and map this range of each channel to 0 to 1: "
        f"{_RANGE_HELP} (default: off for 1 or 3 channels; else fixed 0 255 for uint8, percentile for others)",
    )
    tile: int | None = flag(
        None,
        "use windows of this side in pixels as images, such as 512, of TIFF or NumPy files that are too large to read "
        "as a whole",
        COUNT,
    )
    panel_channels: list[str] | None = flag(
        None, "three channels, by number from 0 or by name, that panels show as red, green and blue (default: 0 1 2)"
    )
    channel_init: Literal["mean", "repeat"] | None = flag(
        None,
        "adapt the patch projection of --init_from to --num_channels: its channels keep their weights, and further "
        "ones get the mean of them or repeat them in turn",
    )


def parse_channel_files(given: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """Return the name and the pattern of each channel."""
    pairs = [one.partition("=") for one in given or ()]
    for (name, separator, pattern), one in zip(pairs, given or (), strict=True):
        if not (name and separator and pattern.count("*") == 1) or "/" in pattern:
            raise SettingsError(f"--channel_files has {one!r}, expected name=pattern, such as red=*_B04.tif")
    names = [name for name, _, _ in pairs]
    if len({*names}) < len(names):
        raise SettingsError(f"--channel_files is {' '.join(given or ())}, expected different names")
    return tuple((name, pattern) for name, _, pattern in pairs)


def measured_of(settings: Any, num_channels: int, tile: int | None = None) -> Measured:
    """Return how a command's images are read; raises SettingsError if --channel_files does not fit."""
    files = parse_channel_files(settings.channel_files)
    if files and len(files) != num_channels:
        raise SettingsError(f"--channel_files names {len(files)} channels, expected {num_channels}")
    return Measured(num_channels, files, tile)


def channels_and_stats(start: Any, values: Mapping[str, Any], origins: Mapping[str, Origin]) -> dict[str, Any]:
    """Return the number of channels, and which statistics a pre-training standardizes by; `start` is --init_from."""
    num_channels, stats, files = values["num_channels"], values["image_stats"], values["channel_files"]
    if files and origins["num_channels"] < Origin.CONFIG:
        num_channels = len(files)
    if start is not None and stats == "source" and (other := start.fixed["num_channels"]) != num_channels:
        if origins["image_stats"] >= Origin.CONFIG:
            raise SettingsError(
                f"--image_stats source: {values['init_from']} has statistics of {other} channels, not of "
                f"{num_channels}; use auto"
            )
        stats = None
    is_default = stats == "source" and origins["image_stats"] < Origin.CONFIG
    if is_default and values["value_range"] and not start.sizes_only and "value_range" in start.image_stats:
        stats = None  # those of the source are relative to its own range
    # The statistics of ImageNet have three colors, and are those of photographs.
    is_photograph = num_channels == 3 and not any(values[name] for name in ("value_range", "channel_files", "tile"))
    return {"num_channels": num_channels, "image_stats": stats or ("preset" if is_photograph else "auto")}


def measured_run(settings: Any) -> Measured | None:
    """Return how the images of a pre-training are read; None for photographs, which become 8 bits."""
    start = settings.start.image_stats if settings.start is not None and settings.image_stats == "source" else {}
    given = (settings.value_range, settings.channel_files, settings.tile, start.get("value_range"))
    if settings.num_channels in (1, 3) and not any(given):
        return None
    return measured_of(settings, settings.num_channels, settings.tile)


def check_measurements(settings: Any, targets: str | None) -> None:
    """Raise SettingsError if a setting of `PretrainingSettings` is impossible with measurements, or needs them.

    Args:
        targets: What makes the targets of the method, if anything does.
    """
    if settings.panel_channels is not None:
        shown_channels(settings)
    if settings.channel_init is not None and settings.init_from is None:
        raise SettingsError("--channel_init has no effect without --init_from; leave it out")
    if settings.measured is None:
        return
    if settings.value_range is not None:
        parse_range(settings.value_range, settings.num_channels)
    if targets is not None:
        raise SettingsError(
            f"--method {settings.method} predicts what a {targets} makes of 8-bit photographs; for measurements use a "
            "method without one, such as mae"
        )
    if settings.is_users("color_jitter") and settings.color_jitter:
        raise SettingsError(
            "--color_jitter changes the colors of photographs; measurements are cropped and flipped only: leave it out"
        )
    if settings.cache:
        raise SettingsError("--cache keeps 8-bit copies of images: leave it out for measurements")
    if settings.method_settings.get("gram_weight"):
        raise SettingsError("--gram_weight compares with features of 8-bit images: leave it out for measurements")


def parse_range(given: Sequence[str], num_channels: int) -> tuple[str, tuple[float, ...]]:
    """Return the kind of a value range and its numbers, if it has such."""
    kind, *numbers = given
    try:
        values = tuple(float(number) for number in numbers)
    except ValueError:
        values = ()
    is_fixed = kind == "fixed" and len(values) in (2, 2 * num_channels) and all(map(math.isfinite, values))
    if is_fixed and all(low < high for low, high in zip(values[::2], values[1::2], strict=True)):
        return kind, values
    if kind in _IN_WORDS and not numbers:
        return kind, ()
    raise SettingsError(f"--value_range is {' '.join(given)}, expected {_RANGE_HELP}, the lower one first")


def find_value_range(settings: Any, images: ImageDataset, dtype: str) -> list[list[float]]:
    """Return the lower and higher value of each channel of a run's images, whose values have this type."""
    kind, numbers = _range_kind(settings, dtype)
    if kind != "fixed":
        return measure_value_range(images, kind)
    ends = [list(pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]
    return ends * (settings.num_channels // len(ends))


def _range_kind(settings: Any, dtype: str) -> tuple[str, tuple[float, ...]]:
    if settings.value_range is not None:
        return parse_range(settings.value_range, settings.num_channels)
    return _EIGHT_BITS if dtype == "uint8" else ("percentile", ())


def describe_values(settings: Any, dtype: str, value_range: Sequence[Sequence[float]]) -> str:
    """Return a line about the range of each channel."""
    kind, _ = _range_kind(settings, dtype)
    by = _IN_WORDS.get(kind, "fixed values")
    is_of_source = settings.image_stats == "source" and "value_range" in settings.start.image_stats
    if is_of_source and settings.value_range is None:
        by = f"the values of {settings.init_from}"
    names = channel_names(settings, len(value_range))
    ranges = ", ".join(f"{name}: {low:g} and {high:g}" for name, (low, high) in zip(names, value_range, strict=True))
    return f"{dtype} as stored; 0 and 1 are {by}: {ranges}"


def channel_names(settings: Any, num_channels: int) -> list[str]:
    """Return the names that --channel_files gives, or numbers from 0."""
    files = parse_channel_files(settings.channel_files)
    return [name for name, _ in files] or [str(number) for number in range(num_channels)]


def shown_channels(settings: Any) -> list[int] | None:
    """Return the numbers of the channels that panels show; None for images that are shown as they are."""
    given, num_channels = settings.panel_channels, settings.num_channels
    names = channel_names(settings, num_channels)
    if num_channels in (1, 3):
        if given is not None:
            raise SettingsError(f"--panel_channels has no effect with {num_channels} channels; leave it out")
        return None
    if given is None:
        return [0, 1, 2] if num_channels > 3 else [0]
    numbers = [names.index(one) if one in names else int(one) if one.isdecimal() else -1 for one in given]
    if len(numbers) != 3 or not all(0 <= number < num_channels for number in numbers):
        raise SettingsError(f"--panel_channels is {' '.join(given)}, expected three of {', '.join(names)}")
    return numbers

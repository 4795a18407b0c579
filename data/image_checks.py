"""Looks at every image of a source before training: which can be read, and what the collection is like."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data.decoding import BadImage, Header, check
from data.sources import ImageSource

_TINY_PIXELS = 16  # a shorter side below one usual patch
_NUM_EXAMPLES = 10
_IMAGES_PER_TASK = 64


@dataclass(frozen=True)
class Extent:
    """Smallest, median and largest of a number of pixels."""

    smallest: int
    median: int
    largest: int


@dataclass(frozen=True)
class Summary:
    """What the readable images are like."""

    num_images: int
    width: Extent
    height: Extent
    modes: dict[str, int]
    formats: dict[str, int]
    num_sixteen_bit: int
    num_tiny: int

    def describe(self) -> str:
        width, height = self.width, self.height
        text = (
            f"{self.num_images:,} images, {width.smallest}-{width.largest} px wide (median {width.median}), "
            f"{height.smallest}-{height.largest} px high (median {height.median}); "
            f"{_counts(self.formats)}; mode {_counts(self.modes)}"
        )
        if self.num_sixteen_bit:
            text += f"; {self.num_sixteen_bit:,} with 16 bits a pixel, of which the high 8 are used"
        if self.num_tiny:
            text += f"; {self.num_tiny:,} with a side under {_TINY_PIXELS} px"
        return text


@dataclass(frozen=True)
class Checked:
    """`good`: int64 indices of the readable images; `bad`: (name, reason) of each other one."""

    good: np.ndarray
    bad: list[tuple[str, str]]
    summary: Summary


def check_images(source: ImageSource, max_bad_fraction: float, num_threads: int) -> Checked:
    """Reads every image's header and end.

    Raises: ValueError if no image can be read, or more than `max_bad_fraction` of them cannot.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction is {max_bad_fraction}, expected a share between 0 and 1")
    good: list[int] = []
    headers: list[Header] = []
    bad: list[tuple[str, str]] = []
    for index, outcome in enumerate(_outcomes(source, num_threads)):
        if isinstance(outcome, Header):
            good.append(index)
            headers.append(outcome)
        else:
            bad.append((source.name(index), outcome))
    if not good or len(bad) > max_bad_fraction * len(source):
        raise ValueError(_too_many_bad(source, bad, max_bad_fraction))
    return Checked(np.array(good, np.int64), bad, _summary(headers))


def _outcomes(source: ImageSource, num_threads: int) -> list[Header | str]:
    starts = range(0, len(source), _IMAGES_PER_TASK)  # one task for each image would queue millions of futures
    outcomes: list[Header | str] = []
    with (
        ThreadPoolExecutor(num_threads) as pool,
        tqdm(total=len(source), desc="Checking images", unit="image", delay=2.0) as progress,
    ):
        for found in pool.map(lambda start: _check_some(source, start), starts):
            outcomes += found
            progress.update(len(found))
    return outcomes


def _check_some(source: ImageSource, start: int) -> list[Header | str]:
    outcomes: list[Header | str] = []
    for index in range(start, min(start + _IMAGES_PER_TASK, len(source))):
        try:
            outcomes.append(check(source.entry(index)))
        except BadImage as error:
            outcomes.append(str(error))
    return outcomes


def _summary(headers: Sequence[Header]) -> Summary:
    modes = Counter(header.mode for header in headers)
    return Summary(
        num_images=len(headers),
        width=_extent([header.width for header in headers]),
        height=_extent([header.height for header in headers]),
        modes=dict(modes.most_common()),
        formats=dict(Counter(header.format for header in headers).most_common()),
        num_sixteen_bit=sum(count for mode, count in modes.items() if mode.startswith("I")),
        num_tiny=sum(min(header.width, header.height) < _TINY_PIXELS for header in headers),
    )


def _extent(pixels: list[int]) -> Extent:
    return Extent(min(pixels), int(np.median(pixels)), max(pixels))


def _too_many_bad(source: ImageSource, bad: list[tuple[str, str]], max_bad_fraction: float) -> str:
    lines = [f"{len(bad):,} of {len(source):,} images cannot be read in {source.describe()}:"]
    lines += [f"  {name}: {reason}" for name, reason in bad[:_NUM_EXAMPLES]]
    if len(bad) > _NUM_EXAMPLES:
        lines.append(f"  ... and {len(bad) - _NUM_EXAMPLES:,} more")
    if len(bad) < len(source):
        share = len(bad) / len(source)
        lines.append(
            f"That is {share:.2%}, and max_bad_fraction allows {max_bad_fraction:.2%}: remove or repair these "
            f"files, or go on without them with max_bad_fraction {np.ceil(share * 1000) / 1000:g}"
        )
    else:
        lines.append("Not one image is left, so max_bad_fraction cannot help: name a folder with readable images.")
    return "\n".join(lines)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())

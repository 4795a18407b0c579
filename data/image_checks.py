"""Check before training which images of a source can be read, and summarize their sizes, modes and formats."""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from data.bad_images import BadImages
from data.decoding import BadImage, Header, check
from data.sources import ImageSource

_TINY_PIXELS = 16  # below one patch of the usual size
_IMAGES_PER_TASK = 64


@dataclass(frozen=True)
class Extent:
    """Smallest, median and largest number of pixels."""

    smallest: int
    median: int
    largest: int


@dataclass(frozen=True)
class Summary:
    """Properties of the readable images."""

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
            f"{_join(self.formats)}; mode {_join(self.modes)}"
        )
        if self.num_sixteen_bit:
            text += f"; {self.num_sixteen_bit:,} with 16 bits per pixel, of which the high 8 are used"
        if self.num_tiny:
            text += f"; {self.num_tiny:,} with a side below {_TINY_PIXELS} px"
        return text


@dataclass(frozen=True)
class CheckedImages:
    """The int64 indices of the readable images, the unreadable ones, and a summary of the readable ones."""

    good: np.ndarray
    bad: BadImages
    summary: Summary


def check_images(
    source: ImageSource, max_bad_fraction: float, num_threads: int = min(8, os.cpu_count() or 1)
) -> CheckedImages:
    """Read the header and check the end of every image.

    Raises:
        ValueError: If no image is readable, or the fraction of unreadable images exceeds `max_bad_fraction`.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction is {max_bad_fraction}, expected a fraction between 0 and 1")
    outcomes = _scan_headers(source, num_threads)
    bad = BadImages((source.name(index), text) for index, text in enumerate(outcomes) if isinstance(text, str))
    headers = {index: header for index, header in enumerate(outcomes) if isinstance(header, Header)}
    num_bad = len(source) - len(headers)  # images of the same name count each
    if not headers or num_bad > max_bad_fraction * len(source):
        raise ValueError(_describe_too_many(source, bad, num_bad, max_bad_fraction))
    return CheckedImages(np.array(list(headers), np.int64), bad, _summarize(list(headers.values())))


def _scan_headers(source: ImageSource, num_threads: int) -> list[Header | str]:
    """Return the header of each image, or the reason why it cannot be read."""

    def scan(start: int) -> list[Header | str]:
        return [_read_header(source, index) for index in range(start, min(start + _IMAGES_PER_TASK, len(source)))]

    outcomes: list[Header | str] = []
    with (
        ThreadPoolExecutor(num_threads) as pool,
        tqdm(total=len(source), desc="Checking images", unit="image", delay=2.0) as progress,
    ):
        # One task per image would queue millions of futures.
        for some in pool.map(scan, range(0, len(source), _IMAGES_PER_TASK)):
            outcomes += some
            progress.update(len(some))
    return outcomes


def _read_header(source: ImageSource, index: int) -> Header | str:
    try:
        return check(source.entry(index))
    except BadImage as error:
        return str(error)


def _summarize(headers: Sequence[Header]) -> Summary:
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


def _describe_too_many(source: ImageSource, bad: BadImages, num_bad: int, max_bad_fraction: float) -> str:
    found = f"{num_bad:,} of {len(source):,} images cannot be read in {source.describe()}:\n  " + bad.describe("\n  ")
    if num_bad == len(source):
        return (
            f"{found}\nNo image is left, so raising max_bad_fraction does not help: use a folder with readable images."
        )
    fraction = num_bad / len(source)
    return (
        f"{found}\nThat is {fraction:.2%}, but max_bad_fraction allows {max_bad_fraction:.2%}: repair or remove these "
        f"files, or continue without them with max_bad_fraction {np.ceil(fraction * 1000) / 1000:g}"
    )


def _join(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())

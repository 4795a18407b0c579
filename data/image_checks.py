"""Check before training which images of a source can be read, and summarize their sizes, modes and formats."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import torch
from tqdm import tqdm

from data.bad_images import BadImages
from data.band_files import DTYPES
from data.decoding import BadImage, check, decode
from data.headers import RECORD, UNKNOWN, Scan, ScanProcesses, as_row, read_plain_header, scan_files
from data.image_source import FileSource
from data.measured import MeasuredImage
from data.runs import Runs, cut_into_runs
from data.scan_file import identities, load_scan, save_scan
from data.seeds import seeded_generator
from data.sources import ImageSource

Checks = Literal["new", "all", "sample"]

NUM_SAMPLED = 2048  # images that checks="sample" opens
_NUM_BLOCKS, _NUM_IN_BLOCKS = 8, 256  # of shards: each block is fetched as a whole
_NUM_DECODED = 16  # images with more than 8 bits whose values are looked at
_TINY_PIXELS = 16  # below one patch of the usual size
_IMAGES_PER_TASK, _TASKS = 64, 1000  # at least; more images per task, up to 1024, if there would be more tasks
_SECONDS_WORTH_PROCESSES = 1.0  # a scan that takes longer is worth their start, about 0.3 s


@dataclass(frozen=True)
class Extent:
    """Smallest, median and largest number of pixels."""

    smallest: int
    median: int
    largest: int


@dataclass(frozen=True)
class Summary:
    """Properties of the readable images that were checked.

    Args:
        num_images: Number of images, checked or not.
        num_checked: Number of images that were checked now or, if they have not changed since, by an earlier run.
        num_opened: Number of images whose header was read now.
        notes: What happens to the pixels of unusual images, and what could not be kept.
    """

    num_images: int
    num_checked: int
    num_opened: int
    width: Extent
    height: Extent
    modes: dict[str, int]
    formats: dict[str, int]
    num_sixteen_bit: int
    num_tiny: int
    notes: tuple[str, ...] = ()

    def describe(self) -> str:
        width, height = self.width, self.height
        sampled = f", of which {self.num_checked:,} were checked" if self.num_checked < self.num_images else ""
        text = (
            f"{self.num_images:,} images{sampled}, {width.smallest}-{width.largest} px wide (median {width.median}), "
            f"{height.smallest}-{height.largest} px high (median {height.median}); "
            f"{_join(self.formats)}; mode {_join(self.modes)}"
        )
        if self.num_sixteen_bit:
            text += f"; {self.num_sixteen_bit:,} with 16 bits per pixel, of which the high 8 are used"
        if self.num_tiny:
            text += f"; {self.num_tiny:,} with a side below {_TINY_PIXELS} px"
        if self.num_opened < self.num_checked:
            text += f"; {self.num_opened:,} of them new or changed since an earlier run"
        return text


@dataclass(frozen=True)
class CheckedImages:
    """The int64 indices of the readable images, the unreadable ones, and a summary of the readable ones.

    If only a sample was checked, all other images count as readable. Of shards, `good` has all images.
    """

    good: np.ndarray | Runs
    bad: BadImages
    summary: Summary


def check_images(
    source: ImageSource,
    max_bad_fraction: float,
    num_processes: int | None = None,
    checks: Checks = "new",
) -> CheckedImages:
    """Read the header and check the end of the images.

    Args:
        num_processes: Processes for large folders; None: one per CPU core, at most 16.
        checks: "new": of files that are new or have changed since they were last checked; "all": of every image;
            "sample": of a seeded sample of 2,048 images, the others are taken for alike. Of shards at most 256 images
            are checked, unless it is "all"; the others are found to be unreadable as they come.

    Raises:
        ValueError: If no image is readable, or the fraction of unreadable images exceeds `max_bad_fraction`.
        OSError: If a process that checks images is killed.
    """
    if not 0 <= max_bad_fraction <= 1:
        raise ValueError(f"max_bad_fraction is {max_bad_fraction}, expected a fraction between 0 and 1")
    if source.blocks is not None and checks != "all":
        indices = _sample_blocks(source.blocks)
        source.prefetch(indices.tolist())
    else:
        indices = np.arange(len(source))
    if checks == "sample" and len(indices) > NUM_SAMPLED:
        order = torch.randperm(len(source), generator=seeded_generator("check_images"))
        indices = np.sort(order[:NUM_SAMPLED].numpy())
    found = _scan(source, indices, checks, num_processes or min(16, num_cores()))
    is_good = found.records["is_good"]
    # Images of the same name count each.
    bad = BadImages((source.name(index), text) for index, text in sorted(found.reasons.items()))
    num_bad = len(indices) - int(is_good.sum())
    if num_bad == len(indices) or num_bad > max_bad_fraction * len(indices):
        raise ValueError(_describe_too_many(source, bad, num_bad, len(indices), max_bad_fraction))
    good: np.ndarray | Runs
    if source.blocks is not None:
        good = cut_into_runs(source.blocks)
    else:
        good = np.delete(np.arange(len(source)), indices[~is_good])
    notes = [*_describe_pixels(source, indices[is_good], found.records[is_good]), *found.notes]
    for part in source.parts:
        notes += part.notes
        bad.update(part.problems)
    if len(indices) < len(source):
        notes.insert(0, _describe_sample(len(source), len(indices), num_bad))
    return CheckedImages(good, bad, _summarize(found, len(good), notes))


def _sample_blocks(sizes: np.ndarray) -> np.ndarray:
    """Return the sorted indices of a seeded choice of images in a few blocks."""
    order = torch.randperm(len(sizes), generator=seeded_generator("check_images"))
    chosen = np.sort(order[:_NUM_BLOCKS].numpy())
    first, each = np.cumsum(sizes) - sizes, _NUM_IN_BLOCKS // len(chosen)
    runs = [first[block] + np.unique(np.linspace(0, sizes[block] - 1, each).astype(np.int64)) for block in chosen]
    return np.concatenate(runs)


# ---- the scan ----


@dataclass
class _Found:
    """The records (RECORD) of the checked images, reasons by index of the image, and how many were opened."""

    records: np.ndarray
    reasons: dict[int, str]
    num_opened: int
    notes: list[str]


def _scan(source: ImageSource, indices: np.ndarray, checks: Checks, num_processes: int) -> _Found:
    """Check the images `indices` of all parts of a source."""
    found, start, records = _Found(np.empty(0, RECORD), {}, 0, []), 0, []
    with tqdm(total=len(indices), desc="Checking images", unit="image", delay=2.0) as progress:
        for part in source.parts:
            inside = indices[(indices >= start) & (indices < start + len(part))] - start
            if isinstance(part, FileSource) and part.measured is None:
                some = _scan_files(part, inside, checks, num_processes, progress)
            else:
                some = _scan_entries(part, inside, progress)
            records.append(some.records)
            found.reasons |= {start + int(inside[row]): text for row, text in some.reasons.items()}
            found.num_opened += some.num_opened
            found.notes += [note for note in some.notes if note not in found.notes]
            start += len(part)
    found.records = np.concatenate(records) if records else found.records
    return found


def _scan_files(source: FileSource, indices: np.ndarray, checks: Checks, num_processes: int, progress: tqdm) -> _Found:
    """Check files; those that have not changed since an earlier run are not opened."""
    started = time.time_ns()
    is_whole = len(indices) == len(source)
    names = source.names if is_whole else source.names.take(pa.array(indices))
    is_kept = checks == "new"
    records, reasons = load_scan(source) if is_kept else (np.zeros(len(indices), RECORD), {})
    size, num_opened = min(max(_IMAGES_PER_TASK, len(indices) // _TASKS), 1024), 0

    def scan_some(start: int, scan: Callable[..., Scan]) -> Scan:
        some = slice(start, start + size)
        return scan(source.base, names[some].to_pylist(), identities(records[some]) if is_kept else None)

    for start, some in _in_tasks(scan_some, range(0, len(names), size), num_processes):
        rows = np.array(some.positions, np.int64) + start
        records[rows] = some.records
        for row in rows.tolist() if reasons else ():
            reasons.pop(row, None)
        reasons.update({start + position: text for position, text in some.reasons.items()})
        num_opened += len(rows)
        progress.update(min(size, len(names) - start))
    note = save_scan(source, records, reasons, started) if is_whole and num_opened else None
    return _Found(records, reasons, num_opened, [note] if note else [])


def _in_tasks(
    scan_some: Callable[[int, Callable[..., Scan]], Scan], starts: range, num_processes: int
) -> Iterator[tuple[int, Scan]]:
    """Yield each `start` with `scan_some(start, scan_files)`, in order; long scans go on in other processes."""
    begin = time.perf_counter()
    for number, start in enumerate(starts, 1):
        yield start, scan_some(start, scan_files)
        left = starts[number:]
        if num_processes > 1 and (time.perf_counter() - begin) / number * len(left) > _SECONDS_WORTH_PROCESSES:
            with ScanProcesses(num_processes) as processes, ThreadPoolExecutor(num_processes) as pool:
                try:
                    found = pool.map(lambda start: scan_some(start, processes.scan_files), left)
                    yield from zip(left, found, strict=True)
                finally:
                    pool.shutdown(cancel_futures=True)
            return


def _scan_entries(source: ImageSource, indices: np.ndarray, progress: tqdm) -> _Found:
    """Check images that are not files of a folder, or that are measurements."""
    records, reasons = np.zeros(len(indices), RECORD), {}

    for row, index in enumerate(indices.tolist()):
        try:
            image = source.image(index)
            if isinstance(image, MeasuredImage):
                header = image.check()
            else:
                header = (isinstance(image, bytes) and read_plain_header(image)) or check(image)
        except BadImage as error:
            reasons[row] = str(error)
        else:
            records[row] = (*UNKNOWN, *as_row(header), True, False)
        progress.update()
    return _Found(records, reasons, len(indices), [])


# ---- what was found ----


def _summarize(found: _Found, num_images: int, notes: Sequence[str]) -> Summary:
    headers = found.records[found.records["is_good"]]
    width, height = headers["width"], headers["height"]
    return Summary(
        num_images=num_images,
        num_checked=len(headers),
        num_opened=min(found.num_opened, len(headers)),
        width=_extent(width),
        height=_extent(height),
        modes=_counts(headers["mode"]),
        formats=_counts(headers["format"]),
        num_sixteen_bit=int(_has_sixteen_bits(headers).sum()),
        num_tiny=int((np.minimum(width, height) < _TINY_PIXELS).sum()),
        notes=tuple(notes),
    )


def _has_sixteen_bits(headers: np.ndarray) -> np.ndarray:
    """Return which photographs lose low bits; the mode of measurements is their type of values."""
    return (headers["num_bits"] > 8) & ~np.isin(headers["mode"], [b"F", *(name.encode() for name in DTYPES)])


def _extent(pixels: np.ndarray) -> Extent:
    return Extent(int(pixels.min()), int(np.median(pixels)), int(pixels.max()))


def _counts(names: np.ndarray) -> dict[str, int]:
    """Count names, the most frequent first."""
    values, counts = np.unique(names, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {values[i].decode(): int(counts[i]) for i in order}


def _describe_pixels(source: ImageSource, indices: np.ndarray, headers: np.ndarray) -> list[str]:
    """Say how many images have pixels that do not fit into 8 bits and 3 channels, and what becomes of them."""
    notes = []
    is_float = headers["mode"] == b"F"
    if num_float := int(is_float.sum()):
        notes.append(
            f"{num_float:,} images have float pixels: each is scaled from its own smallest and largest value, so that "
            "brightness differs between images; save them as 8 or 16 bits of one common scale to avoid that"
        )
    modes, mode_of = np.unique(headers["mode"], return_inverse=True)
    extra = headers["num_channels"] > np.array([_NUM_CHANNELS.get(mode, 255) for mode in modes], int)[mode_of]
    if num_extra := int(extra.sum()):
        kinds = Counter(headers[extra][["num_channels", "mode"]].tolist())
        text = ", ".join(f"{number} become {mode.decode()} in {count:,}" for (number, mode), count in kinds.items())
        notes.append(f"{num_extra:,} images have more channels than are read: {text}")
    sixteen = indices[_has_sixteen_bits(headers)]
    if len(sixteen):
        notes += _describe_sixteen_bits(source, sixteen)
    return notes


_NUM_CHANNELS = {b"1": 1, b"L": 1, b"I": 1, b"I;16": 1, b"I;16B": 1, b"F": 1, b"LA": 2, b"RGB": 3, b"RGBA": 4}


def _describe_sixteen_bits(source: ImageSource, indices: np.ndarray) -> list[str]:
    """Decode some of these images, and say if their values leave high bits unused, of the only 8 that are kept."""
    order = torch.randperm(len(indices), generator=seeded_generator("check_values"))[:_NUM_DECODED]
    largest, num_decoded = 0, 0
    for index in indices[order.numpy()].tolist():
        try:
            largest = max(largest, int(np.asarray(decode(source.entry(index), 3)).max()))
        except BadImage:  # the training will find it too
            continue
        num_decoded += 1
    num_bits = 8 + largest.bit_length()
    if not num_decoded or num_bits == 16:
        return []
    levels = f"{largest + 1} of 256 gray levels are" if largest else "only black is"
    return [
        f"the values of images with 16 bits per pixel need at most {num_bits} bits in a sample of {num_decoded} of "
        f"{len(indices):,}: since the high 8 bits are used, {levels} left; scale the images to the full range"
    ]


def _describe_sample(num_images: int, num_checked: int, num_bad: int) -> str:
    expected = f", so about {num_bad * num_images / num_checked:,.0f} of all" if num_bad else ""
    return (
        f"only a seeded sample of {num_checked:,} of {num_images:,} images was checked; {num_bad:,} of it cannot be "
        f"read{expected}. Sizes and counts are those of the sample; unreadable images that are found in training are "
        "replaced by others"
    )


def _describe_too_many(
    source: ImageSource, bad: BadImages, num_bad: int, num_checked: int, max_bad_fraction: float
) -> str:
    checked = "" if num_checked == len(source) else "checked "
    found = f"{num_bad:,} of {num_checked:,} {checked}images cannot be read in {source.describe()}:\n  "
    found += bad.describe("\n  ")
    if num_bad == num_checked:
        return (
            f"{found}\nNo image is left, so raising max_bad_fraction does not help: use a folder with readable images "
            "and the number of channels that they have."
        )
    fraction = num_bad / num_checked
    return (
        f"{found}\nThat is {fraction:.2%}, but max_bad_fraction allows {max_bad_fraction:.2%}: repair or remove these "
        f"files, or continue without them with max_bad_fraction {np.ceil(fraction * 1000) / 1000:g}"
    )


def _join(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def num_cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)

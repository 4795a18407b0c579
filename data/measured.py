"""Images whose values are measurements: any number of channels, in their own precision, from one file or several.

A source that is `measured` (`data.measured_sources`) gives them instead of encoded bytes. Their crops are uint8,
uint16, or the int32 with the bits of float32 values, so that integers in a batch are values as stored and floats are
standardized ones.
Shapes: C channels, H W pixels of the crop, h w pixels of a window.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.band_files import DTYPES, Bands, Window, open_bands
from data.decoding import BadImage, Header, pillow_errors_as_bad_image

Box = tuple[float, float, float, float]
Views = Sequence[tuple[tuple[int, int], Image.Resampling]]


@dataclass(frozen=True)
class Measured:
    """How the images of a source are read.

    Args:
        channel_files: Name and file name pattern of each channel, where each has a file of its own. What `*` stands
            for in a pattern names the image.
        tile: Side in pixels of the windows that images are divided into; each counts as an image.
        dtype: One of `DTYPES`; images that need a later one cannot be read.
    """

    num_channels: int
    channel_files: tuple[tuple[str, str], ...] = ()
    tile: int | None = None
    dtype: str = DTYPES[-1]

    def __post_init__(self) -> None:
        if self.channel_files and len(self.channel_files) != self.num_channels:
            raise ValueError(f"channel_files names {len(self.channel_files)} files for {self.num_channels} channels")
        for name, pattern in self.channel_files:
            if pattern.count("*") != 1 or "/" in pattern:
                raise ValueError(f"the file name pattern of channel {name} is {pattern!r}, expected one * and no /")

    def image(self, entry: bytes | Path) -> "MeasuredImage":
        return MeasuredImage((entry,), self)


@dataclass(frozen=True)
class MeasuredImage:
    """An image that is not decoded yet.

    Args:
        files: One file with all channels, or one for each channel.
        window: Part of the file that is the image; None for all of it.
        header: What `check` returns, if the file was checked before.
    """

    files: tuple[bytes | Path, ...]
    measured: Measured
    window: Window | None = None
    header: Header | None = None

    def opened(self) -> "_OpenImage":
        """Open the files; raises BadImage if that fails or they do not fit together."""
        return _OpenImage(self)

    def check(self) -> Header:
        """Read the header and check that no file is truncated; raises BadImage."""
        if self.header is not None:
            return self.header
        with self.opened() as image:
            for bands in image.files:
                with pillow_errors_as_bad_image():
                    bands.check()
            return image.header()


Encoded = bytes | Path | MeasuredImage  # an image that is not decoded yet


class _OpenImage:
    """The open files of an image, in a `with` statement."""

    def __init__(self, image: MeasuredImage) -> None:
        self.image, measured = image, image.measured
        self._stack = ExitStack()
        each = 1 if len(image.files) > 1 else measured.num_channels
        try:
            self.files: list[Bands] = []
            for number, file in enumerate(image.files):
                try:
                    self.files.append(self._stack.enter_context(open_bands(file, each)))
                    self._check(self.files[-1], each)
                except BadImage as error:
                    if len(image.files) == 1:
                        raise
                    raise BadImage(f"channel {measured.channel_files[number][0]}: {error}") from error
        except BaseException:
            self._stack.close()
            raise
        self.dtype = max((bands.dtype for bands in self.files), key=DTYPES.index)
        first = self.files[0]
        left, top, right, bottom = image.window or (0, 0, first.width, first.height)
        self.left, self.top, self.width, self.height = left, top, right - left, bottom - top

    def _check(self, bands: Bands, num_channels: int) -> None:
        if bands.num_channels != num_channels:
            raise BadImage(f"{bands.num_channels} channels, expected {num_channels}")
        first = self.files[0]
        if (bands.width, bands.height) != (first.width, first.height):
            raise BadImage(
                f"{bands.width}x{bands.height} pixels, but the first channel has {first.width}x{first.height}; "
                "resample all to one grid"
            )
        expected = self.image.measured.dtype
        if DTYPES.index(bands.dtype) > DTYPES.index(expected):
            raise BadImage(f"{bands.dtype} values, but the other images have {expected}; save all as one type")

    def __enter__(self) -> "_OpenImage":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def header(self) -> Header:
        num_bits = np.dtype(self.dtype).itemsize * 8
        channels = sum(bands.num_channels for bands in self.files)
        return Header(self.width, self.height, self.dtype, self.files[0].format, 1, num_bits, channels)

    def read(self, window: Window) -> np.ndarray:
        """Return the values (h, w, C) of a window of the image, in the type of the source; raises BadImage."""
        left, top, right, bottom = window
        inside = (left + self.left, top + self.top, right + self.left, bottom + self.top)
        parts = [_read(bands, inside) for bands in self.files]
        values = parts[0] if len(parts) == 1 else np.concatenate([part.astype(self.dtype) for part in parts], axis=2)
        if values.dtype.kind == "f" and not (finite := np.isfinite(values).all(axis=2)).all():
            number = finite.size - int(finite.sum())
            raise BadImage(f"NaN or infinite values in {number:,} of {finite.size:,} pixels; fill or cut them off")
        return values.astype(self.image.measured.dtype, copy=False)


def _read(bands: Bands, window: Window) -> np.ndarray:
    with pillow_errors_as_bad_image():
        return bands.read(window)


def load_measured_crops(
    image: MeasuredImage, choose_crops: Callable[[int, int], Sequence[tuple[Box, Views]]]
) -> list[list[Tensor]]:
    """As `data.crops.load_sized_crops`: crops (C, H, W) by crop and view.

    A crop whose size is that of its view has exactly the values of the file. Others are resized by Pillow's filter in
    float32, and rounded if the source holds integers.
    """
    with image.opened() as opened:
        crops = choose_crops(opened.width, opened.height)
        lefts, tops, rights, bottoms = zip(*(box for box, _ in crops), strict=True)
        x, y = math.floor(min(lefts)), math.floor(min(tops))
        right, bottom = min(math.ceil(max(rights)), opened.width), min(math.ceil(max(bottoms)), opened.height)
        values = opened.read((x, y, right, bottom))
    return [
        [_resized(values, (box[0] - x, box[1] - y, box[2] - x, box[3] - y), *view) for view in views]
        for box, views in crops
    ]


def _resized(values: np.ndarray, box: Box, size: tuple[int, int], resample: Image.Resampling) -> Tensor:
    """Return a crop of values (h, w, C) as a tensor (C, H, W)."""
    height, width = size
    left, top, right, bottom = box
    box = (left, top, min(right, values.shape[1]), min(bottom, values.shape[0]))
    if (right - left, bottom - top) == (width, height) and left == int(left) and top == int(top):
        crop = values[int(top) : int(bottom), int(left) : int(right)].transpose(2, 0, 1)
    else:
        bands = (Image.fromarray(np.ascontiguousarray(band, np.float32)) for band in values.transpose(2, 0, 1))
        crop = np.stack([np.asarray(band.resize((width, height), resample, box)) for band in bands])
        if values.dtype.kind != "f":
            crop = crop.round().clip(0, np.iinfo(values.dtype).max)
    crop = np.array(crop, values.dtype, order="C")  # a copy: the values may be those of a file in memory
    return torch.from_numpy(crop.view(np.int32) if crop.dtype == np.float32 else crop)


def mirrored(pixels: Tensor) -> Tensor:
    """Flip pixels (..., W) from left to right; torch lacks that for uint16."""
    return pixels.view(torch.int16).flip(-1).view(torch.uint16) if pixels.dtype == torch.uint16 else pixels.flip(-1)

"""Crop and resize images, decoding no more than the crops need.

The crops are chosen by the size in the header, before any pixel is decoded: a JPEG ends below the lowest crop and is
decoded at 1/2, 1/4 or 1/8 scale where that leaves enough pixels, and only the part with the crops is converted. Images
that `data.cache` has shrunk name their original size, by which their crops are chosen.
Shapes: C channels, H W pixels.
"""

import math
import re
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image, ImageFile
from torch import Tensor, nn

from data.decoding import (
    Header,
    ends_well,
    header_of,
    opened,
    pillow_errors_as_bad_image,
    read_bytes,
    scale_float_pixels,
    to_eight_bit,
)
from data.jpeg import cut_jpeg
from data.measured import Encoded, MeasuredImage, load_measured_crops

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the upright image
View = tuple[tuple[int, int], Image.Resampling]  # (height, width) and the resampling filter
SizedCrop = tuple[Box, Sequence[View]]
_INVERSE_ORIENTATION = {6: 8, 8: 6}  # all others are their own inverse
_TORCH_MODES = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}
_MAX_SKIP, _MAX_SHIFT = 1 / 8, 1 / 16  # of the output, pixels
_MIN_PIXELS_TO_CUT = 16_384  # decoding fewer takes no longer than cutting them off
_ORIGINAL = re.compile(rb"(?:P[56]\n# )?shrunk from (\d+) x (\d+)")
_RAW_HEADER = re.compile(rb"P([56])\n(?:#[^\n]*\n)?(\d+) (\d+)\n255\n")

# Tensors of pixels that Pillow or a cache owns are only read.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")


def load_crops(
    data: Encoded,
    choose_boxes: Callable[[int, int], Sequence[Box]],
    views: Sequence[View],
    num_channels: int,
) -> list[list[Tensor]]:
    """Decode an image once and resize its crops to each of `views`: uint8 (C, H, W) by crop and view.

    Args:
        choose_boxes: Returns the crops, given width and height of the upright image.

    Raises:
        BadImage: If the image is unreadable.
    """
    return load_sized_crops(data, lambda *size: [(box, views) for box in choose_boxes(*size)], num_channels)


def load_sized_crops(
    data: Encoded, choose_crops: Callable[[int, int], Sequence[SizedCrop]], num_channels: int
) -> list[list[Tensor]]:
    """As `load_crops`, where each crop has its own views; of measurements as `load_measured_crops`."""
    if isinstance(data, MeasuredImage):
        return load_measured_crops(data, choose_crops)
    if isinstance(data, Path):
        data = read_bytes(data)
    if (pixels := _raw_pixels(data, num_channels)) is not None:
        height, width, _ = pixels.shape
        crops = _choose(choose_crops, (width, height), _ORIGINAL.match(data))
        return [[_resize(pixels, box, view) for view in views] for box, views in crops]
    with opened(data) as image:
        header = header_of(image)
        comment = image.info.get("comment")  # text in other formats than JPEG, which are never shrunk
        original = _ORIGINAL.match(comment) if isinstance(comment, bytes) else None
        crops = _choose(choose_crops, (header.width, header.height), original)
        with pillow_errors_as_bad_image():
            return _resized_crops(image, data, header, crops, num_channels)


def _choose(
    choose_crops: Callable[[int, int], Sequence[SizedCrop]], size: tuple[int, int], original: re.Match[bytes] | None
) -> Sequence[SizedCrop]:
    """Return the crops of an image; those of a shrunk one are chosen by its original size."""
    if original is None:
        return choose_crops(*size)
    width, height = int(original[1]), int(original[2])
    x, y = size[0] / width, size[1] / height
    crops = choose_crops(width, height)
    return [((left * x, top * y, right * x, bottom * y), views) for (left, top, right, bottom), views in crops]


def _resized_crops(
    image: ImageFile.ImageFile, data: bytes, header: Header, crops: Sequence[SizedCrop], num_channels: int
) -> list[list[Tensor]]:
    orientation = header.orientation
    pixels = scale_float_pixels(image)
    inverse = _INVERSE_ORIENTATION.get(orientation, orientation)
    boxes = [_orient_box(box, header.width, header.height, inverse) for box, _ in crops]
    sizes = [[((size if orientation < 5 else size[::-1]), resample) for size, resample in views] for _, views in crops]
    num_times_smaller = _draft(image, data, list(zip(boxes, sizes, strict=True)), num_channels)
    boxes = [tuple(edge / num_times_smaller for edge in box) for box in boxes]  # type: ignore[misc]
    mode = "RGB" if num_channels == 3 else "L"
    if pixels.mode != mode or pixels.has_transparency_data:
        # Whole pixels around the boxes, so that only these are converted.
        lefts, tops, rights, bottoms = zip(*boxes, strict=True)
        x, y = math.floor(min(lefts)), math.floor(min(tops))
        right, bottom = min(math.ceil(max(rights)), pixels.width), min(math.ceil(max(bottoms)), pixels.height)
        pixels = to_eight_bit(pixels.crop((x, y, right, bottom)), num_channels)
        boxes = [(left - x, top - y, right - x, bottom - y) for left, top, right, bottom in boxes]
    return [
        [_turn_upright(_resize(pixels, box, view), orientation) for view in views]
        for box, views in zip(boxes, sizes, strict=True)
    ]


def _draft(image: ImageFile.ImageFile, data: bytes, crops: Sequence[SizedCrop], num_channels: int) -> int:
    """Set how much of a JPEG will be decoded, and at which scale; return how many times smaller it is."""
    if image.format not in ("JPEG", "MPO"):
        return 1
    scale = min(
        min((right - left) / width, (bottom - top) / height)
        for (left, top, right, bottom), views in crops
        for (height, width), _ in views
    )
    num_times_smaller = next((times for times in (8, 4, 2) if times <= scale), 1)
    _cut(image, data, max(bottom for (_, _, _, bottom), _ in crops), num_times_smaller)
    # draft() takes a size and picks the largest of 1, 2, 4, 8 that still reaches it: this size selects ours.
    mode = "L" if num_channels == 1 else None
    image.draft(mode, (image.width // num_times_smaller, image.height // num_times_smaller))
    return num_times_smaller


def _cut(image: ImageFile.ImageFile, data: bytes, bottom: float, num_times_smaller: int) -> None:
    """Make `image` end below `bottom`, unless that saves little or the file is damaged."""
    if image.format != "JPEG":  # an MPO reads from a stream of its own
        return
    saves_scans = image.info.get("progressive") and num_times_smaller == 8
    if not saves_scans and (image.height - bottom) * image.width < _MIN_PIXELS_TO_CUT:
        return
    if not ends_well(image):  # it must be decoded to the end to find out
        return
    try:
        data, rows = cut_jpeg(data, bottom, num_times_smaller)
    except ValueError:
        return
    image.fp = BytesIO(data)
    image._size = (image.width, rows)
    image.tile = [image.tile[0]._replace(extents=(0, 0, *image.size))]


def _resize(pixels: Image.Image | np.ndarray, box: Box, view: View) -> Tensor:
    """Return a crop of RGB or L pixels, an image or uint8 (H, W, C), as a uint8 tensor (C, height, width)."""
    (height, width), resample = view
    num_rows, num_columns = pixels.shape[:2] if isinstance(pixels, np.ndarray) else pixels.size[::-1]
    down, across = _span(box[1], box[3], height, num_rows), _span(box[0], box[2], width, num_columns)
    if resample not in _TORCH_MODES or down is None or across is None:
        if isinstance(pixels, np.ndarray):
            pixels = Image.fromarray(pixels if pixels.shape[2] > 1 else pixels[..., 0])
        box = (box[0], box[1], min(box[2], pixels.width), min(box[3], pixels.height))
        return to_tensor(pixels.resize((width, height), resample, box))
    array = pixels if isinstance(pixels, np.ndarray) else _as_array(pixels)
    crop = torch.from_numpy(array[down.start : down.stop, across.start : across.stop]).permute(2, 0, 1)  # (C, H, W)
    if crop.shape[1:] == (height, width) and not down.scale and not across.scale:
        crop = crop.clone(memory_format=torch.contiguous_format)
    elif not down.scale and not across.scale:
        crop = nn.functional.interpolate(crop[None], (height, width), mode=_TORCH_MODES[resample], antialias=True)[0]
    else:
        # A bit more than needed, so that rounding never loses the last pixel.
        scale = (down.scale or (height + 1e-4) / crop.shape[1], across.scale or (width + 1e-4) / crop.shape[2])
        crop = nn.functional.interpolate(crop[None], scale_factor=scale, mode=_TORCH_MODES[resample], antialias=True)[
            0
        ]
    rows, columns = slice(down.skip, down.skip + height), slice(across.skip, across.skip + width)
    return crop[: 3 if len(crop) > 1 else 1, rows, columns].contiguous()


class _Span(NamedTuple):
    """One side of a crop for torch's filter, which starts at whole pixels only.

    Args:
        start, stop: Pixels that the filter gets.
        skip: Pixels of its output in front of the crop.
        scale: Output pixels per pixel; None where the crop is exactly from start to stop.
    """

    start: int
    stop: int
    skip: int = 0
    scale: float | None = None


def _span(low: float, high: float, size: int, limit: int) -> _Span | None:
    """Return the side `low` to `high` of a crop with `size` output pixels; None if it cannot be that exact.

    With fractions, the filter starts some output pixels earlier, where one begins at nearly a whole pixel.
    """
    if int(low) == low and int(high) == high:
        return _Span(int(low), int(high))
    pixels_each = (high - low) / size
    for skip in range(min(int(_MAX_SKIP * size), int(low / pixels_each)) + 1):
        exact = low - skip * pixels_each
        start, stop = round(exact), min(limit, math.ceil(high) + 1)
        if abs(exact - start) <= _MAX_SHIFT and int((stop - start) / pixels_each) >= skip + size:
            return _Span(start, stop, skip, 1 / pixels_each)
    return None


def _as_array(image: Image.Image) -> np.ndarray:
    """Return the pixels (H, W, C) without copying them; RGB has a fourth channel of padding."""
    try:
        array = pa.array(image)
    except ValueError:  # the pixels of an image of more than 16 MB are in several pieces
        return np.asarray(image).reshape(image.height, image.width, -1)
    buffer = (array if image.mode == "L" else array.values).buffers()[1]
    return np.frombuffer(buffer, np.uint8).reshape(image.height, image.width, -1)


def _turn_upright(pixels: Tensor, orientation: int) -> Tensor:
    """Apply an EXIF orientation to pixels (C, H, W)."""
    if orientation >= 5:  # 5 to 8 swap the axes, then mirror like 1 to 4
        pixels = pixels.transpose(1, 2)
    if axes := [axis for axis, mirroring in ((2, (2, 3, 6, 7)), (1, (3, 4, 7, 8))) if orientation in mirroring]:
        pixels = pixels.flip(axes)
    return pixels.contiguous()


def to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB or L image to a contiguous uint8 tensor (C, H, W)."""
    return torch.from_numpy(_as_array(image)).permute(2, 0, 1)[: len(image.getbands())].contiguous()


def to_image(pixels: Tensor) -> Image.Image:
    """Convert a uint8 tensor (C, H, W) to an RGB or L image."""
    array = pixels.permute(1, 2, 0).contiguous().numpy()  # (H, W, C)
    return Image.fromarray(array if len(pixels) > 1 else array[..., 0])


def raw_header(size: tuple[int, int], num_channels: int, original_size: tuple[int, int] | None = None) -> bytes:
    """Return what stands before the uint8 pixels (H, W, C) in a raw file, a PPM or PGM; sizes are (width, height)."""
    comment = b"" if original_size is None else b"# " + shrunk_from(*original_size) + b"\n"
    return b"P%d\n%b%d %d\n255\n" % (6 if num_channels == 3 else 5, comment, *size)


def shrunk_from(width: int, height: int) -> bytes:
    """Return the comment in the file of a shrunk image by which its crops are those of the original."""
    return b"shrunk from %d x %d" % (width, height)


def _raw_pixels(data: bytes, num_channels: int) -> np.ndarray | None:
    """Return the pixels (H, W, C) of a raw file with so many channels without copying them; None for other data."""
    found = _RAW_HEADER.match(data)
    if found is None or num_channels != (3 if found[1] == b"6" else 1):
        return None
    width, height = int(found[2]), int(found[3])
    if len(data) - found.end() != height * width * num_channels:  # damaged, for Pillow to describe
        return None
    return np.frombuffer(data, np.uint8, offset=found.end()).reshape(height, width, num_channels)


def _orient_box(box: Box, width: float, height: float, orientation: int) -> Box:
    """Return the position of `box` in a width x height image after applying the EXIF `orientation`."""
    left, top, right, bottom = box
    if orientation >= 5:  # 5 to 8 swap the axes, then mirror like 1 to 4
        left, top, right, bottom = top, left, bottom, right
        width, height = height, width
    if orientation in (2, 3, 6, 7):
        left, right = width - right, width - left
    if orientation in (3, 4, 7, 8):
        top, bottom = height - bottom, height - top
    return left, top, right, bottom

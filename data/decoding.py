"""Decode images into upright 8-bit pixels, decoding no more than the requested crop needs.

Every image is converted to mode RGB or L: transparency is composited on white; 16-bit pixels keep their high byte, the
same scale for all images, so that brightness stays comparable; float pixels are scaled from their minimum and maximum
to 0 and 255; the EXIF orientation is applied; only the first frame of an animation is read. Unreadable images raise
`BadImage`.
"""

import math
import os
import re
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import ExifTags, Image, ImageFile
from torch import Tensor, nn

from data.jpeg import cut_jpeg

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the upright image
View = tuple[tuple[int, int], Image.Resampling]  # (height, width) and the resampling filter

EXTENSIONS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "BMP": (".bmp", ".dib"),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "JPEG2000": (".jp2", ".j2k"),
    "TGA": (".tga",),
}
FORMATS = tuple(EXTENSIONS)
# Pillow's own hard limit, repeated here because other libraries disable Pillow's for the whole process.
MAX_PIXELS = 2 * 89_478_485

_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INVERSE_ORIENTATION = {6: 8, 8: 6}  # all others are their own inverse
_TAIL_BYTES = 512
_TORCH_MODES = {Image.Resampling.BICUBIC: "bicubic", Image.Resampling.BILINEAR: "bilinear"}
_MAX_SKIP, _MAX_SHIFT = 1 / 8, 1 / 16  # of the output, pixels
_MIN_PIXELS_TO_CUT = 16_384  # decoding fewer takes no longer than cutting them off
_ORIGINAL = re.compile(rb"(?:P[56]\n# )?shrunk from (\d+) x (\d+)")
_RAW_HEADER = re.compile(rb"P([56])\n(?:#[^\n]*\n)?(\d+) (\d+)\n255\n")

# Pillow warns about every unusual file (large size, damaged EXIF), which would bury the report of check_images.
warnings.filterwarnings("ignore", module=r"PIL\.")
# Tensors of pixels that Pillow or a cache owns are only read.
warnings.filterwarnings("ignore", "The given NumPy array is not writable")


class BadImage(ValueError):  # noqa: N818  (it describes the image, and is caught as often as it is shown)
    """An image that cannot be read; the message is the reason in plain words."""


@dataclass(frozen=True, slots=True)
class Header:
    """Properties of an image file that are known without decoding pixels; width and height of the upright image.

    `num_bits` and `num_channels` are those of the file, which may have more than Pillow's `mode` keeps.
    """

    width: int
    height: int
    mode: str
    format: str
    orientation: int
    num_bits: int
    num_channels: int


def check(data: bytes | Path) -> Header:
    """Read the header and check the last bytes; only a file that seems truncated is decoded to be sure.

    Raises:
        BadImage: If the image is unreadable.
    """
    with _opened(data) as image:
        header = _header(image)
        with _pillow_errors_as_bad_image():
            if not _ends_well(image):
                image.load()
    return header


def decode(data: bytes | Path, num_channels: int) -> Image.Image:
    """Decode the whole upright image, in mode RGB for 3 channels and L for 1."""
    with _opened(data) as image:
        header = _header(image)
        with _pillow_errors_as_bad_image():
            image.load()
            pixels = _to_eight_bit(_scale_float_pixels(image), num_channels)
            return pixels.transpose(_TRANSPOSE[header.orientation]) if header.orientation > 1 else pixels


def load_crops(
    data: bytes | Path,
    choose_boxes: Callable[[int, int], Sequence[Box]],
    views: Sequence[View],
    num_channels: int,
) -> list[list[Tensor]]:
    """Decode an image once and resize its crops to each of `views`: uint8 (C, H, W) by crop and view.

    `choose_boxes(width, height)` returns the crops. Because they are known first, no more is decoded than they need:
    nothing below the lowest one, a JPEG at 1/2, 1/4 or 1/8 scale whenever that leaves enough pixels for the largest
    view, and only the part with the crops is converted.

    Raises:
        BadImage: If the image is unreadable.
    """
    if isinstance(data, Path):
        data = read_bytes(data)
    if (pixels := _raw_pixels(data, num_channels)) is not None:
        height, width, _ = pixels.shape
        boxes = _choose(choose_boxes, (width, height), _ORIGINAL.match(data))
        return [[_resize(pixels, box, view) for view in views] for box in boxes]
    with _opened(data) as image:
        header = _header(image)
        original = _ORIGINAL.match(image.info["comment"]) if "comment" in image.info else None
        boxes = _choose(choose_boxes, (header.width, header.height), original)
        with _pillow_errors_as_bad_image():
            return _resized_crops(image, data, header, boxes, views, num_channels)


def read_bytes(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        BadImage: If the file cannot be opened.
    """
    with _opened_file(path) as stream:
        return stream.read()


@contextmanager
def _opened(data: bytes | Path) -> Iterator[ImageFile.ImageFile]:
    with BytesIO(data) if isinstance(data, bytes) else _opened_file(data) as stream:
        if not stream.read(1):
            raise BadImage("empty file (0 bytes)")
        stream.seek(0)
        with _pillow_errors_as_bad_image():
            image = Image.open(stream, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise BadImage(
                f"too large: {image.width}x{image.height} pixels, the limit is {MAX_PIXELS:,}; split it into tiles"
            )
        yield image


def _opened_file(path: Path) -> BinaryIO:
    return os.fdopen(open_regular(path), "rb")


def open_regular(path: Path | bytes) -> int:
    """Open a regular file and return its descriptor; opening a FIFO would wait for ever, a device may have effects.

    Raises:
        BadImage: If there is no such file, it is not a regular one, or it cannot be opened.
    """
    try:
        _check_is_regular(os.stat(path))
        # Not blocking, and checked again, because the file may have been replaced by a FIFO since.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        reason = f"broken link to {os.readlink(os.fsdecode(path))}" if os.path.islink(path) else "no such file"
        raise BadImage(reason) from None
    except OSError as error:
        raise BadImage(f"cannot be opened: {error.strerror}") from error
    try:
        _check_is_regular(os.fstat(descriptor))
    except BadImage:
        os.close(descriptor)
        raise
    return descriptor


def _check_is_regular(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(status.st_mode), "a device")
        raise BadImage(f"cannot be opened: it is {kind}, not a regular file")


@contextmanager
def _pillow_errors_as_bad_image() -> Iterator[None]:
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise BadImage(f"not an image in a format that can be read ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError as error:
        raise BadImage(f"too large: {error}") from error
    # Pillow's readers raise a dozen types on damaged files (SyntaxError, struct.error, IndexError, ...). Only code
    # that reads the image runs inside this context, never the caller's.
    except Exception as error:
        raise BadImage(f"cannot be decoded: {error or type(error).__name__}") from error


def _header(image: Image.Image) -> Header:
    orientation = _orientation(image)
    width, height = image.size if orientation < 5 else image.size[::-1]
    return Header(width, height, image.mode, image.format or "", orientation, *_stored(image))


def _stored(image: Image.Image) -> tuple[int, int]:
    """Return bits per channel, at least 8, and number of channels of the file."""
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        return max(8, *tags.get(258, (1,))), tags.get(277, 1)  # BitsPerSample, SamplesPerPixel
    tiles = getattr(image, "tile", ())
    raw_mode = tiles[0][3] if tiles else ""  # such as RGB;16B, which becomes RGB
    return 16 if image.mode.startswith("I") or ";16" in str(raw_mode) else 8, len(image.getbands())


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns TIFF images upright by itself
        return 1
    with _pillow_errors_as_bad_image():
        try:
            # The base class's method: PNG's own decodes all pixels to look for EXIF data behind them.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        except (SyntaxError, ValueError, OSError):  # damaged EXIF data do not affect the pixels
            return 1
    return orientation if orientation in _TRANSPOSE else 1


def _ends_well(image: ImageFile.ImageFile) -> bool:
    """Return whether the file ends like a complete file of its format; False if only decoding can tell."""
    stream = image.fp
    if stream is None:  # WebP and AVIF are read completely when opened, and fail then if truncated
        return True
    position = stream.tell()
    length = stream.seek(0, 2)
    stream.seek(max(0, length - _TAIL_BYTES))
    tail = stream.read()
    stream.seek(position)
    if image.format in ("JPEG", "MPO"):
        return tail.rstrip(b"\0\r\n ").endswith(b"\xff\xd9")
    if image.format == "PNG":
        return b"IEND" in tail
    if image.format == "GIF":
        return tail.rstrip(b"\0").endswith(b";")
    if image.format == "TIFF":
        return _tiff_data_end(image) <= length
    return False


def _tiff_data_end(image: Image.Image) -> float:
    tags = getattr(image, "tag_v2", {})
    for offsets, counts in ((273, 279), (324, 325)):  # strips, tiles
        if offsets in tags and counts in tags:
            return max(start + count for start, count in zip(tags[offsets], tags[counts], strict=True))
    return math.inf


def _choose(
    choose_boxes: Callable[[int, int], Sequence[Box]], size: tuple[int, int], original: re.Match[bytes] | None
) -> Sequence[Box]:
    """Return the crops of an image; those of a shrunk one are chosen by its original size."""
    if original is None:
        return choose_boxes(*size)
    width, height = int(original[1]), int(original[2])
    x, y = size[0] / width, size[1] / height
    return [(left * x, top * y, right * x, bottom * y) for left, top, right, bottom in choose_boxes(width, height)]


def _resized_crops(
    image: ImageFile.ImageFile,
    data: bytes,
    header: Header,
    boxes: Sequence[Box],
    views: Sequence[View],
    num_channels: int,
) -> list[list[Tensor]]:
    orientation = header.orientation
    pixels = _scale_float_pixels(image)
    inverse = _INVERSE_ORIENTATION.get(orientation, orientation)
    boxes = [_orient_box(box, header.width, header.height, inverse) for box in boxes]
    views = [((size if orientation < 5 else size[::-1]), resample) for size, resample in views]
    num_times_smaller = _draft(image, data, boxes, [size for size, _ in views], num_channels)
    boxes = [tuple(edge / num_times_smaller for edge in box) for box in boxes]  # type: ignore[misc]
    mode = "RGB" if num_channels == 3 else "L"
    if pixels.mode != mode or pixels.has_transparency_data:
        # Whole pixels around the boxes, so that only these are converted.
        lefts, tops, rights, bottoms = zip(*boxes, strict=True)
        x, y = math.floor(min(lefts)), math.floor(min(tops))
        right, bottom = min(math.ceil(max(rights)), pixels.width), min(math.ceil(max(bottoms)), pixels.height)
        pixels = _to_eight_bit(pixels.crop((x, y, right, bottom)), num_channels)
        boxes = [(left - x, top - y, right - x, bottom - y) for left, top, right, bottom in boxes]
    return [[_turn_upright(_resize(pixels, box, view), orientation) for view in views] for box in boxes]


def _draft(
    image: ImageFile.ImageFile,
    data: bytes,
    boxes: Sequence[Box],
    sizes: Sequence[tuple[int, int]],
    num_channels: int,
) -> int:
    """Set how much of a JPEG will be decoded, and at which scale; return how many times smaller it is."""
    if image.format not in ("JPEG", "MPO"):
        return 1
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    scale = min(min((right - left) / width, (bottom - top) / height) for left, top, right, bottom in boxes)
    num_times_smaller = next((times for times in (8, 4, 2) if times <= scale), 1)
    _cut(image, data, max(bottom for _, _, _, bottom in boxes), num_times_smaller)
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
    if not _ends_well(image):  # it must be decoded to the end to find out
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


def _scale_float_pixels(image: Image.Image) -> Image.Image:
    """Scale float pixels to 8 bits by the minimum and maximum of the whole image; return other modes unchanged."""
    if image.mode != "F":
        return image
    pixels = np.asarray(image)
    finite = pixels[np.isfinite(pixels)]
    if not finite.size:
        raise BadImage("no finite pixel")
    low, high = float(finite.min()), float(finite.max())
    pixels = np.nan_to_num(
        pixels.astype(np.float64), nan=low, posinf=high, neginf=low
    )  # 3e38 - -3e38 is above float32
    scaled = (pixels - low) * (255 / ((high - low) or 1.0))
    return Image.fromarray(scaled.round().astype(np.uint8))


def _to_eight_bit(image: Image.Image, num_channels: int) -> Image.Image:
    mode = "RGB" if num_channels == 3 else "L"
    if image.mode.startswith("I"):  # I;16, I;16B, and I, Pillow's mode for other 16-bit files
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        foreground = image.convert("RGBA")
        image = Image.new("RGBA", foreground.size, "white")
        image.alpha_composite(foreground)
    return image if image.mode == mode else image.convert(mode)

"""Encoded bytes to upright 8-bit pixels, decoding no more than the wanted crop needs.

Every picture becomes mode RGB or L: transparency is laid on white; 16-bit pixels keep the high byte, one fixed scale
for all images, so that brightness stays comparable; float pixels are stretched from their minimum to their maximum;
the EXIF orientation is applied; an animation gives its first frame. What cannot be read raises `BadImage`.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels of the upright picture
View = tuple[tuple[int, int], Image.Resampling]  # (height, width) and the filter that resizes to it

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
# Pillow's own hard limit, fixed here because other libraries switch Pillow's off for the whole process.
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
_INVERSE_ORIENTATION = {6: 8, 8: 6}  # every other one undoes itself
_TAIL_BYTES = 512

# Pillow warns at every odd file (large size, damaged EXIF), which would bury what check_images has to say.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(ValueError):  # noqa: N818  (it describes the picture, and is caught as often as it is shown)
    """A picture that cannot be read; the message is the reason in plain words."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says about itself before any pixel is decoded; width and height are those of the upright picture."""

    width: int
    height: int
    mode: str
    format: str
    orientation: int


def read_header(data: bytes | Path) -> Header:
    """Size, mode and format, without decoding pixels."""
    with _opened(data) as image:
        return _header(image)


def check(data: bytes | Path) -> Header:
    """Header plus a look at the file's last bytes; only a file whose end looks wrong is decoded to decide."""
    with _opened(data) as image:
        header = _header(image)
        with _pillow_errors_as_bad_image():
            if not _ends_well(image):
                image.load()
    return header


def decode(data: bytes | Path, num_channels: int) -> Image.Image:
    """The whole upright picture, mode RGB for 3 channels and L for 1."""
    with _opened(data) as image:
        header = _header(image)
        with _pillow_errors_as_bad_image():
            image.load()
            pixels = _to_eight_bit(_stretched(image), num_channels)
            return pixels.transpose(_TRANSPOSE[header.orientation]) if header.orientation > 1 else pixels


def load_crop(
    data: bytes | Path,
    choose_box: Callable[[int, int], Box],
    size: tuple[int, int],
    num_channels: int,
    resample: Image.Resampling = Image.Resampling.BICUBIC,
) -> Image.Image:
    """Crop and resize to `size` (height, width), asking `choose_box(width, height)` once the header is known.

    The order matters for speed: knowing the crop first, a JPEG is decoded at 1/2, 1/4 or 1/8 scale whenever that still
    has at least the wanted pixels, and only the crop is converted, turned upright and resized.
    """
    return load_views(data, choose_box, [(size, resample)], num_channels)[0]


def load_views(
    data: bytes | Path,
    choose_box: Callable[[int, int], Box],
    views: Sequence[View],
    num_channels: int,
) -> list[Image.Image]:
    """As `load_crop`, the crop resized to each of `views` ((height, width), filter); decoded once, for the largest."""
    with _opened(data) as image:
        header = _header(image)
        box = choose_box(header.width, header.height)
        with _pillow_errors_as_bad_image():
            return _resized_crops(image, header, box, views, num_channels)


def read_bytes(path: Path) -> bytes:
    """The content of a file, or a `BadImage` that says why not."""
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
                f"too large: {image.width}x{image.height} pixels, the limit is {MAX_PIXELS:,}; cut it in tiles"
            )
        yield image


def _opened_file(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        reason = f"broken link to {path.readlink()}" if path.is_symlink() else "no such file"
        raise BadImage(reason) from None
    except OSError as error:
        raise BadImage(f"cannot be opened: {error.strerror}") from error


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
    # Pillow's readers raise a dozen types on damaged files (SyntaxError, struct.error, IndexError, ...). Only what
    # works on the picture stands inside this block, never the caller's code.
    except Exception as error:
        raise BadImage(f"cannot be decoded: {error or type(error).__name__}") from error


def _header(image: Image.Image) -> Header:
    orientation = _orientation(image)
    width, height = image.size if orientation < 5 else image.size[::-1]
    return Header(width, height, image.mode, image.format or "", orientation)


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow turns TIFF pictures upright by itself
        return 1
    with _pillow_errors_as_bad_image():
        try:
            # The base class's method: PNG's own would decode every pixel to look for EXIF behind them.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        except (SyntaxError, ValueError, OSError):  # damaged EXIF says nothing about the pixels
            return 1
    return orientation if orientation in _TRANSPOSE else 1


def _ends_well(image: ImageFile.ImageFile) -> bool:
    """Whether the file ends as a complete one of its format does; False where that is not known cheaply."""
    stream = image.fp
    if stream is None:  # WebP and AVIF were read whole to open them, and say so themselves when cut
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


def _resized_crops(
    image: Image.Image,
    header: Header,
    box: Box,
    views: Sequence[View],
    num_channels: int,
) -> list[Image.Image]:
    height, width = (max(size[axis] for size, _ in views) for axis in (0, 1))
    orientation = header.orientation
    image = _stretched(image)
    box = _orient_box(box, header.width, header.height, _INVERSE_ORIENTATION.get(orientation, orientation))
    num_times_smaller = _draft(image, box, (width, height) if orientation < 5 else (height, width), num_channels)
    left, top, right, bottom = (edge / num_times_smaller for edge in box)
    # Whole pixels around the box, so that the color conversion and the turn touch no more than the crop.
    origin_x, origin_y = math.floor(left), math.floor(top)
    crop = image.crop((origin_x, origin_y, min(math.ceil(right), image.width), min(math.ceil(bottom), image.height)))
    box = (left - origin_x, top - origin_y, min(right - origin_x, crop.width), min(bottom - origin_y, crop.height))
    crop = _to_eight_bit(crop, num_channels)
    if orientation > 1:
        box = _orient_box(box, crop.width, crop.height, orientation)
        crop = crop.transpose(_TRANSPOSE[orientation])
    return [crop.resize((width, height), resample, box) for (height, width), resample in views]


def _draft(image: Image.Image, box: Box, size: tuple[int, int], num_channels: int) -> int:
    """Sets the scale at which a JPEG will be decoded, and returns how many times smaller that is."""
    if image.format not in ("JPEG", "MPO"):
        return 1
    scale = min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1])
    num_times_smaller = next((times for times in (8, 4, 2) if times <= scale), 1)
    width, height = image.size
    # draft() takes a size and picks the largest of 1, 2, 4, 8 that still gives it: this size gives exactly ours.
    image.draft("L" if num_channels == 1 else None, (width // num_times_smaller, height // num_times_smaller))
    return num_times_smaller


def _orient_box(box: Box, width: float, height: float, orientation: int) -> Box:
    """Where `box` of a width x height picture lies after the turn that `orientation` asks for."""
    left, top, right, bottom = box
    if orientation >= 5:  # 5 to 8 swap the axes, and are then a mirroring like 1 to 4
        left, top, right, bottom = top, left, bottom, right
        width, height = height, width
    if orientation in (2, 3, 6, 7):
        left, right = width - right, width - left
    if orientation in (3, 4, 7, 8):
        top, bottom = height - bottom, height - top
    return left, top, right, bottom


def _stretched(image: Image.Image) -> Image.Image:
    """Float pixels to 8 bits, from the whole picture's minimum and maximum; other modes as they are."""
    if image.mode != "F":
        return image
    pixels = np.asarray(image)
    finite = pixels[np.isfinite(pixels)]
    if not finite.size:
        raise BadImage("no finite pixel")
    low, high = float(finite.min()), float(finite.max())
    scaled = (np.nan_to_num(pixels, nan=low, posinf=high, neginf=low) - low) * (255 / ((high - low) or 1.0))
    return Image.fromarray(scaled.round().astype(np.uint8))


def _to_eight_bit(image: Image.Image, num_channels: int) -> Image.Image:
    mode = "RGB" if num_channels == 3 else "L"
    if image.mode.startswith("I"):  # I;16, I;16B, and I, in which Pillow keeps other 16-bit files
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        picture = image.convert("RGBA")
        image = Image.new("RGBA", picture.size, "white")
        image.alpha_composite(picture)
    return image if image.mode == mode else image.convert(mode)

"""Read the headers of image files, and decode them into upright 8-bit pixels.

Every image is converted to mode RGB or L: transparency is composited on white; 16-bit pixels keep their high byte, the
same scale for all images, so that brightness stays comparable; float pixels are scaled from their minimum and maximum
to 0 and 255; the EXIF orientation is applied; only the first frame of an animation is read. Unreadable images raise
`BadImage`.
"""

import math
import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile

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
    "HEIF": (".heic", ".heif"),
}
FORMATS = tuple(name for name in EXTENSIONS if name != "HEIF")  # those of Pillow itself
# Pillow's own hard limit, repeated here because other libraries disable Pillow's for the whole process.
MAX_PIXELS = 2 * 89_478_485

TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TAIL_BYTES = 512
_HEIF_MARKS = {b"ftyp" + brand for brand in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")}

# Pillow warns about every unusual file (large size, damaged EXIF), which would bury the report of check_images.
warnings.filterwarnings("ignore", module=r"PIL\.")


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
    with opened(data) as image:
        header = header_of(image)
        with pillow_errors_as_bad_image():
            if not ends_well(image):
                image.load()
    return header


def decode(data: bytes | Path, num_channels: int) -> Image.Image:
    """Decode the whole upright image, in mode RGB for 3 channels and L for 1."""
    with opened(data) as image:
        header = header_of(image)
        with pillow_errors_as_bad_image():
            image.load()
            pixels = to_eight_bit(scale_float_pixels(image), num_channels)
            return pixels.transpose(TRANSPOSE[header.orientation]) if header.orientation > 1 else pixels


def read_bytes(path: Path) -> bytes:
    """Return the content of a file.

    Raises:
        BadImage: If the file cannot be opened or read.
    """
    with opened_file(path) as stream, pillow_errors_as_bad_image():
        return stream.read()


@contextmanager
def opened(data: bytes | Path) -> Iterator[ImageFile.ImageFile]:
    with BytesIO(data) if isinstance(data, bytes) else opened_file(data) as stream:
        with pillow_errors_as_bad_image():
            if not stream.read(1):
                raise BadImage("empty file (0 bytes)")
            stream.seek(0)
            image = open_image(stream)
        yield image


def open_image(stream: BinaryIO) -> ImageFile.ImageFile:
    """Open an image with Pillow, and HEIC with its plugin; to be called in `pillow_errors_as_bad_image`."""
    try:
        image = Image.open(stream, formats=FORMATS)
    except Image.UnidentifiedImageError:
        stream.seek(0)
        if stream.read(12)[4:] not in _HEIF_MARKS:
            raise
        stream.seek(0)
        try:
            import pillow_heif
        except ImportError:
            raise BadImage("a HEIC file, which needs pillow-heif: pip install pillow-heif") from None
        pillow_heif.register_heif_opener()
        try:
            image = Image.open(stream, formats=("HEIF",))
        except Image.UnidentifiedImageError:
            raise BadImage("a HEIC file that is damaged or truncated") from None
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(
            f"too large: {image.width}x{image.height} pixels, the limit is {MAX_PIXELS:,}; split it into tiles"
        )
    return image


def opened_file(path: Path) -> BinaryIO:
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
    except BadImage:
        raise
    except ValueError:
        raise BadImage("cannot be opened: its path has a NUL byte") from None
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
def pillow_errors_as_bad_image() -> Iterator[None]:
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
        if isinstance(error, OSError) and error.errno is not None:  # of the file system
            raise BadImage(f"cannot be read: {error.strerror}") from error
        raise BadImage(f"cannot be decoded: {error or type(error).__name__}") from error


def header_of(image: Image.Image) -> Header:
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
    with pillow_errors_as_bad_image():
        try:
            # The base class's method: PNG's own decodes all pixels to look for EXIF data behind them.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        except (SyntaxError, ValueError, OSError):  # damaged EXIF data do not affect the pixels
            return 1
    return orientation if orientation in TRANSPOSE else 1


def ends_well(image: ImageFile.ImageFile) -> bool:
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
    return image.format == "HEIF" and _boxes_end(stream, position) == length


def _boxes_end(stream: IO[bytes], position: int) -> int:
    """Return where the last box of a HEIC file ends."""
    end = 0
    stream.seek(0)
    while len(header := stream.read(16)) >= 8 and (size := int.from_bytes(header[:4], "big")):
        end += int.from_bytes(header[8:], "big") if size == 1 else size
        stream.seek(end)
    stream.seek(position)
    return end


def _tiff_data_end(image: Image.Image) -> float:
    tags = getattr(image, "tag_v2", {})
    for offsets, counts in ((273, 279), (324, 325)):  # strips, tiles
        if offsets in tags and counts in tags:
            return max(start + count for start, count in zip(tags[offsets], tags[counts], strict=True))
    return math.inf


def scale_float_pixels(image: Image.Image) -> Image.Image:
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


def to_eight_bit(image: Image.Image, num_channels: int) -> Image.Image:
    mode = "RGB" if num_channels == 3 else "L"
    if image.mode.startswith("I"):  # I;16, I;16B, and I, Pillow's mode for other 16-bit files
        image = Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        foreground = image.convert("RGBA")
        image = Image.new("RGBA", foreground.size, "white")
        image.alpha_composite(foreground)
    return image if image.mode == mode else image.convert(mode)

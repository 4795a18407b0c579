"""Read windows of images of any number of channels in their own precision: TIFF, NumPy, DICOM, and Pillow's formats.

A file is opened once per window, and only what the window covers is read where the format allows it: the strips or
tiles of a TIFF, and the rows of a .npy file. Values become uint8, uint16 or float32, whichever holds them; 32-bit
integers and float64 are rounded to float32.
Shapes: H W pixels of the image, h w pixels of the window, C channels.
"""

import logging
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.decoding import (
    TRANSPOSE,
    BadImage,
    ends_well,
    header_of,
    open_image,
    opened_file,
    pillow_errors_as_bad_image,
)

ARRAY_EXTENSIONS = frozenset({".npy", ".npz", ".dcm"})  # beside those of Pillow
DTYPES = ("uint8", "uint16", "float32")  # each holds all values of those before it
Window = tuple[int, int, int, int]  # left, top, right, bottom in whole pixels

_SUFFIXES = {"TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "NPY": (b"\x93NUMPY",), "NPZ": (b"PK\x03\x04",)}
_DICOM_MARK = slice(128, 132)

for _name in ("tifffile", "pydicom"):  # they warn about every damaged file, of which the report has a line anyway
    logging.getLogger(_name).setLevel(logging.CRITICAL)


@dataclass(frozen=True)
class Bands:
    """An open image.

    Args:
        dtype: One of `DTYPES`.
        read: Returns the values (h, w, C) of a window.
        check: Raises BadImage if the file ends too early; it does not decode the file if that is avoidable.
    """

    width: int
    height: int
    num_channels: int
    dtype: str
    format: str
    read: Callable[[Window], np.ndarray]
    check: Callable[[], None] = lambda: None


@contextmanager
def open_bands(data: bytes | Path, num_channels: int) -> Iterator[Bands]:
    """Open an image; `num_channels` decides which axis of an array has the channels.

    Raises:
        BadImage: If the file cannot be read or needs a library that is not installed.
    """
    with BytesIO(data) if isinstance(data, bytes) else opened_file(data) as stream:
        with pillow_errors_as_bad_image():
            start = stream.read(132)
            stream.seek(0)
            if not start:
                raise BadImage("empty file (0 bytes)")
            kind = next((kind for kind, marks in _SUFFIXES.items() if start.startswith(marks)), "")
            if start[_DICOM_MARK] == b"DICM":
                kind = "DICOM"
            found = _OPEN.get(kind, _open_with_pillow)(stream, num_channels)
        yield found


def held_in(dtype: np.dtype) -> str:
    """Return the first of `DTYPES` that holds the values of another type; float32 holds the rest, rounded."""
    return next((name for name in DTYPES if np.can_cast(dtype, name, "safe")), DTYPES[-1])


def _required(library: str, what: str) -> Any:
    try:
        return import_module(library)
    except ImportError:
        raise BadImage(f"{what}, which needs {library}: pip install {library}") from None


# ---- arrays ----


def _open_npy(stream: BinaryIO, num_channels: int) -> Bands:
    if isinstance(stream, BytesIO):
        return _of_array(np.lib.format.read_array(stream, allow_pickle=False), num_channels, "NPY")
    major, _ = np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
    header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = header(stream)  # type: ignore[no-untyped-call]
    if dtype.hasobject:
        raise BadImage("an array of Python objects, expected numbers")
    order = "F" if is_fortran else "C"
    array: Any = np.memmap(stream, dtype, "r", offset=stream.tell(), shape=shape, order=order)  # type: ignore[call-overload]
    return _of_array(array, num_channels, "NPY")


def _open_npz(stream: BinaryIO, num_channels: int) -> Bands:
    with np.load(stream, allow_pickle=False) as arrays:
        names = list(arrays)
        if len(names) != 1:
            raise BadImage(f"{len(names)} arrays ({', '.join(names[:3])}), expected one")
        return _of_array(arrays[names[0]], num_channels, "NPZ")


def _of_array(array: np.ndarray, num_channels: int, kind: str) -> Bands:
    """Return an array (H, W), (C, H, W) or (H, W, C); with two possible axes the channels are first."""
    if array.dtype.kind not in "buif":
        raise BadImage(f"an array of {array.dtype}, expected numbers")
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and array.shape[0] == num_channels:
        array = array.transpose(1, 2, 0)
    elif array.ndim != 3:
        raise BadImage(f"an array of shape {array.shape}, expected (H, W), (C, H, W) or (H, W, C)")
    if not array.size:
        raise BadImage(f"an empty array of shape {array.shape}")
    height, width, found = array.shape
    if found != num_channels and height < min(width, found):  # channels first, but not as many as expected
        height, width, found = width, found, height
    dtype = held_in(array.dtype)

    def read(window: Window) -> np.ndarray:
        left, top, right, bottom = window
        return np.asarray(array[top:bottom, left:right], dtype)

    return Bands(width, height, found, dtype, kind, read)


# ---- TIFF ----


def _open_tiff(stream: BinaryIO, num_channels: int) -> Bands:
    """Open the samples of a page, or those of all pages of the first one's size, in this order; 0 is black."""
    tifffile = _required("tifffile", "a TIFF file")
    tiff = tifffile.TiffFile(stream, name="image")
    first = tiff.pages[0]
    pages = [page for page in tiff.pages if _is_like(page, first)] if first.samplesperpixel == 1 else [first]
    if _next_page(tiff, stream):
        raise BadImage(f"the file is truncated or damaged behind page {len(tiff.pages)}")
    if first.imagedepth != 1 or first.dtype is None or first.dtype.kind not in "buif":
        raise BadImage("a TIFF file of volumes or of other values than real numbers")
    if first.photometric == tifffile.PHOTOMETRIC.PALETTE:
        raise BadImage("a TIFF file of palette colors, whose numbers are no measurements; expected gray or RGB")
    is_white_zero = first.photometric == tifffile.PHOTOMETRIC.MINISWHITE and first.dtype.kind == "u"
    if tiff.is_imagej and len(pages) == 1 and tiff.series[0].size != first.size:
        return _of_array(tiff.series[0].asarray(), num_channels, "TIFF")  # a stack that the tags do not tell of
    length, dtype = stream.seek(0, 2), held_in(first.dtype)

    def read(window: Window) -> np.ndarray:
        left, top, right, bottom = window
        shape = (bottom - top, right - left, len(pages) * first.samplesperpixel)
        values = np.full(shape, first.nodata, first.dtype)  # GDAL's tag for what a sparse file leaves out, or 0
        for number, page in enumerate(pages):
            samples = slice(number, number + 1) if len(pages) > 1 else slice(None)
            _read_page(page, stream, window, values[..., samples])
        if is_white_zero:
            values = (1 << first.bitspersample) - 1 - values
        return values.astype(dtype, copy=False)

    def check() -> None:
        end = max(o + n for page in pages for o, n in zip(page.dataoffsets, page.databytecounts, strict=True))
        if end > length:
            raise BadImage(f"the file is truncated: it has {length:,} bytes, its pixels end at {end:,}")

    return Bands(first.imagewidth, first.imagelength, len(pages) * first.samplesperpixel, dtype, "TIFF", read, check)


def _next_page(tiff: Any, stream: BinaryIO) -> int:
    """Return where the last page that was found says that the next one is; 0 if it is the last of the file."""
    layout, offset = tiff.tiff, tiff.pages[-1].offset
    stream.seek(offset)
    (num_tags,) = struct.unpack(layout.tagnoformat, stream.read(layout.tagnosize))
    stream.seek(offset + layout.tagnosize + num_tags * layout.tagsize)
    return int(struct.unpack(layout.offsetformat, stream.read(layout.offsetsize))[0])


def _is_like(page: Any, first: Any) -> bool:
    return bool(page.shape == first.shape and page.dtype == first.dtype and not page.is_reduced)


def _read_page(page: Any, stream: BinaryIO, window: Window, values: np.ndarray) -> None:
    """Decode the strips or tiles of a page that overlap the window, into `values` (h, w, samples)."""
    left, top, right, bottom = window
    is_planar = page.planarconfig == 2 and page.samplesperpixel > 1
    rows, columns = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, page.imagewidth)
    rows = min(rows, page.imagelength) if not page.is_tiled else rows
    down, across = -(-page.imagelength // rows), -(-page.imagewidth // columns)
    for plane in range(page.samplesperpixel if is_planar else 1):
        for row in range(top // rows, -(-bottom // rows)):
            for column in range(left // columns, -(-right // columns)):
                number = (plane * down + row) * across + column
                stream.seek(page.dataoffsets[number])
                count = page.databytecounts[number]
                content = stream.read(count) if count else b""
                if len(content) < count:
                    raise BadImage("the file is truncated: some of its pixels are missing")
                decoded = page.decode(content, number, jpegtables=page.jpegtables)[0] if count else None
                if decoded is None:  # a sparse file leaves out what is empty
                    continue
                part = decoded[0]  # (rows, columns, samples)
                y, x = row * rows, column * columns
                y0, y1, x0, x1 = max(top, y), min(bottom, y + len(part)), max(left, x), min(right, x + part.shape[1])
                samples = slice(plane, plane + 1) if is_planar else slice(None)
                values[y0 - top : y1 - top, x0 - left : x1 - left, samples] = part[y0 - y : y1 - y, x0 - x : x1 - x]


# ---- DICOM ----


def _open_dicom(stream: BinaryIO, num_channels: int) -> Bands:
    """Open a slice; values are those of the modality, such as Hounsfield units (rescale slope and intercept).

    Those of MONOCHROME1, where the smallest value is white, are mirrored in their range, as most X-ray images store
    the largest one as white.
    """
    pydicom = _required("pydicom", "a DICOM file")
    dataset = pydicom.dcmread(stream)
    if "PixelData" not in dataset:
        raise BadImage("a DICOM file without pixels")
    if int(dataset.get("NumberOfFrames", 1) or 1) != 1:
        raise BadImage(f"a DICOM file of {dataset.NumberOfFrames} frames, expected one; save each as a file")
    height, width, found = int(dataset.Rows), int(dataset.Columns), int(dataset.SamplesPerPixel)
    is_scaled = dataset.get("RescaleSlope") is not None  # an empty element is None
    sign = "i" if int(dataset.get("PixelRepresentation", 0)) else "u"
    stored = np.dtype(f"{sign}{max(1, int(dataset.BitsAllocated) // 8)}")
    is_white_zero = dataset.get("PhotometricInterpretation") == "MONOCHROME1"
    white = -1 if sign == "i" else (1 << int(dataset.get("BitsStored") or dataset.BitsAllocated)) - 1

    def read(window: Window) -> np.ndarray:
        left, top, right, bottom = window
        array = white - dataset.pixel_array if is_white_zero else dataset.pixel_array
        if is_scaled:
            array = array * float(dataset.RescaleSlope) + float(dataset.get("RescaleIntercept") or 0)
        array = array[..., None] if array.ndim == 2 else array
        return np.asarray(array[top:bottom, left:right], "float32" if is_scaled else held_in(stored))

    def check() -> None:
        expected = height * width * found * stored.itemsize
        if not dataset.file_meta.TransferSyntaxUID.is_compressed and len(dataset.PixelData) < expected:
            raise BadImage(f"the file is truncated: {len(dataset.PixelData):,} of {expected:,} bytes of pixels")

    return Bands(width, height, found, "float32" if is_scaled else held_in(stored), "DICOM", read, check)


# ---- everything else ----


def _open_with_pillow(stream: BinaryIO, num_channels: int) -> Bands:
    image = open_image(stream)
    header = header_of(image)
    if header.num_bits > 8 and header.num_channels > 1:
        raise BadImage(f"{header.format} of 16 bits in several channels, of which Pillow reads 8; save it as TIFF")
    if image.mode in ("P", "1", "CMYK", "YCbCr", "LAB", "HSV"):
        raise BadImage(f"an image of mode {image.mode}, whose channels are no measurements; expected gray or RGB")
    is_deep = image.mode.startswith("I")
    dtype = "float32" if image.mode == "F" else "uint16" if is_deep else "uint8"

    def read(window: Window) -> np.ndarray:
        upright = image.transpose(TRANSPOSE[header.orientation]) if header.orientation > 1 else image
        values = np.asarray(upright.crop(window))
        if is_deep and (values.min() < 0 or values.max() > 65535):
            raise BadImage("values outside those of 16 bits")
        return (values[..., None] if values.ndim == 2 else values).astype(dtype)

    def check() -> None:
        if not ends_well(image):
            image.load()

    return Bands(header.width, header.height, len(image.getbands()), dtype, header.format, read, check)


_OPEN: dict[str, Callable[[BinaryIO, int], Bands]] = {
    "TIFF": _open_tiff,
    "NPY": _open_npy,
    "NPZ": _open_npz,
    "DICOM": _open_dicom,
}

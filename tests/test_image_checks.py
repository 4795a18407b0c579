"""What the check of the images says about pixels that do not fit into 8 bits and 3 channels, on photographs."""

import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import image_checks
from data.bad_images import BadImages
from data.decoding import decode
from data.image_checks import Summary, check_images
from data.sources import open_source

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = sorted((ROOT / "data/samples/photographs/train").glob("*.jpg"))[:6]


def pixels(number: int, mode: str = "L") -> np.ndarray:
    return np.asarray(Image.open(PHOTOGRAPHS[number]).convert(mode).resize((48, 40)))


def summary_of(folder: Path) -> Summary:
    return check_images(open_source(str(folder)), 0.0).summary


def tiff(array: np.ndarray) -> bytes:
    """Encode an RGB image with more channels, uint8 (H, W, C), which Pillow cannot write."""
    height, width, channels = array.shape
    extra = channels - 3
    bits_at = 8 + 2 + 12 * 10 + 4
    extra_at = bits_at + 2 * channels
    start = extra_at + 2 * extra
    entries = [
        (256, 3, 1, width),
        (257, 3, 1, height),
        (258, 3, channels, bits_at),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, start),
        (277, 3, 1, channels),
        (278, 3, 1, height),
        (279, 4, 1, array.size),
        (338, 3, extra, extra_at if extra > 2 else 0),
    ]
    directory = b"".join(struct.pack("<HHII", *entry) for entry in entries) + bytes(4)
    return (
        struct.pack("<2sHIH", b"II", 42, 8, len(entries))
        + directory
        + struct.pack(f"<{channels}H", *[8] * channels)
        + bytes(2 * extra)
        + array.tobytes()
    )


def sixteen_bit_png(array: np.ndarray) -> bytes:
    """Encode an RGB image of 16 bits, uint16 (H, W, 3), which Pillow cannot write."""
    height, width, _ = array.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0), b"IDAT" + zlib.compress(rows), b"IEND")
    framed = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def test_ordinary_photographs__need_no_note(tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(pixels(number, "RGB")).save(tmp_path / f"{number}.jpg")
        Image.fromarray(pixels(number, "RGB")).convert("RGBA").save(tmp_path / f"{number}.png")
        Image.fromarray(pixels(number, "RGB")).convert("CMYK").save(tmp_path / f"{number}.tif")
        Image.fromarray(pixels(number)).save(tmp_path / f"{number}.webp")
    summary = summary_of(tmp_path)
    assert summary.notes == ()
    assert summary.num_sixteen_bit == 0


def test_float_pixels__are_counted(tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(pixels(number).astype(np.float32) * (number + 1)).save(tmp_path / f"{number}.tif")
    Image.fromarray(pixels(3)).save(tmp_path / "gray.tif")
    (note,) = summary_of(tmp_path).notes
    assert note.startswith("3 images have float pixels: each is scaled from its own smallest and largest value")


@pytest.mark.parametrize("low", [-3.4e38, 0.0])
def test_float_pixels__may_span_more_than_float32(tmp_path: Path, low: float) -> None:
    shown = pixels(0).astype(np.float64) / 255
    array = (low + shown * (3.4e38 - low)).astype(np.float32)
    array[0, :2] = low, 3.4e38
    Image.fromarray(array).save(tmp_path / "huge.tif")
    with np.errstate(all="raise"):
        decoded = np.asarray(decode(tmp_path / "huge.tif", 1), np.float64)
    assert np.abs(decoded / 255 - shown)[1:].max() < 0.003


@pytest.mark.parametrize("num_channels", [5, 6])
def test_extra_channels__are_counted_with_what_is_left(tmp_path: Path, num_channels: int) -> None:
    for number in range(2):
        parts = [pixels(number, "RGB"), *[pixels(number)[..., None]] * (num_channels - 3)]
        (tmp_path / f"{number}.tif").write_bytes(tiff(np.concatenate(parts, axis=2)))
    Image.fromarray(pixels(2, "RGB")).save(tmp_path / "plain.tif")
    assert (np.asarray(decode(tmp_path / "0.tif", 3)) == pixels(0, "RGB")).all()  # silently, but for the note
    (note,) = summary_of(tmp_path).notes
    assert note == f"2 images have more channels than are read: {num_channels} become RGB in 2"


@pytest.mark.parametrize("extension", ["png", "tif", "pgm"])
def test_sixteen_bits__that_use_the_full_range_need_no_note(tmp_path: Path, extension: str) -> None:
    for number in range(3):
        array = pixels(number).astype(np.uint16) * 257
        array[0, 0] = 65535
        Image.fromarray(array).save(tmp_path / f"{number}.{extension}")
    summary = summary_of(tmp_path)
    assert summary.notes == ()
    assert summary.num_sixteen_bit == 3
    assert "3 with 16 bits per pixel, of which the high 8 are used" in summary.describe()


@pytest.mark.parametrize("extension", ["png", "tif"])
def test_ten_bits_in_sixteen__leave_four_gray_levels(tmp_path: Path, extension: str) -> None:
    for number in range(6):
        Image.fromarray(pixels(number).astype(np.uint16) * 4 + 3).save(tmp_path / f"{number}.{extension}")
    (note,) = summary_of(tmp_path).notes
    assert "need at most 10 bits in a sample of 6 of 6" in note
    assert "4 of 256 gray levels are left" in note
    assert len(np.unique(decode(tmp_path / f"0.{extension}", 1))) <= 4


def test_eight_bits_in_sixteen__are_black(tmp_path: Path) -> None:
    Image.fromarray(pixels(0).astype(np.uint16)).save(tmp_path / "0.png")
    (note,) = summary_of(tmp_path).notes
    assert "need at most 8 bits" in note
    assert "only black is left" in note


def test_twelve_bits_in_color__are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_checks, "_NUM_DECODED", 2)
    for number in range(4):
        array = pixels(number, "RGB").astype(np.uint16) * 16
        array[0, 0] = 4095
        (tmp_path / f"{number}.png").write_bytes(sixteen_bit_png(array))
    Image.fromarray(pixels(4, "RGB")).save(tmp_path / "plain.png")
    summary = summary_of(tmp_path)
    assert (summary.num_sixteen_bit, summary.modes) == (4, {"RGB": 5})
    assert "need at most 12 bits in a sample of 2 of 4" in summary.notes[0]
    assert "16 of 256 gray levels" in summary.notes[0]


def test_notes__come_from_a_kept_scan_too(tmp_path: Path) -> None:
    Image.fromarray(pixels(0).astype(np.float32)).save(tmp_path / "0.tif")
    first = summary_of(tmp_path)
    assert summary_of(tmp_path).notes == first.notes


def test_fifo_in_the_folder__is_a_bad_image_and_does_not_hang_the_check(tmp_path: Path) -> None:
    Image.fromarray(pixels(0)).save(tmp_path / "0.png")
    os.mkfifo(tmp_path / "1.jpg")
    found: list[BadImages] = []

    def check_all() -> None:
        for checks in ("new", "all", "sample"):
            found.append(check_images(open_source(str(tmp_path)), 0.5, checks=checks).bad)

    thread = threading.Thread(target=check_all, daemon=True)
    thread.start()
    thread.join(60)
    assert found == [{str(tmp_path / "1.jpg"): "cannot be opened: it is a FIFO, not a regular file"}] * 3

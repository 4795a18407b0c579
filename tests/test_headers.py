"""Headers that are read without Pillow are those of Pillow, for whole, unusual and damaged files."""

import io
import os
import random
import socket
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data.decoding import BadImage, check, read_bytes
from data.headers import UNKNOWN, ScanProcesses, read_plain_header, scan_files

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = sorted((ROOT / "data/samples/photographs/train").glob("*.jpg"))


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format_name, **options)
    return stream.getvalue()


def rotated(orientation: int | None, **tags: object) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F], exif[0x011A] = "a camera", 72.0
    if orientation is not None:
        exif[0x0112] = orientation
    return exif


def captioned(key: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text(key, "text")
    return info


def files() -> dict[str, bytes]:
    """Real photographs in every form that the readers know, and in some that they leave to Pillow."""
    image = Image.open(PHOTOGRAPHS[0]).convert("RGB").resize((64, 48))
    jpegs = {
        "": {},
        "progressive": {"progressive": True},
        "4:4:4": {"subsampling": 0},
        "turned": {"exif": rotated(6)},
        "mirrored": {"exif": rotated(2)},
        "big-endian": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x08\0\0\0\0\0\0"},
        "turned in XMP": {"xmp": b'<x tiff:Orientation="6">'},
        "profile": {"icc_profile": b"profile " * 1000},
        "comment": {"comment": b"hello", "dpi": (300, 300)},
    }
    found = {
        f"{mode} JPEG {name}": encoded(image.convert(mode), "JPEG", **options)
        for mode in ("RGB", "L", "CMYK")
        for name, options in jpegs.items()
    }
    pngs = {
        "": {},
        "caption": {"pnginfo": captioned("Software")},
        "odd key": {"pnginfo": captioned("bbox")},
        "turned": {"exif": rotated(8)},
        "profile": {"icc_profile": b"x" * 100},
        "dpi": {"dpi": (72, 72)},
    }
    sixteen = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        shown = sixteen if mode == "I;16" else image.convert(mode)
        found |= {f"{mode} PNG {name}": encoded(shown, "PNG", **options) for name, options in pngs.items()}
    found["P PNG 4 bits"] = encoded(image.quantize(16), "PNG", bits=4)
    found["RGB PNG transparent"] = encoded(image, "PNG", transparency=(1, 2, 3))
    header = (b"IHDR" + (64).to_bytes(4, "big") * 2 + b"\x10\x02\0\0\0", b"IDAT" + zlib.compress(bytes(385 * 64)))
    chunks = [(len(c) - 4).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in (*header, b"IEND")]
    found["RGB PNG 16 bits"] = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
    return found


def verdict(data: bytes) -> object:
    try:
        return check(data)
    except BadImage as error:
        return str(error)


FILES = files()


def test_plain_header__is_that_of_pillow() -> None:
    plain = {name: header for name, data in FILES.items() if (header := read_plain_header(data))}
    for name, header in plain.items():
        assert header == check(FILES[name]), name
    left_to_pillow = {name.split(" ", 1)[1] for name in FILES.keys() - plain.keys()}
    assert left_to_pillow == {"JPEG turned in XMP", "PNG odd key", "PNG turned", "PNG profile"}
    assert check(FILES["RGB PNG 16 bits"]).num_bits == 16


@pytest.mark.parametrize("photograph", PHOTOGRAPHS[::40], ids=lambda path: path.stem)
def test_plain_header__is_found_in_photographs(photograph: Path) -> None:
    assert read_plain_header(photograph.read_bytes()) == check(photograph)


def test_plain_header__of_damaged_files_is_that_of_pillow_or_none() -> None:
    random_numbers, names, num_plain = random.Random(0), sorted(FILES), 0
    for _ in range(6000):
        data = bytearray(FILES[random_numbers.choice(names)])
        for _ in range(random_numbers.choice((1, 1, 2))):
            position = random_numbers.randrange(2, min(len(data), 500))
            kind = random_numbers.random()
            if kind < 0.6:
                data[position] = random_numbers.choice((0, 1, 8, 0xD9, 0xDA, 0xFF, random_numbers.randrange(256)))
            elif kind < 0.8:
                del data[position : position + 3]
            elif kind < 0.95:
                data[position:position] = random_numbers.randbytes(2)
            else:
                del data[random_numbers.randrange(position, len(data)) :]
            if len(data) < 10:
                break
        if (header := read_plain_header(bytes(data))) is not None:
            num_plain += 1
            assert header == verdict(bytes(data)), bytes(data[:500])
    assert num_plain > 1000


def test_scan_files__gives_the_verdicts_of_check_in_this_process_and_in_others(tmp_path: Path) -> None:
    exif_thumbnail = encoded(Image.open(PHOTOGRAPHS[1]), "JPEG", exif=rotated(6), comment=b"c" * 60_000)
    contents = [*FILES.values(), b"", b"text", FILES["RGB JPEG "][:-300], exif_thumbnail, PHOTOGRAPHS[2].read_bytes()]
    names = [f"{number:03}.jpg".encode() for number in range(len(contents))]
    for name, data in zip(names, contents, strict=True):
        (tmp_path / name.decode()).write_bytes(data)
    names.append(b"missing.jpg")
    scan = scan_files(os.fsencode(tmp_path), names)
    assert scan.positions == list(range(len(names)))
    for data, record, number in zip(contents, scan.records, scan.positions, strict=False):
        expected = verdict(data)
        assert record["is_good"] == (not isinstance(expected, str))
        if isinstance(expected, str):
            assert scan.reasons[number] == expected
        else:
            assert (record["width"], record["height"]) == (expected.width, expected.height)
            assert (record["mode"].decode(), record["format"].decode()) == (expected.mode, expected.format)
            assert (record["num_bits"], record["num_channels"]) == (expected.num_bits, expected.num_channels)
    assert (scan.reasons[len(contents)], scan.records["is_final"][-1]) == ("no such file", False)
    with ScanProcesses(2) as processes:
        other = processes.scan_files(os.fsencode(tmp_path), names, [UNKNOWN] * len(names))
    assert (other.records == scan.records).all()
    assert other.reasons == scan.reasons


def test_scan_processes__report_one_that_was_killed(tmp_path: Path) -> None:
    with ScanProcesses(1) as processes:
        processes._processes[0].kill()
        for _ in range(2):  # the other threads of a scan must not wait for it
            with pytest.raises(ChildProcessError, match=r"exit code -9, at .*1\.jpg or one of the 1 images after it"):
                processes.scan_files(os.fsencode(tmp_path), [b"1.jpg", b"2.jpg"])


# ---- only regular files are opened ----

SCAN = """
import os, sys
from data.headers import scan_files
print(scan_files(b"", [os.fsencode(sys.argv[1])]).reasons)
"""
READ = """
import sys, pathlib
from data.decoding import BadImage, read_bytes
try:
    read_bytes(pathlib.Path(sys.argv[1]))
except BadImage as error:
    print(error)
"""


@pytest.mark.parametrize("program", [SCAN, READ], ids=["scan", "training"])
@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a device", "a folder", "a link to a FIFO"])
def test_special_files__are_bad_images_and_nobody_waits_for_them(tmp_path: Path, kind: str, program: str) -> None:
    path = tmp_path / "image.jpg"
    if kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "a FIFO":
        os.mkfifo(path)
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    command = [sys.executable, "-c", program, str(path)]
    output = subprocess.run(command, cwd=ROOT, timeout=60, capture_output=True, text=True, check=True).stdout
    assert f"is {kind.removeprefix('a link to ')}, not a regular file" in output


def test_fifo__that_replaces_an_image_between_test_and_opening_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "image.jpg"
    os.mkfifo(path)
    status = os.stat(PHOTOGRAPHS[0])
    monkeypatch.setattr(os, "stat", lambda *_, **__: status)
    with pytest.raises(BadImage, match="is a FIFO"):
        read_bytes(path)

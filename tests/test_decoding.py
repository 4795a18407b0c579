import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from data import crops as cropping
from data.crops import load_crops, raw_header, to_image
from data.decoding import BadImage, Header, check, decode

ROOT = Path(__file__).parents[1]
PHOTOGRAPHS = sorted((ROOT / "data/samples/photographs/train").glob("*.jpg"))
ORIENTATION = 0x0112
ROUNDING = 0.02  # mean difference in levels between the bicubic filters of torch and Pillow


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    """A photograph that is not square, so that rotations and swapped axes show."""
    image = Image.open(PHOTOGRAPHS[0]).convert("RGB")
    return image.resize((256, 192), box=(0, 0, image.width, image.height * 0.75))


def encoded(image: Image.Image, format_name: str, **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, format_name, **options)
    return stream.getvalue()


def rotated_by_exif(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image, "JPEG", quality=95, exif=exif)


def png_bomb(width: int, height: int) -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def difference(first: Image.Image, second: Image.Image) -> float:
    assert (first.mode, first.size) == (second.mode, second.size)
    return float(np.abs(np.asarray(first, np.float32) - np.asarray(second, np.float32)).mean())


def displacement(first: Image.Image, second: Image.Image) -> np.ndarray:
    """Return the shift down and right in pixels between two similar images, by least squares on the gradient."""
    moved, still = (np.asarray(image.convert("L"), np.float64) for image in (first, second))
    gradients = np.stack([gradient.ravel() for gradient in np.gradient(still)], 1)
    return np.linalg.lstsq(gradients, (moved - still).ravel(), rcond=None)[0]


def load_crop(
    data: bytes, choose_box: Callable[[int, int], cropping.Box], size: tuple[int, int], num_channels: int
) -> Image.Image:
    views = [(size, Image.Resampling.BICUBIC)]
    return to_image(load_crops(data, lambda *shape: [choose_box(*shape)], views, num_channels)[0][0])


def whole(width: int, height: int) -> cropping.Box:
    return 0, 0, width, height


@pytest.mark.parametrize(("num_channels", "mode"), [(1, "L"), (3, "RGB")])
@pytest.mark.parametrize(
    ("source_mode", "format_name", "tolerance"),
    [
        ("RGB", "PNG", 0),
        ("L", "PNG", 0),
        ("RGB", "WEBP", 4),
        ("RGB", "TIFF", 0),
        ("RGB", "BMP", 0),
        ("RGB", "AVIF", 6),
        ("RGBA", "PNG", 0),
        ("LA", "PNG", 0),
        ("P", "PNG", 8),
        ("P", "GIF", 8),
        ("CMYK", "JPEG", 6),
        ("CMYK", "TIFF", 2),
    ],
)
def test_decode__gives_the_same_image_from_every_mode(
    photograph: Image.Image, source_mode: str, format_name: str, tolerance: float, num_channels: int, mode: str
) -> None:
    image = photograph.quantize(256) if source_mode == "P" else photograph.convert(source_mode)
    decoded = decode(encoded(image, format_name), num_channels)
    gray = source_mode in ("L", "LA")
    expected = (photograph.convert("L") if gray else photograph).convert(mode)
    assert difference(decoded, expected) <= tolerance


def test_decode__reads_adobe_cmyk_jpeg_with_the_right_sign(photograph: Image.Image) -> None:
    data = encoded(photograph.convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data  # the marker that says the inks are stored inverted
    assert difference(decode(data, 3), photograph) < 6 < difference(decode(data, 3), ImageOps.invert(photograph))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_decode__lays_transparency_on_white(photograph: Image.Image, mode: str) -> None:
    options: dict[str, object] = {}
    if mode in ("RGBA", "LA"):
        image = photograph.convert(mode)
        image.putalpha(Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 96, 0).repeat(256, 1)))
    else:  # one color, or palette entry, stands for "transparent"; painted magenta so that it would show
        image = photograph.copy()
        image.paste((255, 0, 255), (0, 0, 256, 96))
        image = image.quantize(64) if mode == "P" else image
        options["transparency"] = image.getpixel((0, 0))
    decoded = np.asarray(decode(encoded(image, "PNG", **options), 3))
    assert (decoded[:96] == 255).all()
    assert decoded[96:].std() > 5


def test_decode__keeps_partial_transparency_proportional() -> None:
    half_transparent_black = Image.new("RGBA", (4, 4), (0, 0, 0, 128))
    assert np.asarray(decode(encoded(half_transparent_black, "PNG"), 3)).max() in (127, 128)


@pytest.mark.parametrize("format_name", ["PNG", "TIFF", "PPM"])
def test_decode__scales_sixteen_bits_alike_in_every_image(photograph: Image.Image, format_name: str) -> None:
    gray = np.asarray(photograph.convert("L"))
    for strength in (257, 64):  # full range, and a dark image that must stay dark
        data = encoded(Image.fromarray(gray.astype(np.uint16) * strength), format_name)
        assert check(data).mode.startswith("I")
        expected = (gray.astype(np.int32) * strength) >> 8
        assert np.abs(np.asarray(decode(data, 1)).astype(np.int32) - expected).max() <= 1


def test_decode__reads_big_endian_sixteen_bits(photograph: Image.Image) -> None:
    gray = np.asarray(photograph.convert("L"))
    image = Image.frombytes("I;16B", photograph.size, (gray.astype(">u2") * 257).astype(">u2").tobytes())
    data = encoded(image, "TIFF")
    assert check(data).mode == "I;16B"
    assert difference(decode(data, 1), photograph.convert("L")) == 0


def test_decode__stretches_float_pixels_and_survives_nan(photograph: Image.Image) -> None:
    pixels = np.asarray(photograph.convert("L"), np.float32) / 1000 - 3
    pixels[0, 0], pixels[0, 1] = np.nan, np.inf
    decoded = np.asarray(decode(encoded(Image.fromarray(pixels), "TIFF"), 1))
    assert (decoded.min(), decoded.max()) == (0, 255)
    assert decoded[0, 0] == 0
    crop = np.asarray(load_crop(encoded(Image.fromarray(pixels), "TIFF"), lambda w, h: (8, 8, 40, 40), (32, 32), 1))
    assert (crop == decoded[8:40, 8:40]).all()  # the scale is the image's, not the crop's


def test_decode__turns_one_bit_into_black_and_white(photograph: Image.Image) -> None:
    assert set(np.unique(np.asarray(decode(encoded(photograph.convert("1"), "PNG"), 1)))) == {0, 255}


def test_decode__takes_the_first_frame_of_an_animation(photograph: Image.Image) -> None:
    frames = [photograph.quantize(128), Image.new("P", photograph.size), Image.new("P", photograph.size, 7)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert getattr(Image.open(BytesIO(data)), "n_frames", 1) > 1
    assert difference(decode(data, 3), photograph) < 8
    check(data)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_decode__reads_a_single_pixel(num_channels: int) -> None:
    data = encoded(Image.new("RGB", (1, 1), (200, 200, 200)), "PNG")
    assert decode(data, num_channels).size == (1, 1)
    assert load_crop(data, whole, (32, 16), num_channels).getextrema() in [(200, 200), ((200, 200),) * 3]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation__gives_the_crop_of_the_upright_image(photograph: Image.Image, orientation: int) -> None:
    data = rotated_by_exif(photograph, orientation)
    upright = ImageOps.exif_transpose(Image.open(BytesIO(data)))
    header = check(data)
    assert (header.width, header.height) == upright.size
    assert difference(decode(data, 3), upright) == 0
    box = (31, 17, 31 + 96, 17 + 120)
    expected = upright.crop(box).resize((96, 112), Image.Resampling.BICUBIC)
    assert difference(load_crop(data, lambda width, height: box, (112, 96), 3), expected) < ROUNDING


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("num_channels", [1, 3])
def test_draft__does_not_move_the_crop(
    photograph: Image.Image, orientation: int, num_channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 251 x 187 is not a multiple of 8, so that a rotated image starts with a partial block.
    data = rotated_by_exif(photograph.resize((251, 187)), orientation)

    def crop(box: cropping.Box) -> Image.Image:
        return load_crop(data, lambda width, height: box, (24, 32), num_channels)

    boxes = [(left, top, left + 150, top + 150) for left in (0, 13, 27) for top in (1, 18, 36)]
    drafted = [crop(box) for box in boxes]
    monkeypatch.setattr(cropping, "_draft", lambda *arguments: 1)
    full = [crop(box) for box in boxes]
    moved = [crop((left + 1, top, right + 1, bottom)) for left, top, right, bottom in boxes]
    assert np.mean(list(map(difference, drafted, full))) < 4
    # In pixels of the crop, about five source pixels each; one source pixel would show.
    assert np.abs(np.mean(list(map(displacement, drafted, full)), 0)).max() < 0.04
    assert np.abs(np.mean(list(map(displacement, moved, full)), 0)).max() > 0.15


def test_draft__decodes_fewer_pixels(photograph: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(photograph.resize((1024, 768)), "JPEG")
    decoded_sizes = []
    load = ImageFile.ImageFile.load

    def noting_load(self: ImageFile.ImageFile) -> object:
        decoded_sizes.append(self.size)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noting_load)
    for size in ((64, 64), (200, 200), (400, 400), (768, 1024)):
        load_crop(data, whole, size, 3)
    assert list(dict.fromkeys(decoded_sizes)) == [(128, 96), (512, 384), (1024, 768)]  # scales 1/8, 1/2, 1 and 1


def test_transparent_crop__equals_the_crop_of_the_decoded_image(photograph: Image.Image) -> None:
    image = photograph.quantize(32)
    data = encoded(image, "PNG", transparency=image.getpixel((40, 40)))
    box = (20, 20, 100, 90)
    expected = decode(data, 3).crop(box).resize((50, 60), Image.Resampling.BICUBIC)
    assert difference(load_crop(data, lambda width, height: box, (60, 50), 3), expected) < ROUNDING


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR, Image.Resampling.LANCZOS])
@pytest.mark.parametrize("size", [(20, 30), (150, 140), (230, 400)])
def test_load_crops__equals_pillow_on_the_whole_image(
    photograph: Image.Image, size: tuple[int, int], resample: Image.Resampling, num_channels: int
) -> None:
    data, boxes = encoded(photograph, "PNG"), [(3, 5, 203, 145), (40, 30, 250, 190), (0, 0, 256, 192)]
    crops = load_crops(data, lambda width, height: boxes, [(size, resample)], num_channels)
    for box, (crop,) in zip(boxes, crops, strict=True):
        image = decode(data, num_channels)
        if resample == Image.Resampling.LANCZOS:  # Pillow's own filter, which also sees the pixels next to the box
            assert difference(to_image(crop), image.resize(size[::-1], resample, box)) == 0
        else:
            assert difference(to_image(crop), image.crop(box).resize(size[::-1], resample)) < ROUNDING


@pytest.mark.parametrize("comment", ["made by me", "shrunk from 10 x 10"])
def test_load_crops__a_png_with_a_comment_is_an_image_like_others(photograph: Image.Image, comment: str) -> None:
    """Pillow gives the comment of a PNG as text, that of a JPEG as bytes."""
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", comment)
    expected, found = (
        load_crop(encoded(photograph, "PNG", **options), whole, (64, 48), 3) for options in ({}, {"pnginfo": info})
    )
    assert difference(found, expected) == 0


def test_load_crops__reads_raw_pixels_without_pillow(photograph: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    for image, num_channels in ((photograph, 3), (photograph.convert("L"), 1)):
        expected = load_crop(encoded(image, "PNG"), lambda *size: (10, 20, 200, 180), (64, 48), num_channels)
        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", lambda *arguments, **options: pytest.fail("Pillow was asked"))
            raw = raw_header((256, 192), num_channels) + image.tobytes()
            found = load_crop(raw, lambda *size: (10, 20, 200, 180), (64, 48), num_channels)
        assert difference(found, expected) == 0
        other = load_crop(raw, whole, (192, 256), 4 - num_channels)  # the other mode, by Pillow
        assert difference(other, image.convert(other.mode)) == 0
        with pytest.raises(BadImage):
            load_crop(raw[:-1], whole, (64, 48), num_channels)


@pytest.mark.parametrize("resample", [Image.Resampling.BICUBIC, Image.Resampling.BILINEAR])
def test_load_crops__keeps_fractions_of_a_pixel(photograph: Image.Image, resample: Image.Resampling) -> None:
    data, generator, num_by_torch = encoded(photograph, "PNG"), np.random.default_rng(0), 0
    boxes = [(x, y, x + w, y + h) for x, y, w, h in generator.uniform((0, 0, 70, 60), (90, 60, 160, 130), (40, 4))]
    boxes += [(0, 0.5, 255.5, 192), (31.25, 0, 256, 160.75)]
    crops = load_crops(data, lambda width, height: boxes, [((96, 128), resample)], 3)
    for box, (crop,) in zip(boxes, crops, strict=True):
        expected = photograph.resize((128, 96), resample, box)
        assert difference(to_image(crop), expected) < 3
        assert np.abs(displacement(to_image(crop), expected)).max() < 0.15  # 1/16 of a pixel, enlarged
        num_by_torch += None not in (
            cropping._span(box[0], box[2], 128, 256),
            cropping._span(box[1], box[3], 96, 192),
        )
    assert num_by_torch > 20


@pytest.mark.parametrize("is_raw", [True, False])
def test_load_crops__of_a_shrunk_image_are_those_of_the_original(photograph: Image.Image, is_raw: bool) -> None:
    shrunk, boxes = photograph.resize((128, 96), Image.Resampling.LANCZOS), [(33, 11, 200, 150), (0, 0, 256, 192)]
    data = raw_header((128, 96), 3, (256, 192)) + shrunk.tobytes()
    if not is_raw:
        data = encoded(shrunk, "JPEG", quality=98, subsampling=0, comment=cropping.shrunk_from(256, 192))
    header = check(data)
    assert (header.width, header.height) == (128, 96)

    def choose_boxes(width: int, height: int) -> list[cropping.Box]:
        assert (width, height) == (256, 192)
        return boxes

    crops = load_crops(data, choose_boxes, [((48, 64), Image.Resampling.BICUBIC)], 3)
    for box, (crop,) in zip(boxes, crops, strict=True):
        expected = photograph.crop(box).resize((64, 48), Image.Resampling.BICUBIC)
        assert difference(to_image(crop), expected) < 3
        assert np.abs(displacement(to_image(crop), expected)).max() < 1 / 16


def truncated(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


@pytest.mark.parametrize(
    "read", [check, lambda data: decode(data, 3), lambda data: load_crop(data, whole, (32, 32), 3)]
)
@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000"])
def test_truncated__is_a_bad_image_before_and_at_decoding(photograph: Image.Image, format_name: str, read) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(BadImage):
        read(truncated(encoded(photograph, format_name)))


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "AVIF", "JPEG2000"])
def test_check__accepts_whole_files(photograph: Image.Image, format_name: str) -> None:
    header = check(encoded(photograph, format_name))
    assert (header.width, header.height, header.format) == (256, 192, format_name)


@pytest.mark.parametrize("format_name", ["JPEG", "PNG", "GIF", "TIFF"])
def test_check__decodes_suspects_only(
    photograph: Image.Image, format_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = encoded(photograph, format_name)
    loaded = []
    load = ImageFile.ImageFile.load

    def noting_load(self: ImageFile.ImageFile) -> object:
        loaded.append(self.format)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", noting_load)
    check(data)
    assert loaded == []
    if format_name == "JPEG":
        check(data + b"a trailer that some cameras append")  # seems truncated but is not
        assert loaded


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"These are my holiday notes, not a picture.\n", "not an image in a format"),
        (b"\xff\xd8\xff\xe0", "not an image|cannot be decoded"),
        (b"\x89PNG\r\n\x1a\n", "not an image|cannot be decoded"),
    ],
)
def test_no_image__is_a_bad_image_with_a_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "ümlaut and space.jpg"
    path.write_bytes(data)
    for argument in (data, path):
        for read in (check, lambda data: decode(data, 3)):
            with pytest.raises(BadImage, match=reason):
                read(argument)


def test_bomb__is_refused_from_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("pixels were decoded"))
    bomb = png_bomb(30_000, 30_000)
    with pytest.raises(BadImage, match="too large"):
        check(bomb)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as some libraries do for the whole process
    with pytest.raises(BadImage, match="30000x30000"):
        check(bomb)


def test_large_but_allowed__gives_no_warning(tmp_path: Path) -> None:
    # In a process of its own, because pytest manages the warnings of this one.
    path = tmp_path / "large.png"
    path.write_bytes(png_bomb(12_000, 8_000))  # above Pillow's warning, below its refusal
    code = "import sys, pathlib, data.decoding as d; print(d.check(pathlib.Path(sys.argv[1])).width)"
    command = [sys.executable, "-c", code, str(path)]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert (outcome.stdout, outcome.stderr) == ("12000\n", "")


def test_missing_files__say_what_is_missing(tmp_path: Path) -> None:
    link = tmp_path / "link.jpg"
    link.symlink_to(tmp_path / "gone.jpg")
    with pytest.raises(BadImage, match=r"broken link to .*gone\.jpg"):
        check(link)
    with pytest.raises(BadImage, match="no such file"):
        check(tmp_path / "never.jpg")
    with pytest.raises(BadImage, match="cannot be opened"):
        check(tmp_path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # pytest undoes the filter that data.decoding sets
def test_damaged_exif__is_ignored(photograph: Image.Image) -> None:
    data = encoded(photograph, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert check(data).orientation == 1


def test_check__is_safe_in_threads(photograph: Image.Image) -> None:
    data = encoded(photograph, "JPEG")
    outcomes: list[Header] = []
    threads = [threading.Thread(target=lambda: outcomes.append(check(data))) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(outcomes)) == 1
    assert len(outcomes) == 16

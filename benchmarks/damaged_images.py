"""Damage small images of all formats, and read them: `benchmarks.survival` does so in processes of their own."""

import io
import json
import os
import random
import signal
from pathlib import Path

import numpy as np
from PIL import Image

from data.augmentations import random_crop, single_view
from data.decoding import BadImage, check, decode
from data.headers import scan_files
from data.seeds import seeded_generator

PHOTOGRAPHS = Path(__file__).resolve().parent.parent / "data" / "samples" / "photographs" / "train"
DAMAGES = ("truncated", "flipped bits", "random bytes", "zeros", "removed", "inserted", "repeated", "header")
SECONDS_PER_FILE = 60


def originals() -> dict[str, bytes]:
    """Return small encoded images by kind: all formats, gray, 16 bit, float, CMYK, palette, transparent, animated."""
    paths = sorted(PHOTOGRAPHS.glob("*.jpg"))
    photograph = Image.open(paths[0]).convert("RGB").resize((80, 60))
    others = [Image.open(path).convert("RGB").resize((80, 60)) for path in paths[1:3]]
    gray = photograph.convert("L")
    deep = Image.fromarray(np.asarray(gray).astype(np.uint16) * 257)
    real = Image.fromarray(np.asarray(gray).astype(np.float32))
    animated = {"save_all": True}
    kinds: dict[str, tuple[Image.Image, str, dict]] = {
        "JPEG": (photograph, "JPEG", {}),
        "JPEG progressive": (photograph, "JPEG", {"progressive": True}),
        "JPEG gray": (gray, "JPEG", {}),
        "JPEG CMYK": (photograph.convert("CMYK"), "JPEG", {}),
        "MPO": (photograph, "MPO", animated),
        "PNG": (photograph, "PNG", {}),
        "PNG gray": (gray, "PNG", {}),
        "PNG 16 bit": (deep, "PNG", {}),
        "PNG 1 bit": (gray.convert("1"), "PNG", {}),
        "PNG palette": (photograph.quantize(32), "PNG", {}),
        "PNG transparent": (photograph.convert("RGBA"), "PNG", {}),
        "PNG animated": (photograph, "PNG", animated),
        "WebP": (photograph, "WEBP", {}),
        "WebP lossless": (photograph.convert("RGBA"), "WEBP", {"lossless": True}),
        "WebP animated": (photograph, "WEBP", animated),
        "GIF": (gray, "GIF", {}),
        "GIF animated": (photograph, "GIF", animated),
        "BMP": (photograph, "BMP", {}),
        "BMP gray": (gray, "BMP", {}),
        "TIFF": (photograph, "TIFF", {}),
        "TIFF LZW": (photograph, "TIFF", {"compression": "tiff_lzw"}),
        "TIFF 16 bit": (deep, "TIFF", {}),
        "TIFF float": (real, "TIFF", {}),
        "TIFF CMYK": (photograph.convert("CMYK"), "TIFF", {}),
        "TIFF pages": (photograph, "TIFF", animated),
        "PPM": (photograph, "PPM", {}),
        "PGM": (gray, "PPM", {}),
        "PGM 16 bit": (deep.convert("I"), "PPM", {}),
        "AVIF": (photograph, "AVIF", {}),
        "AVIF animated": (photograph, "AVIF", animated),
        "JPEG 2000": (photograph, "JPEG2000", {}),
        "JPEG 2000 gray": (gray, "JPEG2000", {}),
        "TGA": (photograph, "TGA", {}),
        "TGA compressed": (gray, "TGA", {"compression": "tga_rle"}),
    }
    encoded = {}
    for name, (image, form, options) in kinds.items():
        stream = io.BytesIO()
        if options is animated:
            options = {**animated, "append_images": [each.copy() for each in others]}  # saving leaves marks on them
        image.copy().save(stream, form, **options)
        encoded[name] = stream.getvalue()
    return encoded


def damaged(data: bytes, generator: random.Random) -> tuple[bytes, str]:
    """Return the data with a random damage, and the name of the damage."""
    damage = generator.choice(DAMAGES)
    content, length = bytearray(data), len(data)
    start = generator.randrange(length)
    end = min(length, start + generator.choice((1, 4, 64, 1024)))
    if damage == "truncated":
        del content[start:]
    elif damage == "flipped bits":
        for _ in range(generator.choice((1, 4, 16))):
            content[generator.randrange(length)] ^= 1 << generator.randrange(8)
    elif damage == "random bytes":
        content[start:end] = generator.randbytes(end - start)
    elif damage == "zeros":
        content[start:end] = bytes(end - start)
    elif damage == "removed":
        del content[start:end]
    elif damage == "inserted":
        content[start:start] = generator.randbytes(end - start)
    elif damage == "repeated":
        content[start:start] = content[start:end]
    else:
        for _ in range(generator.choice((1, 2, 4))):
            content[generator.randrange(min(64, length))] = generator.randrange(256)
    return bytes(content), damage


def read_damaged(first: int, num_files: int, folder: Path, report: Path) -> int:
    """Read damaged files and report a JSON line before and after each, so that a crash is known by its file."""
    encoded = originals()
    views = [single_view(random_crop((32, 32), (0.2, 1.0)), num_channels) for num_channels in (1, 3)]

    def too_slow(*_: object) -> None:
        raise BaseExceptionGroup("more than 60 seconds", [TimeoutError()])

    signal.signal(signal.SIGALRM, too_slow)
    with report.open("a") as stream:
        for number in range(first, first + num_files):
            generator = random.Random(f"file {number}")
            kind = list(encoded)[number % len(encoded)]
            data, damage = damaged(encoded[kind], generator)
            name = f"{number}.img"
            (folder / name).write_bytes(data)
            stream.write(json.dumps({"number": number, "kind": kind, "damage": damage}) + "\n")
            stream.flush()
            signal.alarm(SECONDS_PER_FILE)
            outcomes, failure = [], ""
            sample, seed = {"image": data}, seeded_generator("survival", number)
            for read in (
                lambda data=data: check(data),
                lambda data=data, number=number: decode(data, (1, 3)[number % 2]),
                lambda sample=sample, seed=seed, number=number: views[number // 34 % 2](sample, seed),
            ):
                try:
                    read()
                    outcomes.append("image")
                except BadImage:
                    outcomes.append("bad")
                except BaseException as error:
                    failure = f"{type(error).__name__}: {error}"[:300]
            try:
                scan = scan_files(os.fsencode(folder), [os.fsencode(name)])
                if bool(scan.records["is_good"][0]) != (outcomes[:1] == ["image"]) and not failure:
                    failure = "the scan and the check differ"
            except BaseException as error:
                failure = f"scan: {type(error).__name__}: {error}"[:300]
            signal.alarm(0)
            (folder / name).unlink()
            is_image = outcomes == ["image"] * 3
            stream.write(json.dumps({"number": number, "is_image": is_image, "failure": failure}) + "\n")
            stream.flush()
    return 0

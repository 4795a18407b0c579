"""How class numbers are stored in mask images, and where the classes come from.

A mask is a PNG (or another lossless image) of the size of its image: its pixels are class numbers (gray, also 16 bit,
or a palette, whose colors then do not matter), or colors that a file of classes lists.
Shapes: H W pixels, K classes.
"""

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.decoding import BadImage, opened, pillow_errors_as_bad_image
from data.image_checks import num_cores

IGNORED = 255  # the label of pixels that do not count
MAX_CLASSES = 255
CLASS_FILE = "classes.txt"
_IGNORED_NAME = "ignore"  # a class of this name does not count
_COLOR = re.compile(r"(?P<name>.*?)[\s,:;]+(?:#(?P<hex>[0-9a-fA-F]{6})|(?P<rgb>\d{1,3}(?:[\s,]+\d{1,3}){2}))$")
_MAX_NAMED = 10


@dataclass(frozen=True)
class MaskCodes:
    """Names of the classes, and the value (K,) of a pixel of each: a number, or a color as 65536 r + 256 g + b.

    Args:
        ignored: Further values, of pixels that do not count.
    """

    names: tuple[str, ...]
    values: tuple[int, ...]
    is_color: bool
    ignored: tuple[int, ...]

    def read(self, data: bytes | Path) -> np.ndarray:
        """Return the classes of a mask, uint8 (H, W), `IGNORED` where pixels do not count.

        Raises:
            BadImage: If it cannot be read, or has values that are no class.
        """
        values, is_color = raw_mask(data)
        if is_color != self.is_color:
            expected = "colors, as classes have them" if self.is_color else "one number per pixel"
            raise BadImage(f"its mask has {'colors' if is_color else 'one number per pixel'}, expected {expected}")
        known = np.array([*self.values, *self.ignored])
        labels = np.array([*range(len(self.values)), *[IGNORED] * len(self.ignored)], np.uint8)
        order = np.argsort(known)
        places = np.searchsorted(known[order], values).clip(max=len(known) - 1)
        is_unknown = known[order][places] != values
        if is_unknown.any():
            found = np.unique(values[is_unknown])
            what = "colors that are" if self.is_color else "numbers that are"
            shown = ", ".join(map(self.show, found[:3].tolist()))
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise BadImage(f"its mask has {what} no class: {shown}{more}, {is_unknown.mean():.1%} of its pixels")
        return labels[order][places]

    def show(self, value: int) -> str:
        return f"#{value:06x}" if self.is_color else str(value)


def raw_mask(data: bytes | Path) -> tuple[np.ndarray, bool]:
    """Return the values int64 (H, W) of a mask, and whether they are colors."""
    try:
        with opened(data) as image:
            if image.format in ("JPEG", "MPO"):
                raise BadImage("it is a JPEG, which changes class numbers; save masks as PNG")
            with pillow_errors_as_bad_image():
                image.load()
                pixels: Image.Image = image
                if image.mode == "LA":
                    pixels = image.getchannel("L")
                elif image.mode in ("RGBA", "CMYK", "YCbCr", "LAB", "HSV", "PA"):
                    pixels = image.convert("RGB")
                stored = np.asarray(pixels)
                array = np.nan_to_num(stored).astype(np.int64) if image.mode == "F" else stored.astype(np.int64)
                if image.mode == "F" and (array != stored).any():
                    raise BadImage("its pixels are fractions; expected whole numbers")
    except BadImage as error:
        raise BadImage(f"its mask cannot be used: {error}") from None
    if array.ndim == 3:
        return array @ np.array([65536, 256, 1]), True
    return array, False


def read_class_file(file: Path, ignore_index: int) -> MaskCodes:
    """Read a class on each line: its name, and its color if masks have colors, as `#rrggbb` or three numbers.

    Without colors, the classes are numbered in the order of the lines: from 0, or from 1 if 0 does not count, as in
    ADE20K. A class named "ignore", or with the number `ignore_index`, does not count.

    Raises:
        ValueError: If the file cannot be used.
    """
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the classes cannot be read from {file}: {error}") from None
    if not lines:
        raise ValueError(f"{file} is empty; expected the name of a class on each line")
    found = [_COLOR.match(line) for line in lines]
    with_color = [match for match in found if match]
    if with_color and len(with_color) < len(lines):
        without = next(line for line, match in zip(lines, found, strict=True) if not match)
        raise ValueError(f"{file}: {len(with_color)} of {len(lines)} classes have a color, but not {without!r}")
    if with_color:
        names, values = [match["name"].strip() for match in with_color], [_color(match, file) for match in with_color]
    else:
        names = lines
        start = 1 if ignore_index == 0 else 0
        values = list(range(start, start + len(lines)))
    for what, each in (("name", names), ("color", values)):
        if len(set(each)) < len(each):
            double = next(one for number, one in enumerate(each) if one in each[:number])
            raise ValueError(f"{file}: two classes have the {what} {double if what == 'name' else f'#{double:06x}'!r}")
    ignored = [value for name, value in zip(names, values, strict=True) if name.lower() == _IGNORED_NAME]
    if not with_color and len(names) <= MAX_CLASSES + 1:  # more are refused
        ignored.append(ignore_index)
    kept = [(name, value) for name, value in zip(names, values, strict=True) if value not in ignored]
    return _checked([name for name, _ in kept], [value for _, value in kept], bool(with_color), ignored, str(file))


def codes_from_masks(masks: Iterable[bytes | Path], ignore_index: int, title: str) -> tuple[MaskCodes, str]:
    """Take every value that occurs in masks for a class; returns the codes, and a sentence that says so.

    Masks of 0 and 255 have two classes, background and foreground. Masks that cannot be read are passed over.
    """
    found: set[int] = set()
    kinds: set[bool] = set()
    with ThreadPoolExecutor(min(16, num_cores())) as pool:
        for values, is_color in filter(None, pool.map(_values, masks)):
            found |= values
            kinds.add(is_color)
    if not found:
        raise ValueError(f"no mask in {title} can be read")
    if len(kinds) > 1:
        raise ValueError(f"some masks in {title} have colors and others one number per pixel; use one kind")
    (is_color,) = kinds
    if not is_color and found == {0, 255} and ignore_index != 0:
        codes = MaskCodes(("background", "foreground"), (0, 255), False, ())
        return codes, f"classes: 0 is background and 255 is foreground, as all masks in {title} have these values only"
    kept = sorted(found if is_color else found - {ignore_index})
    names = [f"#{value:06x}" if is_color else str(value) for value in kept]
    codes = _checked(names, kept, is_color, [] if is_color else [ignore_index], title)
    shown = ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")
    what = "colors" if is_color else "numbers"
    return codes, f"classes: the {len(names)} {what} in the masks ({shown}); {CLASS_FILE} can name them"


def _values(mask: bytes | Path) -> tuple[set[int], bool] | None:
    try:
        values, is_color = raw_mask(mask)
    except BadImage:
        return None
    return set(np.unique(values).tolist()), is_color


def _checked(
    names: Sequence[str], values: Sequence[int], is_color: bool, ignored: Sequence[int], title: str
) -> MaskCodes:
    if len(names) < 2:
        raise ValueError(f"{title} has {len(names)} classes, expected at least two: {', '.join(names) or 'none'}")
    if len(names) > MAX_CLASSES:
        hint = "; are the masks photographs, or saved with smooth edges?" if is_color else ""
        raise ValueError(f"{title} has {len(names):,} classes, expected at most {MAX_CLASSES}{hint}")
    return MaskCodes(tuple(names), tuple(values), is_color, tuple(dict.fromkeys(ignored)))


def _color(match: re.Match[str], file: Path) -> int:
    if match["hex"]:
        return int(match["hex"], 16)
    red, green, blue = (int(number) for number in re.split(r"[\s,]+", match["rgb"]))
    if max(red, green, blue) > 255:
        raise ValueError(f"{file}: the color of {match['name']!r} is {match['rgb']}, expected numbers up to 255")
    return 65536 * red + 256 * green + blue

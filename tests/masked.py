"""A small data set of photographs with masks, for tests of segmentation."""

from pathlib import Path

import numpy as np
from PIL import Image

from data.sources import BUNDLED

PHOTOGRAPHS = sorted((BUNDLED["sample"] / "train").glob("*.jpg"))


def masked_folder(folder: Path, num_train: int = 8, num_validation: int = 3, side: int = 64) -> Path:
    """Write photographs with a rectangle of one of two colors, which is the class; 0 is the rest, 255 is unknown."""
    rng = np.random.default_rng(0)
    for number, photograph in enumerate(PHOTOGRAPHS[: num_train + num_validation]):
        split = "train" if number < num_train else "val"
        width, height = (side, side) if number % 3 else (side + side // 2, side)
        with Image.open(photograph) as image:
            pixels = np.array(image.convert("RGB").resize((width, height)))
        mask = np.zeros((height, width), np.uint8)
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        box = (slice(top, top + height // 3), slice(left, left + width // 3))
        mask[box], pixels[box] = 1 + number % 2, ((200, 30, 30), (30, 30, 200))[number % 2]
        mask[0] = 255
        for kind, array, suffix in (("images", pixels, "jpg"), ("masks", mask, "png")):
            path = folder / split / kind / f"{number:02}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    (folder / "classes.txt").write_text("rest\nred\nblue\n")
    return folder

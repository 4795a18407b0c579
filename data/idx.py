"""Read MNIST's idx files: one file of images and one of labels per split, optionally compressed with gzip.

Format: two zero bytes, the type (8: uint8), the number of axes, big-endian sizes, then the values.
Shapes: N images, H W pixels.
"""

import gzip
import os
import re
import zlib
from pathlib import Path

import numpy as np

from data.decoding import BadImage, read_bytes

_IMAGES = re.compile(r"(train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")
_UINT8 = 8


def find_idx_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Return the files (images, labels) of each split in the folder, train first; the label file may not exist."""
    files: dict[str, tuple[Path, Path]] = {}
    for name in os.listdir(folder):
        if match := _IMAGES.fullmatch(name):
            labels = folder / name.replace("images", "labels").replace("idx3", "idx1")
            files["train" if match[1] == "train" else "test"] = (folder / name, labels)
    return dict(sorted(files.items(), reverse=True))


def read_idx(images_file: Path, labels_file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Return uint8 images (N, H, W) and labels (N,), or None without a label file."""
    images = read_idx_array(images_file, num_axes=3)
    if not labels_file.exists():
        return images, None
    labels = read_idx_array(labels_file, num_axes=1)
    if len(labels) != len(images):
        raise ValueError(
            f"{labels_file} has {len(labels):,} labels, but {images_file.name} has {len(images):,} images; "
            "take both from the same download"
        )
    return images, labels


def read_idx_array(file: Path, num_axes: int) -> np.ndarray:
    """Return the values of one file.

    Raises:
        ValueError: If the file is damaged or has another number of axes.
    """
    try:
        content = read_bytes(file)
        content = gzip.decompress(content) if file.suffix == ".gz" else content
    except (OSError, EOFError, zlib.error, BadImage) as error:
        raise ValueError(f"{file} cannot be read ({error}); copy it again") from error
    start = 4 + 4 * num_axes
    if content[:4] != bytes([0, 0, _UINT8, num_axes]) or len(content) < start:
        raise ValueError(f"{file} is not an idx file of uint8 values with {num_axes} axes; copy it again")
    shape = np.frombuffer(content, ">u4", num_axes, 4).astype(np.int64)  # N, then H and W
    if len(content) != start + shape.prod():
        raise ValueError(
            f"{file} has {len(content):,} bytes, but its header says {start + shape.prod():,}; copy it again"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)

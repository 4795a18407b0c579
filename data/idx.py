"""MNIST's idx files: pictures and labels of a part (train, test) in two files, often compressed by gzip.

Layout: two zero bytes, the type (8: uint8), the number of axes, big-endian sizes, then the values.
Shapes: N images, H W pixels.
"""

import gzip
import re
import zlib
from pathlib import Path

import numpy as np

_PICTURES = re.compile(r"(train|t10k|test)-images[-.]idx3-ubyte(\.gz)?")
_UINT8 = 8


def idx_files(folder: Path) -> dict[str, tuple[Path, Path]]:
    """The files (pictures, labels) of each part in the folder, train first; the labels' file need not exist."""
    files: dict[str, tuple[Path, Path]] = {}
    for path in folder.iterdir():
        if match := _PICTURES.fullmatch(path.name):
            labels = path.with_name(path.name.replace("images", "labels").replace("idx3", "idx1"))
            files["train" if match[1] == "train" else "test"] = (path, labels)
    return dict(sorted(files.items(), reverse=True))


def read_idx(pictures_file: Path, labels_file: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """uint8 pictures (N, H, W) and labels (N,), or None where there is no file of labels."""
    pictures = read_idx_array(pictures_file, num_axes=3)
    if not labels_file.exists():
        return pictures, None
    labels = read_idx_array(labels_file, num_axes=1)
    if len(labels) != len(pictures):
        raise ValueError(
            f"{labels_file} has {len(labels):,} labels and {pictures_file.name} {len(pictures):,} pictures; "
            "take both from the same download"
        )
    return pictures, labels


def read_idx_array(file: Path, num_axes: int) -> np.ndarray:
    """The values of one file.

    Raises: ValueError if it is damaged, or not what its name says.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file} cannot be read ({error}); copy it again") from error
    start = 4 + 4 * num_axes
    if content[:4] != bytes([0, 0, _UINT8, num_axes]) or len(content) < start:
        raise ValueError(f"{file} is not an idx file of bytes with {num_axes} axes; copy it again")
    shape = np.frombuffer(content, ">u4", num_axes, 4).astype(np.int64)  # N, then H and W
    if len(content) != start + shape.prod():
        raise ValueError(f"{file} has {len(content):,} bytes, its header says {start + shape.prod():,}; copy it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)

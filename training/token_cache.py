"""Targets computed once and kept in files, for images that training shows without random crops or flips.

Shapes: I images, B of them at a time, S of the targets of an image: N tokens, or D x h x w features of a teacher.
"""

import hashlib
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate
from tqdm import tqdm

from data.decoding import BadImage
from data.images import ImageDataset, no_target
from training.targets import Targets

_BATCH = 32


def cached_targets(
    images: ImageDataset, targets: Targets, folder: Path, log: Callable[[str], None]
) -> dict[str, Path]:
    """Return files with the targets (I, S) of `images` in their own order, by key in the batch.

    Where an image cannot be read, all values are -1, or NaN among features, which have half precision. The names of
    the files depend on the weights of the targets' model, the transform and the images' names, so that targets of
    another model or of other images are never found.

    Raises:
        ValueError: If the files do not fit on the disk, or features are too large for half precision.
    """
    fingerprint = _fingerprint(images, targets)
    files = {key: folder / f"targets-{fingerprint}-{key}.npy" for key in targets.cached}
    if not all(file.exists() for file in files.values()):
        _write(files, images, targets)
    for key, file in files.items():
        values = np.load(file, mmap_mode="r")
        num_without = int(no_target(values.reshape(len(values), -1)[:, 0]).sum())
        what = f"{math.prod(values.shape[1:]):,} {'tokens' if key == 'labels' else 'numbers'}"
        log(f"{file.name}: {what} for each of {len(values) - num_without:,} images, {values.nbytes / 1e6:,.1f} MB")
    return files


def _write(files: Mapping[str, Path], images: ImageDataset, targets: Targets) -> None:
    """Write batch by batch, as there may be millions; a memory map would kill the process if the disk were full."""
    partial = {key: file.with_suffix(".part.npy") for key, file in files.items()}
    streams = {key: file.open("wb") for key, file in partial.items()}
    try:
        for number, found in enumerate(_in_batches(images, targets)):
            if not number:
                _check_space(found, len(images), next(iter(files.values())).parent)
            for key, values in found.items():
                if not number:
                    shape = (len(images), *values.shape[1:])
                    header = {"descr": values.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(streams[key], header)
                streams[key].write(values.tobytes())
    except BaseException:
        for file in partial.values():
            file.unlink()
        raise
    finally:
        for stream in streams.values():
            stream.close()
    for key, file in files.items():
        partial[key].replace(file)


def _check_space(found: Mapping[str, np.ndarray], num_images: int, folder: Path) -> None:
    needed = num_images * sum(values[0].nbytes for values in found.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"--cache_tokens needs {needed / 1e9:,.1f} GB for {num_images:,} images, but {folder} has "
            f"{free / 1e9:,.1f} GB of free space: choose a smaller --teacher_image_size, a disk with more, or leave "
            "out --cache_tokens"
        )


def _in_batches(images: ImageDataset, targets: Targets) -> Iterator[dict[str, np.ndarray]]:
    device = targets.model.device
    starts = range(0, len(images), _BATCH)
    for start in tqdm(starts, desc="targets", unit=f" x {_BATCH} images", disable=len(starts) < 2):
        views: list[dict[str, torch.Tensor]] = []
        readable: list[int] = []
        members = range(start, min(start + _BATCH, len(images)))
        for position, index in enumerate(members):
            try:
                views.append(images.view(index))
                readable.append(position)
            except BadImage as error:
                images.report(index, str(error))
        if not views:
            raise BadImage(f"none of {len(members)} images from {images.name(start)} on can be read")
        batch = targets({key: value.to(device) for key, value in default_collate(views).items()})
        yield {key: _as_stored(batch[key], kind, readable, len(members)) for key, kind in targets.cached.items()}


def _as_stored(found: torch.Tensor, kind: type[np.number[Any]], readable: list[int], number: int) -> np.ndarray:
    """Return the targets of the readable ones of a number of images, between rows without any."""
    missing = -1 if issubclass(kind, np.integer) else np.nan
    values = np.full((number, *found.shape[1:]), missing, kind)
    if missing != -1 and found.abs().max() > np.finfo(np.float16).max:
        raise ValueError(
            f"a feature of the teacher is {found.abs().max():.3g}, too large for the half precision in which "
            "--cache_tokens keeps it: leave that out"
        )
    values[readable] = found.cpu().numpy()
    return values


def _fingerprint(images: ImageDataset, targets: Targets) -> str:
    digest = hashlib.blake2b(f"{images.transform!r}{targets.cache_key}".encode(), digest_size=6)
    for name, weight in targets.model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for index in range(len(images)):
        digest.update(os.fsencode(images.name(index)) + b"\0")
    return digest.hexdigest()

"""Targets computed once and kept in a file, for images that training shows without random crops or flips.

Shapes: I images, B of them at a time, N targets per image.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import default_collate
from tqdm import tqdm

from data.decoding import BadImage
from data.images import ImageDataset
from training.targets import Targets

_NO_TARGETS = -1
_BATCH = 32


def cached_targets(images: ImageDataset, targets: Targets, folder: Path, log: Callable[[str], None]) -> Path:
    """Return a file with the int32 targets (I, N) of `images` in their own order, -1 where one cannot be read.

    The file's name depends on the weights of the targets' model, the transform and the images' names, so that targets
    of another model or of other images are never found.
    """
    file = folder / f"tokens-{_fingerprint(images, targets)}.npy"
    if not file.exists():
        partial = file.with_suffix(".part.npy")
        # Batch by batch, as there may be millions. A memory map would kill the process if the disk were full.
        with partial.open("wb") as stream:
            for number, values in enumerate(_in_batches(images, targets)):
                if not number:
                    shape = (len(images), values.shape[1])
                    header = {"descr": values.dtype.str, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(stream, header)
                stream.write(values.tobytes())
        partial.replace(file)
    values = np.load(file, mmap_mode="r")
    num_without = int((values[:, 0] == _NO_TARGETS).sum())
    log(f"{file.name}: {values.shape[1]} tokens for each of {len(values) - num_without:,} images")
    return file


def _in_batches(images: ImageDataset, targets: Targets) -> Iterator[np.ndarray]:
    device = targets.model.device
    starts = range(0, len(images), _BATCH)
    for start in tqdm(starts, desc="tokens", unit=f" x {_BATCH} images", disable=len(starts) < 2):
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
        batch = {key: value.to(device) for key, value in default_collate(views).items()}
        found = targets(batch)[targets.output].cpu().numpy().astype(np.int32)  # (<= B, N)
        values = np.full((len(members), found.shape[1]), _NO_TARGETS, np.int32)
        values[readable] = found
        yield values


def _fingerprint(images: ImageDataset, targets: Targets) -> str:
    digest = hashlib.blake2b(repr(images.transform).encode(), digest_size=6)
    for name, weight in targets.model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for index in range(len(images)):
        digest.update(os.fsencode(images.name(index)) + b"\0")
    return digest.hexdigest()

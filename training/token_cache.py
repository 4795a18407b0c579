"""Tokens made once and kept in a file, for images that training shows uncropped and unmirrored (`--cache_tokens`).

Shapes: I images, B of them at a time, C channels, H W pixels of the tokenizer's view, N tokens.
"""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import default_collate
from tqdm import tqdm

from data.decoding import BadImage
from data.images import PretrainingImages
from training.targets import TokenizerLabels

_NO_TOKENS = -1
_BATCH = 32


def cached_tokens(
    images: PretrainingImages, labels: TokenizerLabels, folder: Path, log: Callable[[str], None]
) -> Path:
    """A file of (I, N) int32 tokens of `images` in their own order; -1, which is told, where one cannot be read.

    The file's name depends on the tokenizer's weights, its view and the images' names: another tokenizer, or other
    images, never find these tokens.
    """
    file = folder / f"tokens-{_fingerprint(images, labels)}.npy"
    if not file.exists():
        tokens = np.concatenate(list(_in_batches(images, labels)))  # (I, N)
        partial = file.with_suffix(".part.npy")
        np.save(partial, tokens)
        partial.replace(file)
    tokens = np.load(file, mmap_mode="r")
    num_without = int((tokens[:, 0] == _NO_TOKENS).sum())
    log(f"{file.name}: {tokens.shape[1]} tokens of each of {len(tokens) - num_without:,} images")
    return file


def _in_batches(images: PretrainingImages, labels: TokenizerLabels) -> Iterator[np.ndarray]:
    device = labels.tokenizer.device
    numbers = range(0, len(images), _BATCH)
    for start in tqdm(numbers, desc="tokens", unit=f" x {_BATCH} images", disable=len(numbers) < 2):
        views: list[torch.Tensor] = []
        readable: list[int] = []
        members = range(start, min(start + _BATCH, len(images)))
        for place, index in enumerate(members):
            try:
                views.append(images.view(index)["tokenizer_pixel_values"])
                readable.append(place)
            except BadImage as error:
                images.report(index, str(error))
        if not views:
            raise BadImage(f"none of {len(members)} images from {images.name(start)} on can be read")
        found = labels(default_collate(views).to(device)).cpu().numpy().astype(np.int32)  # (<= B, N)
        tokens = np.full((len(members), found.shape[1]), _NO_TOKENS, np.int32)
        tokens[readable] = found
        yield tokens


def _fingerprint(images: PretrainingImages, labels: TokenizerLabels) -> str:
    digest = hashlib.blake2b(repr(images.transform).encode(), digest_size=6)
    for name, weight in labels.tokenizer.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for index in range(len(images)):
        digest.update(images.name(index).encode() + b"\0")
    return digest.hexdigest()

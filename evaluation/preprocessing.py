"""Encoded images to what an encoder's own image processor makes of them, in batches and ahead of the device.

Shapes: B images, C channels, H W pixels.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import BaseImageProcessor

from data.decoding import BadImage, decode
from data.image_source import ImageSource

BATCH_SIZE = 64


@dataclass(frozen=True)
class Preprocessor:
    """Encoded images -> (B, C, H, W) float32, by an image processor of transformers."""

    processor: Any
    num_channels: int

    def __call__(self, data: Sequence[bytes | Path]) -> Tensor:
        pictures: list[Any] = [decode(each, self.num_channels) for each in data]
        layout = {}
        if self.num_channels == 1:  # processors take a picture without channels for one of several
            pictures = [np.asarray(picture)[None] for picture in pictures]
            layout = {"input_data_format": "channels_first"}
        return self.processor(pictures, return_tensors="pt", **layout)["pixel_values"]

    def colors(self, pixel_values: Tensor) -> Tensor:
        """The same pixels (B, C, H, W) in [0, 1], before they were standardized."""
        if not getattr(self.processor, "do_normalize", False):
            return pixel_values.clamp(0, 1)
        mean, std = (
            torch.tensor(numbers).view(-1, 1, 1) for numbers in (self.processor.image_mean, self.processor.image_std)
        )
        return (pixel_values * std + mean).clamp(0, 1)


@dataclass(frozen=True)
class Batch:
    """Which of the images asked for these are, and their pixels (B, C, H, W)."""

    positions: list[int]
    pixel_values: Tensor


def open_preprocessor(name: str, num_channels: int) -> Preprocessor:
    """The image processor of a model, in its Pillow version, which needs no torchvision.

    Raises:
        ValueError: there is none, or it has no such version.
    """
    try:
        settings, _ = BaseImageProcessor.get_image_processor_dict(name)
    except OSError:
        raise ValueError(
            f"model {name!r} has no preprocessor_config.json, which says how its images are resized and standardized; "
            "save its image processor beside it, or name the output folder of a finished run"
        ) from None
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "ViTImageProcessor"
    kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    processor = getattr(transformers, f"{kind}Pil", None)
    if processor is None:
        raise ValueError(
            f"model {name!r} wants the image processor {kind}, of which transformers has no Pillow version"
        )
    return Preprocessor(processor.from_dict(settings), num_channels)


def batches(
    source: ImageSource,
    indices: Sequence[int] | np.ndarray,
    preprocess: Callable[[Sequence[bytes | Path]], Tensor],
    on_bad: Callable[[str, str], None],
    batch_size: int = BATCH_SIZE,
) -> Iterator[Batch]:
    """The images `indices` of `source` in order, prepared by threads; `on_bad(name, reason)` hears of those left out.

    The positions in a batch count in `indices`.
    """

    def prepare(positions: list[int]) -> tuple[Batch | None, list[tuple[str, str]]]:
        try:
            return Batch(positions, preprocess([source.entry(int(indices[each])) for each in positions])), []
        except BadImage:
            return prepare_one_by_one(positions)

    def prepare_one_by_one(positions: list[int]) -> tuple[Batch | None, list[tuple[str, str]]]:
        good, bad = {}, []
        for position in positions:
            try:
                good[position] = preprocess([source.entry(int(indices[position]))])
            except BadImage as error:
                bad.append((source.name(int(indices[position])), str(error)))
        return Batch(list(good), torch.cat(list(good.values()))) if good else None, bad

    num_threads = os.cpu_count() or 1
    with ThreadPoolExecutor(num_threads) as pool:
        pending: deque[Future[tuple[Batch | None, list[tuple[str, str]]]]] = deque()
        starts = iter(range(0, len(indices), batch_size))
        while True:
            while len(pending) <= num_threads and (start := next(starts, None)) is not None:
                pending.append(pool.submit(prepare, list(range(start, min(start + batch_size, len(indices))))))
            if not pending:
                return
            batch, bad = pending.popleft().result()
            for name, reason in bad:
                on_bad(name, reason)
            if batch is not None:
                yield batch

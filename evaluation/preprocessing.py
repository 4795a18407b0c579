"""Batches of images, decoded and prepared by an encoder's own image processor in background threads.

Shapes: B batch size, C channels, H, W height and width in pixels.
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

from data.augmentations import CenterCrop
from data.decoding import BadImage, decode
from data.image_source import ImageSource
from data.measured import Encoded, Measured, MeasuredImage
from modeling.patches import stored_values

BATCH_SIZE = 64
_NUM_AHEAD = 1024  # images, whose block is fetched ahead if they are in shards


@dataclass(frozen=True)
class Preprocessor:
    """Decode images and apply an image processor of transformers; returns (B, C, H, W) float32.

    Measurements, of which the processor has a `value_range`, are resized and cut off at it here: no processor can.
    """

    processor: Any
    num_channels: int
    measured: Measured | None = None

    @property
    def value_range(self) -> Any:
        """The lowest and highest value of each channel; None for photographs."""
        return getattr(self.processor, "value_range", None)

    def __call__(self, data: Sequence[Encoded]) -> Tensor:
        if (ends := self.value_range) is not None:
            crop = CenterCrop((self.processor.crop_size["height"], self.processor.crop_size["width"]))
            pixels = stored_values(torch.stack([crop(image, self.num_channels) for image in data]))
            mean, std = torch.tensor(self.processor.image_mean), torch.tensor(self.processor.image_std)
            low, high = torch.tensor(ends)[..., None, None].unbind(1)  # (C, 1, 1) each
            return (pixels.clamp(low, high) - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)
        images: list[Any] = []
        for each in data:
            assert not isinstance(each, MeasuredImage), "an image processor of photographs"
            images.append(decode(each, self.num_channels))
        layout = {}
        if self.num_channels == 1:  # processors would take an image without a channel axis for a batch
            images = [np.asarray(image)[None] for image in images]
            layout = {"input_data_format": "channels_first"}
        return self.processor(images, return_tensors="pt", **layout)["pixel_values"]

    def unnormalize(self, pixel_values: Tensor) -> Tensor:
        """Undo the standardization of pixels (B, C, H, W); returns values in [0, 1]."""
        if not getattr(self.processor, "do_normalize", False):
            return pixel_values.clamp(0, 1)
        mean, std = torch.tensor(self.processor.image_mean), torch.tensor(self.processor.image_std)
        pixels = pixel_values * std.view(-1, 1, 1) + mean.view(-1, 1, 1)
        if (ends := self.value_range) is not None:
            low, high = torch.tensor(ends)[..., None, None].unbind(1)  # (C, 1, 1) each
            pixels = (pixels - low) / (high - low)
        return pixels.clamp(0, 1)


@dataclass(frozen=True)
class Batch:
    """Prepared images."""

    positions: list[int]  # of each image among the requested ones
    pixel_values: Tensor  # (B, C, H, W)


def open_preprocessor(name: str, num_channels: int) -> Preprocessor:
    """Load a model's image processor in its Pillow version, without torchvision. Raises ValueError if it has none."""
    try:
        settings, _ = BaseImageProcessor.get_image_processor_dict(name)
    except OSError:
        file = Path(name, "preprocessor_config.json")
        if file.exists():
            file.open("rb").close()  # raises the error of a file that the user may not read
        raise ValueError(
            f"`model` {name} has no preprocessor_config.json, which defines how images are resized and standardized; "
            "save its image processor in the same folder, or use the output folder of a finished run"
        ) from None
    kind = settings.get("image_processor_type") or settings.get("feature_extractor_type") or "ViTImageProcessor"
    kind = kind.replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    processor = getattr(transformers, f"{kind}Pil", None)
    if processor is None:
        raise ValueError(
            f"`model` {name} needs the image processor {kind}, which has no Pillow version in transformers"
        )
    return Preprocessor(processor.from_dict(settings), num_channels)


def batches(
    source: ImageSource,
    indices: Sequence[int] | np.ndarray,
    preprocess: Callable[[Sequence[Encoded]], Tensor],
    on_bad: Callable[[str, str], None],
    batch_size: int = BATCH_SIZE,
) -> Iterator[Batch]:
    """Yield the images `indices` of `source` in order, prepared by threads.

    Images that cannot be read are skipped after a call of `on_bad` with the name and the reason.
    """

    def prepare(positions: list[int]) -> tuple[Batch | None, list[tuple[str, str]]]:
        source.prefetch([int(indices[min(positions[-1] + _NUM_AHEAD, len(indices) - 1)])], wait=False)
        try:
            return Batch(positions, preprocess([source.image(int(indices[each])) for each in positions])), []
        except BadImage:  # find out which ones
            pass
        good, bad = {}, []
        for position in positions:
            try:
                good[position] = preprocess([source.image(int(indices[position]))])
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

"""The values of each channel of measurements that count as 0 and 1; values outside are cut off.

Shapes: C channels, N sampled pixels.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from data.images import ImageDataset, choose_images
from data.seeds import seeded_generator
from modeling.patches import stored_values

PERCENTILES = (0.5, 99.5)  # as nnU-Net cuts off the values of CT (Isensee et al. 2021, doi:10.1038/s41592-020-01008-z)
_NUM_IMAGES, _NUM_PIXELS = 1024, 2048  # at most, of which the pixels are the same in all channels


def measure_value_range(images: ImageDataset, kind: str) -> list[list[float]]:
    """Return the lower and higher value of each channel on a seeded choice of images.

    Args:
        kind: "minmax": smallest and largest value of any pixel; "percentile": `PERCENTILES` of a choice of pixels.
    """
    generator = seeded_generator(images.seed, "value_range")
    chosen = choose_images(images, _NUM_IMAGES, generator)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        values = list(pool.map(lambda index: _sample(images, index, kind), chosen))
    joined = torch.cat(values, 1).double()  # (C, N)
    if kind == "minmax":
        ends = torch.stack([joined.amin(1), joined.amax(1)], 1)
    else:
        ordered = joined.sort(1).values
        places = [round(share / 100 * (ordered.shape[1] - 1)) for share in PERCENTILES]
        ends = ordered[:, places]
    return [[low, high if high > low else low + 1.0] for low, high in ends.tolist()]


def _sample(images: ImageDataset, index: int, kind: str) -> Tensor:
    """Return values (C, N) of an image: the extremes, or some pixels."""
    values = stored_values(images[index]["pixel_values"]).flatten(1)
    if kind == "minmax":
        return torch.stack([values.amin(1), values.amax(1)], 1)
    generator = seeded_generator(images.seed, "value_range", index)
    return values[:, torch.randperm(values.shape[1], generator=generator)[:_NUM_PIXELS]]

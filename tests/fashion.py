"""Bundled Fashion-MNIST pixels as features with labels, for tests of classifiers."""

from functools import cache
from io import BytesIO

import numpy as np
import pyarrow.parquet as pq
import torch
from conftest import ROOT
from PIL import Image

_FOLDER = ROOT / "data" / "samples" / "fashion_mnist"


@cache
def fashion_pixels(part: str, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 196) float32 pixels of 14 x 14 and labels (N,): the first images of the part."""
    table = pq.read_table(_FOLDER / f"{part}.parquet").slice(0, num_images)
    pictures = [Image.open(BytesIO(cell["bytes"])).reduce(2) for cell in table["image"].to_pylist()]
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).flatten(1).float() / 255
    return pixels, torch.tensor(table["label"].to_pylist())

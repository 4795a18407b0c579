"""Images of many channels and 16 bits for tests, derived from the bundled photographs: no noise, no drawn shapes.

Photographs have 8 bits. Enlarging them in floating point fills 16, so that low bytes matter as in a real sensor's.
"""

from pathlib import Path

import numpy as np
from PIL import Image

PHOTOGRAPHS = sorted((Path(__file__).parents[1] / "data/samples/photographs/train").glob("*.jpg"))


def bands(number: int, num_channels: int = 12, size: int = 64) -> np.ndarray:
    """Return uint16 (C, H, W): mixes of the colors of photograph `number`, each of another range of values."""
    with Image.open(PHOTOGRAPHS[number]) as photograph:
        colors = [np.asarray(c.convert("F").resize((size, size), box=(0, 0, 150, 150))) for c in photograph.split()]
    shares = np.linspace(0, 2, num_channels)
    mixed = []
    for channel, share in enumerate(shares):
        first = min(int(share), 1)
        mix = colors[first] * (1 - share + first) + colors[first + 1] * (share - first)
        mixed.append(mix.clip(0, 255) * (40 + 15 * channel) + 100 * channel)
    return np.stack(mixed).round().astype(np.uint16)

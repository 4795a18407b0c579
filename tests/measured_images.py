"""Images of many channels and 16 bits for tests, derived from the bundled photographs: no noise, no drawn shapes.

Photographs have 8 bits. Enlarging them in floating point fills 16, so that low bytes matter as in a real sensor's.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
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


def write_tiff(file: Path, values: Any, **options: object) -> None:
    pytest.importorskip("tifffile").imwrite(file, values, photometric="minisblack", **options)


def write_dicom(
    file: Path, values: np.ndarray, slope: float | None = 1.0, intercept: float | None = -1024.0, **elements: object
) -> None:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = *values.shape, 1
    dataset.BitsAllocated = dataset.BitsStored = 16
    dataset.HighBit, dataset.PixelRepresentation, dataset.PhotometricInterpretation = 15, 0, "MONOCHROME2"
    dataset.RescaleSlope, dataset.RescaleIntercept = slope, intercept
    dataset.PixelData = values.tobytes()
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.save_as(file, enforce_file_format=True)

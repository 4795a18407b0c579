"""Files of measurements by format: what a window of them holds, and what is refused."""

from io import BytesIO

import numpy as np
import pytest
from measured_images import PHOTOGRAPHS, bands, write_dicom
from PIL import Image

from data.band_files import open_bands
from data.decoding import BadImage
from data.measured import Measured, MeasuredImage

SIZE = 64


@pytest.mark.parametrize(("slope", "intercept", "dtype"), [(None, None, "uint16"), (2.0, None, "float32")])
def test_dicom__with_empty_rescale_elements_is_read(slope, intercept, dtype, tmp_path):
    values = bands(0, 1)[0]
    write_dicom(tmp_path / "a.dcm", values, slope, intercept)
    with open_bands(tmp_path / "a.dcm", 1) as image:
        assert image.dtype == dtype
        assert np.array_equal(image.read((0, 0, SIZE, SIZE))[..., 0], values * np.array(slope or 1, dtype))


@pytest.mark.parametrize("is_signed", [False, True])
def test_dicom__whose_smallest_value_is_white_is_inverted(is_signed, tmp_path):
    values = (bands(0, 1)[0] // 16).astype(np.int16 if is_signed else np.uint16)  # 12 bits
    values -= 2048 * is_signed
    elements = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    write_dicom(tmp_path / "a.dcm", values, None, None, PixelRepresentation=int(is_signed), **elements)
    with open_bands(tmp_path / "a.dcm", 1) as image:
        assert np.array_equal(image.read((0, 0, SIZE, SIZE))[..., 0], (-1 if is_signed else 4095) - values)


def test_tiff__whose_smallest_value_is_white_is_inverted(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    values = bands(0, 1)[0]
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite")
    with open_bands(tmp_path / "a.tif", 1) as image:
        assert np.array_equal(image.read((3, 5, 40, 50))[..., 0], 65535 - values[5:50, 3:40])


def test_tiff__of_a_palette_is_refused(tmp_path):
    pytest.importorskip("tifffile")
    with Image.open(PHOTOGRAPHS[0]) as photograph:
        photograph.convert("P").save(tmp_path / "a.tif")
    with pytest.raises(BadImage, match="a TIFF file of palette colors, whose numbers are no measurements"):
        MeasuredImage((tmp_path / "a.tif",), Measured(1)).check()


def test_truncated_dicom__is_described(tmp_path):
    write_dicom(tmp_path / "a.dcm", bands(0, 1)[0])
    file = tmp_path / "a.dcm"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(BadImage, match="the file is truncated: 7,192 of 8,192 bytes of pixels"):
        MeasuredImage((file,), Measured(1)).check()


def test_array_with_channels_on_either_side__is_taken_as_channels_first():
    stream = BytesIO()
    np.save(stream, np.arange(3 * 5 * 3).reshape(3, 5, 3).astype(np.uint16))
    with open_bands(stream.getvalue(), 3) as image:
        assert (image.height, image.width, image.num_channels) == (5, 3, 3)

"""A JPEG that was cut for a crop decodes to the same pixels, from less data."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import crops as cropping
from data.crops import load_crops
from data.decoding import BadImage
from data.jpeg import cut_jpeg

PHOTOGRAPHS = sorted((Path(__file__).parents[1] / "data/samples/photographs/train").glob("*.jpg"))
VIEW = [((64, 64), Image.Resampling.BICUBIC)]


def encoded(size: tuple[int, int] = (501, 373), mode: str = "RGB", **options: object) -> bytes:
    stream = BytesIO()
    Image.open(PHOTOGRAPHS[0]).convert(mode).resize(size).save(stream, "JPEG", quality=90, **options)
    return stream.getvalue()


def decoded(data: bytes, num_times_smaller: int) -> np.ndarray:
    image = Image.open(BytesIO(data))
    image.draft(None, (image.width // num_times_smaller, image.height // num_times_smaller))
    return np.asarray(image).astype(np.int32)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("restart_marker_rows", [0, 1])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_cut_jpeg__keeps_the_pixels_above_the_bottom_exactly(
    mode: str, progressive: bool, restart_marker_rows: int, subsampling: str
) -> None:
    options = {"restart_marker_rows": restart_marker_rows} if restart_marker_rows else {}
    data = encoded(mode=mode, progressive=progressive, subsampling=subsampling, **options)
    for num_times_smaller in (1, 2, 4, 8):
        expected = decoded(data, num_times_smaller)
        for bottom in (1, 8, 100, 177.5, 290, 373):
            cut, num_rows = cut_jpeg(data, bottom, num_times_smaller)
            found = decoded(cut, num_times_smaller)
            assert num_rows >= bottom
            assert len(found) == -(-num_rows // num_times_smaller)
            rows = int(-(-bottom // num_times_smaller))
            assert np.abs(found[:rows] - expected[:rows]).max() == 0


def test_cut_jpeg__drops_the_details_of_a_progressive_file_at_an_eighth() -> None:
    data = encoded(progressive=True)
    assert len(cut_jpeg(data, 373, 8)[0]) < len(data) / 3
    assert cut_jpeg(data, 373, 4) == (data, 373)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xd9", encoded()[:200], b"\xff\xd8 no marker"])
def test_cut_jpeg__refuses_what_it_does_not_understand(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        cut_jpeg(data, 100, 1)


@pytest.mark.parametrize("progressive", [False, True])
def test_load_crops__decodes_only_the_rows_above_the_lowest_crop(
    progressive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, sizes = encoded((1000, 800), progressive=progressive), []
    resize = cropping._resize

    def noting_resize(pixels: Image.Image, *arguments: object) -> object:
        sizes.append(pixels.size)
        return resize(pixels, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(cropping, "_resize", noting_resize)
    boxes = [(10, 10, 110, 90), (500, 200, 620, 290)]
    crops = load_crops(data, lambda *size: boxes, VIEW, 3)
    assert sizes == [(1000, 320)] * 2
    monkeypatch.setattr(cropping, "_cut", lambda *arguments: None)
    whole = load_crops(data, lambda *size: boxes, VIEW, 3)
    assert sizes[2:] == [(1000, 800)] * 2
    assert all((one[0] == other[0]).all() for one, other in zip(crops, whole, strict=True))


@pytest.mark.parametrize("progressive", [False, True])
def test_load_crops__finds_a_file_truncated_below_the_crop(progressive: bool) -> None:
    data = encoded((1000, 800), progressive=progressive)
    with pytest.raises(BadImage, match="truncated"):
        load_crops(data[: len(data) * 9 // 10], lambda *size: [(10, 10, 110, 90)], VIEW, 3)

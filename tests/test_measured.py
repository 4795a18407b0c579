import re
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_MODELS, model_class, tiny_batch, tiny_targets
from measured_images import PHOTOGRAPHS, bands, write_dicom, write_tiff
from PIL import Image
from torch.utils.data import DataLoader

from data.augmentations import CenterCrop, build_views, random_crop, single_view
from data.bad_images import BadImages
from data.classification import eval_view
from data.collators import stack_items
from data.decoding import BadImage, check, decode
from data.image_checks import check_images
from data.images import ImageDataset, SourceSamples, measure_image_stats
from data.labeled import open_labeled
from data.measured import Measured, MeasuredImage
from data.sources import open_source, open_validation
from data.value_ranges import PERCENTILES, measure_value_range
from modeling.patches import STORED_DTYPES, in_unit_range, standardize, stored_values
from modeling.views import Photometric, View

tifffile = pytest.importorskip("tifffile")

SIZE, CHANNELS = 64, 12


def in_last_axis(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values.transpose(1, 2, 0))


WRITERS: dict[str, Callable[[Path, np.ndarray], None]] = {
    "pages.tif": write_tiff,
    "planar.tif": lambda file, values: write_tiff(file, values, planarconfig="separate", rowsperstrip=7),
    "tiles.tif": lambda file, values: write_tiff(
        file, values, planarconfig="separate", tile=(32, 48), compression="zlib", predictor=values.dtype == "u2"
    ),
    "pixels.tiff": lambda file, values: write_tiff(
        file, in_last_axis(values), planarconfig="contig", rowsperstrip=5, bigtiff=True, byteorder=">"
    ),
    "first.npy": np.save,
    "last.npy": lambda file, values: np.save(file, in_last_axis(values)),
    "fortran.npy": lambda file, values: np.save(file, np.asfortranarray(values)),
    "array.npz": lambda file, values: np.savez_compressed(file, values),
}


def dataset(folder: Path, measured: Measured, transform: object = None, **options: object) -> ImageDataset:
    source = open_source(str(folder), measured=measured)
    samples = SourceSamples(source, np.arange(len(source)))
    return ImageDataset(samples, transform or single_view(CenterCrop((SIZE, SIZE)), measured.num_channels), **options)


# ---- from the file to the device ----


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
@pytest.mark.parametrize("name", WRITERS)
def test_values__reach_the_device_exactly(name, dtype, tmp_path):
    values = bands(0).astype(dtype) * np.array(1 if dtype == "uint16" else 1 / 3, dtype)
    WRITERS[name](tmp_path / name, values)
    (batch,) = DataLoader(dataset(tmp_path, Measured(CHANNELS)), collate_fn=stack_items)
    pixel_values = batch["pixel_values"].to("cuda" if torch.cuda.is_available() else "cpu")
    assert pixel_values.dtype == (torch.uint16 if dtype == "uint16" else torch.int32) in STORED_DTYPES
    assert np.array_equal(stored_values(pixel_values)[0].cpu().numpy(), values.astype(np.float32))
    ends, mean, std = [[90.0 + 99 * c, 3000.0 + 999 * c] for c in range(CHANNELS)], [0.4] * CHANNELS, [0.2] * CHANNELS
    low, high = np.array(ends).T[:, :, None, None]
    expected = ((values.clip(low, high) - low) / (high - low) - 0.4) / 0.2
    np.testing.assert_allclose(standardize(pixel_values, mean, std, ends)[0].cpu().numpy(), expected, atol=1e-5)


def test_sixteen_bit_png__keeps_its_low_byte(tmp_path):
    values = bands(0, 1)[0]
    Image.fromarray(values).save(tmp_path / "gray.png")
    assert np.array_equal(dataset(tmp_path, Measured(1))[0]["pixel_values"][0].numpy(), values)
    assert len(np.unique(values & 255)) > 200  # what high bytes alone would lose


def test_several_files__are_the_channels_of_one_image(tmp_path):
    values = bands(0, 3)
    for name, band in zip(("B04", "B08", "B02"), values, strict=True):
        (tmp_path / "scene").mkdir(exist_ok=True)
        write_tiff(tmp_path / "scene" / f"a_{name}.tif", band)
    files = (("red", "*_B04.tif"), ("nir", "*_B08.tif"), ("blue", "*_B02.tif"))
    images = dataset(tmp_path, Measured(3, files))
    assert len(images) == 1
    assert np.array_equal(images[0]["pixel_values"].numpy(), values)


def test_dicom__has_hounsfield_units(tmp_path):
    values = bands(0, 1)[0] // 8
    write_dicom(tmp_path / "slice.dcm", values)
    pixel_values = dataset(tmp_path, Measured(1))[0]["pixel_values"]
    assert np.array_equal(stored_values(pixel_values)[0].numpy(), values.astype(np.float32) - 1024)


def test_photographs__read_as_measurements_have_the_same_values(tmp_path):
    for number, format_name in enumerate(("png", "jpg")):
        with Image.open(PHOTOGRAPHS[number]) as photograph:
            photograph.crop((0, 0, SIZE, SIZE)).save(tmp_path / f"{number}.{format_name}")
    samples = SourceSamples(open_source(str(tmp_path)), np.arange(2))
    as_photographs = ImageDataset(samples, single_view(CenterCrop((SIZE, SIZE)), 3))
    for one, other in zip(dataset(tmp_path, Measured(3)), as_photographs, strict=True):
        assert torch.equal(one["pixel_values"], other["pixel_values"])


def test_resized_crops__are_those_of_pillow_in_every_channel(tmp_path):
    values = bands(0, 5, 96)
    write_tiff(tmp_path / "a.tif", values)
    pixel_values = dataset(tmp_path, Measured(5))[0]["pixel_values"]
    for band, crop in zip(values, pixel_values, strict=True):
        expected = np.asarray(Image.fromarray(band.astype(np.float32)).resize((SIZE, SIZE), Image.Resampling.BICUBIC))
        assert np.array_equal(crop.numpy(), expected.round().astype(np.uint16))


def test_evaluation_view__is_the_central_part(tmp_path):
    write_tiff(tmp_path / "a.tif", bands(0, 5, 80))
    view = eval_view((64, 64), 64 / 80)
    pixel_values = dataset(tmp_path, Measured(5), single_view(view, 5))[0]["pixel_values"]
    assert np.array_equal(pixel_values.numpy(), bands(0, 5, 80)[:, 8:-8, 8:-8])


def test_central_part__of_a_photograph_does_not_begin_outside_of_it():
    file = BytesIO()
    Image.new("RGB", (225, 300), (200, 200, 200)).save(file, "PNG")  # 225 / 224 * 224 is a little more than 225
    assert (CenterCrop((224, 224))(file.getvalue(), 3) == 200).all()


@pytest.mark.parametrize("view", [CenterCrop((56, 56)), eval_view((56, 56), 1.0)])
def test_central_part__does_not_begin_outside_the_image(view, tmp_path):
    # 29 / 56 * 56 is a little more than 29.
    write_tiff(tmp_path / "a.tif", np.full((5, 29, 29), 700, np.uint16))
    assert (dataset(tmp_path, Measured(5), single_view(view, 5))[0]["pixel_values"] == 700).all()


def test_random_crops__are_flipped_and_keep_their_colors(tmp_path):
    write_tiff(tmp_path / "a.tif", bands(0, 5))
    views = build_views(
        [View(num_crops=2, photometric=Photometric())],
        image_size=(SIZE, SIZE),
        crop_scale=(1.0, 1.0),
        num_channels=5,
        train=True,
        has_colors=False,
    )
    images = dataset(tmp_path, Measured(5), views, train=True)
    crops = [crop.numpy() for epoch in range(4) for crop in images.item(0, epoch)["pixel_values"].unbind()]
    plain, mirrored = bands(0, 5), bands(0, 5)[:, :, ::-1]
    assert all(np.array_equal(crop, plain) or np.array_equal(crop, mirrored) for crop in crops)
    assert 0 < sum(np.array_equal(crop, mirrored) for crop in crops) < len(crops)


def test_tiles__are_read_without_decoding_the_rest(tmp_path):
    values, file = bands(0, 5, 192), tmp_path / "large.tif"
    write_tiff(file, values, planarconfig="separate", tile=(64, 64), compression="zlib")
    with tifffile.TiffFile(file) as tiff:
        page = tiff.pages[0]
        needed = {plane * 9 + 4 for plane in range(5)}  # the tile in the middle
        spoiled = [(page.dataoffsets[n], page.databytecounts[n]) for n in range(45) if n not in needed]
    with file.open("r+b") as stream:
        for offset, count in spoiled:
            stream.seek(offset)
            stream.write(b"\xff" * count)
    images = dataset(tmp_path, Measured(5, tile=64))
    assert (len(images), images.name(4)) == (9, f"{file}#64,64")
    assert np.array_equal(images[4]["pixel_values"].numpy(), values[:, 64:128, 64:128])
    with pytest.raises(BadImage, match="cannot be decoded"):
        images.view(0)


def test_sparse_file__has_the_value_of_missing_data_where_it_leaves_out_tiles(tmp_path):
    first = np.ones((32, 32), np.float32)
    tag = [(42113, "s", 0, "-9999", True)]  # GDAL_NODATA
    write_tiff(tmp_path / "a.tif", iter([first, None]), shape=(64, 32), dtype="float32", tile=(32, 32), extratags=tag)
    (item,) = dataset(tmp_path, Measured(1), single_view(CenterCrop((64, 32)), 1))
    expected = np.concatenate([first, np.full_like(first, -9999)])
    assert np.array_equal(stored_values(item["pixel_values"])[0].numpy(), expected)


def test_tiles__cover_whole_windows_only_and_keep_small_images(tmp_path):
    write_tiff(tmp_path / "a.tif", bands(0, 5, 100))
    write_tiff(tmp_path / "b.tif", bands(1, 5, 40))
    source = open_source(str(tmp_path), measured=Measured(5, tile=48))
    assert [source.name(index).rpartition("/")[2] for index in range(len(source))] == [
        *("a.tif#0,0", "a.tif#48,0", "a.tif#0,48", "a.tif#48,48", "b.tif")
    ]
    assert check_images(source, 0.0).summary.width.smallest == 40


# ---- statistics ----


def test_value_range__is_measured_per_channel(tmp_path):
    for number in range(3):
        write_tiff(tmp_path / f"{number}.tif", bands(number, 5))
    images = dataset(tmp_path, Measured(5))
    stack = np.stack([bands(number, 5) for number in range(3)])
    extremes = [[float(band.min()), float(band.max())] for band in stack.swapaxes(0, 1)]
    assert measure_value_range(images, "minmax") == extremes
    found = measure_value_range(images, "percentile")
    assert found == measure_value_range(images, "percentile")  # the sample is seeded
    for (low, high), band in zip(found, stack.swapaxes(0, 1), strict=True):
        shares = (band <= low).mean() * 100, (band <= high).mean() * 100
        assert np.allclose(shares, PERCENTILES, atol=1.0)
    mean, std = measure_image_stats(images, value_range=extremes)
    low, high = np.array(extremes).T[:, None, :, None, None]
    units = (stack - low) / (high - low)
    np.testing.assert_allclose(mean, units.mean((0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(std, units.std((0, 2, 3)), atol=1e-6)


def test_value_range__of_a_constant_channel_is_not_empty(tmp_path):
    write_tiff(tmp_path / "a.tif", np.stack([bands(0, 1)[0], np.full((SIZE, SIZE), 7, np.uint16)]))
    assert measure_value_range(dataset(tmp_path, Measured(2)), "percentile")[1] == [7.0, 8.0]


def test_statistics__of_values_in_a_small_part_of_their_range_are_not_those_of_a_constant_channel(tmp_path):
    values = np.full((2, SIZE, SIZE), 100, np.uint16)
    values[0, ::2] += 8
    write_tiff(tmp_path / "a.tif", values)
    _, std = measure_image_stats(dataset(tmp_path, Measured(2)), value_range=[[0.0, 65_535.0]] * 2)
    assert std == [pytest.approx(4 / 65_535), 0.0]


def test_unit_range__cuts_off_what_is_outside():
    pixels = torch.tensor([[[0, 100, 150, 60000]]], dtype=torch.uint16)
    assert in_unit_range(pixels, [[100.0, 200.0]]).tolist() == [[[0.0, 0.0, 0.5, 1.0]]]


# ---- bad input ----


def truncated(file: Path, values: np.ndarray) -> None:
    write_tiff(file, values)
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 3 // 4])


def truncated_pixels(file: Path, values: np.ndarray) -> None:
    write_tiff(file, values, planarconfig="separate")
    file.write_bytes(file.read_bytes()[:-1000])


def truncated_array(file: Path, values: np.ndarray) -> None:
    np.save(file, values)
    file.write_bytes(file.read_bytes()[:-100])


BAD = {
    "bands.tif": (lambda file, values: write_tiff(file, values[:3]), "3 channels, expected 5"),
    "cut.tif": (truncated, "the file is truncated or damaged behind page"),
    "pixels.tif": (truncated_pixels, r"the file is truncated: it has [\d,]+ bytes, its pixels end at"),
    "cut.npy": (truncated_array, "cannot be decoded: mmap length is greater than file size"),
    "text.npy": (lambda file, values: np.save(file, np.array(["a"])), "an array of <U1, expected numbers"),
    "two.npz": (lambda file, values: np.savez(file, a=values, b=values), r"2 arrays \(a, b\), expected one"),
    "empty.tif": (lambda file, values: file.write_bytes(b""), r"empty file \(0 bytes\)"),
    "photo.jpg": (lambda file, values: file.write_bytes(PHOTOGRAPHS[0].read_bytes()), "3 channels, expected 5"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file__is_named_and_counted_once(name, tmp_path):
    write, message = BAD[name]
    for number in range(3):
        write_tiff(tmp_path / f"0{number}.tif", bands(number, 5))
    write(tmp_path / name, bands(3, 5))
    checked = check_images(open_source(str(tmp_path), measured=Measured(5)), 0.5)
    ((bad, reason),) = checked.bad.items()
    assert (bad, len(checked.good)) == (str(tmp_path / name), 3)
    assert re.search(message, reason), reason


def test_mixed_types__are_read_as_the_one_that_holds_all(tmp_path):
    write_tiff(tmp_path / "a.tif", bands(0, 5))
    write_tiff(tmp_path / "b.tif", bands(1, 5).astype(np.float32) / 3)
    for item, number, divisor in zip(dataset(tmp_path, Measured(5)), (0, 1), (1, 3), strict=True):
        expected = bands(number, 5).astype(np.float32) / divisor
        assert np.array_equal(stored_values(item["pixel_values"]).numpy(), expected)
    late = MeasuredImage((tmp_path / "b.tif",), Measured(5, dtype="uint16"))
    with pytest.raises(BadImage, match="float32 values, but the other images have uint16"):
        late.check()


@pytest.mark.parametrize("tile", [None, SIZE])
def test_several_datasets__are_read_in_the_type_that_holds_all(tile, tmp_path):
    datasets = []
    for number, dtype in enumerate(("float32", "uint16")):
        datasets.append(str(tmp_path / dtype))
        for split in ("train", "val"):
            (tmp_path / dtype / split).mkdir(parents=True)
            write_tiff(tmp_path / dtype / split / "a.tif", bands(number, 5).astype(dtype))
    source = open_validation(datasets, Measured(5, tile=tile))
    images = ImageDataset(SourceSamples(source, np.arange(2)), single_view(CenterCrop((SIZE, SIZE)), 5))
    batch = stack_items([images[0], images[1]])
    expected = np.stack([bands(0, 5), bands(1, 5)]).astype(np.float32)
    assert np.array_equal(stored_values(batch["pixel_values"]).numpy(), expected)


def test_several_labeled_datasets__are_read_in_the_type_that_holds_all(tmp_path):
    datasets = []
    for dtype in ("uint8", "float32"):
        datasets.append(str(tmp_path / dtype))
        for name in ("cat", "dog"):
            (tmp_path / dtype / name).mkdir(parents=True)
            np.save(tmp_path / dtype / name / "0.npy", np.full((5, SIZE, SIZE), 7, dtype))
    train = open_labeled(datasets, measured=Measured(5)).train
    images = ImageDataset(train, single_view(CenterCrop((SIZE, SIZE)), 5))
    batch = stack_items([images[index] for index in range(4)])
    assert (stored_values(batch["pixel_values"]) == 7).all()


def test_missing_channel__is_named(tmp_path):
    for name in ("a_1.tif", "a_2.tif", "b_1.tif", "c_1.tif", "c_2.tif"):
        write_tiff(tmp_path / name, bands(0, 1)[0])
    write_tiff(tmp_path / "c_2.tif", bands(0, 1, 32)[0])
    measured = Measured(2, (("red", "*_1.tif"), ("nir", "*_2.tif")))
    checked = check_images(open_source(str(tmp_path), measured=measured), 0.9)
    assert dict(checked.bad) == {
        str(tmp_path / "b_1.tif"): "the file of channel nir (*_2.tif) is missing",
        str(
            tmp_path / "c_1.tif"
        ): "channel nir: 32x32 pixels, but the first channel has 64x64; resample all to one grid",
    }
    with pytest.raises(ValueError, match=r"no file of .* has a name like \*_9.tif"):
        open_source(str(tmp_path), measured=Measured(1, (("a", "*_9.tif"),)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite__are_counted_and_another_image_takes_the_place(value, tmp_path):
    for number in range(3):
        values = bands(number, 5).astype(np.float32)
        values[2, 10, 10:14] = value if number == 1 else 0
        np.save(tmp_path / f"{number}.npy", values)
    record = tmp_path / "bad.jsonl"
    images = dataset(tmp_path, Measured(5), bad_images_file=record)
    assert [item["image_index"] == number for number, item in enumerate(images)] == [True, False, True]
    assert images[1]["image_index"] != 1  # again, and still one line
    assert dict(BadImages.read(record)) == {
        str(tmp_path / "1.npy"): "NaN or infinite values in 4 of 4,096 pixels; fill or cut them off"
    }


@pytest.mark.parametrize(("name", "library"), [("a.tif", "tifffile"), ("a.dcm", "pydicom"), ("a.heic", "pillow_heif")])
def test_missing_library__is_one_message_with_what_to_install(name, library, tmp_path, monkeypatch):
    if name == "a.tif":
        write_tiff(tmp_path / name, bands(0, 1)[0])
    elif name == "a.dcm":
        write_dicom(tmp_path / name, bands(0, 1)[0])
    else:
        (tmp_path / name).write_bytes(heic(PHOTOGRAPHS[0]))
    monkeypatch.setitem(sys.modules, library, None)
    package = library.replace("_", "-")
    message = f"(?s)1 of 1 images cannot be read.*which needs {package}: pip install {package}"
    with pytest.raises(ValueError, match=message):
        check_images(open_source(str(tmp_path), measured=None if name == "a.heic" else Measured(1)), 0.0)


# ---- HEIC ----


def heic(photograph: Path) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif")
    with Image.open(photograph) as image:
        file = pillow_heif.from_pillow(image.crop((0, 0, 200, 120)))
    stream = BytesIO()
    file.save(stream, quality=95)
    return stream.getvalue()


def test_heic__is_decoded_and_truncation_found():
    content = heic(PHOTOGRAPHS[0])
    assert (check(content).format, check(content).width, check(content).height) == ("HEIF", 200, 120)
    with Image.open(PHOTOGRAPHS[0]) as image:
        expected = np.asarray(image.crop((0, 0, 200, 120)), np.float32)
    assert np.abs(np.asarray(decode(content, 3), np.float32) - expected).mean() < 4
    with pytest.raises(BadImage, match="Unexpected end of file"):
        check(content[: len(content) // 2])


def test_random_crop__of_measurements_depends_on_seed_and_epoch_only(tmp_path):
    write_tiff(tmp_path / "a.tif", bands(0, 5))
    transform = single_view(random_crop((32, 32), (0.2, 1.0)), 5)
    first, again = (dataset(tmp_path, Measured(5), transform, train=True, seed=3) for _ in range(2))
    assert torch.equal(first.item(0, 1)["pixel_values"], again.item(0, 1)["pixel_values"])
    assert not torch.equal(first.item(0, 1)["pixel_values"], first.item(0, 2)["pixel_values"])


# ---- models ----


def test_model__takes_stored_values_as_it_takes_standardized_ones(variant):
    if tiny_targets(variant) is not None:
        pytest.skip("predicts what a tokenizer or a teacher makes of photographs")
    ends, stats = [[0.0, 50_000.0]] * 5, {"image_mean": [0.4] * 5, "image_std": [0.3] * 5}
    settings = {**TINY_MODELS[variant], **stats, "value_range": ends}
    settings["encoder_config"] = {**settings["encoder_config"], "num_channels": 5}
    torch.manual_seed(0)
    model = model_class(variant)(model_class(variant).config_class(**settings)).eval()
    batch = tiny_batch(variant, num_images=2)
    views = {key: value for key, value in batch.items() if key.endswith("pixel_values")}
    stored = {key: (value[..., [0, 1, 2, 0, 1], :, :].int() * 201).to(torch.uint16) for key, value in views.items()}
    losses = []
    for pixels in (stored, {key: standardize(value, [0.4] * 5, [0.3] * 5, ends) for key, value in stored.items()}):
        torch.manual_seed(0)
        with torch.no_grad():
            losses.append(model(**{**batch, **pixels}).loss)
    assert torch.isfinite(losses[0])
    torch.testing.assert_close(losses[0], losses[1])

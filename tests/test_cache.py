"""The cache gives every image as it is now, whatever happened to it, to the tables and to their writers."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image, ImageOps
from pretraining_command import pretrain
from transformers import AutoModel

from data import cache
from data.augmentations import RandomResizedCrop, build_views, single_view
from data.cache import CacheFormat, cache_images
from data.decoding import BadImage, decode
from data.image_source import ArraySource, ImageSource, TableSource
from data.images import ImageDataset, SourceSamples
from data.sources import open_source
from modeling.views import View

PHOTOGRAPHS = sorted((ROOT / "data/samples/photographs/train").glob("*.jpg"))
FORM = CacheFormat(64, 3)
SCRIPT = ROOT / "tests" / "cache_and_die.py"


def samples_of(source: ImageSource) -> SourceSamples:
    return SourceSamples(source, np.arange(len(source)))


def cached(images: Path | ImageSource, folder: Path, form: CacheFormat = FORM) -> SourceSamples:
    source = open_source(str(images)) if isinstance(images, Path) else images
    return cache_images([samples_of(source)], folder, form)[0]


def pixels(samples: SourceSamples, index: int) -> np.ndarray:
    return np.asarray(decode(bytes(samples.sample(index)["image"]), 3), np.int32)


def shrunk(path: Path, side: int = 64) -> np.ndarray:
    image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    scale = min(1, side / min(image.size))
    size = round(image.width * scale), round(image.height * scale)
    return np.asarray(image.resize(size, Image.Resampling.LANCZOS), np.int32)


def assert_is_current(samples: SourceSamples) -> None:
    """Every image is the one that its file has now."""
    for index in range(len(samples)):
        expected = shrunk(Path(samples.name(index)))
        found = pixels(samples, index)
        assert found.shape == expected.shape
        assert np.abs(found - expected).mean() < 4  # JPEGs are decoded at a smaller scale


def tables(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.arrow"))


def num_rows(folder: Path) -> int:
    return sum(len(datasets.Dataset.from_file(str(path))) for path in tables(folder))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, path in enumerate(PHOTOGRAPHS[:12]):
        Image.open(path).convert("RGB").resize((120 + number, 100)).save(folder / f"{number:02}.jpg", quality=92)
    return folder


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each image that is encoded."""
    found: list[int] = []
    encode = CacheFormat.encode

    def noting_encode(form: CacheFormat, data: bytes) -> bytes:
        found.append(len(data))
        return encode(form, data)

    monkeypatch.setattr(CacheFormat, "encode", noting_encode)
    return found


# ---- what is stored ----


@pytest.mark.parametrize("encoding", ["raw", "jpeg"])
@pytest.mark.parametrize("num_channels", [1, 3])
def test_cache__has_shrunk_upright_images_of_every_format(tmp_path: Path, encoding, num_channels: int) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    photograph = Image.open(PHOTOGRAPHS[0]).convert("RGB").resize((250, 150))
    exif = Image.Exif()
    exif[0x0112] = 6
    photograph.save(folder / "a.jpg", exif=exif, quality=95)
    photograph.save(folder / "b.png")
    photograph.resize((50, 40)).save(folder / "c.jpg", quality=95)
    photograph.convert("L").save(folder / "d.webp", lossless=True)
    form = CacheFormat(75, num_channels, encoding)
    found = cached(folder, tmp_path / "cache", form)
    assert [found.name(index) for index in range(4)] == [str(path) for path in sorted(folder.iterdir())]
    assert found.source.describe() == f"{folder}: 4 image files"
    sizes = [(75, 125), (125, 75), (50, 40), (125, 75)]
    for index, (path, size) in enumerate(zip(sorted(folder.iterdir()), sizes, strict=True)):
        image = decode(bytes(found.sample(index)["image"]), num_channels)
        assert image.size == size
        expected = Image.fromarray(shrunk(path, 75).astype(np.uint8)).convert(image.mode)
        assert np.abs(np.asarray(image, np.int32) - np.asarray(expected, np.int32)).mean() < 4


def test_cache__tables_are_data_sets_with_the_names_of_the_images(images: Path, tmp_path: Path) -> None:
    cached(images, tmp_path / "cache")
    (table,) = tables(tmp_path / "cache")
    stored = datasets.Dataset.from_file(str(table)).cast_column("image", datasets.Image(decode=False))
    assert stored[3]["image"]["path"] == str(images / "03.jpg")
    assert open_source(str(table)).read(0) == stored[0]["image"]["bytes"]


def test_cache__keeps_small_jpegs_as_they_are(images: Path, tmp_path: Path) -> None:
    found = cached(images, tmp_path / "cache", CacheFormat(100, 3, "jpeg"))
    assert found.sample(0)["image"] == (images / "00.jpg").read_bytes()


def test_cache__is_shared_by_runs_and_subsets_but_not_by_formats(images: Path, tmp_path: Path, encoded) -> None:
    source = open_source(str(images))
    halves = [SourceSamples(source, np.arange(0, 12, 2)), SourceSamples(source, np.arange(1, 12, 2))]
    even, odd = cache_images(halves, tmp_path / "cache", FORM)
    assert len(encoded) == 12
    assert (len(even), odd.name(0)) == (6, str(images / "01.jpg"))
    assert_is_current(cached(open_source([str(images), str(images)]), tmp_path / "cache"))
    assert len(encoded) == 12
    for other in (CacheFormat(65, 3), CacheFormat(64, 1), CacheFormat(64, 3, "jpeg")):
        cached(images, tmp_path / "cache", other)
    assert len(encoded) == 48


def test_cache__reaches_worker_processes_by_path(images: Path, tmp_path: Path) -> None:
    found = cached(images, tmp_path / "cache")
    expected = bytes(found.sample(5)["image"])
    passed_on = pickle.dumps(found)
    assert len(passed_on) < len(expected)
    assert bytes(pickle.loads(passed_on).sample(5)["image"]) == expected


@pytest.mark.parametrize("kind", ["parquet", "arrow", "memory", "paths", "array"])
def test_cache__takes_every_kind_of_source(images: Path, tmp_path: Path, kind: str, encoded) -> None:
    def open_it(paths: list[Path]) -> ImageSource:
        if kind == "array":
            return ArraySource(
                np.stack([np.asarray(Image.open(p).convert("L").resize((70, 70))) for p in paths]), None, "a"
            )
        rows = [{"bytes": path.read_bytes(), "path": None} for path in paths]
        if kind == "paths":
            rows = [{"bytes": None, "path": str(path)} for path in paths]
        features = datasets.Features({"image": datasets.Image()})
        table = datasets.Dataset.from_dict({"image": rows}, features)
        if kind == "parquet":
            table.to_parquet(tmp_path / "images.parquet")
            return open_source(str(tmp_path / "images.parquet"))
        if kind == "arrow":
            table.save_to_disk(tmp_path / "saved")
            return open_source(str(tmp_path / "saved"))
        return TableSource(table, "table")

    paths = sorted(images.iterdir())
    source = open_it(paths[:6])
    found = cached(source, tmp_path / "cache")
    assert found.name(2) == source.name(2)
    cached(open_it(paths[:6]), tmp_path / "cache") if kind in ("memory", "paths", "array") else None
    cached(source, tmp_path / "cache")
    assert len(encoded) == 6
    reversed_source = open_it(paths[5::-1])  # the same rows, title and number of images
    again = cached(reversed_source, tmp_path / "cache")
    assert (pixels(again, 0) == pixels(found, 5)).all()
    assert (pixels(again, 5) == pixels(found, 0)).all()


# ---- changes of the source ----


def replace_keeping_size_and_time(path: Path, data: bytes, by_rename: bool) -> None:
    before = path.stat()
    assert len(data) <= before.st_size
    data += b"\0" * (before.st_size - len(data))
    target = path.with_name("new.tmp") if by_rename else path
    target.write_bytes(data)
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    if by_rename:
        target.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("by_rename", [True, False])
def test_changed_image__of_equal_size_and_time_is_cached_anew(
    images: Path, tmp_path: Path, by_rename, encoded
) -> None:
    cached(images, tmp_path / "cache")
    stream = BytesIO()
    Image.open(PHOTOGRAPHS[50]).convert("RGB").resize((133, 90)).save(stream, "JPEG", quality=40)
    replace_keeping_size_and_time(images / "04.jpg", stream.getvalue(), by_rename)
    del encoded[:]
    assert_is_current(cached(images, tmp_path / "cache"))
    assert len(encoded) == 1


def test_changed_image__right_after_the_cache_was_written_is_cached_anew(images: Path, tmp_path: Path) -> None:
    path = images / "00.jpg"
    for number in range(6):  # without a pause: the time stamps of files advance in steps
        Image.open(PHOTOGRAPHS[number]).convert("RGB").resize((128, 96)).save(path, "BMP")
        assert_is_current(cached(images, tmp_path / "cache"))


def test_added_and_removed_images__are_noticed(images: Path, tmp_path: Path, encoded) -> None:
    cached(images, tmp_path / "cache")
    (images / "03.jpg").unlink()
    (images / "07.jpg").rename(images / "99.jpg")
    shutil.copy(images / "05.jpg", images / "05b.jpg")
    del encoded[:]
    found = cached(images, tmp_path / "cache")
    assert len(found) == 12
    assert_is_current(found)
    assert len(encoded) == 2


def test_image__that_changes_while_it_is_read_is_not_stored(images: Path, tmp_path: Path, monkeypatch) -> None:
    encode, changed = CacheFormat.encode, []

    def encode_and_change(form: CacheFormat, data: bytes) -> bytes:
        if not changed:
            changed.append(images / "00.jpg")
            shutil.copy(images / "08.jpg", changed[0])
        return encode(form, data)

    monkeypatch.setattr(CacheFormat, "encode", encode_and_change)
    source = open_source(str(images))
    found = cache_images([samples_of(source)], tmp_path / "cache", FORM, num_threads=1)[0]
    assert found.sample(0)["image"] == (images / "08.jpg").read_bytes()  # from the source itself
    assert num_rows(tmp_path / "cache") == 11
    assert_is_current(cached(images, tmp_path / "cache"))


def test_bad_images__are_reported_as_without_a_cache(images: Path, tmp_path: Path) -> None:
    for name, data in (("20.jpg", (images / "01.jpg").read_bytes()[:900]), ("21.jpg", b"no image")):
        (images / name).write_bytes(data)
    (images / "22.jpg").symlink_to(tmp_path / "gone.jpg")
    source = open_source(str(images))
    transform = single_view(RandomResizedCrop((32, 32)), 3)

    def reasons(samples: SourceSamples) -> list[str]:
        dataset, found = ImageDataset(samples, transform), []
        for index in (12, 13, 14):
            with pytest.raises(BadImage) as error:
                dataset.view(index)
            found.append(str(error.value))
        return found

    expected = reasons(samples_of(source))
    assert "broken link" in expected[2]
    assert reasons(cached(source, tmp_path / "cache")) == expected


# ---- accidents ----


def run_script(images: Path, folder: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(SCRIPT), str(images), str(folder), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_two_processes__that_start_together_encode_every_image_once(images: Path, tmp_path: Path) -> None:
    processes = [run_script(images, tmp_path / "cache", "--seconds_per_image", "0.1") for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "".join(outputs).count("encoded") == 12
    assert num_rows(tmp_path / "cache") == 12
    assert_is_current(cached(images, tmp_path / "cache"))


@pytest.mark.parametrize("bytes_per_table", [1 << 30, 1])
def test_killed_process__leaves_whole_tables_only(images: Path, tmp_path: Path, bytes_per_table: int, encoded) -> None:
    folder = tmp_path / "cache"
    flags = ["--seconds_per_image", "0.2", "--bytes_per_table", str(bytes_per_table)]
    process = run_script(images, folder, *flags)
    assert process.stdout is not None
    for _ in range(10):  # of 12, in batches of 4: two batches are written
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    num_finished = 2 if bytes_per_table == 1 else 0
    assert len(tables(folder)) == num_finished
    if not num_finished:
        assert list(folder.rglob("*.part"))
    assert_is_current(cached(images, folder))
    assert len(encoded) == 12 - 4 * num_finished
    assert not list(folder.rglob("*.part"))


def test_full_disk__is_one_message_and_leaves_nothing_half_written(images: Path, tmp_path: Path, encoded) -> None:
    folder = tmp_path / "cache"
    process = run_script(images, folder, "--bytes_on_disk", "100000")
    _, message = process.communicate(timeout=120)
    assert process.returncode == 1
    assert f"ValueError: the cache {folder / FORM.folder} cannot be written: File too large" in message
    assert not list(folder.rglob("*.part"))
    assert_is_current(cached(images, folder))
    assert len(encoded) == 12


def test_too_small_disk__is_noticed_before_it_is_full(images: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cache, "_ROWS_PER_BATCH", 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 9000, 9000))
    with pytest.raises(ValueError, match=r"needs about 0\.0 GB more.*cache_format jpeg"):
        cached(images, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name != "lock" and path.is_file()]


def test_read_only_folder__is_one_message(images: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(ValueError, match="cannot be written"):
        cached(images, tmp_path / "cache")


@pytest.mark.parametrize("damage", ["truncated", "emptied", "overwritten", "cut at a batch"])
def test_damaged_table__is_replaced(images: Path, tmp_path: Path, damage: str, monkeypatch) -> None:
    monkeypatch.setattr(cache, "_ROWS_PER_BATCH", 4)
    cached(images, tmp_path / "cache")
    (table,) = tables(tmp_path / "cache")
    data = table.read_bytes()
    table.unlink()  # the memory-mapped one stays whole
    second_batch = data.index(b"\xff\xff\xff\xff", data.index(b"P6\n") + 1)
    contents = {
        "truncated": data[: len(data) // 2],
        "emptied": b"",
        "overwritten": os.urandom(len(data)),
        "cut at a batch": data[:second_batch],
    }
    table.write_bytes(contents[damage])
    assert_is_current(cached(images, tmp_path / "cache"))
    assert num_rows(tmp_path / "cache") == 12


# ---- size and use ----


@pytest.mark.parametrize(("scale", "num_crops", "side"), [((0.2, 1.0), None, 144), ((1.0, 1.0), None, 64)])
def test_views__know_the_smallest_size_without_enlarging(scale, num_crops, side: int) -> None:
    views = build_views([View(num_crops=num_crops)], image_size=(48, 64), crop_scale=scale, num_channels=3, train=True)
    assert views.shortest_side == side


def test_crops__of_cached_images_look_like_those_of_the_originals(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for path in PHOTOGRAPHS[:8]:
        Image.open(path).convert("RGB").resize((900, 600), Image.Resampling.BICUBIC).save(
            folder / path.name, quality=92
        )
    transform = single_view(RandomResizedCrop((64, 64)), 3)
    source = open_source(str(folder))
    plain = ImageDataset(samples_of(source), transform, train=True)
    for encoding, most in (("raw", 2.0), ("jpeg", 2.5)):
        form = CacheFormat(transform.shortest_side, 3, encoding)
        shrunken = ImageDataset(cached(source, tmp_path / "cache", form), transform, train=True)
        difference = [
            (plain[index]["pixel_values"].float() - shrunken[index]["pixel_values"].float()).abs().mean()
            for index in range(32)
        ]
        assert torch.stack(difference).mean() < most


def test_run__continues_with_a_cache_and_repeated_crops_as_if_undisturbed(tmp_path: Path, capsys) -> None:
    folder, flags = tmp_path / "out", ["--cache", str(tmp_path / "cache"), "--cache_size", "80", "--repeated_aug", "3"]
    small = ["--model", "vit-nano", "--max_steps", "3", "--per_device_train_batch_size", "8", "--use_cpu"]
    command = [*small, *flags, "--output_dir", str(folder), "--save_steps", "1"]
    assert pretrain(command) == 0
    said = capsys.readouterr().out
    assert f"cache: {tmp_path / 'cache'}, raw images of 80 px on the shortest side" in said
    assert "218 for training (an epoch has 3 crops of each)" in said
    assert "3 = 0.04 x 81 per epoch" in said  # 218 x 3 / 8
    whole = torch.cat([p.flatten() for p in AutoModel.from_pretrained(folder).parameters()])
    for path in [folder / "checkpoint-3", folder / "checkpoint-2", folder / "pretraining"]:
        shutil.rmtree(path)
    before = [path.stat().st_mtime_ns for path in tables(tmp_path / "cache")]
    assert pretrain(command) == 0
    assert "continuing from" in capsys.readouterr().out
    assert torch.equal(torch.cat([p.flatten() for p in AutoModel.from_pretrained(folder).parameters()]), whole)
    assert [path.stat().st_mtime_ns for path in tables(tmp_path / "cache")] == before

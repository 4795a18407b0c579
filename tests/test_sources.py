import os
import pickle
import threading
from collections import Counter
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data import image_checks, sources
from data.bad_images import BadImages
from data.decoding import BadImage
from data.image_checks import check_images
from data.labeled import open_labeled
from data.sources import open_source, open_validation

PHOTOGRAPHS = sorted((Path(__file__).parents[1] / "data/samples/photographs/train").glob("*.jpg"))


@pytest.fixture(scope="module")
def photograph() -> bytes:
    return PHOTOGRAPHS[0].read_bytes()


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


def fill(folder: Path, names: list[str], data: bytes) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def names_in(source: sources.ImageSource, folder: Path) -> list[str]:
    return [os.path.relpath(source.name(index), folder) for index in range(len(source))]


def image_table(num_rows: int, data: bytes) -> datasets.Dataset:
    features = datasets.Features({"label": datasets.Value("int64"), "photo": datasets.Image()})
    cells = [{"bytes": data, "path": None}] * num_rows
    return datasets.Dataset.from_dict({"label": list(range(num_rows)), "photo": cells}, features=features)


def test_folder__is_read_at_any_depth_in_sorted_order(tmp_path: Path, photograph: bytes) -> None:
    wanted = ["a/b/c/d/e/f/deep.JPG", "a/z.png", "b c/ünï çödé 写真.jpeg", "top.WebP"]
    fill(tmp_path, [*reversed(wanted), ".hidden.jpg", ".cache/x.jpg", "notes.txt", "a/._z.png"], photograph)
    source = open_source(str(tmp_path))
    assert sorted(names_in(source, tmp_path)) == sorted(wanted)
    assert names_in(source, tmp_path) == names_in(open_source(str(tmp_path)), tmp_path)
    assert all(source.read(index) == photograph for index in range(4))
    assert open_validation(str(tmp_path)) is None
    assert "4 image files" in source.describe()


def test_folder__reads_names_that_are_not_unicode(tmp_path: Path, photograph: bytes) -> None:
    with open(os.fsencode(tmp_path) + b"/latin-\xe9.jpg", "wb") as file:
        file.write(photograph)
    assert open_source(str(tmp_path)).read(0) == photograph


def test_folder__follows_links_but_not_in_circles(tmp_path: Path, photograph: bytes) -> None:
    fill(tmp_path, ["elsewhere/one.jpg", "elsewhere/more/two.jpg"], photograph)
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "file.jpg").symlink_to(tmp_path / "elsewhere/one.jpg")
    (photos / "folder").symlink_to(tmp_path / "elsewhere/more")
    (photos / "circle").symlink_to(photos)
    (photos / "broken.jpg").symlink_to(tmp_path / "gone.jpg")
    source = open_source(str(photos))
    assert names_in(source, photos) == ["broken.jpg", "file.jpg", "folder/two.jpg"]
    checked = check_images(source, 0.5, 2)
    assert checked.good.tolist() == [1, 2]
    assert checked.bad == {str(photos / "broken.jpg"): f"broken link to {tmp_path / 'gone.jpg'}"}


def test_folder__lists_a_folder_once_however_many_links_lead_to_it(
    tmp_path: Path, photograph: bytes, monkeypatch
) -> None:
    fill(tmp_path, [f"{number}/image.jpg" for number in range(20)], photograph)
    for number in range(20):
        (tmp_path / str(number) / "up").symlink_to(tmp_path)
        (tmp_path / str(number) / "itself").symlink_to("itself")
        (tmp_path / str(number) / "next").symlink_to(tmp_path / str((number + 1) % 20))
    (tmp_path / "itself").symlink_to("itself")
    listed, scandir = [], os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda path: (listed.append(os.path.realpath(os.fsdecode(path))), scandir(path))[1]
    )
    assert len(open_source(str(tmp_path))) == 20
    assert max(Counter(listed).values()) <= 3  # the folder itself is also asked for splits


@pytest.mark.parametrize("name", ["part.parquet", "part.arrow", "train-images-idx3-ubyte"])
def test_folder__with_a_fifo_for_a_table_is_refused_and_nobody_waits(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    refused: list[str] = []

    def open_it() -> None:
        try:
            open_source(str(tmp_path))
        except ValueError as error:
            refused.append(str(error))

    thread = threading.Thread(target=open_it, daemon=True)
    thread.start()
    thread.join(60)
    assert [text.partition(" (")[0] for text in refused] == [f"{tmp_path / name} cannot be read"]
    assert "it is a FIFO, not a regular file" in refused[0]


def test_list__with_devices_of_the_kernel_and_impossible_names_has_bad_images(
    tmp_path: Path, photograph: bytes
) -> None:
    (tmp_path / "good.jpg").write_bytes(photograph)
    (tmp_path / "list.txt").write_bytes(b"good.jpg\n/proc/self/mem\nwith\0nul.jpg\n/proc/self/environ\n")
    for num_processes in (1, 2):
        checked = check_images(open_source(str(tmp_path / "list.txt")), 0.8, num_processes)
        assert checked.good.tolist() == [0]
        assert list(checked.bad.values())[:2] == [
            "cannot be read: Input/output error",
            "cannot be opened: its path has a NUL byte",
        ]
    text = checked.bad.describe()
    assert "\0" not in text
    assert "with\\x00nul.jpg" in text
    with pytest.raises(BadImage, match="cannot be read: Input/output error"):
        open_source(str(tmp_path / "list.txt")).read(1)


def test_bad_images__describe_names_that_are_not_unicode(tmp_path: Path) -> None:
    name = os.fsdecode("café ".encode() + b"\xe9.jpg")
    text = BadImages({name: "empty"}).describe()
    assert text == "café \\xe9.jpg: empty"
    BadImages({name: "empty"}).append_to(tmp_path / "bad.jsonl")
    assert BadImages.read(tmp_path / "bad.jsonl") == {name: "empty"}


@pytest.mark.parametrize("validation_name", ["val", "valid", "validation", "test", "held_out", "Val"])
def test_folder__keeps_its_own_validation_split_apart(tmp_path: Path, photograph: bytes, validation_name: str) -> None:
    fill(tmp_path, ["train/x/1.jpg", "train/y/2.jpg", f"{validation_name}/x/3.jpg"], photograph)
    source = open_source(str(tmp_path))
    validation = open_validation(str(tmp_path))
    assert names_in(source, tmp_path) == ["train/x/1.jpg", "train/y/2.jpg"]
    assert validation is not None
    assert names_in(validation, tmp_path) == [f"{validation_name}/x/3.jpg"]
    assert f"{validation_name}/ beside it is for validation" in source.describe()
    assert len(open_source(str(tmp_path), split=None)) == 3
    assert len(open_source(str(tmp_path), split=validation_name.lower())) == 1


def test_folder__takes_train_for_a_class_without_a_validation_folder(tmp_path: Path, photograph: bytes) -> None:
    fill(tmp_path, ["train/1.jpg", "car/2.jpg"], photograph)  # a folder of vehicles
    assert len(open_source(str(tmp_path))) == 2
    with pytest.raises(ValueError, match=r"no split 'val' in .*; it has: train"):
        open_source(str(tmp_path), split="val")


def test_several_folders__are_joined_with_their_validation_splits(tmp_path: Path, photograph: bytes) -> None:
    fill(tmp_path, ["a/1.jpg", "a/2.jpg", "b/train/3.jpg", "b/val/4.jpg"], photograph)
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    source = open_source(folders)
    assert names_in(source, tmp_path) == ["a/1.jpg", "a/2.jpg", "b/train/3.jpg"]
    validation = open_validation(folders)
    assert validation is not None
    assert names_in(validation, tmp_path) == ["b/val/4.jpg"]
    assert source.read(2) == photograph


def test_list_file__is_relative_to_its_own_folder(tmp_path: Path, photograph: bytes) -> None:
    fill(tmp_path, ["images/1 1.jpg", "2.jpg"], photograph)
    list_file = tmp_path / "paths.txt"
    list_file.write_text(f"images/1 1.jpg\r\n\n{tmp_path / '2.jpg'}\nmissing.jpg\n")
    source = open_source(str(list_file))
    assert names_in(source, tmp_path) == ["images/1 1.jpg", "2.jpg", "missing.jpg"]
    assert check_images(source, 0.5, 1).bad == {str(tmp_path / "missing.jpg"): "no such file"}


@pytest.mark.parametrize("layout", ["file", "folder", "train folder"])
def test_parquet__gives_the_bytes_of_its_image_column(tmp_path: Path, photograph: bytes, layout: str) -> None:
    if layout == "train folder":
        files = ["train/0.parquet", "test/0.parquet"]
    else:
        files = ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"]
    for file, num_rows in zip(files, (5, 2), strict=True):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        image_table(num_rows, photograph).to_parquet(tmp_path / file)
    source = open_source(str(tmp_path / files[0] if layout == "file" else tmp_path))
    assert len(source) == 5
    assert source.read(4) == photograph
    assert source.name(4).endswith("#4")
    assert "'photo'" in source.describe()
    if layout != "file":
        validation = open_validation(str(tmp_path))
        assert validation is not None
        assert len(validation) == 2
        assert len(open_source(str(tmp_path), "test")) == 2
        assert len(open_source(str(tmp_path), None)) == 7


@pytest.mark.parametrize(
    "image_type", [pa.binary(), pa.large_binary(), pa.struct([("bytes", pa.binary()), ("path", pa.string())])]
)
def test_parquet__needs_no_hugging_face_metadata(tmp_path: Path, photograph: bytes, image_type: pa.DataType) -> None:
    cell = {"bytes": photograph, "path": None} if pa.types.is_struct(image_type) else photograph
    table = pa.table({"id": [7, 8], "picture": pa.array([cell, None], image_type)})
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(str(tmp_path / "x.parquet"))
    assert source.read(0) == photograph
    assert check_images(source, 0.5, 1).bad == {source.name(1): "no image in this row"}


def test_parquet__without_images_says_which_columns_there_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": [7], "text": ["x"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"no image column in .* id, text"):
        open_source(str(tmp_path))


def test_saved_datasets__open_with_and_without_splits(tmp_path: Path, photograph: bytes) -> None:
    image_table(3, photograph).save_to_disk(tmp_path / "plain")
    splits = {"train": image_table(4, photograph), "validation": image_table(2, photograph)}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "dict")
    assert open_source(str(tmp_path / "plain")).read(2) == photograph
    assert len(open_source(str(next((tmp_path / "plain").glob("*.arrow"))))) == 3
    source = open_source(str(tmp_path / "dict"))
    validation = open_validation(str(tmp_path / "dict"))
    assert validation is not None
    assert (len(source), len(validation), len(open_source(str(tmp_path / "dict"), None))) == (4, 2, 6)
    with pytest.raises(ValueError, match=r"no split 'test' in .* it has: train, validation"):
        open_source(str(tmp_path / "dict"), "test")


def test_hub_dataset__is_loaded_with_its_validation_split(monkeypatch: pytest.MonkeyPatch, photograph: bytes) -> None:
    sizes = {"train": 3, "test": 2}
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: list(sizes))
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: image_table(sizes[split], photograph))
    source = open_source("someone/photos")
    validation = open_validation("someone/photos")
    assert validation is not None
    assert (len(source), len(validation)) == (3, 2)
    assert source.name(1) == "someone/photos/train#1"
    assert source.read(1) == photograph


@pytest.mark.parametrize("dataset", ["sample", "sample-fashion"])
def test_bundled_samples__open_by_name_with_a_validation_split(dataset: str) -> None:
    source = open_source(dataset)
    validation = open_validation(dataset)
    assert validation is not None
    assert len(validation) < len(source)
    assert not {source.read(index) for index in range(10)} & {validation.read(index) for index in range(4)}
    assert check_images(source, 0.0, 2).bad == {}


def test_sources__travel_to_worker_processes(tmp_path: Path, photograph: bytes) -> None:
    fill(tmp_path, ["train/1.jpg", "val/2.jpg"], photograph)
    for dataset in (str(tmp_path), [str(tmp_path)] * 2, "sample-fashion"):
        for source in (open_source(dataset), open_validation(dataset)):
            copy = pickle.loads(pickle.dumps(source))
            assert copy.read(0) == source.read(0)
            assert len(copy) == len(source)


def test_paths__are_stored_without_a_python_object_each(tmp_path: Path, photograph: bytes) -> None:
    fill(tmp_path, [f"{number}.jpg" for number in range(200)], photograph)
    source = open_source(str(tmp_path))
    assert len(pickle.dumps(source)) < 200 * (len(str(tmp_path)) + 20) + 1000


def test_wrong_names__say_what_was_looked_for_and_what_would_work(
    tmp_path: Path, photograph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_on_hub(name: str) -> list[str]:
        raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist on the Hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", not_on_hub)
    monkeypatch.chdir(tmp_path)
    fill(tmp_path, ["photos/1.jpg", "texts/1.txt", "texts/2.txt", "one.jpg"], photograph)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").touch()
    for dataset, message in {
        "texts": r"no image files in texts \(found 2 \.txt\)",
        "empty": r"no image files in empty \(found nothing\)",
        "empty.txt": "expected one image path per line",
        "one.jpg": "is a single file; expected a folder",
        "fotos": r"no 'fotos' in .*did you mean photos.* and the Hub has no dataset .*doesn't exist on the Hub",
        "./fotos": r"did you mean photos\?\), and this is not a valid Hub id",
        "photos/2.jpg": r"no '2\.jpg' in .*did you mean 1\.jpg",
        "far/away/from/here": r"no 'far' in",
        "smaple": "did you mean sample",
        "": "the dataset is missing",
    }.items():
        with pytest.raises(ValueError, match=message):
            open_source(dataset)
    for open_dataset in (open_source, open_labeled):  # of a variable that is not set: --dataset "$IMAGES"
        with pytest.raises(ValueError, match="the dataset is missing"):
            open_dataset(["sample-fashion", ""])


def test_check_images__summarises_what_is_there(tmp_path: Path, photograph: bytes) -> None:
    fill(tmp_path, ["a.jpg"], photograph)
    Image.new("L", (10, 300)).save(tmp_path / "b.png")
    Image.fromarray(np.zeros((50, 40), np.uint16)).save(tmp_path / "c.png")
    summary = check_images(open_source(str(tmp_path)), 0, 3).summary
    with Image.open(BytesIO(photograph)) as first:
        widths, heights = sorted([first.width, 10, 40]), sorted([first.height, 300, 50])
    assert (summary.width.smallest, summary.width.median, summary.width.largest) == tuple(widths)
    assert (summary.height.smallest, summary.height.median, summary.height.largest) == tuple(heights)
    assert summary.formats == {"PNG": 2, "JPEG": 1}
    assert (summary.num_images, summary.num_sixteen_bit, summary.num_tiny) == (3, 1, 1)
    assert "16 bits" in summary.describe()


def test_check_images__finds_the_same_in_any_number_of_processes(
    tmp_path: Path, photograph: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_checks, "_SECONDS_WORTH_PROCESSES", 0.0)
    bad = range(0, 300, 7)
    for number in range(300):
        (tmp_path / f"{number:03}.jpg").write_bytes(photograph[:2000] if number in bad else photograph)
    for num_processes in (1, 3):
        checked = check_images(open_source(str(tmp_path)), 0.2, num_processes, checks="all")
        assert checked.good.dtype == np.int64
        assert checked.good.tolist() == [number for number in range(300) if number not in bad]
        assert [Path(name).stem for name in checked.bad] == [f"{number:03}" for number in bad]


def test_check_images__stops_when_too_many_are_bad(tmp_path: Path, photograph: bytes) -> None:
    fill(tmp_path, [f"good{number}.jpg" for number in range(8)], photograph)
    fill(tmp_path, [f"bad{number:02}.jpg" for number in range(12)], b"no picture")
    source = open_source(str(tmp_path))
    with pytest.raises(ValueError, match="12 of 20 images cannot be read") as caught:
        check_images(source, 0.1, 2)
    message = str(caught.value)
    assert message.count("not an image") == 10
    assert "and 2 more" in message
    assert "with max_bad_fraction 0.6" in message
    assert len(check_images(source, 0.6, 2).good) == 8


def test_check_images__needs_at_least_one_image(tmp_path: Path) -> None:
    fill(tmp_path, ["a.jpg"], b"")
    with pytest.raises(ValueError, match=r"1 of 1 images .*\n.*empty file.*\nNo image is left"):
        check_images(open_source(str(tmp_path)), 1.0, 1)
    with pytest.raises(ValueError, match="expected a fraction"):
        check_images(open_source(str(tmp_path)), 5, 1)

"""Shards as a data set: what is read, what is refused, and what is drawn from them."""

import io
import os
import pickle
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from photograph_shards import PHOTOGRAPHS, contents, quick_requests, write_shards, write_tar  # noqa: F401 - a fixture for all tests

from benchmarks.range_server import RangeServer
from data import shard_files
from data.augmentations import CenterCrop, single_view
from data.bad_images import BadImages
from data.decoding import BadImage
from data.images import ImageDataset, SourceSamples, measure_image_stats
from data.label_columns import read_labels
from data.runs import Runs, cut_into_runs
from data.shard_files import ShardError, expand_braces
from data.shards import ShardSource
from data.sources import open_source, open_validation, split_names
from data.splits import open_pretraining_splits

# ---- patterns ----


def test_braces__stand_for_numbers_with_their_width_and_for_words() -> None:
    assert expand_braces("a/{x,y}-{08..10}.tar") == [f"a/{x}-{n}.tar" for x in "xy" for n in ("08", "09", "10")]
    assert expand_braces("{8..10}.tar") == ["8.tar", "9.tar", "10.tar"]


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("t-{000..00.tar", "without its partner"),
        ("t-{009..000}.tar", "counts down"),
        ("t-{000-009}.tar", "is no range"),
        ("t-{0..1}.tar.gz", "compressed as a whole"),
        ("http://localhost/t-*.tar", "lists no files"),
        ("http://localhost/a.jpg", "is not a shard"),
        ("nosuch://bucket/t-{0..1}.tar", "nosuch:// cannot be opened"),
    ],
)
def test_wrong_pattern__is_refused_with_the_reason(pattern: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason.replace(".", r"\.")):
        open_source(pattern)


def test_missing_shard__is_named_before_training(tmp_path: Path) -> None:
    write_shards(tmp_path)
    with pytest.raises(ValueError, match=r"1 of the 4 shards .* missing: .*train-003\.tar"):
        open_source(f"{tmp_path}/train-{{000..003}}.tar")


def test_s3__without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"s3:// cannot be opened .* `pip install s3fs`"):
        open_source("s3://bucket/train-{0..1}.tar")


# ---- kinds of shards ----


def test_tar__is_read_in_the_order_of_the_shards(tmp_path: Path) -> None:
    images = write_shards(tmp_path)
    source = open_source(f"{tmp_path}/train-{{000..002}}.tar")
    assert contents(source) == images
    assert source.name(5) == f"{tmp_path}/train-001.tar#0005"
    assert contents(pickle.loads(pickle.dumps(source))) == images
    assert contents(open_source(str(tmp_path))) == contents(open_source(f"{tmp_path}/*.tar")) == images
    write_shards(tmp_path / "deep")
    assert contents(open_source(f"{tmp_path}/d*p/train-*.tar")) == images
    assert list(read_labels(source, None).values) == ["0", "1"] * 6
    assert "12 images in 3 shards" in source.describe()


@pytest.mark.parametrize("tail", [b"", b"\0" * 700, b"no tar" * 200])
def test_tar__of_tars_that_were_written_one_after_the_other_has_all_images(tmp_path: Path, tail: bytes) -> None:
    images = write_shards(tmp_path)
    parts = [path.read_bytes() for path in sorted(tmp_path.glob("*.tar"))]
    (tmp_path / "all.tar").write_bytes(b"".join(parts) + tail)
    source = open_source(str(tmp_path / "all.tar"))
    assert contents(source) == images


def test_folder__may_have_a_question_mark_in_its_name(tmp_path: Path) -> None:
    images = write_shards(tmp_path / "who?", 2)
    assert contents(open_source(str(tmp_path / "who?"))) == images
    assert contents(open_source(f"{tmp_path}/who?/train-{{000..001}}.tar")) == images


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar__with_long_names_of_each_dialect(tmp_path: Path, kind: int) -> None:
    names = [f"{'folder/' * 40}ünï-{i}.jpg" for i in range(3)]
    members = [*zip(names, PHOTOGRAPHS, strict=False), ("x/y.seg.png", b"1"), ("._a.jpg", b"2"), ("note.md", b"3")]
    source = open_source(str(write_tar(tmp_path / "a.tar", members, kind)))
    assert contents(source) == PHOTOGRAPHS[:3]
    assert source.name(1).endswith("folder/ünï-1")
    assert "1 images, such as x/y.seg.png" in source.notes[0]


def test_tar__with_names_that_are_not_unicode(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"\xe9t\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has Unicode names only")
    write_tar(
        folder / "a.tar", [(f"\udce9t\udce9-{kind}", PHOTOGRAPHS[0]) for kind in ("1.jpg", "1.seg.png", "2.jpg")]
    )
    source = open_source(str(folder))
    assert contents(source) == [PHOTOGRAPHS[0]] * 2
    assert source.name(0) == f"{folder}/a.tar#\udce9t\udce9-1"
    assert "1 images, such as \udce9t\udce9-1.seg.png" in source.notes[0]
    assert contents(open_source(str(folder))) == [PHOTOGRAPHS[0]] * 2  # with the index that was kept


def test_tar__with_links_says_that_they_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.jpg").write_bytes(PHOTOGRAPHS[0])
    (tmp_path / "images/2.jpg").symlink_to("1.jpg")
    (tmp_path / "images/3.jpg").hardlink_to(tmp_path / "images/1.jpg")
    for names in ("123", "2"):
        with tarfile.open(tmp_path / f"{names}.tar", "w") as archive:
            for name in names:
                archive.add(tmp_path / f"images/{name}.jpg", f"{name}.jpg")
    source = open_source(f"{tmp_path}/123.tar")
    assert contents(source) == PHOTOGRAPHS[:1]
    assert "ignored 2 images, such as 2.jpg, which are links" in source.notes[0]
    with pytest.raises(ValueError, match=r"no image in .*2\.tar: .*which are links to other files; pack"):
        open_source(f"{tmp_path}/2.tar")


def test_notes__on_many_shards_are_few(tmp_path: Path) -> None:
    for number in range(8):
        write_tar(tmp_path / f"{number}.tar", [(f"{number}.{kind}", PHOTOGRAPHS[0]) for kind in ("jpg", "seg.png")])
    notes = open_source(f"{tmp_path}/{{0..7}}.tar").notes
    assert [note.partition(":")[0] for note in notes[:5]] == [f"{tmp_path}/{number}.tar" for number in range(5)]
    assert notes[5:] == ["... and 3 more such notes on shards"]


def test_tar__uses_a_sidecar_that_fits_and_ignores_another(tmp_path: Path) -> None:
    images = write_shards(tmp_path, 1)
    with tarfile.open(tmp_path / "train-000.tar") as archive:
        members = [member for member in archive if int(member.name[:4]) < 3]
    lines = [f"{m.name[5:]} {m.offset_data} {m.size} {m.name}" for m in members]
    (tmp_path / "train-000.idx").write_text("\n".join([f"v1.2 {len(lines)}", *lines]))
    assert contents(open_source(f"{tmp_path}/train-000.tar")) == images[:3]
    (tmp_path / "train-000.idx").write_text("v1.2 1\njpg 512 999999999 0.jpg")
    (tmp_path / "train-000.tar").touch()
    shard_files.find_shards.cache_clear()
    assert contents(open_source(f"{tmp_path}/train-000.tar")) == images


def test_zip__stored_or_compressed_with_class_folders(tmp_path: Path) -> None:
    for method, name in ((zipfile.ZIP_STORED, "a"), (zipfile.ZIP_DEFLATED, "b")):
        with zipfile.ZipFile(tmp_path / f"{name}.zip", "w", method) as archive:
            for number, data in enumerate(PHOTOGRAPHS[:4]):
                archive.writestr(f"root/{'cat' if number % 2 else 'dog'}/{number}.jpg", data)
    source = open_source(f"{tmp_path}/{{a,b}}.zip")
    assert contents(source) == PHOTOGRAPHS[:4] * 2
    assert read_labels(source, None).values == ["dog", "cat"] * 4


@pytest.mark.parametrize("kind", ["parquet", "arrow", "stream.arrow"])
def test_tables__are_read_by_group(tmp_path: Path, kind: str) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])})
    for shard in range(2):
        rows = [{"bytes": data, "path": None} for data in PHOTOGRAPHS[shard * 5 : shard * 5 + 5]]
        table = datasets.Dataset.from_dict({"image": rows, "label": [0, 1, 1, 0, 1]}, features=features)
        path, whole = tmp_path / f"t-{shard}.{kind}", table.data.table
        if kind == "parquet":
            table.to_parquet(path, batch_size=2)
        else:
            new = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
            with new(str(path), whole.schema) as writer:
                writer.write_table(whole, max_chunksize=2)
    with RangeServer(tmp_path) as server:
        for where in (str(tmp_path), server.url):
            source = open_source(f"{where}/t-{{0..1}}.{kind}")
            assert isinstance(source, ShardSource)
            assert source.blocks.tolist() == [2, 2, 1] * 2
            assert contents(source) == PHOTOGRAPHS[:10]
            labels = read_labels(source, None)
            assert (labels.values[:2], labels.class_names) == (["dog", "cat"], ("dog", "cat"))


def test_labels__of_tables_with_other_classes_or_without_them_are_refused(tmp_path: Path) -> None:
    for number, names in enumerate((["dog", "cat"], ["cat", "dog"], None)):
        features = datasets.Features({"image": datasets.Image()})
        columns: dict[str, Any] = {"image": [{"bytes": PHOTOGRAPHS[0], "path": None}]}
        if names is not None:
            features, columns = features | {"label": datasets.ClassLabel(names=names)}, columns | {"label": [0]}
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
        table.to_parquet(tmp_path / f"t-{number}.parquet")
    with pytest.raises(ValueError, match=r"classes in column 'label' of .*t-1\.parquet are not those of .*t-0"):
        read_labels(open_source(f"{tmp_path}/t-{{0..1}}.parquet"), None)
    with pytest.raises(ValueError, match=r"no column 'label' in .*t-2\.parquet; its columns are image"):
        read_labels(open_source(f"{tmp_path}/t-{{0,2}}.parquet"), None)


def test_archives__leave_no_more_files_open_than_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = write_shards(tmp_path, 16, 2)
    source, opened, number = open_source(str(tmp_path)), os.open, 2
    monkeypatch.setattr("data.shards._MAX_OPEN", number)

    def slow(*args: Any) -> int:
        time.sleep(0.001)  # so that several threads open the same file
        return opened(*args)

    monkeypatch.setattr("data.shards.os.open", slow)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert list(pool.map(source.read, range(32))) == images
    source.read(0)
    paths = [os.path.realpath(entry.path) for entry in os.scandir("/proc/self/fd")] if Path("/proc").exists() else []
    assert sum(path.endswith(".tar") for path in paths) <= number


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow__with_a_dictionary_of_words_is_read(tmp_path: Path, new: Any) -> None:
    words = pa.array(["dog", "cat"] * 2).dictionary_encode()
    table = pa.table({"image": pa.array(PHOTOGRAPHS[:4], pa.binary()), "word": words})
    with new(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert contents(open_source(f"{tmp_path}/*.arrow")) == PHOTOGRAPHS[:4]


def test_json__beside_the_images_has_the_labels(tmp_path: Path) -> None:
    members = [
        (f"{i}.{kind}", data) for i in range(2) for kind, data in (("json", b'{"kind": "k%d"}' % i), ("png", b"x"))
    ]
    source = open_source(str(write_tar(tmp_path / "a.tar", members)))
    assert read_labels(source, "kind").values == ["k0", "k1"]
    with pytest.raises(ValueError, match=r"expected KEY\.cls beside KEY\.jpg"):
        read_labels(source, None)


def test_splits__are_named_by_the_part_of_the_names_that_differs(tmp_path: Path) -> None:
    write_shards(tmp_path / "test-bucket", 2)
    write_shards(tmp_path / "test-bucket", 1, first="val")
    pattern = f"{tmp_path}/test-bucket/{{train-000,train-001,val-000}}.tar"
    assert split_names(pattern) == split_names(str(tmp_path / "test-bucket")) == ["train", "val"]
    assert len(open_source(pattern)) == 8
    assert len(open_source(pattern, None)) == 12
    validation = open_validation(pattern)
    assert validation is not None
    assert len(validation) == 4
    assert split_names(f"{tmp_path}/test-bucket/val-000.tar") == ["train"]


# ---- what is damaged ----


def test_truncated_tar__keeps_the_whole_images_and_is_named(tmp_path: Path) -> None:
    images = write_shards(tmp_path)
    path = tmp_path / "train-001.tar"
    with tarfile.open(path) as archive:
        end = archive.getmember("0007.jpg").offset_data + 100
    path.write_bytes(path.read_bytes()[:end])
    splits = open_pretraining_splits(
        [f"{tmp_path}/train-{{000..002}}.tar"], validation_fraction=0, max_bad_fraction=0, seed=0
    )
    assert contents(splits.train.source) == [*images[:7], *images[8:]]
    assert "truncated: it ends at byte" in splits.bad[str(path)]


def test_bad_image__is_named_and_replaced_as_it_comes(tmp_path: Path) -> None:
    images = [*PHOTOGRAPHS[:5], b"no image", *PHOTOGRAPHS[5:9]]
    write_tar(tmp_path / "a.tar", [(f"{i}.jpg", data) for i, data in enumerate(images)])
    source = open_source(str(tmp_path / "a.tar"))
    samples = SourceSamples(source, cut_into_runs(source.blocks))
    file = tmp_path / "bad.jsonl"
    dataset = ImageDataset(samples, single_view(CenterCrop((8, 8)), 3), train=True, bad_images_file=file)
    seen = [dataset[counter]["image_index"] for counter in range(10)]
    assert sorted({*seen, 5}) == list(range(10))
    assert 5 not in seen
    assert list(BadImages.read(file)) == [f"{tmp_path}/a.tar#5"]


class Pipe(io.RawIOBase):
    """A stream that cannot go back, to which zipfile writes the size of a file after it."""

    def __init__(self) -> None:
        self.content = b""

    def writable(self) -> bool:
        return True

    def write(self, content: object) -> int:
        self.content += bytes(content)  # type: ignore[call-overload]
        return len(bytes(content))  # type: ignore[call-overload]


def test_zip__written_to_a_stream_has_files_without_what_follows_them(tmp_path: Path) -> None:
    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_STORED) as archive:
        for number in range(3):
            archive.writestr(f"{number}.jpg", PHOTOGRAPHS[number])
            archive.writestr(f"{number}.cls", str(number))
    (tmp_path / "a.zip").write_bytes(pipe.content)
    source = open_source(str(tmp_path / "a.zip"))
    assert contents(source) == PHOTOGRAPHS[:3]
    assert list(read_labels(source, None).values) == ["0", "1", "2"]


@pytest.mark.parametrize("kind", ["zip", "parquet", "arrow"])
def test_wrong_file__is_refused_with_its_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"a.{kind}").write_bytes(b"no such file" * 100)
    with pytest.raises(ValueError, match=rf"a\.{kind} is no {kind}"):
        open_source(f"{tmp_path}/*.{kind}")


def test_damaged_group__of_a_table_is_named(tmp_path: Path) -> None:
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": data, "path": None} for data in PHOTOGRAPHS[:4]]},
        features=datasets.Features({"image": datasets.Image()}),
    )
    table.to_parquet(tmp_path / "a.parquet", batch_size=2)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:1000] = bytes(996)
    (tmp_path / "a.parquet").write_bytes(content)
    source = open_source(f"{tmp_path}/*.parquet")
    with pytest.raises(ShardError, match=r"a\.parquet cannot be read: group 0 of its rows is damaged \("):
        source.read(0)
    assert source.read(2) == PHOTOGRAPHS[2]


def test_wrong_tar__is_refused_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"no such file" * 100)
    with pytest.raises(ValueError, match=r"no image in .*a\.tar: no tar header at byte 0"):
        open_source(str(tmp_path / "a.tar"))


@pytest.mark.parametrize(
    "fields", [b"0 path=a\n", b"x path=a\n", b"-4 path=a\n", b"99 path=a\n", b"11 size=no\n", b"14 size=-512\n"]
)
def test_damaged_header__ends_the_tar_with_a_problem(tmp_path: Path, fields: bytes) -> None:
    path, entry = tmp_path / "a.tar", tarfile.TarInfo("pax")
    entry.type, entry.size = tarfile.XHDTYPE, len(fields)
    write_tar(path, [(f"{number}.jpg", data) for number, data in enumerate(PHOTOGRAPHS[:3])])
    content = path.read_bytes()
    with tarfile.open(path) as archive:
        middle = archive.getmember("1.jpg").offset
    header = entry.tobuf(tarfile.USTAR_FORMAT) + fields.ljust(512, b"\0")
    path.write_bytes(content[:middle] + header + content[middle:])
    source = open_source(str(path))
    assert contents(source) == PHOTOGRAPHS[:1]
    assert f"damaged tar header at byte {middle:,}, after 1 images" in source.problems[str(path)]


# ---- statistics and splits ----


def test_statistics__are_measured_on_few_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.sampling.RUNS_PER_WINDOW", 2)
    write_shards(tmp_path, 4, 6)
    source = open_source(f"{tmp_path}/*.tar")
    seen, read = set[int](), source.read
    monkeypatch.setattr(source, "read", lambda index: seen.add(index) or read(index))
    samples = SourceSamples(source, Runs(np.array([0, 6, 12, 18]), np.array([6, 6, 6, 6])))
    mean, _ = measure_image_stats(ImageDataset(samples, single_view(CenterCrop((8, 8)), 3)), num_samples=10)
    assert len(seen) == 10
    assert len({index // 6 for index in seen}) == 2
    assert len(mean) == 3


def test_split__of_few_images_is_disjoint_and_complete(tmp_path: Path) -> None:
    write_shards(tmp_path)
    splits = open_pretraining_splits([str(tmp_path)], validation_fraction=0.2, max_bad_fraction=0, seed=0)
    both = [*splits.train.indices, *splits.validation.indices]
    assert sorted(both) == list(range(12))
    assert len(splits.validation) == 3
    assert "12 images" in splits.describe()


def test_bad_entries__raise_bad_image(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.jpg", PHOTOGRAPHS[0])
    with pytest.raises(BadImage, match="compression method 14"):
        open_source(str(tmp_path / "a.zip")).read(0)

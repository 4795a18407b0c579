"""Tests of labeled datasets of every form, seeded splits, few-label subsets, and error messages about labels."""

import gzip
import logging
import shutil
from io import BytesIO
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from data.labeled import labeled_subset, open_labeled, split_stratified, with_validation, write_subset
from data.sources import BUNDLED, open_source, open_validation


@pytest.fixture(scope="module")
def clothes() -> datasets.DatasetDict:
    """Real images: three classes of the bundled Fashion-MNIST, six training and two test images each."""
    files = {split: str(BUNDLED["sample-fashion"] / f"{split}.parquet") for split in ("train", "test")}
    found = datasets.load_dataset("parquet", data_files=files)
    chosen = {
        split: np.concatenate([np.flatnonzero(np.array(rows["label"]) == label)[:count] for label in range(3)])
        for (split, rows), count in zip(found.items(), (6, 2), strict=True)
    }
    return datasets.DatasetDict({split: rows.select(chosen[split]) for split, rows in found.items()})


def with_labels(rows: datasets.Dataset, feature: object, values: list, name: str = "label") -> datasets.Dataset:
    return rows.remove_columns("label").add_column(name, values, feature=feature)


def write_folders(
    rows: datasets.Dataset, folder: Path, names: tuple[str, ...] = ("shirt", "trouser", "pullover")
) -> Path:
    for index, row in enumerate(rows):
        path = folder / names[row["label"]] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    return folder


def write_idx(folder: Path, prefix: str, images: np.ndarray, labels: np.ndarray | None, suffix: str = "-") -> None:
    for kind, values in (("images", images), ("labels", labels)):
        if values is not None:
            header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
            file = folder / f"{prefix}-{kind}{suffix}idx{values.ndim}-ubyte.gz"
            file.write_bytes(gzip.compress(header + values.astype(np.uint8).tobytes()))


def pixels(split, index: int) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(split.sample(index)["image"])))


def test_sample_fashion__has_its_class_names_and_official_split():
    images = open_labeled("sample-fashion")
    assert images.class_names[:2] == ("T-shirt/top", "Trouser")
    assert np.bincount(images.train.labels).tolist() == [500] * 10
    assert images.validation is None
    assert np.bincount(images.test.labels).tolist() == [100] * 10


def test_class_folders__without_splits(clothes, tmp_path):
    images = open_labeled([str(write_folders(clothes["train"], tmp_path))])
    assert images.class_names == ("pullover", "shirt", "trouser")
    assert images.validation is None
    assert images.test is None
    for index in range(len(images.train)):
        name = Path(images.train.name(index))
        assert name.parent.name == images.class_names[images.train.labels[index]]
        expected = np.asarray(clothes["train"][int(name.stem)]["image"])
        np.testing.assert_array_equal(pixels(images.train, index), expected)


@pytest.mark.parametrize("validation", ["val", "validation"])
def test_class_folders__with_splits(clothes, tmp_path, validation):
    for split in ("train", validation, "test"):
        write_folders(clothes["train" if split == "train" else "test"], tmp_path / split)
    images = open_labeled(str(tmp_path))
    assert images.class_names == ("pullover", "shirt", "trouser")
    assert [len(split) for split in (images.train, images.validation, images.test)] == [18, 6, 6]
    assert images.validation.name(0).startswith(str(tmp_path / validation))


def test_class_folders__a_training_part_alone_and_folders_within_classes(clothes, tmp_path):
    write_folders(clothes["train"], tmp_path / "train", ("shirt/short", "trouser/long", "pullover/red/old"))
    assert open_labeled(str(tmp_path)).class_names == ("pullover", "shirt", "trouser")


def test_class_folders__one_class_may_be_called_train(clothes, tmp_path):
    write_folders(clothes["train"], tmp_path, ("bus", "car", "train"))
    assert open_labeled(str(tmp_path)).class_names == ("bus", "car", "train")


def test_class_folders__numbers_are_in_their_own_order(clothes, tmp_path):
    write_folders(clothes["train"], tmp_path, ("10", "9", "100"))
    assert open_labeled(str(tmp_path)).class_names == ("9", "10", "100")


def test_class_folders__images_beside_them_are_left_aside_and_named(clothes, tmp_path, caplog):
    write_folders(clothes["train"], tmp_path)
    clothes["train"][0]["image"].save(tmp_path / "overview.png")
    with caplog.at_level(logging.WARNING):
        images = open_labeled(str(tmp_path))
    assert len(images.train) == 18
    assert "1 images outside the class folders are ignored" in caplog.text
    assert "overview.png" in caplog.text
    assert not any("overview" in images.train.name(index) for index in range(18))


@pytest.mark.parametrize("form", ["saved", "parquet", "arrow file"])
def test_tables__class_label_column(clothes, tmp_path, form):
    if form == "saved":
        clothes.save_to_disk(tmp_path)
    elif form == "parquet":
        for split, rows in clothes.items():
            rows.to_parquet(tmp_path / f"{split}-00000.parquet")
    else:
        clothes["train"].save_to_disk(tmp_path / "x")
        shutil.copy(next((tmp_path / "x").glob("*.arrow")), tmp_path / "all.arrow")
    images = open_labeled(str(tmp_path / "all.arrow" if form == "arrow file" else tmp_path))
    assert images.class_names == ("T-shirt/top", "Trouser", "Pullover")
    assert images.train.labels.tolist() == clothes["train"]["label"]
    assert (images.test is None) == (form == "arrow file")


@pytest.mark.parametrize(
    ("values", "feature", "expected"),
    [
        (["cat", "dog", "eel"], "string", ("cat", "dog", "eel")),
        ([10, 9, -1], "int64", ("-1", "9", "10")),
    ],
)
def test_tables__string_and_int_columns(clothes, tmp_path, values, feature, expected):
    rows = clothes["train"]
    labels = [values[label] for label in rows["label"]]
    with_labels(rows, datasets.Value(feature), labels, "category").to_parquet(tmp_path / "train.parquet")
    images = open_labeled(str(tmp_path))
    assert images.class_names == expected
    assert [images.class_names[label] for label in images.train.labels] == [str(label) for label in labels]


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_tables__of_other_classes_are_not_mixed(clothes, tmp_path, ending):
    rows = clothes["train"]
    classes = datasets.ClassLabel(names=["Pullover", "Trouser", "T-shirt/top"])
    other = with_labels(rows, classes, rows["label"])
    for number, part in enumerate((rows, other)):
        if ending == "parquet":
            part.to_parquet(tmp_path / f"{number}.parquet")
        else:
            part.save_to_disk(tmp_path / f"saved{number}")
            next((tmp_path / f"saved{number}").glob("*.arrow")).rename(tmp_path / f"{number}.arrow")
            shutil.rmtree(tmp_path / f"saved{number}")
    with pytest.raises(ValueError, match=rf"in column 'label' of .*1\.{ending} are not those of .*0\.{ending}"):
        open_labeled(str(tmp_path))


def test_tables__of_several_label_columns_one_is_asked_for(clothes, tmp_path):
    rows = clothes["train"].remove_columns("label")
    for name, classes in (("coarse_label", ["a", "b"]), ("fine_label", ["c", "d", "e"])):
        values = [index % len(classes) for index in range(len(rows))]
        rows = rows.add_column(name, values, feature=datasets.ClassLabel(names=classes))
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(
        ValueError, match="several label columns: coarse_label, fine_label; choose one with label_column"
    ):
        open_labeled(str(tmp_path))
    assert open_labeled(str(tmp_path), label_column="fine_label").class_names == ("c", "d", "e")


@pytest.mark.parametrize("suffix", ["-", "."])
def test_idx__pictures_and_labels_come_back(clothes, tmp_path, suffix):
    for prefix, split in (("train", "train"), ("t10k", "test")):
        rows = clothes[split]
        images = np.stack([np.asarray(image) for image in rows["image"]])
        write_idx(tmp_path, prefix, images, np.array(rows["label"]), suffix)
    images = open_labeled(str(tmp_path))
    assert images.class_names == ("0", "1", "2")
    assert images.test.labels.tolist() == clothes["test"]["label"]
    np.testing.assert_array_equal(pixels(images.test, 3), np.asarray(clothes["test"][3]["image"]))
    assert len(open_source(str(tmp_path))) == 18  # unlabeled too: pre-training reads the same folder
    assert len(open_validation(str(tmp_path))) == 6
    assert len(open_source(str(tmp_path), split=None)) == 24


def test_several__the_same_classes_are_joined(clothes, tmp_path):
    folders = [str(write_folders(clothes[split], tmp_path / split)) for split in ("train", "test")]
    images = open_labeled(folders)
    assert len(images.train) == 24
    for index in range(24):
        assert Path(images.train.name(index)).parent.name == images.class_names[images.train.labels[index]]
    write_folders(clothes["test"], tmp_path / "other", ("hat", "shoe", "sock"))
    with pytest.raises(ValueError, match="classes of the datasets differ: pullover, shirt, trouser in the first, hat"):
        open_labeled([*folders, str(tmp_path / "other")])


def test_readable__a_broken_image_is_left_out_with_its_label(clothes, tmp_path):
    write_folders(clothes["train"], tmp_path)
    (tmp_path / "shirt" / "0.png").write_bytes(b"no image")
    images = open_labeled(str(tmp_path))
    split, found = images.train.readable(0.1)
    assert np.bincount(split.labels).tolist() == [6, 5, 6]
    assert list(found.bad) == [str(tmp_path / "shirt" / "0.png")]
    for index, label in enumerate(split.labels):
        assert Path(split.name(index)).parent.name == images.class_names[label]
    for file in (tmp_path / "shirt").iterdir():
        file.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"all images of 1 classes are unreadable, such as .*shirt"):
        open_labeled(str(tmp_path)).train.readable(0.5)


def test_mistake__one_class(clothes, tmp_path):
    write_folders(clothes["train"].filter(lambda row: row["label"] == 0), tmp_path)
    with pytest.raises(ValueError, match="have the class 'shirt'; classification needs at least two"):
        open_labeled(str(tmp_path))


def test_mistake__images_without_class_folders(clothes, tmp_path):
    clothes["train"][0]["image"].save(tmp_path / "1.png")
    with pytest.raises(ValueError, match=r"the images are directly in .* expected a folder for each class"):
        open_labeled(str(tmp_path))
    with pytest.raises(ValueError, match="the images are directly in"):
        open_labeled("sample")


def test_mistake__a_list_of_paths(clothes, tmp_path):
    (tmp_path / "list.txt").write_text("a.png\n")
    with pytest.raises(ValueError, match="has no labels; expected a folder of class folders"):
        open_labeled(str(tmp_path / "list.txt"))


def test_mistake__a_class_with_one_image_cannot_be_split(clothes, tmp_path):
    write_folders(clothes["train"].select(range(13)), tmp_path)  # 6, 6 and 1
    images = open_labeled(str(tmp_path))
    with pytest.raises(ValueError, match="class 'pullover' has one image, which cannot be used for both training and"):
        with_validation(images, 0.1, 0)


def test_mistake__empty_folder(tmp_path):
    with pytest.raises(ValueError, match="no image files in"):
        open_labeled(str(tmp_path))


def test_mistake__classes_that_differ_between_splits(clothes, tmp_path):
    write_folders(clothes["train"], tmp_path / "train")
    write_folders(clothes["test"], tmp_path / "val", ("shirt", "trouser", "hat"))
    with pytest.raises(ValueError, match=r"validation split has classes that the training split does not have: hat"):
        open_labeled(str(tmp_path))


def test_mistake__a_class_missing_from_validation_is_reported(clothes, tmp_path, caplog):
    write_folders(clothes["train"], tmp_path / "train")
    write_folders(clothes["test"].select(range(4)), tmp_path / "val")
    with caplog.at_level(logging.WARNING):
        assert len(open_labeled(str(tmp_path)).validation) == 4
    assert "the validation split has no images of: pullover" in caplog.text


def test_mistake__labels_in_the_wrong_split(clothes, tmp_path):
    secret = with_labels(clothes["train"], clothes["train"].features["label"], [-1] * 18)
    datasets.DatasetDict(train=secret, test=clothes["test"]).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"the training split of .* has no labels, but the test split has: are"):
        open_labeled(str(tmp_path))


def test_mistake__secret_test_labels_are_ignored_with_a_warning(clothes, tmp_path, caplog):
    feature = datasets.ClassLabel(names=["a", "b", "c"])
    train = with_labels(clothes["train"], feature, clothes["train"]["label"])
    secret = with_labels(clothes["test"], feature, [-1] * 6)
    datasets.DatasetDict(train=train, test=secret).save_to_disk(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert open_labeled(str(tmp_path)).test is None
    assert "the test split of" in caplog.text
    assert "has no labels and is ignored" in caplog.text


def test_mistake__some_training_labels_are_missing(clothes, tmp_path):
    rows = with_labels(clothes["train"], datasets.Value("string"), [None, *["a", "b"] * 8, "a"])
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"1 of the 18 training images of .* have no label"):
        open_labeled(str(tmp_path))


def test_mistake__regression_column(clothes, tmp_path):
    rows = with_labels(clothes["train"], datasets.Value("float32"), [index / 4 for index in range(18)], "target")
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"column 'target' .* holds float32 numbers such as 0.0: a regression target"):
        open_labeled(str(tmp_path))


def test_mistake__several_labels_for_an_image(clothes, tmp_path):
    rows = with_labels(clothes["train"], datasets.Sequence(datasets.Value("int64")), [[0, 1]] * 18, "labels")
    rows.to_parquet(tmp_path / "train.parquet")
    with pytest.raises(ValueError, match=r"column 'labels' .* \(such as \[0, 1\]\); expected one class per image"):
        open_labeled(str(tmp_path))


def test_mistake__no_label_column(clothes, tmp_path):
    clothes["train"].rename_column("label", "sort").cast_column("sort", datasets.Value("int64")).to_parquet(
        tmp_path / "train.parquet"
    )
    with pytest.raises(ValueError, match=r"no label column in .* its columns are image, sort"):
        open_labeled(str(tmp_path))
    assert len(open_labeled(str(tmp_path), label_column="sort").class_names) == 3
    with pytest.raises(ValueError, match=r"no column 'kind' in .* its columns are image, sort"):
        open_labeled(str(tmp_path), label_column="kind")


def test_mistake__declared_classes_without_images_are_ignored_with_a_warning(clothes, tmp_path, caplog):
    clothes["train"].to_parquet(tmp_path / "train.parquet")
    with caplog.at_level(logging.WARNING):
        assert open_labeled(str(tmp_path)).class_names == ("T-shirt/top", "Trouser", "Pullover")
    assert "7 of the 10 classes of" in caplog.text
    assert "have no training images and are ignored: Dress, Coat" in caplog.text


def test_mistake__validation_folders_are_not_taken_for_classes(clothes, tmp_path):
    for split in ("val", "test"):
        write_folders(clothes["test"], tmp_path / split)
    with pytest.raises(ValueError, match=r"there is no train folder in .*, which has 'test', 'val'"):
        open_labeled(str(tmp_path))


def test_mistake__no_training_split(clothes, tmp_path):
    datasets.DatasetDict(test=clothes["test"]).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=r"no split 'train' in .*; it has: test"):
        open_labeled(str(tmp_path))


def test_mistake__idx_files_that_do_not_fit(clothes, tmp_path):
    images = np.stack([np.asarray(image) for image in clothes["train"]["image"]])
    write_idx(tmp_path, "train", images, np.zeros(17, np.uint8))
    with pytest.raises(ValueError, match=r"has 17 labels, but train-images-idx3-ubyte.gz has 18 images"):
        open_labeled(str(tmp_path))
    write_idx(tmp_path, "train", images, None)
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(ValueError, match=r"the training split of .* has no labels"):
        open_labeled(str(tmp_path))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + b"\0\0\0\x02" * 3 + b"1"))
    with pytest.raises(ValueError, match="has 17 bytes, but its header says 24; copy it again"):
        open_labeled(str(tmp_path))
    whole = gzip.compress(np.random.default_rng(0).bytes(1000))
    for damaged in (b"\x1f\x8b broken", whole[:500] + bytes(255 - byte for byte in whole[500:520]) + whole[520:]):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cannot be read .* copy it again"):
            open_labeled(str(tmp_path))


def test_split__is_stratified_seeded_and_complete():
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 50, 2]))
    kept, validation = split_stratified(labels, 0.1, seed=0)
    assert np.bincount(labels[validation]).tolist() == [10, 5, 1]
    assert sorted([*kept, *validation]) == list(range(152))
    assert np.array_equal(split_stratified(labels, 0.1, seed=0)[1], validation)
    assert not np.array_equal(split_stratified(labels, 0.1, seed=1)[1], validation)
    assert np.bincount(labels[split_stratified(labels, 0.9, 0)[0]]).tolist() == [10, 5, 1]
    with pytest.raises(ValueError, match="validation_fraction is 1, expected more than 0 and less than 1"):
        split_stratified(labels, 1, 0)


def test_with_validation__reports_what_it_takes_and_keeps_an_existing_split(caplog):
    images = open_labeled("sample-fashion")
    with caplog.at_level(logging.WARNING):
        split = with_validation(images, 0.1, 0)
    assert "500 of the 5000 training images, 10% of each class, are used for validation" in caplog.text
    assert np.bincount(split.validation.labels).tolist() == [50] * 10
    assert not set(split.train.indices) & set(split.validation.indices)
    assert with_validation(split, 0.5, 1) is split


def test_subset__is_balanced_and_nested():
    labels = np.random.default_rng(0).integers(0, 7, 2000)
    subsets = [labeled_subset(labels, num_per_class=count, seed=3) for count in (1, 10, 20, 100)]
    for count, subset in zip((1, 10, 20, 100), subsets, strict=True):
        assert np.bincount(labels[subset]).tolist() == [count] * 7
    for small, large in pairwise(subsets):
        assert set(small) < set(large)
    assert not np.array_equal(labeled_subset(labels, num_per_class=10, seed=4), subsets[1])


def test_subset__a_fraction_keeps_every_class_and_nests_too():
    labels = np.repeat([0, 1, 2], [1000, 300, 20])
    small, large = (labeled_subset(labels, fraction=fraction, seed=0) for fraction in (0.01, 0.1))
    assert np.bincount(labels[small]).tolist() == [10, 3, 1]
    assert np.bincount(labels[large]).tolist() == [100, 30, 2]
    assert set(small) < set(large)
    assert len(labeled_subset(labels, fraction=1, seed=0)) == len(labels)


def test_subset__mistakes_are_reported():
    labels = np.repeat([0, 1], [30, 12])
    with pytest.raises(ValueError, match="labels_per_class is 20, but class 'dog' has only 12 training images"):
        labeled_subset(labels, num_per_class=20, seed=0, class_names=("cat", "dog"))
    with pytest.raises(ValueError, match="labels_per_class is 0, expected at least 1"):
        labeled_subset(labels, num_per_class=0, seed=0)
    with pytest.raises(ValueError, match="label_fraction is 20, expected more than 0 and at most 1"):
        labeled_subset(labels, fraction=20, seed=0)
    with pytest.raises(ValueError, match="either num_per_class or fraction, not both or neither"):
        labeled_subset(labels, seed=0)


def test_subset__is_written_with_names_and_classes(tmp_path):
    images = open_labeled("sample-fashion")
    subset = images.train.select(labeled_subset(images.train.labels, num_per_class=2, seed=0))
    write_subset(tmp_path / "labels.txt", subset, images.class_names)
    lines = [line.split("\t") for line in (tmp_path / "labels.txt").read_text().splitlines()]
    assert len(lines) == 20
    for index, (name, label) in enumerate(lines):
        assert name == subset.name(index)
        assert label == images.class_names[subset.labels[index]]

"""Images with boxes: COCO json, YOLO folders and tables, and what of them cannot be used."""

import json
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torch.testing import assert_close

from data.box_datasets import open_box_splits
from data.coco import decode_mask, read_coco
from data.instances import with_masks
from data.yolo import read_class_names

PHOTOGRAPHS = sorted((ROOT / "data/samples/photographs/train").glob("*.jpg"))[:3]
NAMES = ["cat", "dog"]


def coco(boxes, *, names=NAMES, files=PHOTOGRAPHS) -> dict:
    """COCO json with rows (image number, category id, box, and more entries) and the real sizes of the images."""
    sizes = [Image.open(file).size for file in files]
    return {
        "images": [
            {"id": 10 + number, "file_name": file.name, "width": width, "height": height}
            for number, (file, (width, height)) in enumerate(zip(files, sizes, strict=True))
        ],
        "annotations": [
            {"id": number, "image_id": 10 + image, "category_id": category, "bbox": box, **(more[0] if more else {})}
            for number, (image, category, box, *more) in enumerate(boxes)
        ],
        "categories": [{"id": 3 + number, "name": name} for number, name in enumerate(names)],
    }


GOOD = [(0, 3, [10, 20, 30, 40]), (0, 4, [0, 0, 50, 50], {"area": 700, "iscrowd": 1}), (2, 4, [5, 5, 10, 10])]


def write(folder: Path, content, name="annotations.json", files=PHOTOGRAPHS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file.name).symlink_to(file)
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def open_all(dataset, max_bad_fraction=0.0, validation_fraction=0.0):
    return open_box_splits(
        str(dataset), validation_fraction=validation_fraction, max_bad_fraction=max_bad_fraction, seed=0
    )


def test_coco__has_the_boxes_of_each_image_and_images_without_any(tmp_path):
    splits = open_all(write(tmp_path / "data", coco(GOOD)))
    assert splits.class_names == ("cat", "dog")
    train = splits.by_name["train"]
    width, height = Image.open(PHOTOGRAPHS[0]).size
    sample = train.sample(0)
    assert sample["image"] == PHOTOGRAPHS[0].read_bytes()
    assert_close(
        sample["boxes"],
        torch.tensor([[10 / width, 20 / height, 40 / width, 60 / height], [0, 0, 50 / width, 50 / height]]),
    )
    assert sample["classes"].tolist() == [0, 1]
    assert sample["is_crowd"].tolist() == [False, True]
    assert_close(sample["areas"] * width * height, torch.tensor([1200.0, 700.0]))
    assert len(train.sample(1)["boxes"]) == 0
    assert train.sample(2)["classes"].tolist() == [1]
    assert any("1 of 3 images of the train split have no box" in note for note in splits.notes)


@pytest.mark.parametrize("layout", ["folders", "annotations", "file"])
def test_coco__is_found_in_folders_of_splits_and_beside_them(tmp_path, layout):
    if layout == "folders":
        write(tmp_path / "train", coco(GOOD))
        write(tmp_path / "valid", coco(GOOD), "_annotations.coco.json")
    elif layout == "annotations":
        for split in ("train", "val"):
            write(tmp_path / f"{split}2017", "", "unused.txt")
            write(tmp_path / "annotations", coco(GOOD), f"instances_{split}2017.json", files=[])
        write(tmp_path / "annotations", coco(GOOD), "captions_train2017.json", files=[])
    else:
        write(tmp_path / "images", "", "unused.txt")
        (tmp_path / "boxes.json").write_text(json.dumps(coco(GOOD)))
    splits = open_all(tmp_path / "boxes.json" if layout == "file" else tmp_path)
    assert list(splits.by_name) == ["train"] if layout == "file" else ["train", "validation"]
    assert {len(split) for split in splits.by_name.values()} == {3}


def test_validation_split__is_taken_from_the_training_images(tmp_path):
    splits = open_all(write(tmp_path / "data", coco([*GOOD, (1, 3, [1, 1, 5, 5])])), validation_fraction=0.3)
    assert {name: len(split) for name, split in splits.by_name.items()} == {"train": 2, "validation": 1}
    assert sum(split.num_boxes for split in splits.by_name.values()) == 4


def test_validation_split__is_not_taken_from_a_single_image(tmp_path):
    splits = open_all(write(tmp_path / "data", coco(GOOD[:1], files=PHOTOGRAPHS[:1])), validation_fraction=None)
    assert {name: len(split) for name, split in splits.by_name.items()} == {"train": 1}


def test_validation_split__is_taken_from_the_training_images_beside_a_test_split_too(tmp_path):
    for name in ("train", "test"):
        write(tmp_path / "data" / name, coco(GOOD))
    splits = open_all(tmp_path / "data", validation_fraction=None)
    assert {name: len(split) for name, split in splits.by_name.items()} == {"train": 2, "validation": 1, "test": 3}


def test_median_size__is_that_of_the_images_of_the_split(tmp_path):
    folder = write(tmp_path / "data", coco([*GOOD, (1, 3, [1, 1, 5, 5])]))
    splits = open_all(folder, validation_fraction=0.3)
    sizes = {index: Image.open(file).size for index, file in enumerate(PHOTOGRAPHS)}
    boxes = {0: [(30, 40), (50, 50)], 1: [(5, 5)], 2: [(10, 10)]}
    for split in splits.by_name.values():
        expected = [(w / sizes[image][0], h / sizes[image][1]) for image in split.indices for w, h in boxes[image]]
        assert split.median_size == pytest.approx(np.median(expected, axis=0))


BAD = [
    (5, 3, [1, 1, 5, 5]),  # no such image
    (0, 9, [1, 1, 5, 5]),  # no such class
    (0, 3, [1, 1, 0, 5]),  # no area
    (0, 3, [9999, 1, 5, 5]),  # outside
    (0, 3, [1, 1, 5]),  # not a box
]


def test_bad_boxes__are_counted_by_reason_in_one_message(tmp_path):
    folder = write(tmp_path / "data", coco([*GOOD, *BAD]))
    with pytest.raises(ValueError, match="5 of 8 boxes") as raised:
        open_all(folder, max_bad_fraction=0.5)
    for part in (
        "1 of an image that is not listed, such as annotation 3 of image_id 15",
        f"1 of a class outside the list of 2, such as annotation 4 of {PHOTOGRAPHS[0].name}",
        "1 without four finite numbers, such as annotation 7",
        "1 with no area, such as annotation 5",
        "1 outside of the image, such as annotation 6",
        "max_bad_fraction 0.625",
    ):
        assert part in str(raised.value)
    splits = open_all(folder, max_bad_fraction=0.63)
    assert splits.by_name["train"].num_boxes == 3
    assert any("5 of 8 boxes of the train split" in note for note in splits.notes)


def test_boxes__that_reach_beyond_the_image_are_cut_and_counted(tmp_path):
    splits = open_all(write(tmp_path / "data", coco([(0, 3, [-30, -30, 60, 60]), (1, 3, [-0.2, 0, 9, 9])])))
    width, height = Image.open(PHOTOGRAPHS[0]).size
    assert_close(splits.by_name["train"].sample(0)["boxes"], torch.tensor([[0, 0, 30 / width, 30 / height]]))
    assert next(note for note in splits.notes if "reach beyond" in note).startswith("1 boxes")


def without(content: dict, key: str) -> dict:
    return {name: value for name, value in content.items() if name != key}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("{}", "is empty"),
        ('{"images": [', "cannot be read as json"),
        (without(coco(GOOD), "annotations"), "no list 'annotations'"),
        (coco(GOOD) | {"images": []}, "lists no images"),
        (coco(GOOD) | {"categories": []}, "lists no categories"),
        (coco(GOOD, names=["cat", "cat"]), "category name 'cat' is there more than once"),
        (coco(GOOD) | {"images": [{"id": 1, "file_name": "lost.jpg"}]}, "such as lost.jpg, are in none of"),
        (coco([]), "no image of the train split of .* has a box"),
    ],
)
def test_coco__that_cannot_be_used_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        open_all(write(tmp_path / "data", content))


def test_coco__with_numbers_that_no_array_holds_counts_them_as_bad_boxes(tmp_path):
    content = coco([(0, 3, [10**400, 1, 5, 5]), (0, 3, [1, 2, 30, 40], {"area": 10**400}), *GOOD])
    content["images"][0]["width"] = 10**30
    folder = write(tmp_path / "data", content)
    with pytest.raises(ValueError, match=r"1 of 5 boxes .*cannot be used:\n  1 without four finite numbers"):
        open_all(folder)
    train = open_all(folder, max_bad_fraction=0.5).by_name["train"]
    assert train.sample(0)["areas"][0] * np.prod(Image.open(PHOTOGRAPHS[0]).size) == pytest.approx(30 * 40)


def test_coco__with_a_name_that_no_file_can_have_is_refused(tmp_path):
    content = coco(GOOD)
    for image in content["images"]:
        image["file_name"] = "x" * 5000
    with pytest.raises(ValueError, match="are in none of"):
        open_all(write(tmp_path / "data", content))


def test_coco__with_sizes_of_turned_images_is_refused(tmp_path):
    content = coco(GOOD)
    image = content["images"][1]
    image["width"], image["height"] = 2 * image["height"], image["width"]
    with pytest.raises(ValueError, match=f"other proportions than 1 of 3 images have: .*{PHOTOGRAPHS[1].name} has"):
        open_all(write(tmp_path / "data", content))


def test_coco__with_a_missing_image_file_names_it(tmp_path):
    folder = write(tmp_path / "data", coco(GOOD))
    (folder / PHOTOGRAPHS[1].name).unlink()
    with pytest.raises(ValueError, match=f"1 of 3 images cannot be read(.|\n)*{PHOTOGRAPHS[1].name}"):
        open_all(folder)
    assert len(open_all(folder, max_bad_fraction=0.4).by_name["train"]) == 2


def yolo(folder: Path, lines=("0 0.5 0.5 0.2 0.4\n1 0.1 0.1 0.3 0.1 0.2 0.4\n", "")) -> Path:
    write(folder / "images/train", "", "unused.txt")
    (folder / "labels/train").mkdir(parents=True)
    for file, text in zip(PHOTOGRAPHS, lines, strict=False):
        (folder / "labels/train" / f"{file.stem}.txt").write_text(text)
    (folder / "data.yaml").write_text("names: {0: cat, 1: dog}\n")
    return folder


def test_yolo__has_boxes_and_polygons_and_images_without_a_file(tmp_path):
    splits = open_all(yolo(tmp_path / "data"))
    train = splits.by_name["train"]
    assert splits.class_names == ("cat", "dog")
    sample = train.sample(0)
    assert_close(sample["boxes"], torch.tensor([[0.4, 0.3, 0.6, 0.7], [0.1, 0.1, 0.3, 0.4]]))
    assert sample["classes"].tolist() == [0, 1]
    assert (len(train), train.num_empty) == (3, 2)


def test_yolo__names_the_line_that_cannot_be_used(tmp_path):
    with pytest.raises(ValueError, match=r"1 of a class outside the list of 2, such as .*\.txt, line 2") as raised:
        open_all(yolo(tmp_path / "data", ["0 0.5 0.5 0.2 0.4\n1e30 0.5 0.5 0.1 0.1\nx y\n"]))
    assert "1 without four finite numbers" in str(raised.value)


@pytest.mark.parametrize("has_names", [True, False])
def test_table__has_the_objects_of_each_row(tmp_path, has_names):
    category = datasets.ClassLabel(names=NAMES) if has_names else datasets.Value("int64")
    objects = {"bbox": datasets.List(datasets.List(datasets.Value("float32"))), "category": datasets.List(category)}
    rows = {
        "image": [str(file) for file in PHOTOGRAPHS],
        "objects": [
            {"bbox": [[10, 20, 30, 40], [0, 0, 5, 5]], "category": [1, 0]},
            {"bbox": [], "category": []},
            {"bbox": [[1, 1, 2, 2]], "category": [1]},
        ],
    }
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "train.parquet")
    splits = open_all(tmp_path / "train.parquet")
    width, height = Image.open(PHOTOGRAPHS[0]).size
    sample = splits.by_name["train"].sample(0)
    assert splits.class_names == (tuple(NAMES) if has_names else ("0", "1"))
    assert sample["classes"].tolist() == [1, 0]
    assert_close(sample["boxes"][0], torch.tensor([10 / width, 20 / height, 40 / width, 60 / height]))
    assert len(splits.by_name["train"].sample(1)["boxes"]) == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.yaml", b"names: {0: cat, x: dog}", "no list of different class names"),
        ("data.yaml", b"names: {0: cat, 2: dog}", "no list of different class names"),
        ("classes.txt", b"cat\n\ndog\n", "no list of different class names"),
        ("classes.txt", b"\xe9t\xe9\n", "the classes cannot be read from .*: 'utf-8' codec"),
    ],
)
def test_yolo__with_names_that_cannot_be_used_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_class_names(tmp_path / name)


def test_yolo__names_may_end_with_empty_lines(tmp_path):
    (tmp_path / "classes.txt").write_text("cat\ndog\n\n")
    assert read_class_names(tmp_path / "classes.txt") == ("cat", "dog")


def write_table(file: Path, objects, **columns) -> Path:
    """A table of the first photograph with the objects of each row."""
    rows = {"image": [str(PHOTOGRAPHS[0])] * len(objects), "objects": objects, **columns}
    datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image()).to_parquet(file)
    return file


def test_table__with_fewer_classes_than_boxes_names_the_object(tmp_path):
    two, one = {"bbox": [[10, 20, 30, 40], [0, 0, 5, 5]], "category": ["cat"]}, {"bbox": [[1, 1, 2, 2]]}
    file = write_table(tmp_path / "train.parquet", [{**two, "area": [7]}, {**one, "category": ["dog"], "area": None}])
    with pytest.raises(ValueError, match=r"1 of a class outside the list of 2, such as .*#0, object 1"):
        open_all(file)
    train = open_all(file, max_bad_fraction=0.5).by_name["train"]
    sides = np.prod(Image.open(PHOTOGRAPHS[0]).size)
    assert [train.sample(index)["areas"].item() * sides for index in range(2)] == pytest.approx([7, 4])


def test_table__with_columns_of_sizes_has_the_sizes_of_its_images(tmp_path):
    width, height = Image.open(PHOTOGRAPHS[0]).size
    objects = [{"bbox": [[10, 20, 30, 40]], "category": ["cat"]}] * 2
    file = write_table(tmp_path / "train.parquet", objects, width=[width, None], height=[height, None])
    train = open_all(file).by_name["train"]
    assert train.sample(0)["boxes"].equal(train.sample(1)["boxes"])
    file = write_table(tmp_path / "other.parquet", objects, width=[width, None], height=[2 * height, None])
    with pytest.raises(ValueError, match=r"other.* gives other proportions than 1 of 1 images have: .*other"):
        open_all(file)


def test_table__may_lack_classes_in_a_split_if_it_lists_none(tmp_path):
    boxes = {name: {"bbox": [[10, 20, 30, 40]], "category": [name]} for name in ("ant", "bee", "cat")}
    write_table(tmp_path / "train.parquet", [boxes[name] for name in ("bee", "ant", "cat")])
    write_table(tmp_path / "val.parquet", [boxes[name] for name in ("cat", "ant")])
    splits = open_all(tmp_path)
    assert splits.class_names == ("ant", "bee", "cat")
    assert [splits.by_name["validation"].sample(index)["classes"].item() for index in range(2)] == [2, 0]
    write_table(tmp_path / "train.parquet", [boxes[name] for name in ("bee", "ant")])
    with pytest.raises(ValueError, match=r"classes of the validation split of .*: only there cat; only here bee"):
        open_all(tmp_path)


def test_table__with_one_class_for_all_boxes_of_an_image_is_refused(tmp_path):
    file = write_table(tmp_path / "train.parquet", [{"bbox": [[10, 20, 30, 40], [0, 0, 5, 5]], "category": "cat"}])
    with pytest.raises(ValueError, match="2 of a class outside the list of 0"):
        open_all(file)


@pytest.mark.parametrize("kind", ["coco", "masks", "yolo", "table"])
def test_boxes__can_be_sent_to_a_spawned_worker(tmp_path, kind):
    if kind == "yolo":
        splits = open_all(yolo(tmp_path / "data"))
    elif kind == "table":
        splits = open_all(write_table(tmp_path / "train.parquet", [{"bbox": [[1, 2, 30, 40]], "category": ["cat"]}]))
    else:
        folder = write(tmp_path / "data", coco([(0, 3, [1, 2, 30, 40], {"segmentation": [[1, 2, 31, 2, 31, 42]]})]))
        splits = open_all(folder) if kind == "coco" else with_masks(open_all(folder), str(folder), 0.0)
    train = splits.by_name["train"]
    copy = pickle.loads(pickle.dumps(train))
    assert copy.sample(0)["boxes"].equal(train.sample(0)["boxes"])
    assert copy.raw.name(0) == train.raw.name(0)
    if kind == "masks":
        np.testing.assert_array_equal(copy.sample(0)["masks"], train.sample(0)["masks"])


def test_folder__without_boxes_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there are no boxes in .*; expected COCO json"):
        open_all(write(tmp_path / "data", "", "readme.txt"))


def test_masks__equal_those_of_pycocotools():
    mask = pytest.importorskip("pycocotools.mask")
    random = np.random.RandomState(0)
    for _ in range(40):
        height, width = random.randint(5, 60, 2).tolist()
        corners = random.rand(2, 2 * random.randint(3, 9)) * 1.4 * max(height, width) - 0.2 * max(height, width)
        polygons = corners.round(random.randint(0, 3)).tolist()
        expected = np.any(mask.decode(mask.frPyObjects(polygons, height, width)), axis=2)
        np.testing.assert_array_equal(decode_mask(polygons, height, width), expected)
        pixels = np.asfortranarray(random.rand(height, width) > random.rand(), np.uint8)
        runs = mask.encode(pixels)["counts"].decode()
        compressed = {"size": [height, width], "counts": runs}
        np.testing.assert_array_equal(decode_mask(compressed, height, width), pixels == 1)
    uncompressed = {"size": [2, 3], "counts": [1, 2, 3]}
    np.testing.assert_array_equal(decode_mask(uncompressed, 2, 3), [[False, True, False], [True, False, False]])


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [3, 4], "counts": None}, "the run lengths of it are no whole numbers"),
        ({"size": [3, 4], "counts": [[1, 2], [3]]}, "the run lengths of it are no whole numbers"),
        ({"size": [3, 4], "counts": "o" * 40}, "the run lengths of it (are no|do not add up)"),
        ([[{}, 1, 2, 3, 4, 5]], "corners that are no numbers"),
        ([[None, 1, 2, 3, 4, 5]], "corners that are no numbers"),
        ([[1e12, 0, 5, 5, 1, 1]], "far outside of the image"),
        ([1, 2, 3, 4, 5, 6], "it has no mask; expected polygons"),
    ],
)
def test_mask__that_is_damaged_is_refused(segmentation, message):
    with pytest.raises(ValueError, match=message):
        decode_mask(segmentation, 3, 4, "it")


def test_mask__of_another_size_is_refused(tmp_path):
    rows = [(0, 3, [1, 1, 5, 5], {"segmentation": {"size": [2, 3], "counts": [6]}}), (0, 3, [1, 1, 5, 5])]
    content = read_coco(write(tmp_path / "data", coco(rows)) / "annotations.json")
    with pytest.raises(ValueError, match=r"mask of annotation 0 of .* has size \[2, 3\]"):
        content.mask(0)
    with pytest.raises(ValueError, match=r"annotation 1 of .* has no mask"):
        content.mask(1)


def test_masks__are_of_the_size_of_their_images(tmp_path):
    content = coco([(0, 3, [1, 2, 30, 40], {"segmentation": [[1, 2, 31, 2, 31, 42]]})])
    for image in content["images"]:
        del image["width"], image["height"]
    folder = write(tmp_path / "unknown", content)
    (mask,) = with_masks(open_all(folder), str(folder), 0.0).by_name["train"].sample(0)["masks"]
    assert mask.shape == Image.open(PHOTOGRAPHS[0]).size[::-1]
    assert mask.sum() > 0
    for image, file in zip(content["images"], PHOTOGRAPHS, strict=True):
        image["width"], image["height"] = (2 * side for side in Image.open(file).size)
    folder = write(tmp_path / "doubled", content)
    with pytest.raises(ValueError, match=r"1 of 1 masks .*: that of annotation 0 of .* is for .* but the image has"):
        with_masks(open_all(folder), str(folder), 0.5)

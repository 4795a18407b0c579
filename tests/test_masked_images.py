"""Images with masks: what can be opened, what is refused, and their views."""

import json
import logging
import shutil
from collections import Counter
from functools import partial

import datasets
import numpy as np
import pytest
import torch
from masked import masked_folder
from PIL import Image

from data.decoding import BadImage
from data.dense_views import RandomPlacement
from data.mask_codes import IGNORED, MaskCodes, read_class_file
from data.masked_images import open_masked_splits
from data.seeds import seeded_generator
from data.segmentation import EvalViews, TrainViews, collate_padded, window_boxes

open_splits = partial(
    open_masked_splits,
    class_file=None,
    ignore_index=255,
    mask_column=None,
    validation_fraction=None,
    max_bad_fraction=0.5,
    seed=0,
)


@pytest.fixture
def folder(tmp_path):
    return masked_folder(tmp_path / "labeled")


def test_folders__are_opened_with_their_splits_classes_and_numbers_of_pixels(folder):
    splits = open_splits([str(folder)])
    assert splits.class_names == ("rest", "red", "blue")
    assert {name: len(split) for name, split in splits.by_name.items()} == {"train": 8, "validation": 3}
    assert not splits.bad
    masks = [splits.by_name["train"].mask(index) for index in range(8)]
    assert splits.pixels.tolist() == [sum(int((mask == k).sum()) for mask in masks) for k in range(3)]
    assert splits.pixels.dtype == np.int64
    assert any(note.startswith("pixels by class: rest 8") for note in splits.notes)


def test_folders__may_have_the_splits_below_images_and_masks(folder, tmp_path):
    for kind, new in (("images", "images"), ("masks", "annotations")):
        for split, name in (("train", "training"), ("val", "validation")):
            (tmp_path / "ade" / new).mkdir(parents=True, exist_ok=True)
            (folder / split / kind).rename(tmp_path / "ade" / new / name)
    splits = open_splits([str(tmp_path / "ade")], class_file=str(folder / "classes.txt"))
    assert {name: len(split) for name, split in splits.by_name.items()} == {"train": 8, "validation": 3}


def test_folders__a_split_without_masks_is_named(folder, caplog):
    shutil.rmtree(folder / "val" / "masks")
    with caplog.at_level(logging.WARNING):
        splits = open_splits([str(folder)])
    assert {name: len(split) for name, split in splits.by_name.items()} == {"train": 7, "validation": 1}
    assert f"{folder / 'val' / 'images'} is not used: there are no masks for it" in caplog.text


def test_folders__a_split_without_masks_below_images_is_named(folder, tmp_path, caplog):
    for kind in ("images", "masks"):
        for split in ("train", "val"):
            (tmp_path / "ade" / kind).mkdir(parents=True, exist_ok=True)
            (folder / split / kind).rename(tmp_path / "ade" / kind / split)
    (tmp_path / "ade" / "images" / "val").rename(tmp_path / "ade" / "images" / "other")
    with caplog.at_level(logging.WARNING):
        splits = open_splits([str(tmp_path / "ade")], class_file=str(folder / "classes.txt"))
    assert set(splits.by_name) == {"train", "validation"}
    assert f"{tmp_path / 'ade' / 'masks' / 'val'} is not used: there are no images for it" in caplog.text


def test_folders__without_splits_get_a_validation_split_and_without_a_file_the_numbers_in_the_masks(folder):
    splits = open_splits([str(folder / "train")])
    assert splits.class_names == ("0", "1", "2")
    assert {name: len(split) for name, split in splits.by_name.items()} == {"train": 7, "validation": 1}
    assert any("the 3 numbers in the masks (0, 1, 2)" in note for note in splits.notes)


def test_table__has_a_column_of_masks(folder):
    rows = {"image": [], "annotation": []}
    for path in sorted((folder / "train" / "images").iterdir()):
        rows["image"].append(str(path))
        rows["annotation"].append(str(folder / "train" / "masks" / f"{path.stem}.png"))
    features = datasets.Features({"annotation": datasets.Image(), "image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "table.parquet")
    splits = open_splits([str(folder / "table.parquet")], class_file=str(folder / "classes.txt"))
    from_folder = open_splits([str(folder / "train")], class_file=str(folder / "classes.txt"))
    assert splits.pixels.tolist() == from_folder.pixels.tolist()
    images = datasets.Dataset.from_dict({"image": rows["image"]}).cast_column("image", datasets.Image())
    images.to_parquet(folder / "images.parquet")
    with pytest.raises(ValueError, match="no column with masks in "):
        open_splits([str(folder / "images.parquet")])


def write_coco(folder, **changes):
    """Two images with a rectangle on the second, as COCO has it."""
    for number in range(2):
        Image.new("RGB", (20, 10)).save(folder / f"{number}.png")
    images = [{"id": number, "file_name": f"{number}.png", "width": 20, "height": 10} for number in range(2)]
    square = {"id": 1, "image_id": 1, "category_id": 7, "bbox": [2, 1, 4, 3], "area": 12}
    square["segmentation"] = [[2, 1, 6, 1, 6, 4, 2, 4]]
    content = {
        "images": images,
        "annotations": [square],
        "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}],
    }
    (folder / "annotations.json").write_text(json.dumps(content | changes))
    return square


def test_coco__becomes_masks_with_a_background(tmp_path):
    write_coco(tmp_path)
    splits = open_splits([str(tmp_path)], validation_fraction=0)
    assert splits.class_names == ("background", "a", "b")
    train = splits.by_name["train"]
    assert not train.mask(0).any()  # an image without annotations
    expected = np.zeros((10, 20), int)
    expected[1:4, 2:6] = 2
    np.testing.assert_array_equal(train.mask(1), expected)
    assert splits.pixels.tolist() == [400 - 12, 0, 12]


def test_coco__with_a_class_named_background_has_no_two_of_them(tmp_path):
    write_coco(tmp_path, categories=[{"id": 3, "name": "background"}, {"id": 7, "name": "b"}])
    splits = open_splits([str(tmp_path)], validation_fraction=0)
    assert splits.class_names == ("unlabeled", "background", "b")


def test_coco__may_have_its_images_beside_a_folder_of_annotations(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "annotations").mkdir()
    write_coco(tmp_path / "images")
    (tmp_path / "images/annotations.json").rename(tmp_path / "annotations/instances.json")
    splits = open_splits([str(tmp_path)], validation_fraction=0)
    assert splits.class_names == ("background", "a", "b")
    assert splits.by_name["train"].mask(1).any()


def test_coco__with_two_splits_for_validation_is_refused(tmp_path):
    for name in ("train", "val", "valid"):
        (tmp_path / name).mkdir()
        write_coco(tmp_path / name)
    with pytest.raises(ValueError, match="has two splits for validation: val is the second one"):
        open_splits([str(tmp_path)])


def test_coco__names_annotations_that_cannot_be_used(tmp_path):
    square = write_coco(tmp_path)
    others = [{**square, "id": 2, "image_id": 9}, {**square, "id": 3, "category_id": 8}, square]
    write_coco(tmp_path, annotations=others)
    splits = open_splits([str(tmp_path)], validation_fraction=0)
    assert len(splits.bad) == 2
    assert "annotation 2 of image_id 9: its image is not in the list" in splits.bad.describe()
    assert "annotation 3 of 1.png: its category is not in the list" in splits.bad.describe()
    write_coco(tmp_path, annotations=[{**square, "segmentation": {"size": [5, 5], "counts": [25]}}])
    with pytest.raises(ValueError, match=r"1 of 2 images .* has size \[5, 5\], but the image has \[10, 20\]"):
        open_splits([str(tmp_path)], validation_fraction=0, max_bad_fraction=0.1)


def test_coco__that_is_empty_or_names_missing_images_is_refused(tmp_path):
    write_coco(tmp_path)
    (tmp_path / "1.png").unlink()
    with pytest.raises(ValueError, match=r"1\.png: no such file"):
        open_splits([str(tmp_path)], validation_fraction=0, max_bad_fraction=0.1)
    (tmp_path / "annotations.json").write_text("")
    with pytest.raises(ValueError, match=r"annotations\.json is empty; expected COCO json"):
        open_splits([str(tmp_path)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image files in"):
        open_splits([str(tmp_path / "empty")])


def test_what_cannot_be_used__is_named_and_counted_in_one_message(folder):
    images, masks = (folder / "train" / kind for kind in ("images", "masks"))
    Image.new("L", (10, 20)).save(masks / "00.png")
    Image.fromarray(np.full((64, 64), 7, np.uint8)).save(masks / "01.png")
    (masks / "02.png").unlink()
    (images / "03.jpg").unlink()
    Image.new("RGB", (64, 64), (1, 2, 3)).save(masks / "04.png")
    (masks / "05.png").write_bytes(b"")
    Image.fromarray(np.full((96, 64), 255, np.uint8)).save(masks / "06.png")
    with pytest.raises(ValueError, match="7 of 11 images") as refused:
        open_splits([str(folder)], max_bad_fraction=0.1)
    message = str(refused.value)
    for expected in (
        "00.jpg: its mask is 10 x 20 pixels, but the image 96 x 64",
        "01.jpg: its mask has numbers that are no class: 7, 100.0% of its pixels",
        "02.jpg: it has no mask of the same name in",
        "03.png: it has no image of the same name in",
        "04.jpg: its mask has colors, expected one number per pixel",
        "05.jpg: its mask cannot be used: empty file (0 bytes)",
        "06.jpg: its mask is 64 x 96 pixels",
    ):
        assert expected in message
    splits = open_splits([str(folder)], max_bad_fraction=0.9)
    assert len(splits.bad) == 7
    assert [len(split) for split in splits.by_name.values()] == [1, 3]


def test_colors__need_a_file_or_are_the_classes(folder):
    colors = np.zeros((256, 3), np.uint8)
    colors[[1, 2, 255]] = [(200, 0, 0), (0, 0, 200), (9, 9, 9)]
    for path in folder.glob("*/masks/*.png"):
        Image.fromarray(colors[np.array(Image.open(path))]).save(path)
    (folder / "classes.txt").write_text("rest #000000\nred: 200 0 0\nblue 0,0,200\nignore #090909\n")
    splits = open_splits([str(folder)])
    assert splits.class_names == ("rest", "red", "blue")
    assert splits.by_name["train"].mask(0)[0, 0] == IGNORED
    (folder / "classes.txt").write_text("rest #000000\nred: 200 0 0\n")
    with pytest.raises(ValueError, match="its mask has colors that are no class: #0000c8, #090909, "):
        open_splits([str(folder)], max_bad_fraction=0.0)
    (folder / "classes.txt").unlink()
    splits = open_splits([str(folder)])
    assert splits.class_names == ("#000000", "#0000c8", "#090909", "#c80000")


def test_ignore_index__without_effect_is_refused(folder):
    for path in folder.glob("*/masks/*.png"):
        Image.open(path).convert("RGB").save(path)
    (folder / "classes.txt").unlink()
    with pytest.raises(ValueError, match=r"ignore_index 0 has no effect: the masks of .* are colors; a class named"):
        open_splits([str(folder)], ignore_index=0)


def test_masks_of_0_and_255__are_background_and_foreground(folder):
    for path in folder.glob("*/masks/*.png"):
        Image.fromarray((np.array(Image.open(path)) == 1).astype(np.uint8) * 255).save(path)
    (folder / "classes.txt").unlink()
    assert open_splits([str(folder)]).class_names == ("background", "foreground")
    with pytest.raises(ValueError, match="has 1 classes, expected at least two: 255"):
        open_splits([str(folder)], ignore_index=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("one\n", "has 1 classes, expected at least two"),
        ("a\na\n", "two classes have the name 'a'"),
        ("a #000000\nb\n", "1 of 2 classes have a color, but not 'b'"),
        ("a #000000\nb 0 0 0\n", "two classes have the color"),
        ("a 0 0 300\nb 0 0 1\n", "expected numbers up to 255"),
        ("\n".join(map(str, range(300))), "has 300 classes, expected at most 255"),
    ],
)
def test_class_file__is_refused_with_the_reason(tmp_path, text, message):
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_class_file(tmp_path / "classes.txt", 255)


def test_class_file__numbers_classes_from_1_if_0_does_not_count(tmp_path):
    (tmp_path / "classes.txt").write_text("wall\nroad 66\n")
    codes = read_class_file(tmp_path / "classes.txt", 0)
    assert codes == MaskCodes(("wall", "road 66"), (1, 2), False, (0,))


def test_class_file__leaves_out_the_class_whose_number_does_not_count(tmp_path):
    (tmp_path / "classes.txt").write_text("wall\nroad\nunlabeled\n")
    codes = read_class_file(tmp_path / "classes.txt", 2)
    assert codes == MaskCodes(("wall", "road"), (0, 1), False, (2,))


def test_float_masks__are_numbers_if_they_are_whole(tmp_path):
    codes = MaskCodes(("a", "b"), (0, 1), False, ())
    Image.fromarray(np.array([[0, 1]], np.float32)).save(tmp_path / "whole.tif")
    assert codes.read(tmp_path / "whole.tif").tolist() == [[0, 1]]
    for value in (0.7, np.nan):
        Image.fromarray(np.array([[0, value]], np.float32)).save(tmp_path / "fraction.tif")
        with pytest.raises(BadImage, match="its pixels are fractions; expected whole numbers"):
            codes.read(tmp_path / "fraction.tif")


def test_folders__with_two_images_of_one_mask_use_the_first(folder):
    image = sorted((folder / "train/images").iterdir())[0]
    Image.open(image).save(image.with_suffix(".webp"))
    splits = open_splits([str(folder)])
    assert len(splits.by_name["train"]) == 8
    assert "another image has its name up to the ending, and the mask" in splits.bad.describe()


def test_palette_masks__are_numbers_whatever_their_colors(tmp_path):
    mask = Image.fromarray(np.array([[0, 1], [2, 255]], np.uint8), "P")
    mask.putpalette([10, 20, 30] * 256)
    mask.save(tmp_path / "mask.png")
    codes = MaskCodes(("a", "b", "c"), (0, 1, 2), False, (255,))
    assert codes.read(tmp_path / "mask.png").tolist() == [[0, 1], [2, IGNORED]]


def test_views__of_training_are_seeded_and_move_image_and_mask_alike(folder):
    split = open_splits([str(folder)]).by_name["train"]
    views = TrainViews(RandomPlacement((48, 48)), split.codes, (7, 7, 7))
    sample = split.sample(1)  # a blue rectangle
    shares = Counter()
    for seed in range(20):
        item = views(sample, seeded_generator(seed))
        assert item["pixel_values"].shape == (3, 48, 48)
        assert torch.equal(item["pixel_values"], views(sample, seeded_generator(seed))["pixel_values"])
        image, labels = item["pixel_values"].float(), item["labels"]
        shares[bool((labels == 2).any())] += 1
        if (labels == 2).sum() > 100 and (labels == 0).sum() > 100:
            spread = [image[:, labels == k].var(1).sum() for k in (0, 2)]
            assert spread[1] < spread[0]  # the rectangle has one color
    assert shares[True] > 14  # crops of a single class are drawn again


def test_views__of_evaluation_keep_proportions_and_are_padded_to_batches(folder):
    split = open_splits([str(folder)]).by_name["train"]
    views = EvalViews(32, split.codes)
    items = [{**views(split.sample(index)), "image_index": index} for index in (0, 1)]
    assert [item["pixel_values"].shape for item in items] == [(3, 32, 48), (3, 32, 32)]
    batch = collate_padded(items)
    assert batch["pixel_values"].shape == (2, 3, 32, 48)
    assert batch["labels"].shape == (2, 64, 96)
    assert (batch["labels"][1, :, 64:] == IGNORED).all()
    assert batch["sizes"].tolist() == [[32, 48], [32, 32]]
    assert batch["mask_sizes"].tolist() == [[64, 96], [64, 64]]
    assert batch["num_counted_pixels"].tolist() == [63 * 96, 63 * 64]


def test_views__of_tiles_keep_the_resolution_of_large_images(folder):
    split = open_splits([str(folder)]).by_name["train"]
    sample = split.sample(0)  # 96 x 64
    assert EvalViews(32, split.codes, tile=16)(sample)["pixel_values"].shape == (3, 128, 192)
    assert EvalViews(32, split.codes, tile=200)(sample)["pixel_values"].shape == (3, 32, 48)  # it has no more
    drawn = RandomPlacement((32, 32), (1.0, 1.0), tile=16).draw(96, 64, seeded_generator(0))
    for left, top, right, bottom in (placement.box for placement in drawn):
        assert (right - left, bottom - top) == (16, 16)


@pytest.mark.parametrize("size", [(32, 32), (32, 33), (50, 100), (64, 32)])
def test_windows__cover_the_image_and_overlap(size):
    covered = np.zeros(size, int)
    for top, left in window_boxes(*size, 32):
        assert 0 <= top <= size[0] - 32
        assert 0 <= left <= size[1] - 32
        covered[top : top + 32, left : left + 32] += 1
    assert covered.min() == 1
    assert size == (32, 32) or covered.max() > 1

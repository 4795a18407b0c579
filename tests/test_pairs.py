"""Benchmark of images with texts: baselines, and captions of stamps."""

import json
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.pair_sets import Pair, caption, is_test, on_white, write
from benchmarks.pairs import bag_of_words, chance_of_images, histogram
from benchmarks.tuxstamps import Stamp


def squares(colors) -> list[Pair]:
    return [Pair(Image.new("RGB", (8, 8), color), f"a {color} square", "squares") for color in colors]


def test_bag_of_words__of_histograms_finds_colors_and_nothing_else(tmp_path):
    colors = ["red", "lime", "blue", "white", "black", "yellow", "cyan", "magenta"]
    write(tmp_path / "retrieval" / "train", squares(colors * 10))
    write(tmp_path / "retrieval" / "test", squares(colors))
    found = bag_of_words(tmp_path, histogram)
    assert found["text_recall_at_1"] == found["image_recall_at_1"] == 1
    write(tmp_path / "retrieval" / "train", [Pair(each.image, "nothing", "") for each in squares(colors * 10)])
    assert bag_of_words(tmp_path, histogram)["text_recall_at_1"] < 0.5


def test_chance__counts_all_images_of_a_text():
    assert chance_of_images(list("abcdefghij")) == pytest.approx(0.5)
    assert chance_of_images([*"ab"] * 5) == pytest.approx(1 - 1 / 252)


def test_caption__is_the_first_line_beside_the_stamp(tmp_path):
    (tmp_path / "owl.txt").write_text("An owl.\nde.utf8=Eine Eule.\n")
    assert caption(Stamp("bird", tmp_path / "owl.png", "owl", is_for_test=False)) == "An owl."
    assert caption(Stamp("bird", tmp_path / "jay.png", "jay", is_for_test=False)) == ""


def test_drawings__keep_their_shape_on_white_and_have_a_split_of_their_own():
    square = on_white(Image.new("RGBA", (200, 100), "red"))
    assert square.size == (64, 64)
    assert square.getpixel((32, 32)) == (255, 0, 0)
    assert square.getpixel((32, 5)) == (255, 255, 255)
    assert 50 < sum(is_test(str(number)) for number in range(1000)) < 150


def test_write__names_each_file(tmp_path):
    write(tmp_path, squares(["red", "lime"]))
    rows = [json.loads(line) for line in Path(tmp_path / "captions.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["a red square", "a lime square"]
    assert all((tmp_path / row["file_name"]).is_file() for row in rows)

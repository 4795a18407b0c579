"""Tests of the splits that fine-tuning uses for training, validation and testing, with all labels or few."""

import numpy as np
import pytest
from PIL import Image

from data.splits import open_labeled_splits

ALL = {"num_per_class": None, "label_fraction": None, "validation_fraction": None, "max_bad_fraction": 0.5, "seed": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 images of each of three classes, one of them in color."""
    root = tmp_path_factory.mktemp("labeled")
    for name in ("cat", "dog", "owl"):
        (root / name).mkdir()
        for number in range(20):
            shape = (8, 8, 3) if name == "owl" else (8, 8)
            Image.fromarray(np.full(shape, 10 * number, np.uint8)).save(root / name / f"{number:02}.png")
    return str(root)


def sizes(opened) -> dict[str, int]:
    return {name: len(split) for name, split in opened.images.splits.items()}


def test_splits__without_validation_use_a_tenth_of_each_class_for_it(folder):
    opened = open_labeled_splits([folder], None, **ALL)
    assert sizes(opened) == {"train": 54, "validation": 6}
    assert opened.measured[0] == "validation"
    assert (opened.num_gray, opened.has_subset) == (40, False)


def test_splits__few_labels_are_taken_from_the_other_training_images(folder):
    opened = open_labeled_splits([folder], None, **{**ALL, "num_per_class": 5})
    assert sizes(opened) == {"train": 15, "validation": 6}
    train, validation = ({split.name(i) for i in range(len(split))} for split in opened.images.splits.values())
    assert not train & validation


def test_splits__with_a_test_split_use_no_other_labels_than_those_requested():
    opened = open_labeled_splits(["sample-fashion"], None, **{**ALL, "num_per_class": 20})
    assert sizes(opened) == {"train": 200, "test": 1000}
    assert opened.measured[0] == "test"
    validation = open_labeled_splits(
        ["sample-fashion"], None, **{**ALL, "num_per_class": 20, "validation_fraction": 0.25}
    )
    assert sizes(validation) == {"train": 150, "validation": 50, "test": 1000}
    few = {opened.images.train.name(i) for i in range(200)}
    images = validation.images
    assert few == {split.name(i) for split in (images.train, images.validation) for i in range(len(split))}

"""Tests that the bundled images match their README and have licenses that allow redistribution."""

import json
import re
from collections import Counter

import datasets
import pytest
from conftest import ROOT
from PIL import Image

from data.samples.build import tree_sha256

SAMPLES = ROOT / "data" / "samples"
CROPS = {split: sorted((SAMPLES / "photographs" / split).glob("*.jpg")) for split in ("train", "held_out")}
ATTRIBUTION = (SAMPLES / "ATTRIBUTION.md").read_text(encoding="utf-8")
PERMISSIVE = {"CC0 1.0", "CC BY 2.0", "CC BY 4.0", "Public domain"}


def photograph_of(path) -> str:
    return re.fullmatch(r"(.+)_\d+_\d+_\d+", path.stem)[1]


def test_sizes__stay_within_what_a_repository_should_carry():
    assert sum(path.stat().st_size for paths in CROPS.values() for path in paths) < 6e6
    assert sum(path.stat().st_size for path in (SAMPLES / "fashion_mnist").glob("*.parquet")) < 4e6


def test_photographs__of_the_two_splits_differ():
    train, validation = ({photograph_of(path) for path in CROPS[split]} for split in ("train", "held_out"))
    assert not train & validation
    assert len(validation) >= 3
    assert 0.15 < len(CROPS["held_out"]) / len(CROPS["train"]) < 0.35


def test_photographs__each_is_attributed_under_a_permissive_license():
    for photograph in {photograph_of(path) for paths in CROPS.values() for path in paths}:
        entry = re.search(rf"^## {photograph}: .*?(?=^## |\Z)", ATTRIBUTION, flags=re.MULTILINE | re.DOTALL)
        assert entry, f"{photograph} is not in ATTRIBUTION.md"
        assert re.search(r"License: \[(.+?)\]", entry[0])[1] in PERMISSIVE
        assert re.search(r"Author: \S", entry[0])


@pytest.mark.parametrize("split", sorted(CROPS))
def test_photographs__all_decode_to_256_pixel_color(split):
    for path in CROPS[split]:
        with Image.open(path) as image:
            image.load()
            assert (image.mode, image.size) == ("RGB", (256, 256))


def test_manifest__has_the_hash_and_the_counts_and_the_readme_repeats_them():
    manifest = json.loads((SAMPLES / "MANIFEST.json").read_text())
    readme = (SAMPLES / "README.md").read_text(encoding="utf-8")
    assert manifest["sha256"] == tree_sha256(SAMPLES)
    for split, paths in CROPS.items():
        assert manifest["photographs"][split]["crops"] == len(paths)
        num_photographs = len({photograph_of(path) for path in paths})
        assert re.search(rf"\b{len(paths)} crops of {num_photographs}\b", readme)


@pytest.mark.parametrize(("split", "per_class"), [("train", 500), ("test", 100)])
def test_fashion__is_balanced_labeled_and_gray(split, per_class):
    table = datasets.load_dataset("parquet", data_files=str(SAMPLES / "fashion_mnist" / f"{split}.parquet"))["train"]
    assert table.features["label"].names[9] == "Ankle boot"
    assert set(Counter(table["label"]).values()) == {per_class}
    assert len(set(table["label"])) == 10
    assert (table[0]["image"].mode, table[0]["image"].size) == ("L", (28, 28))
    assert len(
        {image["bytes"] for image in table.cast_column("image", datasets.Image(decode=False))["image"]}
    ) > 0.99 * len(table)

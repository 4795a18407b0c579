import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from data.augmentations import CenterCrop, RandomResizedCrop, single_view
from data.bad_images import BadImages
from data.decoding import BadImage
from data.images import ImageDataset, SourceSamples, measure_image_stats, split_validation
from data.sampling import EpochSampler
from data.sources import open_source

PHOTOGRAPHS = sorted((Path(__file__).parents[1] / "data/samples/photographs/train").glob("*.jpg"))
NUM_IMAGES = 11


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven real pictures, no two alike."""
    folder = tmp_path / "photos"
    folder.mkdir()
    step = len(PHOTOGRAPHS) // NUM_IMAGES
    for number, path in enumerate(PHOTOGRAPHS[: NUM_IMAGES * step : step]):
        (folder / f"{number:02}.jpg").write_bytes(path.read_bytes())
    return folder


def make_images(
    folder: Path,
    *,
    train: bool = True,
    seed: int = 5,
    file: Path | None = None,
    chosen: list[int] | None = None,
    num_channels: int = 3,
    crops_per_image: int = 1,
) -> ImageDataset:
    source = open_source(str(folder))
    crop = RandomResizedCrop((24, 32)) if train else CenterCrop((24, 32))
    return ImageDataset(
        SourceSamples(source, np.arange(len(source)) if chosen is None else np.array(chosen)),
        single_view(crop, num_channels),
        seed=seed,
        images_per_step=4,
        crops_per_image=crops_per_image,
        bad_images_file=file,
        train=train,
    )


def test_epoch__shows_every_image_once_in_an_order_of_its_own(folder: Path) -> None:
    images = make_images(folder)
    epochs = [[images[epoch * NUM_IMAGES + place] for place in range(NUM_IMAGES)] for epoch in range(3)]
    orders = [[item["image_index"] for item in items] for items in epochs]
    assert all(sorted(order) == list(range(NUM_IMAGES)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert [item["epoch"] for item in epochs[2]] == [2] * NUM_IMAGES


def test_item__says_epoch_and_step(folder: Path) -> None:
    images = make_images(folder)
    steps = [images[counter]["step"] for counter in range(2 * NUM_IMAGES)]
    assert steps == [0] * 4 + [1] * 4 + [2] * 3 + [3] * 4 + [4] * 4 + [5] * 3  # 11 images, 4 a step: 3 steps an epoch
    item = images[0]
    assert item["pixel_values"].dtype == torch.uint8
    assert item["pixel_values"].shape == (3, 24, 32)
    assert item.keys() == {"pixel_values", "image_index", "epoch", "step"}


def test_item__depends_on_seed_and_counter_only(folder: Path) -> None:
    images, again = make_images(folder), make_images(folder)
    backwards = [again[counter] for counter in reversed(range(2 * NUM_IMAGES))][::-1]
    torch.manual_seed(123)
    for counter, item in enumerate(backwards):
        assert torch.equal(images[counter]["pixel_values"], item["pixel_values"])
        assert images[counter]["image_index"] == item["image_index"]
    other_seed = make_images(folder, seed=6)
    assert any(
        other_seed[counter]["image_index"] != backwards[counter]["image_index"] for counter in range(NUM_IMAGES)
    )


def test_item__is_augmented_anew_in_every_epoch(folder: Path) -> None:
    images = make_images(folder)
    views: dict[int, list[torch.Tensor]] = {}
    for counter in range(3 * NUM_IMAGES):
        item = images[counter]
        views.setdefault(item["image_index"], []).append(item["pixel_values"])
    assert not any(torch.equal(first, second) or torch.equal(second, third) for first, second, third in views.values())


def test_repeated_crops__follow_each_other_and_count_as_images(folder: Path) -> None:
    images, plain = make_images(folder, crops_per_image=3), make_images(folder)
    assert len(images) == 3 * NUM_IMAGES
    for epoch in range(2):
        items = [images[epoch * len(images) + place] for place in range(len(images))]
        assert [item["step"] - epoch * 9 for item in items] == [place // 4 for place in range(33)]
        assert [item.get("crop", 0) for item in items] == [0, 1, 2] * NUM_IMAGES
        for number in range(NUM_IMAGES):
            first, *others = items[3 * number : 3 * number + 3]
            expected = plain[epoch * NUM_IMAGES + number]  # the same order, and the same first crop
            assert first["image_index"] == others[0]["image_index"] == others[1]["image_index"]
            assert first["image_index"] == expected["image_index"]
            difference = first["pixel_values"].float() - expected["pixel_values"].float()
            assert difference.abs().mean() < 4  # a smaller crop beside it may need a larger scale of decoding
            assert not torch.equal(first["pixel_values"], others[0]["pixel_values"])
            assert not torch.equal(others[0]["pixel_values"], others[1]["pixel_values"])


def test_repeated_crops__are_decoded_once_and_do_not_depend_on_the_batches(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = make_images(folder, crops_per_image=3)
    alone = [images[counter] for counter in range(2 * len(images))]
    opened: list[object] = []
    open_image = Image.open
    monkeypatch.setattr(Image, "open", lambda *given, **options: opened.append(given) or open_image(*given, **options))
    for batch_size in (3, 6, 4):
        del opened[:]
        batches = [range(start, min(start + batch_size, 66)) for start in range(0, 66, batch_size)]
        found = [item for batch in batches for item in images.__getitems__(batch)]
        assert all(item.keys() == other.keys() for item, other in zip(found, alone, strict=True))
        assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(found, alone, strict=True))
        assert len(opened) == (2 * NUM_IMAGES if batch_size % 3 == 0 else 2 * NUM_IMAGES + 11)


def test_repeated_crops__of_an_unreadable_image_are_all_of_the_same_other_one(folder: Path) -> None:
    (folder / "03.jpg").write_bytes(b"no image")
    images = make_images(folder, crops_per_image=2)
    for start in range(0, len(images), 2):
        first, second = images.__getitems__([start, start + 1])
        assert first["image_index"] == second["image_index"] != 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader__gives_the_same_items_with_any_number_of_workers(folder: Path, num_workers: int) -> None:
    images = make_images(folder)
    sampler = EpochSampler(len(images))
    loader = DataLoader(
        images, batch_size=4, sampler=sampler, num_workers=num_workers, persistent_workers=num_workers > 0
    )
    for epoch in range(2):
        sampler.set_epoch(epoch)  # workers live on, and still show this epoch's items
        seen = torch.cat([batch["pixel_values"] for batch in loader])
        expected = [make_images(folder)[epoch * NUM_IMAGES + place]["pixel_values"] for place in range(NUM_IMAGES)]
        assert torch.equal(seen, torch.stack(expected))


def test_evaluation__shows_the_same_central_crops_in_plain_order(folder: Path) -> None:
    images = make_images(folder, train=False)
    for index in range(NUM_IMAGES):
        item = images[index]
        assert (item["image_index"], item["epoch"], item["step"]) == (index, 0, 0)
        assert torch.equal(item["pixel_values"], make_images(folder, train=False, seed=9)[index]["pixel_values"])
        assert images.name(index) == str(folder / f"{index:02}.jpg")
    with pytest.raises(IndexError):
        images[NUM_IMAGES]


def test_indices__choose_the_images_of_the_source(folder: Path) -> None:
    images = make_images(folder, train=False, chosen=[3, 8])
    assert len(images) == 2
    assert images.name(1) == str(folder / "08.jpg")
    assert torch.equal(images[1]["pixel_values"], make_images(folder, train=False)[8]["pixel_values"])


@pytest.mark.parametrize("train", [True, False])
def test_bad_image__is_replaced_alike_everywhere_and_reported_once(folder: Path, tmp_path: Path, train: bool) -> None:
    (folder / "04.jpg").write_bytes(b"no picture")
    (folder / "07.jpg").write_bytes((folder / "07.jpg").read_bytes()[:3000])
    file = tmp_path / "out" / "bad_images.jsonl"
    images, again = make_images(folder, train=train, file=file), make_images(folder, train=train)
    counters = range(3 * NUM_IMAGES if train else NUM_IMAGES)
    for counter in counters:
        item = images[counter]
        assert item["image_index"] not in (4, 7)
        assert torch.equal(item["pixel_values"], again[counter]["pixel_values"])
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(entry["name"] for entry in entries) == [str(folder / "04.jpg"), str(folder / "07.jpg")]
    images_of_another_process = pickle.loads(pickle.dumps(make_images(folder, train=train, file=file)))
    for counter in counters:
        images_of_another_process[counter]
    assert len(file.read_text().splitlines()) == 4
    reasons = BadImages.read(file)
    assert len(reasons) == 2
    assert "not an image" in reasons[str(folder / "04.jpg")]
    assert "truncated" in reasons[str(folder / "07.jpg")]


def test_bad_image__is_warned_of_without_a_file(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "04.jpg").write_bytes(b"")
    images = make_images(folder)
    with caplog.at_level(logging.WARNING, logger="data.images"):
        for counter in range(2 * NUM_IMAGES):
            images[counter]
    assert [record.getMessage() for record in caplog.records] == [
        f"another image takes the place of {folder / '04.jpg'}: empty file (0 bytes)"
    ]


def test_bad_images__end_the_run_when_nothing_can_be_read(folder: Path) -> None:
    images = make_images(folder)
    for path in folder.iterdir():
        path.unlink()  # the disk went away
    with pytest.raises(BadImage, match="nor can any of 10 others"):
        images[0]


def test_bad_images__are_none_without_a_file(tmp_path: Path) -> None:
    assert BadImages.read(tmp_path / "never.jsonl") == {}


@pytest.mark.parametrize(
    ("num_images", "fraction", "num_validation_images"),
    [(100, 0.1, 10), (100, 0.001, 1), (2, 0.9, 1), (1, 0.5, 0), (10, 0.0, 0), (10, 0.99, 9)],
)
def test_split_held_out__parts_every_image_once(num_images: int, fraction: float, num_validation_images: int) -> None:
    train, validation = split_validation(num_images, fraction, seed=0)
    assert len(validation) == num_validation_images
    assert sorted([*train, *validation]) == list(range(num_images))
    assert train.tolist() == sorted(train)
    assert validation.tolist() == sorted(validation)
    assert validation.dtype == train.dtype == np.int64


def test_split_held_out__follows_its_seed() -> None:
    assert split_validation(100, 0.1, 0)[1].tolist() == split_validation(100, 0.1, 0)[1].tolist()
    assert split_validation(100, 0.1, 0)[1].tolist() != split_validation(100, 0.1, 1)[1].tolist()
    for fraction in (-0.1, 1.0, 10):
        with pytest.raises(ValueError, match="expected at least 0"):
            split_validation(10, fraction, 0)


@pytest.mark.parametrize("num_channels", [1, 3])
def test_image_stats__equal_those_of_all_pixels(folder: Path, num_channels: int) -> None:
    images = make_images(folder, train=False, num_channels=num_channels)
    crops = torch.stack([images[index]["pixel_values"] for index in range(NUM_IMAGES)])  # (B, C, H, W)
    pixels = crops.transpose(0, 1).flatten(1).double() / 255
    mean, std = measure_image_stats(images)
    assert mean == pytest.approx(pixels.mean(1).tolist())
    assert std == pytest.approx(pixels.std(1, correction=0).tolist())
    assert measure_image_stats(images, 5)[0] != pytest.approx(mean)


def test_image_stats__of_one_color_have_no_spread(tmp_path: Path) -> None:
    Image.new("RGB", (40, 40), (255, 0, 51)).save(tmp_path / "a.png")
    mean, std = measure_image_stats(make_images(tmp_path, train=False))
    assert mean == pytest.approx([1, 0, 0.2])
    assert std == pytest.approx([0, 0, 0], abs=1e-6)


def test_no_images__is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="no image is left"):
        ImageDataset(SourceSamples(open_source(str(folder)), np.array([])), single_view(CenterCrop((8, 8)), 3))

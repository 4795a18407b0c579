"""Views and batches of labeled images: the published shapes, the processor's own pixels, and exact repetition."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import ViTImageProcessorPil

from data.augmentations import RandomResizedCrop, single_view
from data.classification import (
    CROP_SHARE,
    EvalView,
    TrainView,
    eval_view,
    train_view,
)
from data.collators import stack_items
from data.images import ImageDataset, StackedImages
from data.labeled import LabeledSplit, open_labeled
from data.randaugment import RandAugment
from data.sampling import EpochSampler
from data.seeds import seeded_generator
from data.sources import open_source

MEAN = (0.485, 0.456, 0.406)


@pytest.fixture(scope="module")
def clothes() -> LabeledSplit:
    part = open_labeled("sample-fashion").test
    assert part is not None
    return part.select(np.arange(40))


def photograph(width: int, height: int, format: str = "JPEG") -> bytes:
    """A bundled photograph in another shape."""
    image = Image.open(BytesIO(open_source("sample").read(3))).resize((width, height), Image.Resampling.LANCZOS)
    stream = BytesIO()
    image.save(stream, format, quality=90)
    return stream.getvalue()


@pytest.mark.parametrize(("width", "height"), [(300, 200), (201, 333), (255, 255), (97, 64), (40, 90)])
@pytest.mark.parametrize(("size", "share"), [(64, CROP_SHARE), (224, CROP_SHARE), (96, 1.0)])
def test_eval_view__makes_the_pixels_of_the_saved_processor(width, height, size, share):
    view, data = eval_view((size, size), share), photograph(width, height)
    processor = ViTImageProcessorPil(
        size={"shortest_edge": view.resize_to},
        do_center_crop=True,
        crop_size={"height": size, "width": size},
        resample=Image.Resampling.BICUBIC,
        do_rescale=False,
        do_normalize=False,
    )
    expected = processor(Image.open(BytesIO(data)), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(view(data, 3).float(), expected.float(), atol=0, rtol=0)


def test_eval_view__published_sizes():
    assert eval_view((224, 224), CROP_SHARE).resize_to == 256
    assert eval_view((192, 192), CROP_SHARE).resize_to == 219
    assert eval_view((384, 384), 1.0).resize_to == 384
    with pytest.raises(ValueError, match=r"crop_share is 1\.2, expected more than 0 and at most 1"):
        eval_view((224, 224), 1.2)
    with pytest.raises(ValueError, match="resize_to is 200 px, expected at least the crop"):
        EvalView((224, 224), 200)


def test_eval_view__has_no_randomness(clothes):
    view = eval_view((32, 32), CROP_SHARE)
    first = view(clothes.sample(0)["image"], 3, seeded_generator(0))
    assert torch.equal(first, view(clothes.sample(0)["image"], 3, seeded_generator(1)))


def test_train_view__is_crop_and_flip_then_randaugment():
    crop, data = RandomResizedCrop((64, 64), (0.08, 1.0)), photograph(200, 150)
    augment = RandAugment(MEAN)
    changed = 0
    for index in range(12):
        generator = seeded_generator(0, index)
        plain = crop(data, 3, generator)
        operations = augment.choose(generator)
        augmented = TrainView(crop, augment)(data, 3, seeded_generator(0, index))
        if not operations:
            assert torch.equal(augmented, plain)
        assert torch.equal(train_view((64, 64))(data, 3, seeded_generator(0, index)), plain)
        changed += not torch.equal(augmented, plain)
    assert 5 <= changed < 12


@pytest.mark.parametrize("num_channels", [1, 3])
@pytest.mark.parametrize("size", [28, 64])
def test_views__small_gray_pictures_in_one_or_three_channels(clothes, num_channels, size):
    for view in (train_view((size, size), RandAugment((0.5,))), eval_view((size, size), CROP_SHARE)):
        pixel_values = view(clothes.sample(0)["image"], num_channels, seeded_generator(0))
        assert pixel_values.shape == (num_channels, size, size)
        assert pixel_values.dtype == torch.uint8
    plain = eval_view((28, 28), 1.0)(clothes.sample(0)["image"], 3)
    original = torch.from_numpy(np.array(Image.open(BytesIO(clothes.sample(0)["image"]))))
    assert all(torch.equal(channel, original) for channel in plain)


def test_items__carry_the_label_of_their_own_image(clothes):
    images = ImageDataset(clothes, single_view(train_view((28, 28)), 3), seed=5, train=True)
    epoch = [images[3 * len(images) + position] for position in range(len(images))]
    assert sorted(item["image_index"] for item in epoch) == list(range(40))
    assert [item["image_index"] for item in epoch] != list(range(40))
    assert all(item["labels"] == clothes.labels[item["image_index"]] for item in epoch)
    evaluated = ImageDataset(clothes, single_view(eval_view((28, 28), 1.0), 3))
    assert [evaluated[index]["image_index"] for index in range(40)] == list(range(40))
    assert clothes.labels.tolist() == [evaluated[index]["labels"] for index in range(40)]
    assert set(epoch[0]) == {"pixel_values", "labels", "image_index", "epoch", "step"}


def test_items__of_an_image_that_cannot_be_read_are_another_with_its_label(clothes, tmp_path):
    broken = clothes.select(np.arange(40))
    part = LabeledSplit(_Broken(broken.source, broken.indices[7]), broken.indices, broken.labels)
    images = ImageDataset(part, single_view(eval_view((28, 28), 1.0), 3), bad_images_file=tmp_path / "bad.jsonl")
    item = images[7]
    assert item["image_index"] != 7
    assert item["labels"] == clothes.labels[item["image_index"]]
    assert part.name(7) in (tmp_path / "bad.jsonl").read_text()


def test_items__depend_on_seed_epoch_and_image_only(clothes):
    images = ImageDataset(clothes, single_view(train_view((28, 28), RandAugment(MEAN)), 3), seed=1, train=True)
    sampler = EpochSampler(len(images))
    sampler.set_epoch(2)

    def epoch(num_workers: int) -> list[dict[str, torch.Tensor]]:
        torch.manual_seed(num_workers)
        return list(DataLoader(images, 8, sampler=sampler, num_workers=num_workers, collate_fn=stack_items))

    for alone, with_workers in zip(epoch(0), epoch(2), strict=True):
        assert all(torch.equal(alone[name], with_workers[name]) for name in alone)
    sampler.set_epoch(3)
    assert not torch.equal(epoch(0)[0]["pixel_values"], alone["pixel_values"])


def test_collator__stacks(clothes):
    images = ImageDataset(clothes, single_view(eval_view((28, 28), 1.0), 3))
    batch = stack_items([images[index] for index in (4, 2)])
    assert batch["pixel_values"].shape == (2, 3, 28, 28)
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["labels"].tolist() == clothes.labels[[4, 2]].tolist()
    assert batch["labels"].dtype == torch.int64
    assert batch["image_index"].tolist() == [4, 2]


def test_stacked__has_the_same_items_and_refuses_training_views(clothes):
    images = ImageDataset(clothes, single_view(eval_view((28, 28), CROP_SHARE), 3))
    stacked = StackedImages(images, num_threads=2)
    assert len(stacked) == 40
    for index in (0, 17, 39):
        assert torch.equal(stacked[index]["pixel_values"], images[index]["pixel_values"])
        assert stacked[index]["labels"] == images[index]["labels"]
        assert stacked[index]["image_index"] == index
    with pytest.raises(ValueError, match="differ in each epoch and cannot be kept"):
        StackedImages(ImageDataset(clothes, single_view(train_view((28, 28)), 3), train=True))


class _Broken:
    """A source in which one image is damaged."""

    blocks = None

    def __init__(self, source, index: int) -> None:
        self.source, self.index = source, index

    def __len__(self) -> int:
        return len(self.source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def describe(self) -> str:
        return self.source.describe()

    def read(self, index: int) -> bytes:
        return b"damaged" if index == self.index else self.source.read(index)

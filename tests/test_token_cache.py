"""Tokens made once: the same training as with tokens made in every step, and never those of something else."""

import numpy as np
import torch
from conftest import SIZE, LabeledByTokenizer, tiny_arguments, tiny_model
from PIL import Image

from data.augmentations import CenterCrop, TwoViews
from data.collators import MaskingCollator
from data.images import PretrainingImages
from data.sources import open_source
from training.targets import TokenizerLabels
from training.token_cache import cached_tokens
from training.trainer import MimTrainer


def images_of(source, num_images: int) -> PretrainingImages:
    views = TwoViews(CenterCrop((SIZE, SIZE)), (SIZE, SIZE))
    return PretrainingImages(source, np.arange(num_images), views, 3, 0, 8, None, train=True)


def small_labels() -> TokenizerLabels:
    collator = MaskingCollator((4, 4), 0.4, equal_num_masked=False)
    return TokenizerLabels(LabeledByTokenizer(collator).image_tokenizer, torch.device("cpu"))


def train(folder, images, labels) -> dict[str, torch.Tensor]:
    trainer = MimTrainer(
        model=tiny_model("beit"),
        args=tiny_arguments(folder, max_steps=4),
        train_dataset=images,
        data_collator=MaskingCollator((4, 4), (0.2, 0.9), equal_num_masked=False, with_image_index=True),
    )
    trainer.make_labels = labels
    trainer.train()
    return trainer.model.state_dict()


def test_cache__trains_to_the_same_weights_as_tokens_made_in_every_step(tmp_path):
    source, labels = open_source("sample"), small_labels()
    made_in_each_step = train(tmp_path / "a", images_of(source, 40), labels)
    images = images_of(source, 40)
    file = cached_tokens(images, labels, tmp_path, lambda text: None)
    images.labels, images.transform = np.load(file, mmap_mode="r"), images.transform.crop
    assert len(np.unique(images.labels)) > 1  # else any order of the images would do
    assert "tokenizer_pixel_values" not in images[0]

    def never(views):
        raise AssertionError("the tokenizer was run though the tokens are there")

    from_the_file = train(tmp_path / "b", images, never)
    for name, expected in made_in_each_step.items():
        assert torch.equal(from_the_file[name], expected), name


def test_cache__is_found_again_but_not_for_another_tokenizer_or_other_images(tmp_path):
    source, labels, said = open_source("sample"), small_labels(), []
    file = cached_tokens(images_of(source, 40), labels, tmp_path, said.append)
    assert "16 tokens of each of 40 images" in said[0]
    before = file.stat().st_mtime_ns
    assert cached_tokens(images_of(source, 40), labels, tmp_path, said.append) == file
    assert file.stat().st_mtime_ns == before
    assert cached_tokens(images_of(source, 39), labels, tmp_path, said.append) != file
    with torch.no_grad():
        next(labels.tokenizer.parameters()).add_(1e-3)
    assert cached_tokens(images_of(source, 40), labels, tmp_path, said.append) != file
    assert len(list(tmp_path.glob("tokens-*.npy"))) == 3


def test_cache__an_unreadable_image_is_named_and_another_takes_its_place(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(4):
        Image.fromarray(np.full((SIZE, SIZE, 3), 60 * number, np.uint8)).save(pictures / f"{number}.png")
    source = open_source(str(pictures))
    (pictures / "2.png").write_bytes(b"cut")
    images = images_of(source, 4)
    images.bad_images_file = tmp_path / "bad_images.jsonl"
    said = []
    file = cached_tokens(images, small_labels(), tmp_path, said.append)
    images.labels, images.transform = np.load(file), images.transform.crop
    assert "2.png" in images.bad_images_file.read_text()
    assert "3 images" in said[0]
    assert images.labels[2].tolist() == [-1] * 16
    item = images.item(2, epoch=0)
    assert item["image_index"] != 2
    assert item["labels"].min() >= 0


def test_views_at_center__are_two_where_training_has_two():
    images = images_of(open_source("sample"), 4)
    images.transform = TwoViews(CenterCrop((SIZE, SIZE)), (16, 16))
    assert images.at_center()[0]["tokenizer_pixel_values"].shape == (3, 16, 16)

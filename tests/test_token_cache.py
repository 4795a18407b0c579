"""Targets made once: the same training as with targets made in every step, and never those of something else."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SIZE, LabeledByTokenizer, tiny_arguments, tiny_model, tiny_targets
from PIL import Image
from torch.utils.data import default_collate

from data.augmentations import CenterCrop, CropView, OtherSize, Views, single_view
from data.collators import MaskingCollator
from data.decoding import BadImage
from data.images import ImageDataset, SamplesWithTargets, SourceSamples
from data.sources import open_source
from training import token_cache
from training.targets import TokenizerTargets
from training.token_cache import cached_targets
from training.trainer import MimTrainer

VIEW = OtherSize("tokenizer_pixel_values", (SIZE, SIZE), Image.Resampling.LANCZOS)


def images_of(source, num_images: int, train: bool = False, file=None) -> ImageDataset:
    views = Views((CropView(CenterCrop((SIZE, SIZE)), other_size=VIEW),), 3)
    samples = SourceSamples(source, np.arange(num_images))
    return ImageDataset(samples, views, train=train, images_per_step=8, bad_images_file=file)


def with_targets(images: ImageDataset, files: dict) -> ImageDataset:
    samples = SamplesWithTargets(images.samples, files)
    transform = single_view(CenterCrop((SIZE, SIZE)), 3)
    return ImageDataset(samples, transform, train=True, images_per_step=8, bad_images_file=images.bad_images_file)


def small_targets() -> TokenizerTargets:
    collator = MaskingCollator((4, 4), 0.4, equal_num_masked=False)
    return TokenizerTargets(LabeledByTokenizer(collator).image_tokenizer, (4, 4))


def train(folder, images, targets) -> dict[str, torch.Tensor]:
    trainer = MimTrainer(
        model=tiny_model("beit"),
        args=tiny_arguments(folder, max_steps=4),
        train_dataset=images,
        data_collator=MaskingCollator((4, 4), (0.2, 0.9), equal_num_masked=False, with_image_index=True),
        targets=targets,
    )
    trainer.train()
    return trainer.model.state_dict()


def test_cache__trains_to_the_same_weights_as_tokens_made_in_every_step(tmp_path):
    source, targets = open_source("sample"), small_targets()
    made_in_each_step = train(tmp_path / "a", images_of(source, 40, train=True), targets)
    files = cached_targets(images_of(source, 40), targets, tmp_path, lambda text: None)
    images = with_targets(images_of(source, 40), files)
    assert len(np.unique(images.samples.values["labels"])) > 1  # else any order of the images would do
    assert "tokenizer_pixel_values" not in images[0]

    def never(pixel_values):
        raise AssertionError("the tokenizer was run though the tokens are there")

    targets.model.get_codebook_indices = never
    from_the_file = train(tmp_path / "b", images, targets)
    for name, expected in made_in_each_step.items():
        assert torch.equal(from_the_file[name], expected), name


def test_cache__is_found_again_but_not_for_another_tokenizer_or_other_images(tmp_path):
    source, targets, logged = open_source("sample"), small_targets(), []
    files = cached_targets(images_of(source, 40), targets, tmp_path, logged.append)
    assert "16 tokens for each of 40 images" in logged[0]
    before = files["labels"].stat().st_mtime_ns
    assert cached_targets(images_of(source, 40), targets, tmp_path, logged.append) == files
    assert files["labels"].stat().st_mtime_ns == before
    assert cached_targets(images_of(source, 39), targets, tmp_path, logged.append) != files
    with torch.no_grad():
        next(targets.model.parameters()).add_(1e-3)
    assert cached_targets(images_of(source, 40), targets, tmp_path, logged.append) != files
    assert len(list(tmp_path.glob("targets-*.npy"))) == 3


def test_cache__an_unreadable_image_is_named_and_another_takes_its_place(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(4):
        Image.fromarray(np.full((SIZE, SIZE, 3), 60 * number, np.uint8)).save(pictures / f"{number}.png")
    source = open_source(str(pictures))
    (pictures / "2.png").write_bytes(b"cut")
    images = images_of(source, 4, file=tmp_path / "bad_images.jsonl")
    logged = []
    files = cached_targets(images, small_targets(), tmp_path, logged.append)
    images = with_targets(images, files)
    assert "2.png" in images.bad_images_file.read_text()
    assert "3 images" in logged[0]
    assert images.samples.values["labels"][2].tolist() == [-1] * 16
    item = images.item(2, epoch=0)
    assert item["image_index"] != 2
    assert item["labels"].min() >= 0


def test_cache__is_one_array_though_written_batch_by_batch(tmp_path, monkeypatch):
    images, targets = images_of(open_source("sample"), 70), small_targets()
    whole = np.concatenate([found["labels"] for found in token_cache._in_batches(images, targets)])

    def batches(images, targets):
        for start in range(0, 70, 32):
            yield {"labels": whole[start : start + 32]}

    monkeypatch.setattr(token_cache, "_in_batches", batches)
    file = cached_targets(images, targets, tmp_path, lambda text: None)["labels"]
    assert np.array_equal(np.load(file), whole)
    assert np.load(file).dtype == np.int32
    assert [each.name for each in tmp_path.iterdir()] == [file.name]


def features_of(folder, source, num_images=5, **options):
    """Files with the features of images by a small teacher with a class token."""
    images, targets, logged = images_of(source, num_images, **options), tiny_targets("feature+teacher"), []
    images.transform = single_view(CenterCrop(targets.view.image_size), 3)
    targets.view = None
    return images, targets, cached_targets(images, targets, folder, logged.append), logged


def test_features__are_kept_in_half_precision_with_the_class_token(tmp_path):
    images, targets, files, logged = features_of(tmp_path, open_source("sample"))
    expected = targets(default_collate([images.view(index) for index in range(5)]))
    assert set(files) == {"teacher_features", "teacher_class_token"}
    samples = SamplesWithTargets(images.samples, files)
    for key in files:
        found = torch.stack([samples.sample(index)[key] for index in range(5)])
        assert found.dtype == torch.float16
        assert found.shape == expected[key].shape
        torch.testing.assert_close(found.float(), expected[key], rtol=1e-3, atol=1e-3)
    assert "for each of 5 images" in logged[0]
    again = targets({key: found, "teacher_features": found})
    assert again["teacher_features"] is found  # the teacher is not run


def test_features__of_a_worker_are_not_a_copy_of_the_file(tmp_path):
    images, _, files, _ = features_of(tmp_path, open_source("sample"))
    samples = SamplesWithTargets(images.samples, files)
    assert samples.sample(0).keys() == {"image", *files}
    sent = pickle.loads(pickle.dumps(samples))
    assert "values" not in sent.__dict__
    assert torch.equal(sent.sample(3)["teacher_features"], samples.sample(3)["teacher_features"])


def test_features__of_an_unreadable_image_are_missing(tmp_path):
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        Image.fromarray(np.full((SIZE, SIZE, 3), 60 * number, np.uint8)).save(tmp_path / f"pictures/{number}.png")
    source = open_source(str(tmp_path / "pictures"))
    (tmp_path / "pictures" / "1.png").write_bytes(b"cut")
    images, _, files, logged = features_of(tmp_path, source, 3, file=tmp_path / "bad_images.jsonl")
    assert "for each of 2 images" in logged[0]
    with pytest.raises(BadImage, match="could not be read when its targets were computed"):
        SamplesWithTargets(images.samples, files).sample(1)


def test_features__that_do_not_fit_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(token_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    with pytest.raises(ValueError, match=r"--cache_tokens needs .* GB for 5 images, but .* has 0\.0 GB of free space"):
        features_of(tmp_path, open_source("sample"))
    assert not list(tmp_path.iterdir())


def test_features__too_large_for_half_precision_are_refused(tmp_path):
    images, targets = images_of(open_source("sample"), 5), tiny_targets("feature+teacher")
    images.transform = single_view(CenterCrop(targets.view.image_size), 3)
    targets.view = None
    with torch.no_grad():
        for parameter in targets.model.parameters():
            parameter *= 1e6
    with pytest.raises(ValueError, match="too large for the half precision"):
        cached_targets(images, targets, tmp_path, lambda text: None)
    assert not list(tmp_path.iterdir())

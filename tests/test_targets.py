"""Labels from an image tokenizer: which models are one, what view they want, and that both views show the same."""

import pytest
import torch
from conftest import tiny_arguments, tiny_model
from PIL import Image
from torch.testing import assert_close
from transformers import FlavaImageCodebook, FlavaImageCodebookConfig, ViTConfig, ViTModel

from data.augmentations import CenterCrop, CropView, OtherSize, RandomResizedCrop, Views
from data.collators import MaskingCollator
from data.images import ImageDataset, SourceSamples
from data.seeds import seeded_generator
from data.sources import open_source
from hub.open_model import open_model
from training.targets import TokenizerTargets
from training.trainer import MimTrainer


@pytest.fixture(scope="module")
def dalle(tmp_path_factory):
    """The public tokenizer's class at a small size; its weights would come from the Hub."""
    folder = tmp_path_factory.mktemp("tokenizer")
    torch.manual_seed(0)
    config = FlavaImageCodebookConfig(hidden_size=16, vocab_size=32, num_blocks_per_group=1, image_size=32)
    FlavaImageCodebook(config).save_pretrained(folder)
    return folder


def two_views(source, crop) -> ImageDataset:
    samples = SourceSamples(source, torch.arange(0, 48).numpy())
    return ImageDataset(samples, views_of(crop), train=isinstance(crop, RandomResizedCrop), images_per_step=8)


def views_of(crop) -> Views:
    other_size = OtherSize("tokenizer_pixel_values", (32, 32), Image.Resampling.LANCZOS)
    return Views((CropView(crop, other_size=other_size),), 3)


def test_views__show_the_same_crop_and_colors():
    source = open_source("sample")
    crop = RandomResizedCrop((64, 64), (0.08, 1.0), color_jitter=0.4)
    for index in range(12):
        views = views_of(crop)({"image": source.read(index)}, seeded_generator(0, index))
        first, second = (views[name].float() for name in ("pixel_values", "tokenizer_pixel_values"))
        shrunk = torch.nn.functional.interpolate(first[None], (32, 32), mode="bicubic", antialias=True)[0]
        assert (shrunk - second).abs().mean() < 6  # of 255: other filters, the same image
        assert (shrunk.flip(-1) - second).abs().mean() > 2 * (shrunk - second).abs().mean()


def test_views__colors_are_jittered_in_training_only():
    source = open_source("sample")
    plain, jittered = (RandomResizedCrop((64, 64), color_jitter=amount) for amount in (0.0, 0.4))
    one, other = (crop(source.read(0), 3, seeded_generator(0)) for crop in (plain, jittered))
    assert (one.float() - other.float()).abs().mean() > 2
    center = views_of(CenterCrop((64, 64)))({"image": source.read(0)}, seeded_generator(0))
    assert torch.equal(center["pixel_values"], CenterCrop((64, 64))(source.read(0), 3))


def test_views__of_several_crops_are_stacked_and_differ():
    source = open_source("sample")
    views = Views((CropView(RandomResizedCrop((32, 32)), num_crops=2), CropView(CenterCrop((16, 16)), "small")), 3)
    item = views({"image": source.read(0), "labels": 7}, seeded_generator(0))
    assert item["pixel_values"].shape == (2, 3, 32, 32)
    assert not torch.equal(*item["pixel_values"])
    assert item["small"].shape == (3, 16, 16)
    assert item["labels"] == 7


def test_targets__are_those_of_the_frozen_tokenizer_in_float32_with_dalles_pixel_mapping(dalle):
    tokenizer = open_model(str(dalle), "tokenizer").model
    targets = TokenizerTargets(tokenizer, (4, 4))
    views = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        batch = targets({"tokenizer_pixel_values": views, "image_index": 7})
    assert batch.keys() == {"labels", "image_index"}
    assert batch["labels"].dtype == torch.int64
    assert torch.equal(batch["labels"], tokenizer.get_codebook_indices(0.8 * views.float() / 255 + 0.1).flatten(1))
    assert not any(parameter.requires_grad for parameter in tokenizer.parameters())
    assert targets({"labels": 1}) == {"labels": 1}  # from a cache
    others = targets({"labels": 1, "pair_tokenizer_pixel_values": views})
    assert others.keys() == {"labels", "pair_labels"}
    assert torch.equal(others["pair_labels"], batch["labels"])


def test_view__is_the_tokenizers_own_size_and_must_give_a_token_per_patch(dalle):
    tokenizer = open_model(str(dalle), "tokenizer").model
    targets = TokenizerTargets(tokenizer, (4, 4))
    assert targets.view.image_size == (32, 32)
    assert targets.config_settings == {"vocab_size": 32}
    with pytest.raises(ValueError, match="32 x 32 pixels into 4 x 4 tokens, but the encoder has 8 x 8 patches"):
        TokenizerTargets(tokenizer, (8, 8))


def test_load__says_what_is_wrong(tmp_path):
    with pytest.raises(ValueError, match=r"`tokenizer` .*missing is neither a folder nor a Hub id"):
        open_model(str(tmp_path / "missing"), "tokenizer")
    with pytest.raises(ValueError, match=r"no config\.json"):
        open_model(str(tmp_path), "tokenizer")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=32)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="ViTModel without get_codebook_indices"):
        TokenizerTargets(open_model(str(tmp_path), "tokenizer").model, (4, 4))


def test_trainer__every_hidden_patch_of_a_step_counts_alike(dalle, tmp_path):
    """Images have very unequal numbers of masked patches: 1 x 8 images and 4 x 2 must still be the same step."""
    source, crop = open_source("sample"), RandomResizedCrop((32, 32), (0.2, 1.0))
    weights, losses = [], []
    targets = TokenizerTargets(open_model(str(dalle), "tokenizer").model, (4, 4))

    def few_tokens(batch):
        batch = targets(batch)
        return batch | {"labels": batch["labels"] % 16}

    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = MimTrainer(
            model=tiny_model("beit", drop_path_rate=0.0),
            args=tiny_arguments(
                tmp_path,
                max_steps=2,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=accumulation,
                optim="sgd",
                learning_rate=0.1,
            ),
            train_dataset=two_views(source, crop),
            eval_dataset=two_views(source, CenterCrop((32, 32))),
            data_collator=MaskingCollator((4, 4), (0.2, 0.9), equal_num_masked=False, with_image_index=True),
            targets=few_tokens,
        )
        trainer.train()
        weights.append(trainer.model.state_dict())
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, expected in weights[0].items():
        assert_close(weights[1][name], expected, rtol=1e-5, atol=1e-6)
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_accuracy"] <= 1

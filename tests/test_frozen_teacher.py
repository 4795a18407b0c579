"""Frozen teachers of every kind: their grid, their pixels, and what is refused."""

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers import AutoModel

from benchmarks.efficientnet_lite0 import build_model
from modeling.frozen_teacher import FrozenTeacher, match_grid

_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 32}
# Settings, the grid and the number of tokens before the patches, for 32 x 48 pixels.
TEACHERS = {
    "ViT": ({**_VIT, "patch_size": 8}, (4, 6), 1),
    "DeiT": ({**_VIT, "patch_size": 8}, (4, 6), 2),
    "Dinov2": ({**_VIT, "patch_size": 8}, (4, 6), 1),
    "Dinov2WithRegisters": ({**_VIT, "patch_size": 8, "num_register_tokens": 4}, (4, 6), 5),
    "DINOv3ViT": ({**_VIT, "patch_size": 8, "num_register_tokens": 4}, (4, 6), 5),
    "CLIPVision": ({**_VIT, "patch_size": 8}, (4, 6), 1),
    "SiglipVision": ({**_VIT, "patch_size": 8}, (4, 6), 0),
    "Beit": ({**_VIT, "patch_size": 8, "image_size": (32, 48)}, (4, 6), 1),
    "Swin": ({"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2, "image_size": 32}, (4, 6), 0),
    "ResNet": ({"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}, (4, 6), None),
    "ConvNext": ({"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}, (4, 6), None),
    "EfficientNet": ({"width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128}, (1, 1), None),
}
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)


def tiny(name, **settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**TEACHERS[name][0], **settings})
    return AutoModel.from_config(config)


def pixels(height, width, num_channels=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (2, num_channels, height, width), generator=generator, dtype=torch.uint8)


def standardized(images, mean=MEAN, std=STD):
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (images / 255 - mean) / std


@pytest.mark.parametrize("name", TEACHERS)
def test_teacher__returns_the_patches_of_any_encoder_on_its_grid(name):
    _, grid, num_extra = TEACHERS[name]
    model = tiny(name)
    teacher = FrozenTeacher(model, MEAN, STD, (32, 48)).train()
    images = pixels(32, 48)
    features = teacher(images)
    options = {"interpolate_pos_encoding": True} if name in ("ViT", "DeiT", "CLIPVision", "SiglipVision") else {}
    with torch.no_grad():
        hidden = model.eval()(pixel_values=standardized(images), **options).last_hidden_state
    expected = hidden if num_extra is None else hidden[:, num_extra:].transpose(1, 2).unflatten(2, grid)
    assert teacher.grid == grid
    assert_close(features.patches, expected, rtol=1e-4, atol=1e-4)
    assert features.patches.shape == (2, teacher.feature_size, *grid)
    assert not features.patches.requires_grad
    if num_extra:
        assert_close(features.class_token, hidden[:, 0], rtol=1e-4, atol=1e-4)
    assert (features.class_token is not None) == teacher.has_class_token == bool(num_extra)
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@torch.no_grad()
def test_teacher__standardizes_again_what_was_standardized_for_a_student():
    teacher = FrozenTeacher(tiny("ViT"), MEAN, STD, 32)
    images = pixels(32, 32)
    own = {"image_mean": (0.1, 0.2, 0.3), "image_std": (0.5, 0.6, 0.7)}
    floats = standardized(images, *own.values())
    assert_close(teacher(floats, **own).patches, teacher(images).patches, rtol=1e-4, atol=1e-5)
    gray = pixels(32, 32, num_channels=1)
    own = {"image_mean": (0.1,), "image_std": (0.5,)}
    again = teacher(standardized(gray, *own.values()), **own).patches
    assert_close(again, teacher(gray.expand(-1, 3, -1, -1)).patches, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_teacher__resizes_images_to_its_size_and_its_grid_to_the_students():
    teacher = FrozenTeacher(tiny("ViT", image_size=64), MEAN, STD, 64)
    patches = teacher(pixels(32, 32)).patches
    assert patches.shape[2:] == teacher.grid == (8, 8)
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    ramp = torch.stack([rows, columns])[None]  # (1, 2, 8, 8)
    assert_close(match_grid(ramp, (8, 8)), ramp.flatten(2).transpose(1, 2))
    halved = match_grid(ramp, (4, 4)).unflatten(1, (4, 4))
    assert_close(halved[0, 1:3, 1:3, 0], torch.tensor([[2.5, 2.5], [4.5, 4.5]]))
    doubled = match_grid(ramp, (16, 8)).unflatten(1, (16, 8))
    assert_close(doubled[0, 3:5, 2], torch.tensor([[1.25, 2.0], [1.75, 2.0]]))


def test_teacher__is_refused_if_it_reads_no_images_or_has_no_grid():
    bert = AutoModel.from_config(
        transformers.BertConfig(
            vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
        )
    )
    with pytest.raises(ValueError, match=r"the teacher is a BertModel, which reads input_ids; expected an encoder of"):
        FrozenTeacher(bert, MEAN, STD, 32)
    with pytest.raises(ValueError, match=r"a Dinov2Model that gives no grid of features for images of 30 x 30"):
        FrozenTeacher(tiny("Dinov2"), MEAN, STD, 30, "x")
    with pytest.raises(ValueError, match=r"x has image_mean \(0\.5,\) and image_std \(0\.5,\), expected one"):
        FrozenTeacher(tiny("ViT"), (0.5,), (0.5,), 32, "x")
    teacher = FrozenTeacher(tiny("ViT", num_channels=1), (0.5,), (0.5,), 32, "x")
    with pytest.raises(ValueError, match=r"x reads images of 1 channels, but these have 3; choose a teacher with as"):
        teacher(pixels(32, 32))


@torch.no_grad()
def test_efficientnet_lite0__is_a_native_model_whose_squeeze_and_excitation_does_nothing():
    sizes = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
    torch.manual_seed(0)
    weights = AutoModel.from_config(transformers.EfficientNetConfig(**sizes)).state_dict()
    released = {name: value for name, value in weights.items() if "squeeze_excite" not in name}
    model = build_model(released | {"classifier.weight": torch.zeros(1), "classifier.bias": torch.zeros(1)})
    for name, value in released.items():
        assert torch.equal(model.state_dict()[name], value), name
    block = model.encoder.blocks[3]
    hidden = torch.randn(2, block.squeeze_excite.dim, 4, 4)
    assert torch.equal(block.squeeze_excite(hidden), hidden)
    assert FrozenTeacher(model, MEAN, STD, 64).grid == (2, 2)

"""Feature prediction: HOG against a plain reference, losses by hand, teachers by the command, and each refusal."""

import math

import numpy as np
import pytest
import torch
import yaml
from conftest import PATCH, SIZE, tiny_batch, tiny_model, tiny_targets
from pretraining_command import pretrain
from torch.nn import functional as F
from torch.testing import assert_close
from transformers import (
    AutoModel,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from commands.settings import RECIPES
from modeling import CONFIGS, MODELS
from modeling.feature import FeatureConfig, FeatureForPreTraining
from modeling.frozen_teacher import match_grid
from modeling.gradient_histograms import cells_per_side, gradient_histograms, histogram_size

_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
SMALL = ["--method", "feature", "--dataset", "sample", "--model", "vit-nano", "--image_size", "32", "--max_steps", "2"]
SMALL += ["--per_device_train_batch_size", "4", "--dataloader_num_workers", "0", "--report_to", "none", "--use_cpu"]


def plain_hog(image: np.ndarray, patch: int, cell: int) -> np.ndarray:
    """MaskFeat's HOG pixel by pixel: image (C, H, W) -> (N, C * 9 * cells of a patch)."""
    channels, height, width = image.shape
    padded = np.pad(image.astype(np.float64), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    window, middle = 2 * cell, (2 * cell - 1) / 2
    cells = np.zeros((channels, 9, height // cell, width // cell))
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                near = padded[c, y : y + 3, x : x + 3]
                horizontal = near[:, 0] @ [1, 2, 1] - near[:, 2] @ [1, 2, 1]
                vertical = [1, 2, 1] @ near[0] - [1, 2, 1] @ near[2]
                orientation = math.floor(math.atan2(horizontal, vertical) / math.pi * 9) % 9
                distance = (y % window - middle) ** 2 + (x % window - middle) ** 2
                weight = math.exp(-distance / (2 * cell**2))
                cells[c, orientation, y // cell, x // cell] += weight * math.hypot(horizontal, vertical)
    cells /= np.maximum(np.linalg.norm(cells, axis=1, keepdims=True), 1e-12)
    side = patch // cell
    return np.stack(
        [
            cells[:, :, y : y + side, x : x + side].ravel()
            for y in range(0, height // cell, side)
            for x in range(0, width // cell, side)
        ]
    )


@pytest.mark.parametrize(("patch", "cell"), [(16, 8), (8, 8), (4, 4)])
def test_histograms__equal_a_plain_reference(patch, cell):
    images = tiny_batch("feature", 2)["pixel_values"][..., :16, :]  # (2, 3, 16, 32), photographs
    found = gradient_histograms(images, patch)
    expected = np.stack([plain_hog(image.numpy(), patch, cell) for image in images])
    assert found.shape == (2, 16 * 32 // patch**2, histogram_size(patch, 3))
    assert_close(found, torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-5)
    assert cells_per_side(patch) == patch // cell
    assert_close(gradient_histograms(images * 3.0, patch), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_histograms__are_the_same_under_autocast(precision):
    images = torch.randint(256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with torch.autocast("cpu", precision):
        found = gradient_histograms(images, 16)
    assert torch.equal(found, gradient_histograms(images, 16))


def test_histograms__of_a_published_patch_are_108_numbers_and_point_along_the_edge():
    assert histogram_size(16, 3) == 108
    steep = torch.zeros(1, 1, 16, 16, dtype=torch.uint8)
    steep[..., 8:] = 200  # a vertical edge, and the same turned by 90 degrees
    found = [gradient_histograms(image, 16).view(9, 4) for image in (steep, steep.mT)]
    assert [int(one.sum(1).argmax()) for one in found] == [4, 0]


@torch.no_grad()
def test_losses__are_those_of_the_formulas():
    model, batch = tiny_model("feature+teacher").eval(), tiny_batch("feature+teacher")
    mask, pixels = batch["bool_masked_pos"], model.standardize(batch["pixel_values"])
    tokens = model.encoder.tokens(pixels, mask)
    target = F.layer_norm(match_grid(batch["teacher_features"], (SIZE // PATCH, SIZE // PATCH)), (16,))
    predicted = model.head(tokens[:, 1:])
    errors = 1 - (F.normalize(predicted, dim=-1) * F.normalize(target, dim=-1)).sum(-1)
    token = F.layer_norm(batch["teacher_class_token"], (16,))
    token_error = 1 - F.cosine_similarity(model.class_token_head(tokens[:, 0]), token).mean()
    output = model(**batch)
    expected = {"masked": errors[mask].mean(), "visible": errors[~mask].mean(), "class_token": 1 - (1 - token_error)}
    assert_close(output.losses, expected)
    assert_close(output.loss, sum(expected.values()))
    counts = {"masked": int(mask.sum()), "visible": int((~mask).sum()), "class_token": len(mask)}
    assert model.loss_counts(batch) == counts
    model.config.feature_loss = "smooth_l1"
    expected = F.smooth_l1_loss(predicted[mask], target[mask])
    assert_close(model(**batch).losses["masked"], expected)


@torch.no_grad()
def test_loss__of_histograms_is_their_squared_error_at_masked_patches():
    model, batch = tiny_model("feature").eval(), tiny_batch("feature")
    output, mask = model(**batch), batch["bool_masked_pos"]
    target = gradient_histograms(batch["pixel_values"], PATCH)[mask]
    assert_close(output.loss, (output.logits - target).square().mean())
    assert output.losses is None
    assert output.logits.shape == (int(mask.sum()), 27)


def test_model__needs_the_teachers_features_and_refuses_unknown_settings():
    batch = tiny_batch("feature+teacher")
    token, features = batch.pop("teacher_class_token"), batch.pop("teacher_features")
    model = tiny_model("feature+teacher")
    with pytest.raises(ValueError, match=r"pass `teacher_features` \(B, D, h, w\)"):
        model(**batch)
    with pytest.raises(ValueError, match=r"pass `teacher_class_token` \(B, D\)"):
        model(**batch, teacher_features=features)
    assert torch.isfinite(model(**batch, teacher_features=features, teacher_class_token=token).loss)
    assert "not at hand" in model.panel_problem(None)
    with pytest.raises(ValueError, match="feature_loss is 'l2', expected one of cosine, smooth_l1"):
        FeatureConfig(feature_loss="l2")
    with pytest.raises(ValueError, match=r"drop_path_rate is 1\.0, expected 0 or more and below 1"):
        FeatureConfig(drop_path_rate=1.0)
    with pytest.raises(ValueError, match="feature_size is -1, expected 0 or more"):
        FeatureConfig(feature_size=-1)


@torch.no_grad()
def test_targets__show_the_teacher_its_own_view_and_keep_features_that_are_there():
    targets = tiny_targets("feature+teacher")
    view = torch.randint(256, (2, 3, 24, 24), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batch = targets({"teacher_pixel_values": view, "pixel_values": 7})
    assert batch.keys() == {"pixel_values", "teacher_features", "teacher_class_token"}
    assert torch.equal(batch["teacher_features"], targets.model(view).patches)
    assert targets(batch) is batch
    same_size = type(targets)(targets.model, (24, 24), 3)
    assert same_size.view is None
    assert torch.equal(same_size({"pixel_values": view})["teacher_features"], batch["teacher_features"])


def test_recipes__have_the_published_settings():
    maskfeat, eva = (
        yaml.safe_load((RECIPES / f"feature_{name}_vit-base_in1k.yaml").read_text(encoding="utf-8"))
        for name in ("maskfeat", "eva")
    )
    assert maskfeat["base_learning_rate"] == pytest.approx(1.6e-3 * 256 / 2048)
    assert int(maskfeat["mask_ratio"] * 196) == 78
    assert (maskfeat["max_grad_norm"], maskfeat["num_train_epochs"], maskfeat["warmup_epochs"]) == (0.02, 300, 30)
    assert eva["base_learning_rate"] == pytest.approx(1e-3 * 256 / 4096)
    assert (eva["mask_ratio"], eva["num_train_epochs"], eva["warmup_epochs"]) == (0.4, 150, 2)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    torch.manual_seed(0)
    clip = {**_VIT, "image_size": 32, "patch_size": 8}
    text = {**_VIT, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config=clip, projection_dim=8)).save_pretrained(folder / "clip")
    ViTModel(ViTConfig(**clip, num_channels=1)).save_pretrained(folder / "gray")
    ConvNextModel(ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)).save_pretrained(folder / "cnn")
    size = {"height": 96, "width": 96}
    for name, channels in (("clip", 3), ("gray", 1), ("cnn", 3)):
        stats = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels}
        ViTImageProcessorPil(size=size if name == "cnn" else {"height": 32, "width": 32}, **stats).save_pretrained(
            folder / name
        )
    return folder


@pytest.mark.parametrize(
    ("teacher", "flags", "width"),
    [
        ("hog", [], 27),
        ("clip", ["--distill_visible", "true"], 16),
        ("cnn", ["--teacher_image_size", "40", "--cache_tokens"], 16),
    ],
)
def test_run__trains_on_every_kind_of_teacher_and_leaves_it_out_of_the_weights(
    teacher, flags, width, teachers, tmp_path, capsys
):
    folder = tmp_path / "out"
    name = teacher if teacher == "hog" else str(teachers / teacher)
    assert pretrain([*SMALL, "--teacher", name, "--output_dir", str(folder), *flags]) == 0
    assert "similarity" in "".join(capsys.readouterr())
    encoder, info = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(encoder) is ViTModel
    assert not info["missing_keys"]
    whole = FeatureForPreTraining.from_pretrained(folder / "pretraining")
    assert whole.head.out_features == width
    assert hasattr(whole, "class_token_head") == (teacher == "clip")
    assert not [key for key in whole.state_dict() if "teacher" in key]
    assert list(folder.glob("panels/step-*.png"))
    assert len(list(folder.glob("targets-*-teacher_features.npy"))) == ("--cache_tokens" in flags)


def test_refusals__say_what_to_do(teachers, tmp_path, capsys):
    def refusal(*flags: str) -> str:
        assert pretrain([*SMALL, "--dry_run", "--output_dir", str(tmp_path / "out"), *flags]) == 2
        return capsys.readouterr().err

    message = refusal()
    assert "facebook/dinov2-small" in message
    assert "hog: histograms" in message
    assert "reads images of 1 channels, but these have 3" in refusal("--teacher", str(teachers / "gray"))
    small = refusal("--teacher", str(teachers / "cnn"), "--teacher_image_size", "8")
    assert "has a grid of 1 x 1 for images of 8 x 8 pixels" in small
    assert "gives no grid of features" in refusal("--teacher", str(teachers / "clip"), "--teacher_image_size", "6")
    assert "--teacher_image_size has no effect" in refusal("--teacher", "hog", "--teacher_image_size", "32")
    assert "--cache_tokens has no effect with --teacher hog" in refusal("--teacher", "hog", "--cache_tokens")
    assert "--teacher has no effect with --method mae" in refusal("--method", "mae", "--teacher", "hog")


def test_registration__names_the_method():
    assert MODELS["feature"] is FeatureForPreTraining
    assert CONFIGS["feature"] is FeatureConfig


def test_teacher__that_is_convolutional_sees_at_most_twice_the_encoders_size(teachers, tmp_path, capsys):
    def plan(*flags: str) -> str:
        assert pretrain([*SMALL, "--dry_run", "--output_dir", str(tmp_path / "out"), *flags]) == 0
        return "".join(capsys.readouterr())

    assert "teacher: 8 x 8 features of 16 numbers for 64 x 64 pixels" in plan("--teacher", str(teachers / "cnn"))
    larger = plan("--teacher", str(teachers / "cnn"), "--teacher_image_size", "96")
    assert "teacher: 12 x 12 features of 16 numbers for 96 x 96 pixels" in larger
    assert "teacher: 4 x 4 features of 16 numbers for 32 x 32 pixels" in plan("--teacher", str(teachers / "clip"))

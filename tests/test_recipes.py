"""Every recipe loads and says where it comes from; the MAE recipes hold the figures of the paper and its code."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml

from commands.arithmetic import Hardware
from commands.memory import Footprint
from commands.pretraining_plan import PretrainingPlan
from commands.pretraining_settings import load_pretraining_settings
from commands.settings import RECIPES
from modeling import MODELS
from modeling.mae import MaeConfig

CONFIGS = {method: head.config_class for method, head in MODELS.items()}
ALL = sorted(path for path in RECIPES.glob("*.yaml") if not path.stem.startswith(("dvae", "vqkd", "finetune")))
HEADER = ("Paper:", "Run:", "Cost:", "Expected:", "Measured:")
NUM_IMAGENET_IMAGES = 1_281_167


def plan_of_imagenet(settings) -> PretrainingPlan:
    """Return the plan on eight GPUs."""
    eight_gpus = Hardware("cuda", 96, world_size=8, num_local_processes=8, has_bf16=True)
    num_images = (NUM_IMAGENET_IMAGES, 50_000)
    return PretrainingPlan.make(settings, eight_gpus, num_images, Footprint(1, 1, 1, 1), "imagenet", settings.grid)


def load(path: Path):
    argv = ["--method", path.stem] if path.stem in CONFIGS else ["--config", str(path)]
    return load_pretraining_settings(argv, CONFIGS)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipe__loads_and_every_line_of_it_counts(path):
    settings = load(path)
    for name, value in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        found = json.loads(settings.values[name]) if isinstance(value, dict) else settings.values[name]
        assert found == (float(value) if isinstance(found, float) else [value] if name == "dataset" else value), name


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipe__header_says_paper_command_cost_expectation_and_measurement(path):
    lines = [line.removeprefix("# ") for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "#"]
    for field in HEADER:
        said = [line.removeprefix(field).strip() for line in lines if line.startswith(field)]
        assert len(said) == 1, f"{path.name}: {field}"
        assert len(said[0]) > 5


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_recipe__command_in_the_header_runs_this_recipe(path):
    run = next(line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# Run:"))
    argv = run.split("run_pretraining.py")[1].split()
    settings = load_pretraining_settings(argv, CONFIGS)
    assert f"recipes/{path.name}" in settings.labels.values()


@pytest.mark.parametrize("method", CONFIGS)
def test_methods_recipe__leaves_model_and_data_to_the_user(method):
    lines = yaml.safe_load((RECIPES / f"{method}.yaml").read_text(encoding="utf-8"))
    assert not {"model", "method", "dataset", "image_size", "per_device_train_batch_size"} & set(lines)


def test_mae__has_the_published_settings():
    settings = load_pretraining_settings(["--method", "mae"], CONFIGS)
    published = {
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.05,
        "base_learning_rate": 1.5e-4,
        "warmup_epochs": 40,
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 800,
        "max_grad_norm": 0,
        "mask_ratio": 0.75,
        "mask_strategy": "random",
        "crop_scale": [0.2, 1.0],
        "norm_pix_loss": True,
        "image_stats": "preset",
        "image_size": 224,
        "decoder_hidden_size": 512,
        "decoder_num_hidden_layers": 8,
        "decoder_num_attention_heads": 16,
        "decoder_intermediate_size": 2048,
        "dataloader_drop_last": True,
    }
    assert {name: settings.values[name] for name in published} == published


@pytest.mark.parametrize(
    ("model", "patch_size", "width", "num_blocks", "num_heads", "accuracy"),
    [
        ("vit-base", 16, 768, 12, 12, "83.6"),
        ("vit-large", 16, 1024, 24, 16, "85.9"),
        ("vit-huge", 14, 1280, 32, 16, "86.9"),
    ],
)
def test_published_runs__are_1600_epochs_of_4096_images_a_step(
    model, patch_size, width, num_blocks, num_heads, accuracy
):
    path = RECIPES / f"mae_{model}_in1k.yaml"
    settings = load(path)
    sizes = settings.encoder_settings()
    assert (sizes["hidden_size"], sizes["num_hidden_layers"], sizes["num_attention_heads"]) == (
        width,
        num_blocks,
        num_heads,
    )
    assert (sizes["intermediate_size"], sizes["patch_size"]) == (4 * width, patch_size)
    plan = plan_of_imagenet(settings)
    assert plan.images_per_step == 4096
    assert plan.learning_rate == pytest.approx(2.4e-3)
    assert plan.num_steps == 1600 * math.ceil(NUM_IMAGENET_IMAGES / 4096)  # the last step of an epoch is a smaller one
    assert plan.warmup_steps == 40 * plan.steps_per_epoch
    assert f"{plan.num_steps:,} steps" in path.read_text(encoding="utf-8")
    assert f"Expected: {accuracy} top-1" in path.read_text(encoding="utf-8")


def test_beit__has_the_published_constants():
    settings = load(RECIPES / "beit.yaml")
    published = {
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "weight_decay": 0.05,
        "base_learning_rate": 1.5e-3 * 256 / 2048,
        "warmup_epochs": 10,
        "num_train_epochs": 800,
        "max_grad_norm": 3.0,
        "mask_strategy": "block",
        "crop_scale": [0.08, 1.0],
        "color_jitter": 0.4,
    }
    assert {name: settings.values[name] for name in published} == published
    assert round(settings.values["mask_ratio"] * 196) == 75
    assert json.loads(settings.values["lr_scheduler_kwargs"])["min_lr_rate"] == pytest.approx(1e-5 / 1.5e-3, rel=1e-4)


@pytest.mark.parametrize(("model", "accuracy", "clip"), [("vit-base", "83.2", 3.0), ("vit-large", "85.2", 1.0)])
def test_beit__published_runs_are_800_epochs_of_2048_images_a_step(model, accuracy, clip):
    path = RECIPES / f"beit_{model}_in1k.yaml"
    settings = load(path)
    plan = plan_of_imagenet(settings)
    assert plan.images_per_step == 2048
    assert plan.learning_rate == pytest.approx(1.5e-3)
    assert plan.num_steps == 800 * math.ceil(NUM_IMAGENET_IMAGES / 2048)
    assert settings.values["max_grad_norm"] == clip
    assert f"{plan.num_steps:,} steps" in path.read_text(encoding="utf-8")
    assert f"Expected: {accuracy} top-1" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "epochs", "beta2", "drop_path", "accuracy"),
    [
        ("vit-base_in1k_300ep", 300, 0.98, 0.0, "85.0"),
        ("vit-base_in1k", 1600, 0.999, 0.1, "85.5"),
        ("vit-large_in1k_300ep", 300, 0.98, 0.0, "86.6"),
        ("vit-large_in1k", 1600, 0.999, 0.1, "87.3"),
    ],
)
def test_beit2__published_runs_are_of_300_and_1600_epochs(name, epochs, beta2, drop_path, accuracy):
    path = RECIPES / f"beit2_{name}.yaml"
    settings = load(path)
    plan = plan_of_imagenet(settings)
    published = {
        "adam_beta1": 0.9,
        "adam_beta2": beta2,
        "drop_path_rate": drop_path,
        "num_aggregation_blocks": 2,
        "weight_decay": 0.05,
        "warmup_epochs": 10,
        "max_grad_norm": 3.0,
        "mask_strategy": "exact-block",
        "crop_scale": [0.2, 1.0],
        "color_jitter": 0.4,
        "image_stats": "preset",
    }
    assert {name: settings.values[name] for name in published} == published
    assert plan.num_masked == (75, 75)
    assert (plan.images_per_step, plan.learning_rate) == (2048, pytest.approx(1.5e-3))
    assert plan.num_steps == epochs * math.ceil(NUM_IMAGENET_IMAGES / 2048)
    assert json.loads(settings.values["lr_scheduler_kwargs"])["min_lr_rate"] == pytest.approx(1e-5 / 1.5e-3, rel=1e-4)
    config = CONFIGS["beit2"](encoder_config=settings.encoder_settings(), **settings.method_settings)
    scale, layer = {12: (0.1, 9), 24: (1e-5, 21)}[config.encoder_config.num_hidden_layers]
    assert (config.encoder_config.layer_scale_init_value, config.aggregation_layer) == (scale, layer)
    assert config.encoder_config.drop_path_rate == drop_path
    assert f"{plan.num_steps:,} steps" in path.read_text(encoding="utf-8")
    assert f"Expected: {accuracy} top-1" in path.read_text(encoding="utf-8")


def test_data2vec__has_the_published_constants():
    settings = load(RECIPES / "data2vec.yaml")
    published = {
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "weight_decay": 0.05,
        "base_learning_rate": 2e-3 * 256 / 2048,
        "warmup_epochs": 10,
        "num_train_epochs": 800,
        "max_grad_norm": 3.0,
        "mask_strategy": "block",
        "crop_scale": [0.08, 1.0],
        "color_jitter": 0.4,
        "smooth_l1_beta": 2.0,
        "post_target_layer_norm": True,
    }
    assert {name: settings.values[name] for name in published} == published
    assert round(settings.values["mask_ratio"] * 196) == 120
    assert json.loads(settings.values["lr_scheduler_kwargs"])["min_lr_rate"] == pytest.approx(1e-5 / 2e-3)


@pytest.mark.parametrize(
    ("model", "images_per_step", "peak", "warmup", "accuracy"),
    [("vit-base", 2048, 2e-3, 10, "84.2"), ("vit-large", 4096, 1e-3, 80, "86.2")],
)
def test_data2vec__published_runs_are_of_800_epochs(model, images_per_step, peak, warmup, accuracy):
    path = RECIPES / f"data2vec_{model}_in1k.yaml"
    settings = load(path)
    plan = plan_of_imagenet(settings)
    assert plan.images_per_step == images_per_step
    assert plan.learning_rate == pytest.approx(peak)
    assert plan.num_steps == 800 * math.ceil(NUM_IMAGENET_IMAGES / images_per_step)
    assert plan.warmup_steps == warmup * plan.steps_per_epoch
    assert json.loads(settings.values["lr_scheduler_kwargs"])["min_lr_rate"] == pytest.approx(1e-5 / peak)
    assert (settings.values["num_target_layers"], settings.values["teacher_momentum"]) == (6, 0.9998)
    assert f"{plan.num_steps:,} steps" in path.read_text(encoding="utf-8")
    assert f"Expected: {accuracy} top-1" in path.read_text(encoding="utf-8")


def test_data2vec2__published_run_is_of_375_thousand_steps_of_256_images():
    path = RECIPES / "data2vec2_vit-base_in1k.yaml"
    settings = load(path)
    plan = plan_of_imagenet(settings)
    published = {
        "mask_strategy": "visible-blocks",
        "mask_ratio": 0.8,
        "num_masks": 16,
        "crop_scale": [0.2, 1.0],
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "weight_decay": 0.05,
        "max_grad_norm": 4.0,
        "num_target_layers": 10,
        "class_loss_weight": 0.01 * 16 * 16,
        "mask_noise_std": 0.01,
        "teacher_momentum_start": 0.9998,
        "teacher_momentum": 0.99999,
        "teacher_momentum_steps": 100_000,
    }
    assert {name: settings.values[name] for name in published} == published
    assert (plan.images_per_step, plan.learning_rate) == (256, pytest.approx(1e-3))
    assert (plan.num_steps, plan.warmup_steps) == (375_300, 50_040)
    assert plan.num_masked == (157, 157)
    assert f"{plan.num_steps:,} steps" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "epochs", "smallest_crop", "trains_scale", "warmup", "frozen", "max_norm", "last_rate", "accuracy"),
    [
        ("ibot_vit-small", 800, 0.25, True, 30, 1, 3.0, 1e-6, "75.2 top-1 by kNN, 77.9"),
        ("ibot_vit-base", 400, 0.32, False, 50, 3, 0.3, 2e-6, "77.1 top-1 by kNN, 79.5"),
        ("dino_vit-small", 800, 0.25, True, 30, 1, 0.0, 1e-5, "74.5 top-1 by kNN, 77.0"),
        ("dino_vit-base", 400, 0.25, False, 50, 3, 0.3, 2e-6, "76.1 top-1 by kNN, 78.2"),
    ],
)
def test_multi_crop__published_runs_are_of_1024_images_a_step(
    name, epochs, smallest_crop, trains_scale, warmup, frozen, max_norm, last_rate, accuracy
):
    path = RECIPES / f"{name}_in1k.yaml"
    settings = load(path)
    plan = plan_of_imagenet(settings)
    published = {
        "num_train_epochs": epochs,
        "crop_scale": [smallest_crop, 1.0],
        "max_local_crop_scale": smallest_crop,
        "trains_prototype_scale": trains_scale,
        "teacher_temperature_warmup_epochs": warmup,
        "freeze_prototypes_epochs": frozen,
        "max_tensor_norm": max_norm,
        "num_prototypes": 65_536,
        "num_local_crops": 10,
        "min_local_crop_scale": 0.05,
        "drop_path_rate": 0.1,
        "student_temperature": 0.1,
        "teacher_temperature": 0.07,
        "teacher_temperature_start": 0.04,
        "teacher_momentum_start": 0.996,
        "centering": "mean",
        "center_momentum": 0.9,
        "head_hidden_size": 2048,
        "head_bottleneck_size": 256,
        "koleo_loss_weight": 0,
        "weight_decay_start": 0.04,
        "weight_decay_end": 0.4,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "max_grad_norm": 0,
    }
    if name.startswith("ibot"):
        published |= {"num_prototypes": 8192, "mask_strategy": "block", "mask_ratio": [0.1, 0.5], "shares_heads": True}
    assert {key: settings.values[key] for key in published} == published
    assert plan.images_per_step == 1024
    assert plan.learning_rate == pytest.approx({800: 2e-3, 400: 3e-3}[epochs])
    kwargs = json.loads(settings.values["lr_scheduler_kwargs"])
    assert kwargs["min_lr_rate"] * plan.learning_rate == pytest.approx(last_rate, rel=1e-4)
    assert (plan.num_steps, plan.warmup_steps) == (epochs * 1251, 10 * 1251)
    assert f"{plan.num_steps:,} steps" in path.read_text(encoding="utf-8")
    assert f"Expected: {accuracy} by a linear probe" in path.read_text(encoding="utf-8")


def test_dinov2__published_run_is_the_short_configuration():
    path = RECIPES / "dinov2_vit-large_in1k.yaml"
    settings = load(path)
    plan = plan_of_imagenet(settings)
    published = {
        "num_prototypes": 65_536,
        "head_hidden_size": 2048,
        "head_bottleneck_size": 256,
        "shares_heads": True,
        "trains_prototype_scale": True,
        "centering": "mean",
        "koleo_loss_weight": 0.1,
        "mask_probability": 0.5,
        "mask_ratio": [0.1, 0.5],
        "drop_path_rate": 0.3,
        "num_register_tokens": 0,
        "num_local_crops": 8,
        "crop_scale": [0.32, 1.0],
        "min_local_crop_scale": 0.05,
        "max_local_crop_scale": 0.32,
        "teacher_temperature_start": 0.04,
        "teacher_temperature": 0.07,
        "teacher_momentum_start": 0.992,
        "weight_decay_start": 0.04,
        "weight_decay_end": 0.4,
        "layer_decay": 0.9,
        "max_grad_norm": 3.0,
        "max_tensor_norm": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
    }
    assert {name: settings.values[name] for name in published} == published
    assert (plan.images_per_step, plan.num_steps, plan.warmup_steps) == (2048, 100 * 1250, 10 * 1250)
    assert plan.learning_rate == pytest.approx(4e-3 * math.sqrt(2048 / 1024), rel=1e-4)
    kwargs = json.loads(settings.values["lr_scheduler_kwargs"])
    assert kwargs["min_lr_rate"] * plan.learning_rate == pytest.approx(1e-6, rel=1e-4)
    config = CONFIGS["dinov2"](encoder_config=settings.encoder_settings(), **settings.method_settings)
    assert config.encoder_config.layerscale_value == 1e-5
    assert [view.image_size for view in config.views] == [None, (96, 96)]
    with torch.device("meta"):
        schedules = MODELS["dinov2"](config).schedules(plan.num_steps, plan.steps_per_epoch)
    assert schedules["teacher_temperature"].num_steps == 30 * 1250
    assert round(settings.values["freeze_prototypes_epochs"] * plan.steps_per_epoch) == 1250
    assert f"{plan.num_steps:,} steps" in path.read_text(encoding="utf-8")
    assert "Expected: 81.6 top-1 by kNN, 82.9" in path.read_text(encoding="utf-8")


def test_quickstart__is_small_and_predicts_plain_pixels():
    settings = load(RECIPES / "quickstart.yaml")
    plan = PretrainingPlan.make(
        settings, Hardware("cpu", 2), (1000, 50), Footprint(1, 1, 1, 1), "sample", settings.grid
    )
    assert settings.values["norm_pix_loss"] is False
    assert plan.learning_rate == pytest.approx(1.5e-3)
    assert plan.grid == (8, 8)
    config = MaeConfig(encoder_config=settings.encoder_settings(), **settings.method_settings)
    assert (config.encoder_config.hidden_size, config.decoder_hidden_size) == (192, 128)


def test_simmim__has_the_published_settings():
    settings = load(RECIPES / "simmim.yaml")
    published = {
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.05,
        "base_learning_rate": 2e-4 * 256 / 512,
        "warmup_epochs": 10,
        "num_train_epochs": 100,
        "max_grad_norm": 5.0,
        "mask_ratio": 0.6,
        "mask_strategy": "random-unit",
        "mask_unit": 32,
        "crop_scale": [0.67, 1.0],
        "interpolation": "bilinear",
        "pixel_loss": "l1",
        "norm_pix_loss": False,
        "image_stats": "preset",
    }
    assert {name: settings.values[name] for name in published} == published
    assert json.loads(settings.values["lr_scheduler_kwargs"])["min_lr_rate"] == pytest.approx(1e-5 / 2e-4)


@pytest.mark.parametrize(
    ("name", "epochs", "peak", "drop", "hidden", "accuracy"),
    [
        ("vit-base_in1k_800ep", 800, 4e-4, 700, (120, 196), "83.8"),
        ("swin-base_in1k_100ep", 100, 8e-4, None, (1408, 2304), "82.8"),
        ("swin-base_in1k_800ep", 800, 4e-4, 700, (1408, 2304), "84.0"),
    ],
)
def test_simmim__published_runs_are_of_2048_images_a_step(name, epochs, peak, drop, hidden, accuracy):
    path = RECIPES / f"simmim_{name}.yaml"
    settings = load(path)
    plan = plan_of_imagenet(settings)
    assert plan.images_per_step == 2048
    assert plan.learning_rate == pytest.approx(peak)
    assert plan.num_steps == epochs * math.ceil(NUM_IMAGENET_IMAGES / 2048)
    assert plan.warmup_steps == 10 * plan.steps_per_epoch
    assert plan.lr_drop_step == (drop and drop * plan.steps_per_epoch)
    assert plan.num_masked == (hidden[0], hidden[0])
    assert math.prod(plan.grid) == hidden[1]
    assert f"{plan.num_steps:,} steps" in path.read_text(encoding="utf-8")
    assert f"Expected: {accuracy} top-1" in path.read_text(encoding="utf-8")


def test_simmim__encoders_are_those_of_the_paper():
    vit = load(RECIPES / "simmim_vit-base_in1k_800ep.yaml")
    config = CONFIGS["simmim"](encoder_config=vit.encoder_settings(), **vit.method_settings).encoder_config
    assert (config.model_type, config.layer_scale_init_value, config.drop_path_rate) == ("beit", 0.1, 0.1)
    assert (config.use_shared_relative_position_bias, config.use_absolute_position_embeddings) == (True, False)
    swin = load(RECIPES / "simmim_swin-base_in1k_800ep.yaml")
    config = CONFIGS["simmim"](encoder_config=swin.encoder_settings(), **swin.method_settings).encoder_config
    assert (config.embed_dim, config.depths, config.num_heads) == (128, [2, 2, 18, 2], [4, 8, 16, 32])
    assert (config.window_size, config.image_size, config.drop_path_rate) == (6, 192, 0.0)


def test_simmim_asymmetric__hides_40_percent_and_sees_117_of_196_patches():
    settings = load(RECIPES / "simmim-asymmetric.yaml")
    plan = PretrainingPlan.make(
        settings, Hardware("cpu", 2), (1000, 50), Footprint(1, 1, 1, 1), "sample", settings.grid
    )
    assert plan.num_masked == (79, 79)
    assert settings.values["norm_pix_loss"] is False
    assert settings.values["decoder_num_hidden_layers"] == 8

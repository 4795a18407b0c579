"""The fine-tuning recipes hold the published constants, and each encoder gets the one of its method and size."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from commands.arithmetic import Hardware
from commands.finetune_plan import FinetunePlan
from commands.finetune_settings import load_finetune_settings
from commands.memory import Footprint
from commands.settings import RECIPES, SettingsError
from tasks import SETTINGS

NAMED = ["--model", "encoder", "--dataset", "labeled"]
PUBLISHED = sorted(path.stem for path in RECIPES.glob("finetune_*.yaml") if not path.stem.endswith("_few"))
NUM_IMAGENET_IMAGES = 1_281_167


def encoder(method="mae", family="vit", width=768) -> SimpleNamespace:
    """By default the config of MAE's ViT-B/16."""
    return SimpleNamespace(mim_method=method, model_type=family, hidden_size=width, image_size=224)


def load(*argv: str, config=encoder()):  # noqa: B008
    return load_finetune_settings(argv, SETTINGS, lambda name: config)


def load_named(*argv: str, **kwargs):
    return load(*NAMED, *argv, **kwargs)


def plan_of(settings, hardware=Hardware("cpu", 2), num_images=(200, 0), trained=10):  # noqa: B008
    footprint = Footprint(1000, trained, 1000, 1000)
    return FinetunePlan.make(
        settings, hardware, num_images, footprint, "labeled", (7, 7), metrics=("accuracy",), rows_of_task={}
    )


@pytest.mark.parametrize(
    ("method", "family", "width", "expected"),
    [
        ("mae", "vit", 768, "finetune_mae_vit-base"),
        ("mae", "vit", 192, "finetune_mae_vit-base"),
        ("mae", "vit", 1024, "finetune_mae_vit-large"),
        ("mae", "vit", 1280, "finetune_mae_vit-huge"),
        ("mae", "beit", 768, "finetune_mae_vit-base"),  # fine-tuned before
        ("simmim-asymmetric", "vit", 768, "finetune_mae_vit-base"),
        ("simmim", "beit", 768, "finetune_simmim_vit-base"),
        ("simmim", "swin", 1024, "finetune_simmim_swin-base"),
        ("beit", "beit", 1024, "finetune_beit_vit-large"),
        ("beit2", "beit", 768, "finetune_beit2_vit-base"),
        ("beit2", "beit", 1024, "finetune_beit2_vit-large"),
        (None, "vit_mae", 1024, "finetune_mae_vit-large"),
        (None, "beit", 768, "finetune_beit_vit-base"),
        (None, "data2vec-vision", 768, "finetune_beit_vit-base"),
        (None, "swin", 768, "finetune_simmim_swin-base"),
        (None, "swin", 1536, "finetune_simmim_swin-large"),
        (None, "dinov2", 384, "finetune_mae_vit-base"),
        ("unknown", "beit", 768, "finetune_beit_vit-base"),
    ],
)
def test_recipe_name__is_that_of_the_encoders_own_method_and_size(method, family, width, expected):
    assert SETTINGS["classification"].recipe_for(encoder(method, family, width), "finetune") == expected
    assert expected in PUBLISHED


@pytest.mark.parametrize(
    ("recipe", "published", "peak", "floor", "num_steps", "accuracy"),
    [
        (
            "finetune_mae_vit-base",
            {"layer_decay": 0.65, "drop_path": 0.1, "num_train_epochs": 100, "warmup_epochs": 5, "max_grad_norm": 0},
            (1024, 2e-3),
            1e-6,
            "125,100",
            "83.6",
        ),
        (
            "finetune_mae_vit-large",
            {"layer_decay": 0.75, "drop_path": 0.2, "num_train_epochs": 50, "warmup_epochs": 5, "max_grad_norm": 0},
            (1024, 4e-3),
            1e-6,
            "62,550",
            "85.9",
        ),
        (
            "finetune_mae_vit-huge",
            {"layer_decay": 0.75, "drop_path": 0.3, "num_train_epochs": 50, "warmup_epochs": 5, "max_grad_norm": 0},
            (1024, 4e-3),
            1e-6,
            "62,550",
            "86.9",
        ),
        (
            "finetune_simmim_vit-base",
            {"layer_decay": 0.65, "drop_path": 0.1, "num_train_epochs": 100, "warmup_epochs": 20, "max_grad_norm": 5},
            (2048, 5e-3),
            1e-6,
            "62,600",
            "83.8",
        ),
        (
            "finetune_simmim_swin-base",
            {"layer_decay": 0.9, "drop_path": 0.1, "num_train_epochs": 100, "warmup_epochs": 20, "max_grad_norm": 5},
            (2048, 5e-3),
            1e-6,
            "62,600",
            "82.8",
        ),
        (
            "finetune_simmim_swin-base_800ep",
            {"layer_decay": 0.8, "drop_path": 0.1, "num_train_epochs": 100, "warmup_epochs": 20, "max_grad_norm": 5},
            (2048, 5e-3),
            1e-6,
            "62,600",
            "84.0",
        ),
        (
            "finetune_simmim_swin-large",
            {"layer_decay": 0.7, "drop_path": 0.2, "num_train_epochs": 100, "warmup_epochs": 20, "max_grad_norm": 5},
            (2048, 5e-3),
            1e-6,
            "62,600",
            "85.4",
        ),
        (
            "finetune_beit_vit-base",
            {"layer_decay": 0.65, "drop_path": 0.1, "num_train_epochs": 100, "warmup_epochs": 20, "max_grad_norm": 0},
            (1024, 4e-3),
            1e-6,
            "125,100",
            "83.2",
        ),
        (
            "finetune_beit_vit-large",
            {"layer_decay": 0.75, "drop_path": 0.2, "num_train_epochs": 50, "warmup_epochs": 5, "max_grad_norm": 0},
            (1024, 1e-3),
            1e-6,
            "62,550",
            "85.2",
        ),
        (
            "finetune_beit2_vit-base",
            {"layer_decay": 0.65, "drop_path": 0.1, "num_train_epochs": 100, "warmup_epochs": 20, "max_grad_norm": 0},
            (1024, 5e-4),
            1e-6,
            "125,100",
            "85.0",
        ),
        (
            "finetune_beit2_vit-base_1600ep",
            {"layer_decay": 0.6, "drop_path": 0.2, "num_train_epochs": 100, "warmup_epochs": 20, "max_grad_norm": 0},
            (1024, 5e-4),
            1e-6,
            "125,100",
            "85.5",
        ),
        (
            "finetune_beit2_vit-large",
            {"layer_decay": 0.8, "drop_path": 0.2, "num_train_epochs": 50, "warmup_epochs": 5, "max_grad_norm": 0},
            (1024, 5e-4),
            1e-6,
            "62,550",
            "86.6",
        ),
        (
            "finetune_beit2_vit-large_1600ep",
            {"layer_decay": 0.8, "drop_path": 0.2, "num_train_epochs": 50, "warmup_epochs": 5, "max_grad_norm": 0},
            (1024, 2e-4),
            1e-6,
            "62,550",
            "87.3",
        ),
        (
            "finetune_beit2_vit-base_ft21k",
            {
                "layer_decay": 0.75,
                "drop_path": 0.1,
                "num_train_epochs": 30,
                "warmup_epochs": 20,
                "max_grad_norm": 0,
                "mixup": 0,
                "cutmix": 0,
            },
            (1024, 5e-5),
            1e-6,
            "37,530",
            "86.5",
        ),
        (
            "finetune_beit2_vit-large_ft21k",
            {
                "layer_decay": 0.8,
                "drop_path": 0.25,
                "num_train_epochs": 20,
                "warmup_epochs": 5,
                "max_grad_norm": 0,
                "mixup": 0,
                "cutmix": 0,
            },
            (1024, 7e-5),
            1e-6,
            "25,020",
            "88.4",
        ),
    ],
)
def test_recipe__has_the_published_constants(recipe, published, peak, floor, num_steps, accuracy):
    path = RECIPES / f"{recipe}.yaml"
    text = path.read_text(encoding="utf-8")
    run = next(line for line in text.splitlines() if line.startswith("# Run:"))
    argv = run.split("run_finetune.py")[1].split()
    settings = load(*argv, config=encoder("beit", "beit", 1024))
    common = {
        "pooling": "mean",
        "mixup": 0.8,
        "cutmix": 1.0,
        "label_smoothing_factor": 0.1,
        "rand_augment": 9,
        "erasing": 0.25,
        "crop_scale": [0.08, 1.0],
        "interpolation": "bicubic",
        "weight_decay": 0.05,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "lr_scheduler_type": "cosine_with_min_lr",
    }
    expected = {**common, **published}
    assert {name: settings.values[name] for name in expected} == expected
    eight_gpus = Hardware("cuda", 96, world_size=8, num_local_processes=8, has_bf16=True)
    plan = plan_of(settings, eight_gpus, (NUM_IMAGENET_IMAGES, 50_000))
    assert (plan.images_per_step, plan.learning_rate) == (peak[0], pytest.approx(peak[1]))
    ratio = json.loads(settings.values["lr_scheduler_kwargs"])["min_lr_rate"]
    assert ratio * plan.learning_rate == pytest.approx(floor, rel=1e-6)
    assert plan.num_steps == published["num_train_epochs"] * plan.steps_per_epoch
    assert f"{plan.num_steps:,}" == num_steps
    assert f"{num_steps} steps" in text
    assert f"Expected: {accuracy} top-1" in text


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipe__header_says_where_it_comes_from_and_leaves_encoder_and_data_to_the_user(recipe):
    path = RECIPES / f"{recipe}.yaml"
    text = path.read_text(encoding="utf-8")
    for field in ("Paper:", "Run:", "Cost:", "Expected:", "Measured:", "Differs:"):
        assert len([line for line in text.splitlines() if line.startswith(f"# {field}")]) == 1, field
    assert f"--config recipes/{path.name}" in text
    assert not {"model", "dataset", "image_size", "per_device_train_batch_size"} & set(yaml.safe_load(text))


def test_linear__has_a_recipe_of_its_own_without_mixing():
    settings = load_named("--mode", "linear")
    wanted = {"pooling": "class", "rand_augment": 0, "mixup": 0, "cutmix": 0, "drop_path": 0, "num_train_epochs": 90}
    assert {name: settings.values[name] for name in wanted} == wanted


def test_precedence__command_line_over_config_over_the_encoders_recipe(tmp_path: Path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("mixup: 0.2\nlayer_decay: 0.8\n")
    settings = load_named("--config", str(mine), "--layer_decay", "0.9")
    assert (settings.mixup, settings.layer_decay, settings.cutmix) == (0.2, 0.9, 1.0)
    assert "recipes/finetune_mae_vit-base.yaml" in settings.describe()


def test_plan__small_data_get_steps_enough_and_the_best_checkpoint_is_saved():
    plan = plan_of(load_named("--eval_steps", "50"), num_images=(200, 40))
    assert plan.num_steps >= 1000
    assert any("epochs instead of 100" in note for note in plan.notes)
    arguments = plan.training_arguments()
    assert (arguments["eval_steps"], arguments["save_steps"]) == (50, 50)
    assert (arguments["load_best_model_at_end"], arguments["greater_is_better"]) == (True, True)
    nothing_to_choose_by = plan_of(load_named(), num_images=(200, 0)).training_arguments()
    assert (nothing_to_choose_by["load_best_model_at_end"], nothing_to_choose_by["eval_strategy"]) == (False, "no")


def test_plan__counts_only_what_trains_for_adam():
    whole, head = (plan_of(load_named(), trained=trained).bytes_for_weights for trained in (1000, 10))
    assert (whole, head) == (16_000, 160 + 4 * 990)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dataset", "x"], "--model is missing"),
        (["--model", "x"], "--dataset is missing"),
        ([*NAMED, "--mode", "attentive"], "run_evaluation.py measures an encoder with an attentive probe"),
        ([*NAMED, "--mode", "attentiv"], "got 'attentiv', expected one of finetune, linear, partial"),
        ([*NAMED, "--label_fraction", "0.1", "--labels_per_class", "5"], "give one"),
        ([*NAMED, "--label_fraction", "1.5"], "--label_fraction is 1.5, expected a number above 0"),
        ([*NAMED, "--layer_decay", "0"], "--layer_decay is 0.0, expected a number above 0 and at most 1"),
        ([*NAMED, "--mixupp", "0"], "did you mean --mixup?"),
        ([*NAMED, "--mode", "liner"], "did you mean linear?"),
        ([*NAMED, "--push_to_hub"], "--push_to_hub needs --hub_model_id"),
    ],
)
def test_mistake__is_told_with_what_was_expected(argv, message):
    with pytest.raises(SettingsError) as error:
        load(*argv)
    assert message in str(error.value)


def test_help__names_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit):
        load_named("--help")
    text = capsys.readouterr().out
    assert "--labels_per_class" in text
    assert "attentive" not in text
    assert "the method's" not in text


def test_schedule__another_one_leaves_the_recipes_own_options_behind():
    argv = ["--model", "x", "--dataset", "y", "--lr_scheduler_type", "cosine"]
    assert not load(*argv).values["lr_scheduler_kwargs"]


@pytest.mark.parametrize(
    ("method", "family", "width", "recipe", "published"),
    [
        ("mae", "vit", 768, "mae_vit-base", (1e-4, 0.65, 0.1, 0.05)),
        ("mae", "vit", 1024, "mae_vit-base", (1e-4, 0.65, 0.1, 0.05)),
        (None, "vit", 192, "mae_vit-base", (1e-4, 0.65, 0.1, 0.05)),
        ("beit", "beit", 768, "beit_vit-base", (7e-4, 0.65, 0.1, 0.05)),
        ("beit", "beit", 1024, "beit_vit-large", (2e-5, 0.95, 0.2, 0.05)),
        ("beit2", "beit", 768, "beit2_vit-base", (5e-5, 0.75, 0.15, 0.05)),
        ("beit2", "beit", 1024, "beit2_vit-large", (4e-5, 0.9, 0.2, 0.05)),
        ("ibot", "vit", 384, "ibot_vit-small", (3e-5, 0.65, 0.1, 0.05)),
        ("ibot", "vit", 768, "ibot_vit-base", (8e-5, 0.65, 0.1, 0.05)),
        ("simmim", "swin", 1024, "swin-base", (6e-5, 1.0, 0.3, 0.01)),
    ],
)
def test_segmentation__settings_are_those_published_for_the_method(method, family, width, recipe, published):
    """UPerNet on ADE20K: 160,000 steps of 16 images, 1,500 of them warm-up."""
    settings = load_named("--task", "segmentation", config=encoder(method, family, width))
    assert f"recipes/finetune_upernet_{recipe}.yaml" in settings.describe()
    rate = settings.base_learning_rate * 16 / 256
    found = (rate, settings.layer_decay, settings.drop_path, settings.weight_decay)
    assert found == pytest.approx(published)
    assert settings.num_train_epochs * 20_210 / 16 == pytest.approx(160_000, rel=1e-3)
    assert settings.warmup_epochs * 20_210 / 16 == pytest.approx(1500, rel=0.01)
    assert (settings.resize_scale, settings.lr_scheduler_type) == ((0.5, 2.0), "linear")


def test_segmentation__linear_settings_are_those_of_dinov2():
    settings = load_named("--task", "segmentation", "--mode", "linear")
    assert settings.base_learning_rate * 16 / 256 == pytest.approx(1e-3)
    assert settings.num_train_epochs * 20_210 / 16 == pytest.approx(40_000, rel=1e-2)
    assert (settings.weight_decay, settings.drop_path) == (1e-4, 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crop_scale", "0.5", "1"], "--crop_scale has no effect with masks or boxes; --resize_scale"),
        (["--resize_scale", "2", "1"], "--resize_scale"),
        (["--ignore_index", "-1"], "--ignore_index"),
        (["--mode", "linear", "--head_hidden_size", "64"], "--head_hidden_size has no effect with --mode linear"),
    ],
)
def test_segmentation__refuses_settings_without_effect_or_sense(flags, message):
    with pytest.raises(SettingsError, match=message):
        load_named("--task", "segmentation", *flags)


@pytest.mark.parametrize("mode", ["finetune", "linear"])
def test_segmentation__names_the_encoders_that_it_takes(mode):
    with pytest.raises(ValueError, match="is a deit, expected one of beit, "):
        load_named(
            "--task", "segmentation", "--mode", mode, config=SimpleNamespace(model_type="deit", name_or_path="x")
        )

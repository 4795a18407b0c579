"""Rules for few images and few labels: figures worked out by hand, and that what is given or published stays."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from pretraining_command import pretrain
from transformers import ViTConfig

import run_finetune
from commands import small_data
from commands.advice import advise, check_advisable
from commands.arithmetic import Hardware
from commands.encoder_choice import choose_encoder
from commands.few_labels import with_rate_for_few_labels, with_rules_for_few_labels
from commands.finetune_settings import load_finetune_settings
from commands.memory import Footprint
from commands.pretraining_plan import PretrainingPlan
from commands.pretraining_settings import load_pretraining_settings
from commands.settings import Origin, SettingsError
from commands.small_data import (
    config_rules,
    keep_schedule,
    with_batch_rule,
    with_schedule_rules,
    with_validation_rule,
)
from commands.time_budget import Fitted
from data.splits import open_pretraining_splits
from evaluation.linear_probe import fit_logistic
from modeling import CONFIGS
from modeling.image_classification import random_encoder
from tasks import SETTINGS

FASHION_MNIST = Path(__file__).parent.parent / "data" / "samples" / "fashion_mnist" / "train.parquet"
LAPTOP, GPU = Hardware("cpu", num_cpus=2), Hardware("cuda", num_cpus=16, has_bf16=True)
NANO, BASE = 4 * 10**8, 56 * 10**9  # FLOP per image


def plan(*argv: str, images: int = 2624, hardware: Hardware = LAPTOP, flops: int = NANO) -> PretrainingPlan:
    settings = load_pretraining_settings(argv, CONFIGS)
    settings, notes = with_batch_rule(settings, hardware, images, flops)

    def make() -> PretrainingPlan:
        footprint = Footprint(10**6, 10**6, 1, flops)
        return PretrainingPlan.make(settings, hardware, (images, 50), footprint, "photos", settings.grid, notes)

    settings, rules = with_schedule_rules(settings, hardware, images, flops, make().images_per_step)
    notes += rules
    return make()


def test_run_of_an_earlier_version__continues_without_rules(monkeypatch):
    settings = load_pretraining_settings(["--method", "simmim", "--model", "vit-nano"], CONFIGS)
    assert (settings.schedule, settings.mask_unit) == ("auto", 1)
    saved = {"method": "simmim", "mask_unit": 32}
    monkeypatch.setattr(small_data, "settings_of_interrupted_run", lambda settings: saved)
    kept = keep_schedule(settings)
    assert (kept.schedule, kept.mask_unit) == ("published", 4)
    given = load_pretraining_settings(["--method", "simmim", "--model", "vit-nano", "--mask_unit", "16"], CONFIGS)
    assert keep_schedule(given).mask_unit == 2  # a change that is reported
    saved["schedule"] = "auto"
    assert keep_schedule(settings) is settings


def test_pretraining__of_small_data_on_a_laptop():
    few = plan("--model", "vit-nano")
    assert (few.batch_size, few.steps_per_epoch) == (16, 164)
    # 2.4e-3 for 4,096 images and a width of 768: x sqrt(64 / 4096) x 768 / 192
    assert few.learning_rate == pytest.approx(2.4e-3 / 8 * 4)
    assert few.num_epochs == pytest.approx(4e14 / NANO / 16 / 164, abs=1)
    assert few.warmup_steps / few.num_steps == pytest.approx(0.05, abs=0.001)
    shown = few.describe()
    assert (
        "note: learning rate 0.0012: 0.0024 x the square root of 64 / 4,096 images per step (that of 64 for fewer)"
        in shown
    )
    assert "note: 16 images per device: more steps in the same time" in shown
    assert "382 epochs instead of 800: an hour or two on a CPU" in shown


def test_pretraining__the_learning_rate_of_self_distillation_falls_in_proportion_to_the_batch():
    few = plan("--method", "dino", "--model", "vit-nano")
    # 2e-3 for 1,024 images and a width of 384: x 64 / 1024 x 384 / 192
    assert few.learning_rate == pytest.approx(2e-3 / 16 * 2)
    assert "note: learning rate 0.00025: 0.002 x 64 / 1,024 images per step (that of 64 for fewer)" in few.describe()


def test_pretraining__the_learning_rate_of_data2vec2_does_not_depend_on_the_width():
    few = plan("--method", "data2vec2", "--model", "vit-nano")
    assert few.learning_rate == pytest.approx(1e-3 / 2)  # 1e-3 for 256 images: x sqrt(64 / 256)


def test_pretraining__of_two_hundred_images_keeps_steps_in_an_epoch_and_in_the_run():
    few = plan("--model", "vit-nano", images=218)
    assert (few.batch_size, few.steps_per_epoch, few.num_epochs) == (16, 13, 800)
    assert plan("--model", "vit-nano", images=100).steps_per_epoch == 8
    fewest = plan("--model", "vit-nano", images=20)
    assert fewest.num_steps >= 2000
    assert "note: 8 images per device: the fewest that a step has" in fewest.describe()


def test_pretraining__large_models_have_small_batches_on_a_cpu():
    assert plan("--model", "vit-base", flops=BASE).batch_size == 8
    assert plan("--model", "vit-base", flops=BASE).num_steps >= 2000
    assert plan("--model", "vit-base", flops=BASE, hardware=GPU).batch_size == 64


def test_pretraining__what_is_given_stays(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base_learning_rate: 1.0e-3\nwarmup_steps: 7\n")
    few = plan(
        "--model", "vit-nano", "--config", str(recipe), "--max_steps", "90", "--per_device_train_batch_size", "4"
    )
    assert (few.batch_size, few.num_steps, few.warmup_steps) == (4, 90, 7)
    assert few.learning_rate == pytest.approx(1e-3 * 4 / 256)


@pytest.mark.parametrize("schedule", [["--schedule", "published"], []])
def test_pretraining__published_numbers_stay_for_published_sizes_and_on_request(schedule):
    images, argv = (2624, ["--per_device_train_batch_size", "64"]) if schedule else (1_281_167, [])
    argv += schedule or ["--per_device_train_batch_size", "512"]
    many = plan("--model", "vit-base", *argv, images=images, hardware=GPU, flops=BASE)
    assert many.learning_rate == pytest.approx(1.5e-4 * many.batch_size / 256)
    assert (many.num_epochs, many.notes) == (800, ())


def test_drop_path__is_smaller_for_fewer_blocks_and_only_where_the_method_has_one():
    assert rules("--method", "dino", "--model", "vit-nano") == {"drop_path_rate": 0.033}
    assert rules("--method", "dino", "--model", "vit-small") == {}
    assert rules("--method", "mae", "--model", "vit-nano") == {}
    assert rules("--method", "dino", "--model", "vit-nano", num_images=200_000) == {}
    assert rules("--method", "dino", "--model", "vit-nano", "--drop_path_rate", "0.2") == {}


def test_local_crops__are_left_out_where_images_are_too_small_for_them():
    small = ("--model", "vit-small", "--image_size", "32", "--patch_size", "4")
    assert rules("--method", "dinov2", *small) == {"num_local_crops": 0}
    assert rules("--method", "dinov2", *small, "--num_local_crops", "2") == {}
    assert rules("--method", "dinov2", "--model", "vit-small", "--image_size", "48", "--patch_size", "4") == {}
    assert rules("--method", "mae", *small) == {}
    assert rules("--method", "dino", *small, "--schedule", "published") == {}


def rules(*argv: str, num_images: int = 100) -> dict[str, Any]:
    chosen = config_rules(load_pretraining_settings(argv, CONFIGS), num_images)
    assert all(reason for _, reason in chosen.values())
    return {name: value for name, (value, _) in chosen.items()}


# ---- few labels ----


def finetuning(num_labels: int, *argv: str, image_size: int = 96) -> tuple[Any, list[str]]:
    config = SimpleNamespace(
        mim_method="mae",
        model_type="vit",
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        image_size=image_size,
    )
    argv = ("--model", "out", "--dataset", "labeled", *argv)
    settings = load_finetune_settings(argv, SETTINGS, lambda name: config)  # type: ignore[arg-type,return-value]
    settings, notes = with_rules_for_few_labels(settings, config, num_labels)
    settings, rate_notes = with_rate_for_few_labels(settings, config, 64)
    return settings, notes + rate_notes


def test_finetuning__with_few_labels_has_weak_views_and_a_rate_by_the_square_root():
    few, notes = finetuning(200)
    assert few.learning_rate == pytest.approx(2e-3)  # 2e-3 for 1,024 images and a width of 768: / 4 x 4
    assert (few.num_train_epochs, few.warmup_steps) == (100, 0.1)
    assert (few.mixup, few.cutmix, few.erasing, few.rand_augment, few.crop_scale) == (0, 0, 0, 5, (0.4, 1.0))
    assert (few.drop_path, few.layer_decay) == (0.033, 0.75)
    assert any("learning rate 0.002: 0.002 x the square root of 64 / 1,024 images" in note for note in notes)
    assert finetuning(200, image_size=28)[0].rand_augment == 0


def test_finetuning__epochs_fall_slowly_with_the_labels_and_strong_views_come_back():
    assert finetuning(100)[0].num_train_epochs == 200
    many, _ = finetuning(20_000)
    assert many.num_train_epochs == 26  # 100 / 100^0.3
    assert (many.mixup, many.rand_augment) == (0.8, 9)


def test_finetuning__what_is_given_or_published_stays():
    given, _ = finetuning(200, "--mixup", "0.3", "--learning_rate", "1e-5", "--num_train_epochs", "3")
    assert (given.mixup, given.learning_rate, given.num_train_epochs) == (0.3, 1e-5, 3)
    assert "has no effect" in finetuning(200_000, "--schedule", "auto")[1][0]
    for published, notes in (finetuning(200_000), finetuning(200, "--schedule", "published")):
        assert (published.schedule, published.mixup, published.rand_augment, notes) == ("published", 0.8, 9, [])
        assert not published.counts("learning_rate")


@pytest.mark.parametrize(
    ("task", "rate"),
    # Published: 1e-4 for 16 images, with boxes 1e-4 for 64; x the square root of 64 / 16, and x 4 for a width of 192.
    [("segmentation", 8e-4), ("instance", 8e-4), ("detection", 4e-4)],
)
def test_finetuning__with_masks_or_boxes_only_the_rate_follows_a_rule(task, rate):
    few, notes = finetuning(1000, "--task", task)
    published, _ = finetuning(1000, "--task", task, "--schedule", "published")
    assert few.learning_rate == pytest.approx(rate)
    assert (few.num_train_epochs, few.layer_decay) == (published.num_train_epochs, published.layer_decay)
    assert [note.partition(":")[0] for note in notes] == [f"learning rate {rate}"]
    assert not finetuning(100_000, "--task", task)[0].counts("learning_rate")


# ---- advice ----


def speeds_of(seconds_per_image: float) -> Callable[[dict[str, Any]], float]:
    costs = {"vit-base": 1.0, "vit-small": 0.3, "vit-tiny": 0.1, "vit-nano": 0.02}
    return lambda sizes: 1 / (seconds_per_image * costs[sizes["model"]])


def advice(images: int, seconds_per_image: float, hardware: Hardware = LAPTOP, side: int = 300) -> str:
    settings = load_pretraining_settings(["--dataset", "my photos", "--advise"], CONFIGS)
    return advise(settings, "folder", images, side, hardware, speeds_of(seconds_per_image))


def test_advice__for_few_images_starts_with_a_frozen_encoder_then_continues_one():
    lines = advice(300, 1.0).splitlines()
    commands = [line[3:] for line in lines if line[:2] in ("1.", "2.", "3.")]
    assert commands[0].startswith("python run_evaluation.py --model facebook/dinov2-small")
    assert "--init_from facebook/dinov2-small --method dinov2 --image_size 98" in commands[1]
    assert "--model vit-nano --image_size 64 --patch_size 8 --dataset 'my photos' --time_budget 30m" in commands[2]


def test_advice__for_many_images_and_a_fast_device_is_a_large_encoder_of_ones_own():
    text = advice(500_000, 1 / 3000, GPU)
    sizes = "--model vit-base --image_size 224 --patch_size 16"
    assert f"1. python run_pretraining.py --method mae {sizes} --dataset 'my photos' --time_budget 2h" in text


def test_advice__small_images_have_a_small_encoder():
    assert "--model vit-nano --image_size 32 --patch_size 4" in advice(60_000, 1e-1, side=28)


# ---- the encoder ----


@pytest.mark.parametrize(
    ("seconds_per_image", "side", "is_cpu", "wanted", "chosen"),
    [
        (1.0, 300, True, None, ("vit-nano", 64, 8)),
        (1.0, 28, True, None, ("vit-nano", 32, 4)),
        (1e-2, 300, True, None, ("vit-tiny", 96, 8)),
        (1e-3, 300, False, None, ("vit-base", 224, 16)),
        (1e-3, 64, False, None, ("vit-nano", 64, 8)),
        (1e-3, 28, False, None, ("vit-small", 32, 4)),
        (math.inf, 300, False, None, ("vit-nano", 64, 8)),  # nothing fits into memory
        (1.0, 300, True, (224, 224), ("vit-nano", [224, 224], 28)),
        (1e-2, 300, True, (224, 224), ("vit-tiny", [224, 224], 16)),
        (1.0, 300, True, (64, 96), ("vit-nano", [64, 96], 8)),
        (1.0, 300, True, (28, 28), ("vit-nano", [28, 28], 4)),
    ],
)
def test_encoder__is_the_largest_that_sees_enough_images(seconds_per_image, side, is_cpu, wanted, chosen):
    speeds = speeds_of(seconds_per_image)
    choice = choose_encoder(2624, side, 600, is_cpu, speeds, wanted)
    assert choice.sizes == dict(zip(("model", "image_size", "patch_size"), chosen, strict=True))
    assert choice.num_seen == pytest.approx(0.85 * 600 * speeds(choice.sizes))


def test_encoder__is_chosen_by_a_time_budget_and_kept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("run_pretraining.seconds_per_step", lambda *args: 16 / 200)
    short = {"max_steps": 2, "save_steps": 1}
    monkeypatch.setattr(
        "run_pretraining.fit_to_budget",
        lambda settings, *args: Fitted(settings.derived(Origin.MEASURED, "two steps", **short)),
    )
    argv = ["--time_budget", "90s", "--use_cpu", "--report_to", "none", "--output_dir", str(tmp_path / "out")]
    assert pretrain(argv) == 0
    printed = capsys.readouterr().out
    assert "note: vit-nano, chosen by --time_budget 90s: it sees about 15,300 images in this time (200" in printed
    assert "8 x 8 = 64 patches of 8 x 8" in printed
    saved = yaml.safe_load((tmp_path / "out" / "settings.yaml").read_text())
    assert (saved["model"], saved["image_size"], saved["patch_size"]) == ("vit-nano", 64, 8)

    def measure(*args: Any) -> float:
        raise AssertionError("a run that is continued has its encoder")

    shutil.rmtree(tmp_path / "out" / "pretraining")  # as if it had not ended
    monkeypatch.setattr("run_pretraining.seconds_per_step", measure)
    monkeypatch.setattr("run_pretraining.train", lambda plan, *args, **kwargs: print(plan.settings.model))
    assert pretrain(argv) == 0
    assert capsys.readouterr().out.endswith("vit-nano\n")


@pytest.mark.parametrize(
    "flags",
    [
        ("--model", "vit-base"),
        ("--schedule", "published"),
        ("--config", "quickstart"),
        ("--method", "feature", "--teacher", "hog"),
    ],
)
def test_encoder__is_not_chosen_where_one_is_given_or_targets_depend_on_it(flags):
    settings = load_pretraining_settings(["--time_budget", "10m", *flags], CONFIGS)
    assert not settings.fits_encoder


def test_encoder__without_a_budget_is_vit_base():
    settings = load_pretraining_settings(["--dataset", "photos"], CONFIGS)
    assert not settings.fits_encoder
    assert (settings.model, settings.default_output_dir()) == ("vit-base", "outputs/vit-base-mae-photos")
    fitting = load_pretraining_settings(["--dataset", "photos", "--time_budget", "1h"], CONFIGS)
    assert fitting.fits_encoder
    assert fitting.default_output_dir() == "outputs/mae-photos"


def test_advise__prints_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("run_pretraining.seconds_per_step", lambda *args: 0.5)
    assert pretrain(["--advise", "--use_cpu"]) == 0
    printed = capsys.readouterr().out
    assert "Worth running, in this order:" in printed
    assert not list(tmp_path.iterdir())


def test_advise__measures_and_repeats_the_number_of_channels(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measured: list[int] = []
    monkeypatch.setattr(
        "run_pretraining.seconds_per_step", lambda trial, one, *args: measured.append(one.num_channels) or 1
    )
    assert pretrain(["--advise", "--use_cpu", "--num_channels", "1"]) == 0
    assert set(measured) == {1}
    printed = capsys.readouterr().out
    assert "--num_channels 1" in printed
    assert printed.count("--use_cpu") == 2  # of both commands that pre-train


@pytest.mark.parametrize("flags", [("--model", "vit-large"), ("--method", "dino"), ("--dry_run",)])
def test_advise__refuses_settings_that_it_ignores(flags):
    with pytest.raises(SettingsError, match=f"{flags[0]} has no effect with --advise"):
        check_advisable(load_pretraining_settings(["--advise", *flags], CONFIGS))


# ---- the head ----


def test_head__starts_as_the_logistic_regression_on_the_features_that_it_reads(tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    random_encoder(ViTConfig(**sizes, image_size=28, patch_size=7)).save_pretrained(tmp_path / "encoder")
    fitted: list[Any] = []
    models: list[Any] = []

    def fit(features: torch.Tensor, labels: torch.Tensor, *args: Any) -> Any:
        fitted.extend((features, labels, fit_logistic(features, labels, *args)))
        return fitted[-1]

    def train(plan: Any, *args: Any, build_trainer: Any, **kwargs: Any) -> None:
        build_trainer(plan, None)

    monkeypatch.setattr("tasks.classification.fit_logistic", fit)
    monkeypatch.setattr(run_finetune, "train", train)
    monkeypatch.setattr(run_finetune, "build_trainer", lambda task, plan, model: models.append(model))
    argv = ["--model", str(tmp_path / "encoder"), "--dataset", "sample-fashion", "--labels_per_class", "10"]
    run_finetune.main([*argv, "--use_cpu", "--output_dir", str(tmp_path / "out")])
    features, labels, probe = fitted
    assert features.shape == (100, 32)
    torch.testing.assert_close(models[0].classifier(features), probe(features), rtol=1e-3, atol=1e-3)
    assert (probe(features).argmax(1) == labels).float().mean() > 0.5
    assert "the head starts as a logistic regression on frozen features of 100 images" in capsys.readouterr().out
    run_finetune.main([*argv, "--use_cpu", "--output_dir", str(tmp_path / "out"), "--from_scratch"])
    assert len(fitted) == 3
    assert models[1].classifier.weight.abs().max() < 1e-3


def test_validation__is_short_on_a_cpu():
    splits = open_pretraining_splits([str(FASHION_MNIST)], validation_fraction=0.95, max_bad_fraction=0, seed=0)
    settings = load_pretraining_settings([], CONFIGS)
    fewer, notes = with_validation_rule(settings, LAPTOP, splits)
    many = len(splits.validation)
    assert many > 500
    assert (len(fewer.validation), len(fewer.train)) == (500, len(splits.train))
    assert len(set(fewer.validation.indices.tolist())) == 500
    assert notes == [f"500 of {many:,} validation images are evaluated, which a CPU does in less time"]
    for given, hardware in (
        ([], GPU),
        (["--validation_fraction", "0.1"], LAPTOP),
        (["--schedule", "published"], LAPTOP),
    ):
        assert with_validation_rule(load_pretraining_settings(given, CONFIGS), hardware, splits) == (splits, [])

"""Which value wins and where it comes from, and that a mistake is answered with what would work."""

from pathlib import Path

import pytest
import yaml
from transformers import TrainingArguments

from commands.flags import method_flags, method_help
from commands.pretraining_settings import PretrainingSettings, load_pretraining_settings
from commands.settings import Origin, SettingsError
from modeling import MODELS, MimConfig
from modeling.mae import MaeConfig

CONFIGS = {method: head.config_class for method, head in MODELS.items()}


class OtherConfig(MimConfig):
    """A method with one setting of its own and one that MAE has too, with another default."""

    model_type = "other"
    num_guesses: int = 3
    norm_pix_loss: bool = False


def load(*argv: str) -> PretrainingSettings:
    return load_pretraining_settings(argv, CONFIGS)


def error_of(*argv: str, heads: dict | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        load_pretraining_settings(argv, heads or CONFIGS)
    return str(caught.value)


@pytest.fixture
def recipe(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


# ---- which value wins ----


@pytest.mark.parametrize(
    ("model", "sizes"),
    [
        ("vit-nano", (128, 2, 4, 512)),
        ("vit-tiny", (192, 2, 6, 768)),
        ("vit-small", (256, 4, 8, 1024)),
        *((model, (512, 8, 16, 2048)) for model in ("vit-base", "vit-large", "vit-huge")),
    ],
)
def test_decoder__is_the_published_one_beside_published_encoders_and_smaller_beside_small_ones(model, sizes):
    names = [f"decoder_{name}" for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")]
    names.append("decoder_intermediate_size")
    settings = load("--model", model)
    assert tuple(settings.method_settings[name] for name in names) == sizes
    assert settings.method_settings["decoder"] == "self"
    given = load("--model", model, "--decoder_num_hidden_layers", "3", "--decoder", "cross")
    assert given.method_settings["decoder_num_hidden_layers"] == 3
    assert given.method_settings["decoder"] == "cross"
    assert given.method_settings["decoder_hidden_size"] == sizes[0]


def test_no_flags__gives_mae_on_the_bundled_images():
    settings = load()
    assert (settings.model, settings.method, settings.dataset) == ("vit-base", "mae", ["sample"])
    assert settings.image_size == (224, 224)
    assert settings.mask_ratio == 0.75


def test_precedence__is_default_then_method_then_config_then_command_line(recipe):
    mine = recipe("weight_decay: 0.2\nadam_beta2: 0.9\n")
    settings = load("--config", mine, "--adam_beta2", "0.8")
    found = {
        n: (settings.values[n], settings.origins[n])
        for n in ("adam_beta1", "adam_beta2", "weight_decay", "mask_ratio")
    }
    assert found == {
        "adam_beta1": (0.9, Origin.METHOD),
        "adam_beta2": (0.8, Origin.COMMAND_LINE),
        "weight_decay": (0.2, Origin.CONFIG),
        "mask_ratio": (0.75, Origin.METHOD),
    }
    assert settings.origins["max_bad_fraction"] is Origin.DEFAULT
    assert settings.labels[Origin.METHOD] == "recipes/mae.yaml"


def test_precedence__order_on_the_command_line_does_not_matter(recipe):
    mine = recipe("seed: 5\n")
    assert load("--seed", "7", "--config", mine).seed == 7


def test_preset__brings_its_sizes_and_the_command_line_wins():
    nano = load("--model", "vit-nano", "--decoder_hidden_size", "64")
    assert nano.encoder_settings()["hidden_size"] == 192
    assert (nano.image_size, nano.patch_size) == ((64, 64), 8)
    assert (nano.method_settings["decoder_hidden_size"], nano.method_settings["decoder_num_hidden_layers"]) == (64, 2)
    assert load().method_settings["decoder_hidden_size"] == MaeConfig.decoder_hidden_size


def test_two_ways_to_say_it__the_one_nearer_to_the_command_line_counts(recipe):
    mine = recipe("max_steps: 100\nwarmup_steps: 10\nlearning_rate: 0.1\n")
    assert load("--config", mine).counts("max_steps")
    assert not load("--config", mine, "--num_train_epochs", "5").counts("max_steps")
    assert not load("--config", mine, "--warmup_epochs", "5").counts("warmup_steps")
    assert not load("--config", mine, "--base_learning_rate", "1").counts("learning_rate")
    assert not load("--config", mine, "--max_steps", "-1").counts("max_steps")
    assert not load().counts("learning_rate")


def test_encoder_and_head__are_what_the_configs_take():
    settings = load("--image_size", "96", "64", "--patch_size", "8", "--num_channels", "1", "--no_norm_pix_loss")
    config = MaeConfig(
        encoder_config=settings.encoder_settings(), image_mean=[0.5], image_std=[0.5], **settings.method_settings
    )
    assert config.encoder_config.image_size == [96, 64]
    assert (config.encoder_config.num_channels, config.norm_pix_loss) == (1, False)


def test_gray_images__are_standardized_by_their_own_mean():
    assert load("--num_channels", "1").image_stats == "auto"
    assert load().image_stats == "preset"
    assert "expected auto" in error_of("--num_channels", "1", "--image_stats", "preset")


def test_training_arguments__take_ours_and_leave_the_rest_to_transformers(tmp_path):
    arguments = load("--lr_scheduler_kwargs", '{"num_cycles": 0.5}').training_arguments()
    assert "hub_model_id" not in arguments
    resolved = TrainingArguments(**{**arguments, "output_dir": str(tmp_path), "use_cpu": True})
    assert (resolved.logging_nan_inf_filter, resolved.remove_unused_columns, resolved.seed) == (False, False, 0)
    assert resolved.lr_scheduler_kwargs == {"num_cycles": 0.5}


# ---- how values are written ----


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--mask-ratio", ".5", ".75"], "mask_ratio", [0.5, 0.75]),
        (["--mask_ratio=0.6"], "mask_ratio", 0.6),
        (["--image_size", "224", "160"], "image_size", [224, 160]),
        (["--dataset", "a", "b"], "dataset", ["a", "b"]),
        (["--learning_rate", "1e-3"], "learning_rate", 0.001),
        (["--dry-run"], "dry_run", True),
        (["--bf16"], "bf16", True),
        (["--bf16", "false"], "bf16", False),
        (["--gradient_checkpointing"], "gradient_checkpointing", True),
        (["--tf32"], "tf32", True),
        (["--no-norm-pix-loss"], "norm_pix_loss", False),
        (["--max_steps", "-1"], "max_steps", -1),
    ],
)
def test_command_line__gives_values_of_the_right_type(argv, name, value):
    settings = load(*argv)
    assert settings.values[name] == value
    assert type(settings.values[name]) is type(value)
    assert settings.is_on_command_line(name)


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-3", "learning_rate", 0.001),  # YAML itself reads this as a string
        ("num-train-epochs: 3", "num_train_epochs", 3.0),
        ("max_steps: -1", "max_steps", -1),
        ("mask_ratio: [0.5, 0.6]", "mask_ratio", [0.5, 0.6]),
        ("dataset: ./my photos", "dataset", ["./my photos"]),
        ("norm_pix_loss: no", "norm_pix_loss", False),
        ("dry_run: true", "dry_run", True),
        ("lr_scheduler_kwargs: {num_cycles: 0.5}", "lr_scheduler_kwargs", '{"num_cycles": 0.5}'),
    ],
)
def test_recipe__gives_values_of_the_right_type(recipe, text, name, value):
    settings = load("--config", recipe(text))
    assert settings.values[name] == value
    assert type(settings.values[name]) is type(value)
    assert settings.origins[name] is Origin.CONFIG


def test_debug__bare_shows_tracebacks_and_keeps_the_options_of_transformers():
    assert not load().shows_tracebacks
    assert load("--debug", "--seed", "1").shows_tracebacks
    assert load("--debug").debug == []
    assert [option.value for option in load("--debug", "underflow_overflow").debug] == ["underflow_overflow"]


# ---- mistakes ----


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--mask_ration", ".5"], "unknown flag --mask_ration; did you mean --mask_ratio?"),
        (["--mask-ration=.5"], "unknown flag --mask_ration; did you mean --mask_ratio?"),
        (["--xyzzy"], "unknown flag --xyzzy; see --help_all"),
        (["--mask", ".5"], "unknown flag --mask;"),  # no abbreviations
        (["--warmup_ratio", ".1"], "use --warmup_epochs, or --warmup_steps"),
        (["--overwrite_output_dir"], "use --overwrite"),
        (["--no_cuda"], "use --use_cpu"),
        (["--evaluation_strategy", "steps"], "use --eval_strategy"),
        (["--train_dir", "x"], "use --dataset"),
        (["--data", "x"], "use --dataset"),
        (["recipes/mae.yaml"], "--config recipes/mae.yaml"),
        (["photos"], "'photos' belongs to no flag"),
        (["--mask_ratio", "abc"], "--mask_ratio: got 'abc', expected a number"),
        (["--mask_ratio", "75"], "--mask_ratio is 75.0, expected one number above 0 and below 1"),
        (["--mask_ratio", ".8", ".5"], "the lower one first"),
        (["--mask_ratio", ".1", ".2", ".3"], "or two of them"),
        (["--image_size", "1", "2", "3"], "one side, or height and width"),
        (["--crop_scale", ".5"], "two numbers, 0 < smallest"),
        (["--validation_fraction", "1"], "--validation_fraction is 1.0, expected 0 or more and below 1"),
        (["--patch_size", "0"], "--patch_size is 0, expected 1 or more"),
        (["--max_steps", "0"], "--max_steps is 0, expected 1 or more"),
        (["--num_train_epochs", "0"], "expected a number above 0"),
        (["--eval_steps", "0"], "expected a number above 0"),
        (["--seed", "1.5"], "--seed: got '1.5', expected a whole number"),
        (["--bf16", "perhaps"], "--bf16: got 'perhaps', expected true or false"),
        (["--num_channels", "0"], "--num_channels is 0, expected 1 or more"),
        (["--patch_size"], "--patch_size: expected one argument"),
        (["--model", "vit-bass"], "did you mean vit-base?"),
        (["--model", "resnet"], "one of vit-nano, vit-tiny, vit-small, vit-base, vit-large, vit-huge"),
        (["--model", "facebook/vit-mae-base"], "; to start from trained weights, use --init_from"),
        (
            ["--method", "moe"],
            "--method: got 'moe', expected one of beit, beit2, beit3, data2vec, data2vec2, dino, dinov2, feature",
        ),
        (["--mask_strategy", "stripes"], "expected one of random, random-unit, block"),
        (["--lr_scheduler_type", "cosin"], "did you mean cosine?"),
        (["--config", "nowhere.yaml"], ", mae, mae_vit-base_in1k"),
        (["--config", "quikstart"], "did you mean quickstart?"),
        (["--model", "swin-base"], "--method mae cannot train swin-base; it trains vit-nano, vit-tiny, vit-small"),
        (["--mask_unit", "32"], "--mask_unit has no effect with --mask_strategy random"),
        (["--lr_drop_epoch", "7"], "--lr_drop_epoch needs --lr_scheduler_type constant_with_warmup, not cosine"),
    ],
)
def test_mistake_on_the_command_line__is_answered_with_what_would_work(argv, message):
    assert message in error_of(*argv)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mask_ration: 0.5", "mine.yaml: unknown flag --mask_ration; did you mean --mask_ratio?"),
        ("warmup_ratio: 0.1", "mine.yaml: there is no flag --warmup_ratio; use --warmup_epochs"),
        ("mask_ratio: many", "mine.yaml: --mask_ratio: got 'many', expected a number"),
        ("optimization: {lr: 1}", "mine.yaml: unknown flag --optimization"),
        ("mask_ratio: {low: 0.1}", "expected a number"),
        ("mask_ratio:", "mask_ratio has no value"),
        ("help: true", "unknown flag --help"),
        ("config: mae", "cannot name another one"),
        ("trust_remote_code: true", "mine.yaml: trust_remote_code is accepted on the command line only"),
        ("trust-remote-code: true", "mine.yaml: "),
        ("- mask_ratio", "holds no settings"),
        ("", "holds no settings"),
        ("seed: 1\nseed: 2", "seed is given twice"),
        ("mask_ratio: [0.5", "cannot be read"),
    ],
)
def test_mistake_in_a_recipe__names_the_recipe(recipe, text, message):
    assert message in error_of("--config", recipe(text))


def test_setting_of_another_method__is_refused_with_the_methods_own():
    heads = {**CONFIGS, "other": OtherConfig}
    assert load_pretraining_settings(["--norm_pix_loss", "false"], heads).method_settings["norm_pix_loss"] is False
    message = error_of("--num_guesses", "4", heads=heads)
    assert "command line: num_guesses is a setting of other, not of mae, which has: " in message
    assert "decoder_hidden_size" in message


def test_method_without_a_recipe__says_so():
    message = error_of("--method", "other", heads={**CONFIGS, "other": OtherConfig})
    assert "method other has no recipes/other.yaml" in message


def test_file_named_like_a_recipe__in_the_working_folder_is_not_taken_for_the_methods(tmp_path, monkeypatch):
    (tmp_path / "mae.yaml").write_text("weight_decay: 0.3\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert load().weight_decay == 0.05


# ---- what is printed and saved ----


def test_as_recipe__gives_the_same_settings_again(tmp_path):
    argv = ["--config", "quickstart", "--num_train_epochs", "7", "--mask_ratio", ".4", ".6", "--no_norm_pix_loss"]
    settings = load(*argv, "--hub_token", "hf_secret", "--output_dir", "somewhere", "--trust_remote_code")
    saved = tmp_path / "saved.yaml"
    saved.write_text(yaml.safe_dump(settings.as_recipe()), encoding="utf-8")
    again = load("--config", str(saved))
    assert again.as_recipe() == settings.as_recipe()
    assert again.num_train_epochs == 7
    assert not again.counts("max_steps")
    assert not {"max_steps", "hub_token", "output_dir", "trust_remote_code"} & set(settings.as_recipe())


def test_describe__says_where_each_value_comes_from_and_keeps_the_token_secret():
    text = load("--config", "quickstart", "--seed", "3", "--hub_token", "hf_secret").describe()
    lines = {line.split()[0]: " ".join(line.split()[1:]) for line in text.splitlines()}
    assert lines["seed"] == "3 command line"
    assert lines["mask_ratio"] == "0.75 recipes/mae.yaml"
    assert lines["max_steps"] == "900 recipes/quickstart.yaml"
    assert lines["patch_size"] == "8 size of vit-nano"
    assert "mask_unit" not in lines  # a default
    assert "hf_secret" not in text


@pytest.mark.parametrize("flag", ["--help", "-h", "--help_all", "--help-all"])
def test_help__fits_in_100_columns_and_exits(flag, capsys):
    with pytest.raises(SystemExit) as caught:
        load(flag)
    text = capsys.readouterr().out
    assert caught.value.code == 0
    assert max(map(len, text.splitlines())) <= 100
    for name in ("--mask_ratio", "--decoder_hidden_size", "--output_dir", "--help_all", "small data:"):
        assert name in text
    assert ("--ddp_backend" in text) is ("all" in flag)
    assert "--hub_model_id" in text


def test_help__has_every_default_that_is_ours(capsys):
    with pytest.raises(SystemExit):
        load("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "from swin-nano to swin-large (default: vit-base; with --time_budget" in text
    assert "seed of all random numbers: data order, crops, masks, weights (default: 0)" in text
    assert "of hybrid, mae, simmim-asymmetric (default: 512)" in text
    assert "0 for an average over the last 2% of the steps" in text


@pytest.mark.parametrize("method", CONFIGS)
def test_help__explains_every_setting_of_a_method(method):
    sentences = method_help(CONFIGS[method])
    assert not [name for name in method_flags(CONFIGS[method]) if len(sentences.get(name, "")) < 20]


# ---- masks in pixels, and a schedule's own arguments ----


def test_mask_unit__is_in_pixels_whatever_the_patch():
    assert load("--method", "simmim").mask_unit == 2
    assert load("--method", "simmim", "--model", "swin-base").mask_unit == 8
    assert load("--method", "simmim", "--patch_size", "32").mask_unit == 1
    assert load("--method", "simmim", "--mask_strategy", "block").mask_unit == 1
    assert load("--mask_strategy", "random-unit").mask_unit == 1


def test_mask_unit__that_does_not_fit_names_those_that_do():
    with pytest.raises(SettingsError, match=r"multiple of the patch of 14 that divides 224 x 224: 14, 28, 56, 112"):
        load("--method", "simmim", "--patch_size", "14", "--mask_unit", "32")


@pytest.mark.parametrize(
    ("image_size", "patch_size", "pixels"),
    [("192", "16", 32), ("224", "14", 28), ("96", "8", 16), ("64", "8", 8), ("64", "16", 16), ("28", "4", 4)],
)
def test_mask_unit__is_published_or_leaves_as_many_in_a_smaller_image(image_size, patch_size, pixels):
    flags = ["--method", "simmim", "--model", "vit-nano", "--image_size", image_size, "--patch_size", patch_size]
    settings = load(*flags)
    assert settings.mask_unit * settings.patch_size == pixels
    assert ("schedule auto" in settings.labels.values()) == (pixels != 32)
    if pixels > 16:
        assert load(*flags, "--schedule", "published", "--mask_unit", str(pixels)).mask_unit == settings.mask_unit


def test_mask_unit__of_the_user_the_published_schedule_and_swin_stays():
    small = ["--method", "simmim", "--model", "vit-nano", "--image_size", "64"]
    assert load(*small, "--mask_unit", "32").mask_unit == 4
    assert load(*small, "--schedule", "published").mask_unit == 4
    assert load("--method", "simmim", "--model", "swin-nano").mask_unit == 8


def test_scheduler_arguments__go_when_another_schedule_is_chosen():
    assert "min_lr_rate" in str(load("--method", "simmim").values["lr_scheduler_kwargs"])
    assert not load("--method", "simmim", "--lr_scheduler_type", "linear").values["lr_scheduler_kwargs"]

"""The flags of `run_tokenizer.py`: the discrete VAE's sizes and objective, data, and every field of TrainingArguments.

Lowest first: defaults, the preset's sizes, recipes/dvae.yaml, the recipe of --config, the command line.
"""

from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from commands.flags import HELP_TEXTS, RANGES, RunFlags
from commands.parsing import make_parser
from commands.settings import (
    RECIPES,
    Origin,
    Settings,
    UsersLayers,
    check_ranges,
    label_of,
    merged,
    read_recipe,
    training_defaults,
)

# dvae: the encoder and decoder of DALL-E (Ramesh et al. 2021, arXiv:2102.12092, App. A), on the views of 112 pixels
# that BEiT gives it (DALL-E's were 256). The others are ours; dvae-nano learns on two CPU cores in minutes.
TOKENIZER_SIZES: dict[str, dict[str, Any]] = {
    "dvae-nano": {
        "hidden_size": 32,
        "num_groups": 4,
        "num_blocks_per_group": 1,
        "decoder_input_size": 64,
        "image_size": 112,
    },
    "dvae-small": {
        "hidden_size": 64,
        "num_groups": 4,
        "num_blocks_per_group": 2,
        "decoder_input_size": 128,
        "image_size": 112,
    },
    "dvae": {
        "hidden_size": 256,
        "num_groups": 4,
        "num_blocks_per_group": 2,
        "decoder_input_size": 128,
        "image_size": 112,
    },
}
_METHOD = "dvae"
_EPILOG = """\
The result is an image tokenizer for BEiT: accelerate launch run_pretraining.py --method beit --tokenizer FOLDER.
Small data: a step never takes more images than there are, and what needs fewer steps than planned ends sooner. The
plan, printed before training, says in a "note:" what was changed.

precedence: defaults < recipes/dvae.yaml < --config < command line. --vocab-size is --vocab_size.
"""


_HELP_TEXTS = {
    "model": f"size of the tokenizer: {', '.join(TOKENIZER_SIZES)}",
    "crop_scale": "smallest and largest share of a picture that a training crop shows (default: recipes/dvae.yaml)",
    "base_learning_rate": "in place of learning_rate, for 256 images a step (default: off)",
    "learning_rate": "the peak (default: recipes/dvae.yaml)",
    "output_dir": "where everything goes (default: outputs/<model>-<data>)",
}


def _flag(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass
class TokenizerModelFlags:
    _argument_group_name = "model"

    model: str = "dvae"
    vocab_size: int = _flag(8192, "codes in the book")
    image_size: list[int] | None = None
    num_channels: Literal[1, 3] = 3


@dataclass
class TokenizerObjectiveFlags:
    _argument_group_name = "objective (defaults: DALL-E's)"

    kl_weight: float = _flag(6.6, "weight of the divergence from a uniform choice of codes, once it has grown from 0")
    kl_weight_steps: float = _flag(5000.0, "steps in which it grows; below 1 it is a share of all steps")
    final_temperature: float = _flag(0.0625, "temperature of the relaxation, once it has fallen from 1")
    temperature_steps: float = _flag(150000.0, "steps in which it falls; below 1 it is a share of all steps")
    usage_weight: float = _flag(0.0, "weight of an extra term that spreads the codes of a batch evenly; not DALL-E's")
    start_from_images: bool = _flag(False, "start filters and codes from images; not DALL-E's, for short runs")
    ema_decay: float = _flag(0.999, "of the average of the weights that is evaluated and saved")


@dataclass
class TokenizerDataFlags:
    _argument_group_name = "data"

    dataset: list[str] = field(default_factory=lambda: ["sample"])
    validation_fraction: float = 0.05
    max_bad_fraction: float = 0.05
    crop_scale: list[float] | None = None


_GROUPS = (TokenizerModelFlags, TokenizerObjectiveFlags, TokenizerDataFlags, RunFlags)
_RANGES = {
    **RANGES,
    "vocab_size": (lambda x: x[0] >= 2, "2 or more"),
    "kl_weight": (lambda x: x[0] >= 0, "0 or more"),
    "kl_weight_steps": (lambda x: x[0] >= 0, "0 or more"),
    "final_temperature": (lambda x: 0 < x[0] <= 1, "a number above 0, at most 1"),
    "temperature_steps": (lambda x: x[0] >= 0, "0 or more"),
    "usage_weight": (lambda x: x[0] >= 0, "0 or more"),
    "ema_decay": (lambda x: 0 <= x[0] < 1, "0 or more and below 1"),
}


def build_tokenizer_parser() -> ArgumentParser:
    return make_parser(
        _GROUPS,
        {"model": TOKENIZER_SIZES},
        {**HELP_TEXTS, **_HELP_TEXTS},
        prog="run_tokenizer.py",
        usage="accelerate launch run_tokenizer.py [--flag value ...]",
        description="Train an image tokenizer (a discrete VAE) on unlabeled images.",
        epilog=_EPILOG,
    )


def load_tokenizer_settings(argv: Sequence[str]) -> Settings:
    """Resolve the settings of a tokenizer's run.

    Raises:
        SettingsError: an unknown flag, a value that cannot be, or no such recipe.
    """
    parser = build_tokenizer_parser()
    users = UsersLayers.read(parser, argv)
    defaults = {name: value for group in _GROUPS for name, value in vars(group()).items()}
    model = {**defaults, **users.values}["model"]
    method_file = RECIPES / f"{_METHOD}.yaml"
    lower = {
        Origin.DEFAULT: {**defaults, **training_defaults()},
        Origin.PRESET: {"image_size": TOKENIZER_SIZES[model]["image_size"]},
        Origin.METHOD: read_recipe(parser, method_file),
    }
    labels = users.labels({Origin.PRESET: f"size of {model}", Origin.METHOD: label_of(method_file)})
    values, origins = merged(users.over(lower))
    return Settings(_checked(values), origins, labels, ("vocab_size",))


def tokenizer_sizes(settings: Settings) -> dict[str, Any]:
    """Keyword arguments of the tokenizer's config."""
    own = {name: settings[name] for name in ("image_size", "vocab_size", "num_channels")}
    return {**TOKENIZER_SIZES[settings["model"]], **own}


def _checked(values: Mapping[str, Any]) -> dict[str, Any]:
    """With every number in its range, and one side of a square as that number."""
    checked = dict(values)
    check_ranges(checked, _RANGES)
    size = checked["image_size"]
    if isinstance(size, list) and len(size) == 1:
        checked["image_size"] = size[0]
    return checked

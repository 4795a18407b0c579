"""Settings of `run_tokenizer.py`: what all tokenizers have, and a class with the flags of each `--method`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from transformers.trainer_utils import HubStrategy

from commands.flags import (
    BELOW_ONE,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_UP_TO_ONE,
    SIDES,
    CachedImageFlags,
    Range,
    flag,
    flags_of,
)
from commands.presets import ENCODER_SIZES
from commands.settings import RECIPES, CommandLine, Layer, Origin, TrainingSettings, chosen_among, data_name
from modeling.schedules import Schedule, constant

_SIZE_HELP = "one side, or height and width, in pixels (default: the model's)"
_DEFAULT_METHOD = "dvae"


def _dvae(hidden_size: int, num_blocks_per_group: int, decoder_input_size: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "num_groups": 4,
        "num_blocks_per_group": num_blocks_per_group,
        "decoder_input_size": decoder_input_size,
        "image_size": 112,
    }


# dvae: the encoder and decoder of DALL-E (Ramesh et al. 2021, arXiv:2102.12092, App. A), on the views of 112 pixels
# that BEiT gives it (DALL-E's were 256). The others are ours; dvae-nano trains on two CPU cores in minutes.
TOKENIZER_SIZES = {"dvae-nano": _dvae(32, 1, 64), "dvae-small": _dvae(64, 2, 128), "dvae": _dvae(256, 2, 128)}
VIT_SIZES = {name: sizes for name, sizes in ENCODER_SIZES.items() if name.startswith("vit-")}
# Fractions of all steps. DALL-E's schedules end after 0.2 % and 5 % of 3 million steps, and must end in short runs.
_MOST_KL_WEIGHT_SHARE, _MOST_TEMPERATURE_SHARE = 0.1, 0.5
_EPILOG = """\
The result is an image tokenizer for BEiT: accelerate launch run_pretraining.py --method {takes} --tokenizer FOLDER.
Small data: a step never takes more images than there are, and schedules that are longer than the run are shortened.
The plan, printed before training, lists each change in a "note:".{other}

precedence: defaults < recipes/{method}.yaml < --config < command line. --vocab-size is --vocab_size.
"""


@dataclass(frozen=True, kw_only=True)
class TokenizerModelFlags:
    title: ClassVar = "model"

    method: Literal["dvae", "vqkd"] = flag(
        _DEFAULT_METHOD,
        "dvae: codes that rebuild pixels (DALL-E, for BEiT); vqkd: codes that rebuild the features of a frozen "
        "teacher (BEiT v2)",
    )
    model: str = flag(None, "size of the tokenizer")
    vocab_size: int = flag(8192, "number of codes in the codebook", Range(lambda x: x >= 2, "2 or more"))
    image_size: tuple[int, int] = flag(None, _SIZE_HELP, SIDES)
    num_channels: Literal[1, 3] = flag(3, "3: color, 1: gray")


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings(TokenizerModelFlags, CachedImageFlags, TrainingSettings):
    """Base class of the settings of a tokenizer's training."""

    base_learning_rate: float | None = flag(
        None, "instead of learning_rate, for a batch of 256 images (default: off)", POSITIVE
    )
    learning_rate: float = flag(help="peak learning rate (default: the recipe's)", within=POSITIVE)
    output_dir: str | None = flag(help="where all files go (default: outputs/<model>-<data>)")
    push_to_hub: bool = flag(help="upload the finished tokenizer to --hub_model_id")
    hub_strategy: HubStrategy = flag(help="only end: nothing is uploaded before the run has finished (default: end)")

    program: ClassVar = {
        "prog": "run_tokenizer.py",
        "usage": "accelerate launch run_tokenizer.py [--flag value ...]",
        "description": "Train an image tokenizer on unlabeled images.",
        "epilog": "",
    }
    sizes: ClassVar[dict[str, dict[str, Any]]]  # by --model
    start_from_images = False
    ema_decay = 0.0

    def default_output_dir(self) -> str:
        return f"outputs/{self.model}-{data_name(self.dataset)}"

    def config_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of the tokenizer's config."""
        raise NotImplementedError

    def schedules(self, num_steps: int, notes: list[str]) -> dict[str, Schedule]:
        """Return the arguments of the model's forward that change during training; adds to the plan's notes."""
        return {}

    def plan_rows(self, schedules: dict[str, Schedule]) -> dict[str, str]:
        """Return lines of the plan by name."""
        return {}


@dataclass(frozen=True, kw_only=True)
class DvaeModelFlags(TokenizerModelFlags):
    model: str = flag("dvae", f"size of the tokenizer: {', '.join(TOKENIZER_SIZES)}", choices=TOKENIZER_SIZES)


@dataclass(frozen=True, kw_only=True)
class DvaeObjectiveFlags:
    title: ClassVar = "objective (defaults: DALL-E's)"

    kl_weight: float = flag(
        6.6, "weight of the divergence from a uniform choice of codes, after it has grown from 0", NOT_NEGATIVE
    )
    kl_weight_steps: float = flag(
        5000.0, "steps in which it grows; below 1 it is a fraction of all steps", NOT_NEGATIVE
    )
    final_temperature: float = flag(
        0.0625, "temperature of the relaxation, after it has fallen from 1", POSITIVE_UP_TO_ONE
    )
    temperature_steps: float = flag(
        150000.0, "steps in which it falls; below 1 it is a fraction of all steps", NOT_NEGATIVE
    )
    usage_weight: float = flag(
        0.0, "weight of an extra term that spreads the codes of a batch evenly; not in DALL-E", NOT_NEGATIVE
    )
    start_from_images: bool = flag(False, "initialize filters and codes from images; not in DALL-E, for short runs")
    ema_decay: float = flag(0.999, "decay of the average of the weights that is evaluated and saved", BELOW_ONE)


@dataclass(frozen=True, kw_only=True)
class DvaeSettings(DvaeModelFlags, DvaeObjectiveFlags, TokenizerSettings):
    """Settings of the training of a discrete VAE."""

    sizes = TOKENIZER_SIZES
    program: ClassVar = {
        **TokenizerSettings.program,
        "epilog": _EPILOG.format(takes="beit", method="dvae", other=" --method vqkd has flags of its own."),
    }

    def config_settings(self) -> dict[str, Any]:
        own = {name: self.values[name] for name in ("image_size", "vocab_size", "num_channels")}
        return {**TOKENIZER_SIZES[self.model], **own}

    def schedules(self, num_steps: int, notes: list[str]) -> dict[str, Schedule]:
        """Return them, all of half a cosine.

        Paper: Ramesh et al. 2021 (DALL-E), arXiv:2102.12092, App. A.2.
        """

        def steps(name: str, most_share: float) -> int:
            given: float = getattr(self, name)
            wanted = math.ceil(given * num_steps) if given < 1 else int(given)
            most = num_steps if self.is_users(name) else int(most_share * num_steps)
            if wanted > most:
                notes.append(f"{name} is {most:,} instead of {wanted:,}: the run has {num_steps:,} steps")
            return min(wanted, most)

        kl_weight_steps = steps("kl_weight_steps", _MOST_KL_WEIGHT_SHARE)
        temperature_steps = steps("temperature_steps", _MOST_TEMPERATURE_SHARE)
        return {
            "kl_weight": Schedule(0.0, self.kl_weight, kl_weight_steps),
            "temperature": Schedule(1.0, self.final_temperature, temperature_steps),
            "usage_weight": constant(self.usage_weight),
        }

    def plan_rows(self, schedules: dict[str, Schedule]) -> dict[str, str]:
        kl_weight, temperature = schedules["kl_weight"], schedules["temperature"]
        return {
            "KL weight": f"0 to {kl_weight.end:g} in {kl_weight.num_steps:,} steps",
            "temperature": f"1 to {temperature.end:g} in {temperature.num_steps:,} steps",
        }


@dataclass(frozen=True, kw_only=True)
class VqkdModelFlags(TokenizerModelFlags):
    model: str = flag("vit-base", f"size of the encoder: {', '.join(VIT_SIZES)}", choices=VIT_SIZES)
    patch_size: int = flag(None, "side in pixels of the square that a code represents (default: the model's)", COUNT)
    decoder_num_hidden_layers: int = flag(3, "blocks of the decoder, as wide as the encoder's", COUNT)
    code_size: int = flag(32, "width of a code", COUNT)


@dataclass(frozen=True, kw_only=True)
class VqkdObjectiveFlags:
    title: ClassVar = "objective (defaults: BEiT v2's)"

    teacher: str | None = flag(
        None, "folder or Hub id of the frozen encoder whose features of each patch the codes must rebuild"
    )
    teacher_image_size: tuple[int, int] | None = flag(
        None,
        "one side, or height and width, of the images that the teacher sees; smaller ones cost less (default: the "
        "teacher's own)",
        SIDES,
    )
    codebook_decay: float = flag(0.99, "decay of the moving average that a code is of its features", BELOW_ONE)
    commitment_loss_weight: float = flag(1.0, "weight of the distance between features and their codes", NOT_NEGATIVE)
    start_from_images: bool = flag(True, "start the codebook from a k-means of images")
    restarts_dead_codes: bool = flag(
        False, "give codes that hardly occur the features that are farthest from their code; not in BEiT v2"
    )


@dataclass(frozen=True, kw_only=True)
class VqkdSettings(VqkdModelFlags, VqkdObjectiveFlags, TokenizerSettings):
    """Settings of the training of a VQ-KD."""

    sizes = VIT_SIZES
    program: ClassVar = {
        **TokenizerSettings.program,
        "epilog": _EPILOG.format(takes="beit2", method="vqkd", other=""),
    }

    def config_settings(self) -> dict[str, Any]:
        own = {name: self.values[name] for name in ("image_size", "patch_size", "num_channels")}
        names = ("vocab_size", "code_size", "decoder_num_hidden_layers", "codebook_decay", "commitment_loss_weight")
        settings = {name: self.values[name] for name in (*names, "restarts_dead_codes")}
        return {"encoder_config": {**VIT_SIZES[self.model], **own}, **settings}

    def plan_rows(self, schedules: dict[str, Schedule]) -> dict[str, str]:
        return {"teacher": str(self.teacher)}


SETTINGS: dict[str, type[TokenizerSettings]] = {"dvae": DvaeSettings, "vqkd": VqkdSettings}
for _settings_class in SETTINGS.values():  # messages about flags of another --method name it
    _others = {name: f"--method {other}, which has it" for other, each in SETTINGS.items() for name in flags_of(each)}
    _own = flags_of(_settings_class)
    _settings_class.successors = {
        **_settings_class.successors,
        **{name: text for name, text in _others.items() if name not in _own},
    }


def chosen_settings(argv: Sequence[str]) -> type[TokenizerSettings]:
    """Return the settings class of the --method that the command line or its recipe names."""
    return SETTINGS[chosen_among(argv, "method", SETTINGS, _DEFAULT_METHOD)]


def load_tokenizer_settings(argv: Sequence[str]) -> TokenizerSettings:
    """Resolve the settings of a tokenizer's training; raises SettingsError if they are invalid."""
    command_line = CommandLine(chosen_settings(argv), argv)
    chosen = command_line.chosen
    sizes = chosen.sizes[chosen.model]
    size: dict[str, Any] = {name: sizes[name] for name in ("image_size", "patch_size") if name in sizes}
    lower: dict[Origin, Layer] = {
        Origin.PRESET: (f"size of {chosen.model}", size),
        Origin.METHOD: command_line.read_recipe(RECIPES / f"{chosen.method}.yaml"),
    }
    return command_line.resolve(lower)

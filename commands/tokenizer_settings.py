"""Settings of `run_tokenizer.py`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from transformers.trainer_utils import HubStrategy

from commands.flags import BELOW_ONE, NOT_NEGATIVE, POSITIVE, POSITIVE_UP_TO_ONE, SIDES, CachedImageFlags, Range, flag
from commands.settings import RECIPES, CommandLine, Origin, TrainingSettings, data_name


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
_EPILOG = """\
The result is an image tokenizer for BEiT: accelerate launch run_pretraining.py --method beit --tokenizer FOLDER.
Small data: a step never takes more images than there are, and schedules that are longer than the run are shortened.
The plan, printed before training, lists each change in a "note:".

precedence: defaults < recipes/dvae.yaml < --config < command line. --vocab-size is --vocab_size.
"""


@dataclass(frozen=True, kw_only=True)
class TokenizerModelFlags:
    title: ClassVar = "model"

    model: str = flag("dvae", f"size of the tokenizer: {', '.join(TOKENIZER_SIZES)}", choices=TOKENIZER_SIZES)
    vocab_size: int = flag(8192, "number of codes in the codebook", Range(lambda x: x >= 2, "2 or more"))
    image_size: tuple[int, int] = flag(None, "one side, or height and width, in pixels (default: the model's)", SIDES)
    num_channels: Literal[1, 3] = flag(3, "3: color, 1: gray")


@dataclass(frozen=True, kw_only=True)
class TokenizerObjectiveFlags:
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
class TokenizerSettings(TokenizerModelFlags, TokenizerObjectiveFlags, CachedImageFlags, TrainingSettings):
    """Settings of a tokenizer's training."""

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
        "description": "Train an image tokenizer (a discrete VAE) on unlabeled images.",
        "epilog": _EPILOG,
    }

    def default_output_dir(self) -> str:
        return f"outputs/{self.model}-{data_name(self.dataset)}"

    def config_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of the tokenizer's config."""
        own = {name: self.values[name] for name in ("image_size", "vocab_size", "num_channels")}
        return {**TOKENIZER_SIZES[self.model], **own}


def load_tokenizer_settings(argv: Sequence[str]) -> TokenizerSettings:
    """Resolve the settings of a tokenizer's training; raises SettingsError if they are invalid."""
    command_line = CommandLine(TokenizerSettings, argv)
    model = command_line.chosen.model
    lower = {
        Origin.PRESET: (f"size of {model}", {"image_size": TOKENIZER_SIZES[model]["image_size"]}),
        Origin.METHOD: command_line.read_recipe(RECIPES / "dvae.yaml"),
    }
    return command_line.resolve(lower)

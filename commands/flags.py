"""Declaration of command-line flags, and the groups of flags that several commands share.

A setting is a field of a frozen dataclass: its annotation is the type that the code reads, and `flag` adds the help
text and the permitted values. A group is such a dataclass with a `title`, its heading in --help; the settings of a
command (`commands.settings`) inherit from their groups and may declare a field again to change its default or help.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields
from inspect import cleandoc
from itertools import pairwise
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin

from transformers import PreTrainedConfig
from transformers.debug_utils import DebugOption
from transformers.trainer_utils import HubStrategy


class Range(NamedTuple):
    """The permitted values of a number (or of a list of numbers), and their description for error messages."""

    contains: Callable[[Any], bool]
    description: str


POSITIVE = Range(lambda x: x > 0, "a number above 0")
NOT_NEGATIVE = Range(lambda x: x >= 0, "0 or more")
COUNT = Range(lambda x: x >= 1, "1 or more")
FRACTION = Range(lambda x: 0 <= x <= 1, "a fraction from 0 to 1")
BELOW_ONE = Range(lambda x: 0 <= x < 1, "0 or more and below 1")
POSITIVE_UP_TO_ONE = Range(lambda x: 0 < x <= 1, "a number above 0 and at most 1")
SIDES = Range(lambda x: len(x) <= 2 and min(x) >= 1, "one side, or height and width, of at least 1 pixel")
RISING = Range(lambda x: x[0] >= 1 and all(a < b for a, b in pairwise(x)), "numbers that rise")
SCALE = Range(lambda x: len(x) == 2 and 0 < x[0] <= x[1] <= 1, "two numbers, 0 < smallest <= largest <= 1")
RATIO = Range(
    lambda x: len(x) <= 2 and 0 < x[0] <= x[-1] < 1,
    "one number above 0 and below 1, or two of them, the lower one first",
)

TRANSFORMERS_DEFAULT: Any = object()


def flag(
    default: Any = TRANSFORMERS_DEFAULT,
    help: str = "",
    within: Range | None = None,
    choices: Collection[str] | None = None,
    refused: Mapping[str, str] = MappingProxyType({}),
    words: Collection[str] = (),
    otherwise: str = "",
) -> Any:
    """Declare a setting that is a flag of the command line and a line of a recipe.

    Args:
        default: None if a recipe or a preset gives the value; omitted for a field of TrainingArguments that keeps
            the default of transformers.
        help: For a field of TrainingArguments without it, --help_all shows the text of transformers.
        refused: Values that users may expect but that do not exist, each with an explanation.
        words: Values of a number that are words.
        otherwise: What is said of a value that resembles none of the choices.
    """
    metadata = {"help": help, "within": within, "choices": choices}
    metadata |= {"refused": refused, "words": words, "otherwise": otherwise}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    title: ClassVar = "run"

    config: str | None = flag(None, "recipe: a YAML file of flag names; the command line overrides it")
    base_learning_rate: float | None = flag(
        None,
        "learning rate for a batch of 256 images: learning_rate = this x images per step / 256 "
        "(default: the recipe's)",
        POSITIVE,
    )
    warmup_epochs: float = flag(
        None,
        "epochs in which the learning rate rises from 0; at most a tenth of the run unless given here "
        "(default: the recipe's)",
        NOT_NEGATIVE,
    )
    time_budget: str | None = flag(
        None,
        "how long the run may take in all, such as 45s, 30m or 2h, instead of a number of epochs or steps; the speed "
        "is measured, and the schedule ends with the time",
    )
    license: str | None = flag(
        None, "license of the weights for the model card: one of the Hub's identifiers, such as apache-2.0"
    )
    resume: Literal["auto", "never"] = flag("auto", "auto: continue from the last complete checkpoint in --output_dir")
    overwrite: bool = flag(False, "delete what an earlier run left in --output_dir")
    dry_run: bool = flag(False, "check everything, print the plan and stop before training")


@dataclass(frozen=True, kw_only=True)
class DataFlags:
    title: ClassVar = "data"

    dataset: list[str] = flag([], "images")
    validation_fraction: float | None = flag(
        None,
        "fraction of the training images used for validation if the data has no validation split (default: 0.1)",
        BELOW_ONE,
    )
    max_bad_fraction: float = flag(
        0.05, "stop before training if more than this fraction of the images cannot be read", FRACTION
    )
    check_images: Literal["new", "all", "sample"] = flag(
        "new",
        "images whose headers are read before training: those that are new or have changed since an earlier run, all, "
        "or a sample of 2,048; of shards a few hundred, unless all",
    )
    shard_cache_gb: float = flag(
        20.0,
        "size of the folder in the cache of the Hub that keeps what was read of remote and parquet shards, oldest out "
        "first; all processes of a computer share it",
        POSITIVE,
    )


@dataclass(frozen=True, kw_only=True)
class ImageFlags(DataFlags):
    dataset: list[str] = flag(
        ["sample"],
        "folders of images (any nesting), parquet or arrow files, text files of paths, tar or zip archives, Hub ids, "
        "or patterns of shards such as s3://bucket/train-{0000..0999}.tar (hf://, https:// and others too); 'sample' "
        "and 'sample-fashion' are bundled",
    )
    validation_fraction: float = flag(
        0.05,
        "fraction of the images kept for validation; unused if the data has a validation split of its own",
        BELOW_ONE,
    )
    crop_scale: tuple[float, float] = flag(
        None, "smallest and largest fraction of an image that a training crop shows (default: the recipe's)", SCALE
    )


@dataclass(frozen=True, kw_only=True)
class CachedImageFlags(ImageFlags):
    cache: str | None = flag(
        None,
        "folder for shrunk copies of the images, so that large ones are decoded once; runs and methods share it, and "
        "changed images are stored anew",
    )
    cache_size: int | None = flag(
        None, "shortest side in pixels of the copies (default: the smallest crop is never enlarged)", COUNT
    )
    cache_format: Literal["raw", "jpeg"] = flag(
        "raw", "raw: fastest; jpeg (quality 95): a fifth of the space, and about as slow as small JPEGs"
    )


@dataclass(frozen=True, kw_only=True)
class TrainingFlags:
    """The fields of TrainingArguments that this project reads, documents, or gives another default."""

    output_dir: str | None = flag(help="where all files go (default: outputs/<model>-<method>-<data>)")
    num_train_epochs: float = flag(
        help="number of passes over the images (default: the recipe's, more on small data)", within=POSITIVE
    )
    max_steps: int = flag(
        help="number of optimizer steps, instead of num_train_epochs (default: off)",
        within=Range(lambda x: x == -1 or x >= 1, "1 or more, or -1 for none"),
    )
    per_device_train_batch_size: int | Literal["auto"] = flag(
        help="images per device and forward pass, or auto for the largest number that fits into its memory "
        "(default: 64 on a GPU; on a CPU 8, or what --schedule auto chooses)",
        within=COUNT,
        words=("auto",),
    )
    gradient_accumulation_steps: int = flag(help="batches accumulated for one optimizer step", within=COUNT)
    learning_rate: float = flag(
        help="peak learning rate, instead of base_learning_rate (default: off)", within=POSITIVE
    )
    warmup_steps: float = flag(
        help="instead of warmup_epochs; below 1 it is a fraction of all steps (default: off)", within=NOT_NEGATIVE
    )
    lr_scheduler_type: str = flag("cosine", "how the learning rate decays after warm-up")
    optim: str = flag("adamw_torch_fused")
    weight_decay: float = flag(help="not applied to biases and norms (default: the recipe's)")
    max_grad_norm: float = flag(help="clip the gradient at this norm; 0: never (default: the recipe's)")
    bf16: bool = flag(help="train in bfloat16 (default: on if the GPU supports it)")
    fp16: bool = flag()
    torch_compile: bool = flag(help="compile the model: slow start, faster steps")
    gradient_checkpointing: bool | None = flag(help="less memory, about a third more time")
    dataloader_num_workers: int = flag(
        help="processes per device that decode images (default: depends on the number of CPU cores)",
        within=NOT_NEGATIVE,
    )
    dataloader_drop_last: bool = flag(True)
    logging_steps: float = flag(20, "steps between two lines of the log", POSITIVE)
    logging_first_step: bool = flag(True)
    logging_nan_inf_filter: bool = flag(False)  # True logs a NaN loss as 0
    disable_tqdm: bool | None = flag(False)
    report_to: str | list[str] | None = flag("tensorboard", "tensorboard, wandb, trackio, ... or none")
    eval_strategy: str = flag("steps")
    eval_steps: float | None = flag(0.05, "steps between evaluations; below 1 it is a fraction of all steps", POSITIVE)
    prediction_loss_only: bool = flag(True)  # else the predictions on all validation images are kept in memory
    save_strategy: str = flag("steps")
    save_steps: float = flag(0.05, "steps between checkpoints; below 1 it is a fraction of all steps", POSITIVE)
    save_total_limit: int | None = flag(3, "number of checkpoints to keep")
    remove_unused_columns: bool = flag(False)  # True removes the counters that masks are drawn from
    ddp_find_unused_parameters: bool | None = flag(False)
    resume_from_checkpoint: str | None = flag()
    push_to_hub: bool = flag(help="upload to --hub_model_id at every save, in the background, and at the end")
    hub_model_id: str | None = flag(help="organization/name or user/name; created if it does not exist")
    hub_strategy: HubStrategy = flag(
        help="every_save; checkpoint: with the last training state, from which a run with an empty --output_dir "
        "continues on any computer; all_checkpoints: with every training state; end: only the finished run"
    )
    hub_private_repo: bool | None = flag(
        help="create the repository as a private one, and never write to a public one"
    )
    hub_token: str | None = flag(help="instead of HF_TOKEN or the login of `hf auth login`; never stored")
    hub_revision: str | None = flag()
    hub_always_push: bool = flag()
    seed: int = flag(0, "seed of all random numbers: data order, crops, masks, weights")
    use_cpu: bool = flag(help="do not use the GPU")
    debug: str | list[DebugOption] = flag(
        help="show Python tracebacks of errors (without a value), or a debug option of transformers"
    )


# Flags of older versions of transformers, of the authors' code and of other toolkits, with their replacements.
SUCCESSORS = {
    "warmup_ratio": "--warmup_epochs, or --warmup_steps with a number below 1",
    "overwrite_output_dir": "--overwrite",
    "no_cuda": "--use_cpu",
    "evaluation_strategy": "--eval_strategy",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "per_gpu_train_batch_size": "--per_device_train_batch_size",
    "batch_size": "--per_device_train_batch_size",
    "accum_iter": "--gradient_accumulation_steps",
    "epochs": "--num_train_epochs",
    **dict.fromkeys(("max_time", "time_limit", "budget"), "--time_budget"),
    "lr": "--learning_rate, or --base_learning_rate for 256 images",
    "blr": "--base_learning_rate",
    "input_size": "--image_size",
    "push_to_hub_model_id": "--hub_model_id",
    "half_precision_backend": "--bf16 or --fp16",
    **dict.fromkeys(("data", "data_path", "data_dir", "train_dir", "dataset_name"), "--dataset"),
}


def method_flags(config_class: type) -> dict[str, Any]:
    """Return the scalar settings that a method's config adds to those of transformers, with their defaults."""
    inherited = {setting.name for setting in fields(PreTrainedConfig)}  # type: ignore[arg-type]
    return {
        setting.name: setting.default
        for setting in fields(config_class)
        if setting.name not in inherited and setting.type in (int, float, bool, str)
    }


def method_help(config_class: type) -> dict[str, str]:
    """Return the first sentences about settings in the docstring of a method's config, by name."""
    descriptions: dict[str, str] = {}
    for owner in reversed(config_class.__mro__):
        arguments = cleandoc(vars(owner).get("__doc__") or "").partition("Args:\n")[2]
        for names, text in re.findall(r"^ {4}([a-z_0-9, ]+): (.+(?:\n {8}.+)*)", arguments, re.MULTILINE):
            descriptions |= dict.fromkeys(names.split(", "), " ".join(text.split()).partition(". ")[0].rstrip("."))
    return descriptions


def flags_of(settings_class: type) -> dict[str, Any]:
    """Return the fields of a class that `flag` declared, by name."""
    return {setting.name: setting for setting in fields(settings_class) if "within" in setting.metadata}


def default_of(declared: Any) -> Any:
    """Return the default of a field that `flag` declared."""
    return declared.default if declared.default_factory is MISSING else declared.default_factory()


def tuple_in(hint: Any) -> Any | None:
    """Return the tuple type that `hint` is or admits, if any."""
    return next((option for option in (hint, *get_args(hint)) if get_origin(option) is tuple), None)

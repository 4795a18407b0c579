"""The flags of a pre-training run: ours, every field of TrainingArguments, and the settings of the methods' heads."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import PreTrainedConfig, TrainingArguments

from commands.presets import ENCODER_SIZES
from data.masks import MASK_STRATEGIES


@dataclass
class ModelFlags:
    _argument_group_name = "model"

    model: str = "vit-base"
    method: str = "mae"
    image_size: list[int] | None = None
    patch_size: int | None = None
    num_channels: Literal[1, 3] = 3
    init_from: str | None = None
    repair_positions: bool = False


@dataclass
class DataFlags:
    _argument_group_name = "data"

    dataset: list[str] = field(default_factory=lambda: ["sample"])
    validation_fraction: float = 0.05
    eval_dataset: list[str] | None = None
    eval_label_column: str | None = None
    max_bad_fraction: float = 0.05
    image_stats: Literal["preset", "auto", "source"] | None = None
    crop_scale: list[float] | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    color_jitter: float = 0.0
    tokenizer: str | None = None
    cache_tokens: bool = False


@dataclass
class MaskFlags:
    _argument_group_name = "masks"

    mask_ratio: list[float] | None = None
    mask_strategy: str | None = None
    mask_unit: int | None = None


@dataclass
class RunFlags:
    _argument_group_name = "run"

    config: str | None = None
    base_learning_rate: float | None = None
    warmup_epochs: float | None = None
    license: str | None = None
    resume: Literal["auto", "never"] = "auto"
    overwrite: bool = False
    dry_run: bool = False


@dataclass
class PretrainingRunFlags(RunFlags):
    lr_drop_epoch: float | None = None
    layer_decay: float = 1.0


OUR_GROUPS = (ModelFlags, DataFlags, MaskFlags, PretrainingRunFlags)

# Flags of which only some values exist; those of `method` are the heads that there are.
CHOICES: dict[str, Collection[str]] = {"model": ENCODER_SIZES, "mask_strategy": MASK_STRATEGIES}


class TransformersFlags(TrainingArguments):
    """TrainingArguments with a title of its own in --help."""

    _argument_group_name = "training (flags of transformers.TrainingArguments)"


_Numbers = Sequence[float]
_POSITIVE: tuple[Callable[[_Numbers], bool], str] = (lambda x: x[0] > 0, "a number above 0")
_NOT_NEGATIVE: tuple[Callable[[_Numbers], bool], str] = (lambda x: x[0] >= 0, "0 or more")
_COUNT: tuple[Callable[[_Numbers], bool], str] = (lambda x: x[0] >= 1, "1 or more")

# Which numbers a flag may have, given as a list, and the words for it.
RANGES: dict[str, tuple[Callable[[_Numbers], bool], str]] = {
    "image_size": (lambda x: len(x) <= 2 and min(x) >= 1, "one side, or height and width, of at least 1 pixel"),
    "patch_size": _COUNT,
    "validation_fraction": (lambda x: 0 <= x[0] < 1, "0 or more and below 1"),
    "max_bad_fraction": (lambda x: 0 <= x[0] <= 1, "a share from 0 to 1"),
    "crop_scale": (lambda x: len(x) == 2 and 0 < x[0] <= x[1] <= 1, "two numbers, 0 < smallest <= largest <= 1"),
    "mask_ratio": (
        lambda x: len(x) <= 2 and 0 < x[0] <= x[-1] < 1,
        "one number above 0 and below 1, or two of them, the lower one first",
    ),
    "mask_unit": _COUNT,
    "base_learning_rate": _POSITIVE,
    "warmup_epochs": _NOT_NEGATIVE,
    "lr_drop_epoch": _POSITIVE,
    "layer_decay": (lambda x: 0 < x[0] <= 1, "a number above 0 and at most 1"),
    "learning_rate": _POSITIVE,
    "warmup_steps": _NOT_NEGATIVE,
    "num_train_epochs": _POSITIVE,
    "max_steps": (lambda x: x[0] == -1 or x[0] >= 1, "1 or more, or -1 for none"),
    "per_device_train_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "eval_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "logging_steps": _POSITIVE,
    "dataloader_num_workers": _NOT_NEGATIVE,
}

# What transformers starts with where we know better; everything else is as transformers has it.
TRAINING_DEFAULTS: dict[str, Any] = {
    "seed": 0,
    "lr_scheduler_type": "cosine",
    "optim": "adamw_torch_fused",
    "logging_steps": 20,
    "logging_first_step": True,
    "logging_nan_inf_filter": False,  # True shows a NaN loss as 0
    "eval_strategy": "steps",
    "eval_steps": 0.05,
    "save_strategy": "steps",
    "save_steps": 0.05,
    "save_total_limit": 3,
    "report_to": "tensorboard",
    "disable_tqdm": False,
    "prediction_loss_only": True,  # else the predictions of the whole held-out part are kept in memory
    "remove_unused_columns": False,  # True takes away the counters that masks are drawn from
    "dataloader_drop_last": True,
    "ddp_find_unused_parameters": False,
}

HELP_TEXTS = {
    "model": "size of the encoder, from vit-nano to vit-huge or from swin-nano to swin-large",
    "method": "how it learns; its published settings are in recipes/<method>.yaml",
    "image_size": "one side, or height and width, in pixels (default: the model's)",
    "patch_size": "side of a patch in pixels (default: the model's)",
    "num_channels": "3: color, 1: gray",
    "init_from": "folder or Hub id of a trained encoder, or of a whole model of ours, to begin from; its sizes then "
    "stand in place of --model's",
    "repair_positions": "fill the position tables of a ViTMAE with sines and cosines, where they are all zero",
    "dataset": "folders of images (any nesting), parquet or arrow files, text files of paths, or Hub ids; 'sample' "
    "and 'sample-fashion' are bundled",
    "validation_fraction": "share of the images held out to measure the loss; not used where the data come with a "
    "held-out part of their own",
    "eval_dataset": "labeled images (folder of class folders, Hub id, 'sample-fashion') on which kNN, a linear probe "
    "and RankMe of the frozen encoder are measured every eval_steps",
    "eval_label_column": "of --eval_dataset, a table: where its classes are (default: found by type and name)",
    "max_bad_fraction": "stop before training if more than this share of the images cannot be read",
    "image_stats": "standardize with ImageNet's mean and deviation (preset), these images' own (auto), or those of "
    "--init_from (source) (default: source if it has any, else preset for color, auto for gray)",
    "crop_scale": "smallest and largest share of a picture that a training crop shows (default: the method's)",
    "interpolation": "filter that resizes crops (default: the method's)",
    "color_jitter": "change brightness, contrast and saturation by up to this share (default: the method's)",
    "tokenizer": "for beit: folder or Hub id of the image tokenizer whose tokens are predicted",
    "cache_tokens": "for beit: make every image's tokens once, before training. Each image is then its central crop, "
    "never mirrored: for images that are cut to size already",
    "mask_ratio": "share of the patches that is hidden, or lowest and highest to draw it from (default: the method's)",
    "mask_strategy": "which patches are hidden (default: the method's)",
    "mask_unit": "side in pixels of the squares that 'random-unit' hides (default: a patch)",
    "config": "recipe: a YAML file of flag names; the command line wins over it",
    "base_learning_rate": "learning rate for 256 images a step: learning_rate = this x images a step / 256 "
    "(default: the method's)",
    "warmup_epochs": "epochs in which the learning rate rises from 0; at most a tenth of the run unless given here "
    "(default: the method's)",
    "license": "of the weights, for the card: one of the Hub's identifiers, such as apache-2.0 (default: none)",
    "resume": "auto: go on from the last whole checkpoint in --output_dir",
    "overwrite": "delete what an earlier run left in --output_dir",
    "dry_run": "check everything, print the plan and stop before training",
    "output_dir": "where everything goes (default: outputs/<model>-<method>-<data>)",
    "num_train_epochs": "passes over the images (default: the method's, more on small data)",
    "max_steps": "optimizer steps, in place of num_train_epochs (default: off)",
    "per_device_train_batch_size": "images a device takes at once (default: 64 on a GPU, 8 on a CPU)",
    "gradient_accumulation_steps": "batches summed up for one optimizer step",
    "lr_drop_epoch": "from this epoch on a tenth of the learning rate; with --lr_scheduler_type constant_with_warmup",
    "layer_decay": "each layer of the encoder learns this much slower than the one above it; for --init_from",
    "learning_rate": "the peak itself, in place of base_learning_rate (default: off)",
    "warmup_steps": "in place of warmup_epochs; below 1 it is a share of all steps (default: off)",
    "lr_scheduler_type": "how the learning rate falls after warm-up",
    "weight_decay": "not on biases and norms (default: the method's)",
    "max_grad_norm": "clip the gradient at this norm; 0: never (default: the method's)",
    "bf16": "bfloat16 arithmetic (default: on where the GPU has it)",
    "torch_compile": "compile the model: slow start, faster steps",
    "gradient_checkpointing": "less memory, about a third more time",
    "dataloader_num_workers": "processes that decode images, per device (default: by number of CPU cores)",
    "logging_steps": "steps between two lines of the log",
    "eval_steps": "steps between evaluations; below 1 it is a share of all steps",
    "save_steps": "steps between checkpoints; below 1 it is a share of all steps",
    "save_total_limit": "checkpoints kept",
    "report_to": "tensorboard, wandb, trackio, ... or none",
    "push_to_hub": "upload to --hub_model_id at every save, beside the training, and at the end",
    "hub_model_id": "organization/name or user/name; made if it is not there",
    "hub_strategy": "every_save; checkpoint: with the last training state, which an empty --output_dir on any machine "
    "continues from; all_checkpoints: with every one; end: only the finished run",
    "hub_private_repo": "make the repository private if it is made, and never write to a public one",
    "hub_token": "in place of HF_TOKEN or the login of `hf auth login`; stored nowhere",
    "seed": "of everything random: data order, crops, masks, weights",
    "use_cpu": "leave the GPU alone",
    "debug": "show Python tracebacks of errors (bare), or transformers' own debug options",
}

EPILOG = """\
small data: a step never takes more images than there are, an epoch has at least one step, warm-up is at most a tenth
of the run, and a method's own number of epochs is raised until the run has 2,000 steps. The plan, printed before
training, says in a "note:" what was changed; settings given by you are only changed where they cannot be kept.

precedence: defaults < recipes/<method>.yaml < --config < command line. --mask-ratio is --mask_ratio.
"""

# Flags of older transformers, of the authors' code and of other toolkits -> ours.
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
    "lr": "--learning_rate, or --base_learning_rate for 256 images",
    "blr": "--base_learning_rate",
    "input_size": "--image_size",
    "push_to_hub_model_id": "--hub_model_id",
    "half_precision_backend": "--bf16 or --fp16",
    **dict.fromkeys(("data", "data_path", "data_dir", "train_dir", "dataset_name"), "--dataset"),
}


def method_flags(config_class: type) -> dict[str, Any]:
    """The scalar settings that a head's config adds to the library's, with their defaults."""
    inherited = {setting.name for setting in fields(PreTrainedConfig)}  # type: ignore[arg-type]
    return {
        setting.name: setting.default
        for setting in fields(config_class)
        if setting.name not in inherited and setting.type in (int, float, bool, str)
    }

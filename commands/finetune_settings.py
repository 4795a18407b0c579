"""The flags of `run_finetune.py`: the encoder's own published recipe, which flags and --config change.

Lowest first: defaults, recipes/finetune_<...>.yaml chosen by the encoder and the mode, the recipe of --config, the
command line.
"""

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from commands.flags import HELP_TEXTS, RANGES, RunFlags
from commands.parsing import SettingsError, make_parser
from commands.settings import (
    RECIPES,
    Origin,
    Settings,
    UsersLayers,
    check_ranges,
    label_of,
    merged,
    read_recipe,
    refuse_hub_flags,
    training_defaults,
)

# Encoders that say nothing of a method of ours are fine-tuned as the method that made their kind.
_METHOD_OF_FAMILY = {"beit": "beit", "data2vec-vision": "beit", "swin": "simmim"}
_METHOD_OF_THE_REST = "mae"
_VARIANTS = {"simmim-asymmetric": "mae"}
_LARGE, _HUGE, _LARGE_SWIN = 1024, 1280, 1536  # widths; of a Swin that of its last stage
_RECIPES = "(default: the recipe's)"
_EPILOG = """\
The result opens without this project: pipeline("image-classification", model=FOLDER).
Small data: a step never takes more images than there are, and a recipe's own number of epochs is raised until the run
has 1,000 steps. The plan, printed before training, says in a "note:" what was changed.

precedence: defaults < the encoder's recipe < --config < command line. --label-fraction is --label_fraction.
"""


def _flag(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


@dataclass
class FinetuneModelFlags:
    _argument_group_name = "model"

    model: str | None = None
    mode: Literal["finetune", "linear", "partial", "attentive"] = _flag(
        "finetune", "what trains: finetune, all of it; partial, the last blocks and the head; linear, the head alone"
    )
    num_trained_blocks: int = _flag(4, "for --mode partial: blocks that train, counted from the head")
    from_scratch: bool = _flag(False, "the same architecture and recipe with random weights, to compare with")
    pooling: Literal["mean", "class"] | None = _flag(
        None, "what the head reads: the mean of the patches or the class token (default: the recipe's)"
    )
    image_size: int | None = None
    drop_path: float = _flag(
        0.0, f"share of the images for which the last block is skipped; less in earlier blocks {_RECIPES}"
    )


@dataclass
class FinetuneDataFlags:
    _argument_group_name = "data"

    dataset: list[str] = field(default_factory=list)
    label_column: str | None = _flag(None, "of a table: where the classes are (default: found by type and name)")
    label_fraction: float | None = _flag(None, "train on this share of the labels of each class (default: all)")
    labels_per_class: int | None = _flag(None, "train on so many labels of each class (default: all)")
    validation_fraction: float | None = _flag(
        None,
        "share of the training images held out where the data have no validation part (default: 0.1; 0 where they "
        "have a test part and only some labels are used)",
    )
    max_bad_fraction: float = 0.05
    class_weights: Literal["none", "balanced"] = _flag(
        "none", "none, or balanced: an image of a rare class counts more"
    )


@dataclass
class FinetuneViewFlags:
    _argument_group_name = "views of an image"

    crop_scale: list[float] | None = None
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    eval_crop_share: float | None = _flag(
        None,
        "side of the central crop at evaluation, as a share of the resized short side (default: as published, 0.875 "
        "up to 224 pixels for MAE, below 384 for BEiT and always for SimMIM, else 1)",
    )
    rand_augment: float = _flag(0.0, f"strength of RandAugment, up to 10; 0: off {_RECIPES}")
    mixup: float = _flag(0.0, f"of the Beta distribution that blends two images; 0: off {_RECIPES}")
    cutmix: float = _flag(0.0, f"of the Beta distribution of the size of a pasted piece; 0: off {_RECIPES}")
    erasing: float = _flag(0.0, f"probability that a box of an image is replaced by noise {_RECIPES}")


@dataclass
class FinetuneRateFlags:
    _argument_group_name = "optimization"

    layer_decay: float = _flag(
        1.0, f"each layer learns this much slower than the one above it; 1: all alike {_RECIPES}"
    )
    ema_decay: float = _flag(0.0, "of the average of the weights that is evaluated and saved; 0: none")
    early_stopping_patience: int | None = _flag(
        None, "stop after so many evaluations without a better one (default: off)"
    )


_GROUPS = (FinetuneModelFlags, FinetuneDataFlags, FinetuneViewFlags, FinetuneRateFlags, RunFlags)
_SHARE: tuple[Callable[[Sequence[float]], bool], str] = (lambda x: 0 <= x[0] <= 1, "0 to 1")
_COUNT: tuple[Callable[[Sequence[float]], bool], str] = (lambda x: x[0] >= 1, "1 or more")
_NOT_NEGATIVE: tuple[Callable[[Sequence[float]], bool], str] = (lambda x: x[0] >= 0, "0 (off) or more")
_RANGES = {
    **RANGES,
    "num_trained_blocks": _COUNT,
    "drop_path": (lambda x: 0 <= x[0] < 1, "0 (off) or more and below 1"),
    "label_fraction": (lambda x: 0 < x[0] <= 1, "a number above 0 and at most 1"),
    "labels_per_class": _COUNT,
    "eval_crop_share": (lambda x: 0 < x[0] <= 1, "a number above 0 and at most 1"),
    "rand_augment": (lambda x: 0 <= x[0] <= 10, "0 (off) to 10"),
    "mixup": _NOT_NEGATIVE,
    "cutmix": _NOT_NEGATIVE,
    "erasing": _SHARE,
    "label_smoothing_factor": (lambda x: 0 <= x[0] < 1, "0 or more and below 1"),
    "layer_decay": (lambda x: 0 < x[0] <= 1, "a number above 0 and at most 1"),
    "ema_decay": (lambda x: 0 <= x[0] < 1, "0 (off) or more and below 1"),
    "early_stopping_patience": _COUNT,
}
_DEFAULTS = {
    "prediction_loss_only": False,
    "load_best_model_at_end": True,
    "metric_for_best_model": "accuracy",
}
_HELP_TEXTS = {
    "model": "folder or Hub id of a pre-trained encoder",
    "image_size": "side in pixels; position tables are resized to it (default: the encoder's)",
    "dataset": "a folder of class folders (with train/ beside val/ or test/, or without), a table or a Hub id with a "
    "column of labels, a folder of MNIST's idx files, or sample-fashion",
    "crop_scale": "smallest and largest share of a picture that a training crop shows (default: the recipe's)",
    "label_smoothing_factor": "share of the target that is spread over all classes (default: the recipe's)",
    "load_best_model_at_end": "keep the weights of the evaluation with the best metric_for_best_model",
    "metric_for_best_model": "accuracy, balanced_accuracy, macro_f1, top5_accuracy, loss or calibration_error",
    "per_device_train_batch_size": "images a device takes at once (default: 64 on a GPU, 32 on a CPU)",
    "push_to_hub": "upload the finished classifier to --hub_model_id",
    "hub_strategy": "only end: what is not finished is not uploaded (default: end)",
    "output_dir": "where everything goes (default: outputs/<model>-<mode>-<data>)",
    **{
        name: HELP_TEXTS[name].replace("the method's", "the recipe's")
        for name in (
            *("base_learning_rate", "warmup_epochs", "num_train_epochs", "weight_decay", "max_grad_norm"),
            "interpolation",
        )
    },
}


def recipe_name(method: str | None, family: str, width: int) -> str:
    """The published fine-tuning that fits an encoder best, by its method, its model type and its width."""
    method = _VARIANTS.get(method or "", method) or _METHOD_OF_FAMILY.get(family, _METHOD_OF_THE_REST)
    if family == "swin":
        return f"finetune_simmim_swin-{'large' if width >= _LARGE_SWIN else 'base'}"
    if method == "simmim":
        return "finetune_simmim_vit-base"
    if method == "mae" and width >= _HUGE:
        return "finetune_mae_vit-huge"
    return f"finetune_{method}_vit-{'large' if width >= _LARGE else 'base'}"


def build_finetune_parser() -> ArgumentParser:
    return make_parser(
        _GROUPS,
        {},
        {**HELP_TEXTS, **_own_help_texts(), **_HELP_TEXTS},
        prog="run_finetune.py",
        usage="accelerate launch run_finetune.py --model ENCODER --dataset LABELED [--flag value ...]",
        description="Fine-tune a pre-trained encoder on labeled images.",
        epilog=_EPILOG,
    )


def load_finetune_settings(argv: Sequence[str], choose_recipe: Callable[[str], str]) -> Settings:
    """Resolve the settings of a fine-tuning. `choose_recipe`: name of the encoder -> its `recipe_name`.

    Raises:
        SettingsError: an unknown flag, a value that cannot be, no such recipe, or neither model nor data named.
    """
    parser = build_finetune_parser()
    users = UsersLayers.read(parser, argv)
    defaults = {name: value for group in _GROUPS for name, value in vars(group()).items()}
    chosen = {**defaults, **users.values}
    _refuse_incomplete(chosen)
    recipe = RECIPES / f"{'finetune_linear' if chosen['mode'] == 'linear' else choose_recipe(chosen['model'])}.yaml"
    lower = {
        Origin.DEFAULT: {**defaults, **training_defaults(), **_DEFAULTS},
        Origin.METHOD: read_recipe(parser, recipe),
    }
    values, origins = merged(users.over(lower))
    check_ranges(values, _RANGES)
    refuse_hub_flags(values, origins)
    if origins["hub_strategy"] >= Origin.CONFIG and values["hub_strategy"] != "end":
        raise SettingsError(f"--hub_strategy {values['hub_strategy']}: a fine-tuning is uploaded when it is finished")
    return Settings(values, origins, users.labels({Origin.METHOD: label_of(recipe)}), ())


def _own_help_texts() -> dict[str, str]:
    """Of the flags above: some are named like flags of pre-training and mean something else."""
    own = (FinetuneModelFlags, FinetuneDataFlags, FinetuneViewFlags, FinetuneRateFlags)
    return {flag.name: flag.metadata["help"] for group in own for flag in fields(group) if "help" in flag.metadata}


def _refuse_incomplete(chosen: dict[str, Any]) -> None:
    for name, what in (("model", "the pre-trained encoder"), ("dataset", "the labeled images")):
        if not chosen[name]:
            raise SettingsError(f"--{name} is missing: {what}, a folder or a Hub id")
    if chosen["mode"] == "attentive":
        raise SettingsError(
            "--mode attentive: transformers has no class for a classifier with an attentive head, so there would be "
            "nothing to open afterwards; run_evaluation.py measures an encoder with an attentive probe"
        )
    if chosen["label_fraction"] is not None and chosen["labels_per_class"] is not None:
        raise SettingsError("--label_fraction and --labels_per_class both say how many labels to use; give one")

"""Settings of `run_finetune.py`: the published recipe of the encoder, which --config and flags override.

The recipe recipes/finetune_<...>.yaml is chosen by the encoder and by --mode.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers.trainer_utils import HubStrategy

from commands.flags import (
    BELOW_ONE,
    COUNT,
    FRACTION,
    NOT_NEGATIVE,
    POSITIVE_UP_TO_ONE,
    SCALE,
    Range,
    flag,
)
from commands.settings import RECIPES, CommandLine, Origin, SettingsError, TrainingSettings, data_name
from data.classification import CROP_SHARE

_RECIPES = "(default: the recipe's)"
_EPILOG = """\
The result opens without this project: pipeline("image-classification", model=FOLDER).
Small data: a step never takes more images than there are, and a recipe's own number of epochs is raised until the run
has 1,000 steps. The plan, printed before training, lists each change in a "note:".

precedence: defaults < the encoder's recipe < --config < command line. --label-fraction is --label_fraction.
"""


@dataclass(frozen=True, kw_only=True)
class FinetuneModelFlags:
    title: ClassVar = "model"

    model: str = flag(None, "folder or Hub id of a pre-trained encoder")
    mode: Literal["finetune", "linear", "partial"] = flag(
        "finetune",
        "what is trained: finetune, everything; partial, the last blocks and the head; linear, only the head",
        refused={
            "attentive": "transformers has no classifier with an attentive head, so nothing could open the result; "
            "run_evaluation.py measures an encoder with an attentive probe"
        },
    )
    num_trained_blocks: int = flag(4, "for --mode partial: number of trained blocks, counted from the head", COUNT)
    from_scratch: bool = flag(False, "the same architecture and recipe with random weights, for comparison")
    pooling: Literal["mean", "class"] = flag(
        None, "input of the head: the mean of the patches or the class token (default: the recipe's)"
    )
    image_size: int = flag(
        None, "side in pixels; position embeddings are resized to it (default: the encoder's)", COUNT
    )
    drop_path: float = flag(
        0.0,
        f"fraction of the images for which the last block is skipped; less in earlier blocks {_RECIPES}",
        BELOW_ONE,
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneDataFlags:
    title: ClassVar = "data"

    dataset: list[str] = flag(
        [],
        "a folder of class folders (with train/ beside val/ or test/, or without), a table or a Hub id with a column "
        "of labels, a folder of MNIST's idx files, or sample-fashion",
    )
    label_column: str | None = flag(
        None, "column with the classes, if the data is a table (default: found by type and name)"
    )
    label_fraction: float | None = flag(
        None, "train on this fraction of the labels of each class (default: all)", POSITIVE_UP_TO_ONE
    )
    labels_per_class: int | None = flag(None, "train on this number of labels of each class (default: all)", COUNT)
    validation_fraction: float | None = flag(
        None,
        "fraction of the training images used for validation if the data has no validation split (default: 0.1; 0 if "
        "it has a test split and only some labels are used)",
        BELOW_ONE,
    )
    max_bad_fraction: float = flag(
        0.05, "stop before training if more than this fraction of the images cannot be read", FRACTION
    )
    class_weights: Literal["none", "balanced"] = flag(
        "none", "none, or balanced: an image of a rare class has a larger weight"
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneViewFlags:
    title: ClassVar = "views of an image"

    crop_scale: tuple[float, float] = flag(
        None, "smallest and largest fraction of an image that a training crop shows (default: the recipe's)", SCALE
    )
    interpolation: Literal["bicubic", "bilinear"] = flag("bicubic", f"filter that resizes crops {_RECIPES}")
    eval_crop_share: float = flag(
        None,
        "side of the central crop at evaluation, as a fraction of the resized short side (default: as published, "
        "0.875 up to 224 pixels for MAE, below 384 for BEiT and always for SimMIM, else 1)",
        POSITIVE_UP_TO_ONE,
    )
    rand_augment: float = flag(
        0.0,
        f"strength of RandAugment, up to 10; 0: off {_RECIPES}",
        Range(lambda x: 0 <= x <= 10, "0 (off) to 10"),
    )
    mixup: float = flag(
        0.0, f"parameter of the Beta distribution that blends two images; 0: off {_RECIPES}", NOT_NEGATIVE
    )
    cutmix: float = flag(
        0.0, f"parameter of the Beta distribution of the size of a pasted box; 0: off {_RECIPES}", NOT_NEGATIVE
    )
    erasing: float = flag(0.0, f"probability that a box of an image is replaced by noise {_RECIPES}", FRACTION)


@dataclass(frozen=True, kw_only=True)
class FinetuneRateFlags:
    title: ClassVar = "optimization"

    layer_decay: float = flag(
        1.0,
        f"the learning rate of each layer is this fraction of that of the layer above; 1: the same for all {_RECIPES}",
        POSITIVE_UP_TO_ONE,
    )
    ema_decay: float = flag(
        0.0, "decay of the average of the weights that is evaluated and saved; 0: no average", BELOW_ONE
    )
    early_stopping_patience: int | None = flag(
        None, "stop after this number of evaluations without improvement (default: off)", COUNT
    )


@dataclass(frozen=True)
class EncoderFacts:
    """What the settings of a fine-tuning depend on: the encoder's published recipe, its sizes and abilities.

    Args:
        poolings: Possible inputs of a classification head, the preferred one first.
        largest_with_margin: Largest image side in pixels that is evaluated on a central crop of a larger image.
    """

    recipe: str
    image_size: tuple[int, int]
    poolings: tuple[str, ...]
    has_drop_path: bool
    largest_with_margin: float


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(FinetuneModelFlags, FinetuneDataFlags, FinetuneViewFlags, FinetuneRateFlags, TrainingSettings):
    """Settings of a fine-tuning."""

    output_dir: str | None = flag(help="where all files go (default: outputs/<model>-<mode>-<data>)")
    per_device_train_batch_size: int = flag(
        help="images per device and forward pass (default: 64 on a GPU, 32 on a CPU)", within=COUNT
    )
    prediction_loss_only: bool = flag(False)
    label_smoothing_factor: float = flag(
        help="fraction of the target that is spread over all classes (default: the recipe's)", within=BELOW_ONE
    )
    load_best_model_at_end: bool = flag(True, "keep the weights of the evaluation with the best metric_for_best_model")
    metric_for_best_model: str = flag(
        "accuracy", "accuracy, balanced_accuracy, macro_f1, top5_accuracy, loss or calibration_error"
    )
    push_to_hub: bool = flag(help="upload the finished classifier to --hub_model_id")
    hub_strategy: HubStrategy = flag(help="only end: nothing is uploaded before the run has finished (default: end)")

    program: ClassVar = {
        "prog": "run_finetune.py",
        "usage": "accelerate launch run_finetune.py --model ENCODER --dataset LABELED [--flag value ...]",
        "description": "Fine-tune a pre-trained encoder on labeled images.",
        "epilog": _EPILOG,
    }

    def default_output_dir(self) -> str:
        start = "-scratch" if self.from_scratch else ""
        return f"outputs/{Path(self.model).name}-{self.mode}{start}-{data_name(self.dataset)}"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_fraction is not None and self.labels_per_class is not None:
            raise SettingsError("--label_fraction and --labels_per_class both set the number of labels; give one")


def load_finetune_settings(argv: Sequence[str], open_encoder: Callable[[str], EncoderFacts]) -> FinetuneSettings:
    """Resolve the settings of a fine-tuning; `open_encoder` takes the value of --model.

    Raises:
        SettingsError: An unknown flag, an invalid value, no such recipe, or neither model nor data given.
    """
    command_line = CommandLine(FinetuneSettings, argv)
    command_line.require(model="the pre-trained encoder", dataset="the labeled images")
    chosen = command_line.chosen
    encoder = open_encoder(chosen["model"])
    recipe = "finetune_linear" if chosen["mode"] == "linear" else encoder.recipe
    lower = {Origin.METHOD: command_line.read_recipe(RECIPES / f"{recipe}.yaml")}
    return command_line.resolve(lower, lambda values, origins: _values_for(encoder, values, origins))


def _values_for(encoder: EncoderFacts, values: Mapping[str, Any], origins: Mapping[str, Origin]) -> Mapping[str, Any]:
    """Return the settings that follow from the encoder.

    Raises:
        SettingsError: The encoder's images are not square.
    """
    height, width = encoder.image_size
    if values["image_size"] is None and height != width:
        raise SettingsError(
            f"--model {values['model']} is for images of {height} x {width} pixels, and classifiers of transformers "
            "are for square ones: give --image_size with one side"
        )
    size, pooling, possible = values["image_size"] or height, values["pooling"], encoder.poolings
    # A recipe's value gives way to what is possible; the user's is refused later if it is impossible.
    is_users = {name: origins[name] >= Origin.CONFIG for name in ("pooling", "drop_path")}
    return {
        "image_size": size,
        "eval_crop_share": values["eval_crop_share"] or (CROP_SHARE if size <= encoder.largest_with_margin else 1.0),
        "pooling": pooling if is_users["pooling"] or pooling in possible else next(iter(possible), pooling),
        "drop_path": values["drop_path"] if encoder.has_drop_path or is_users["drop_path"] else 0.0,
    }

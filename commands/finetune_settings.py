"""Settings of `run_finetune.py` that all tasks share; the settings class of a task adds its own.

From lowest to highest: defaults, the recipe of the task for the encoder and the mode, the recipe of --config, the
command line.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from transformers import PreTrainedConfig
from transformers.trainer_utils import HubStrategy

from commands.channels import ChannelFlags, measured_of
from commands.flags import BELOW_ONE, COUNT, POSITIVE_UP_TO_ONE, SCALE, DataFlags, flag
from commands.settings import RECIPES, CommandLine, Origin, SettingsError, TrainingSettings, chosen_among, data_name
from data.measured import Measured
from modeling.patches import height_and_width

_TASKS = sorted(file.stem for file in (RECIPES.parent / "tasks").glob("*.py"))
_TASK_NAMES = tuple(name for name in _TASKS if name not in ("__init__", "base"))
_DEFAULT_TASK = "classification"
_RECIPES = "(default: the recipe's)"
_EPILOG = """\
Flags of a task: --task NAME --help.
Small data: with --schedule auto, epochs, rates and views follow the number of labels. The plan, printed before
training, gives the reasons in lines that start with "note:". A step never takes more images than there are.

precedence: defaults < the encoder's recipe < --config < command line. --label-fraction is --label_fraction.
"""


@dataclass(frozen=True, kw_only=True)
class FinetuneModelFlags:
    title: ClassVar = "model"

    task: str = flag(_DEFAULT_TASK, "what the labels are: one of the files in tasks/", choices=_TASK_NAMES)
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
    image_size: int = flag(
        None, "side in pixels; position embeddings are resized to it (default: the encoder's)", COUNT
    )
    drop_path: float = flag(
        0.0,
        f"fraction of the images for which the last block is skipped; less in earlier blocks {_RECIPES}",
        BELOW_ONE,
    )


@dataclass(frozen=True, kw_only=True)
class FinetuneDataFlags(DataFlags):
    dataset: list[str] = flag([], "labeled images")


@dataclass(frozen=True, kw_only=True)
class FinetuneViewFlags:
    title: ClassVar = "views of an image"

    crop_scale: tuple[float, float] = flag(
        None, "smallest and largest fraction of an image that a training crop shows (default: the recipe's)", SCALE
    )
    interpolation: Literal["bicubic", "bilinear"] = flag("bicubic", f"filter that resizes crops {_RECIPES}")


@dataclass(frozen=True, kw_only=True)
class FinetuneRateFlags:
    title: ClassVar = "optimization"

    schedule: Literal["auto", "published"] = flag(
        "auto",
        "auto: below 100,000 labels, rates, epochs and views follow rules for few labels (docs/small-data.md), unless "
        "given, and the head starts as a logistic regression on frozen features; with masks or boxes only the rate "
        "does; published: always the recipe's",
    )
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


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(
    FinetuneModelFlags, FinetuneDataFlags, ChannelFlags, FinetuneViewFlags, FinetuneRateFlags, TrainingSettings
):
    """Base class of the settings of a fine-tuning task.

    Args:
        measured: How images are read for an encoder of measurements; None for photographs.
    """

    measured: Measured | None = None

    takes_measurements: ClassVar = False
    # What --schedule auto means, see commands/few_labels.py: the learning rate follows the batch by which the recipes
    # are published; and with True, epochs, views and the head follow rules too.
    published_batch: ClassVar[int | None] = None
    has_rules_for_few_labels: ClassVar = False

    output_dir: str | None = flag(help="where all files go (default: outputs/<model>-<mode>-<data>)")
    per_device_train_batch_size: int | Literal["auto"] = flag(
        help="images per device and forward pass, or auto for the largest number that fits into its memory "
        "(default: 64 on a GPU, 32 on a CPU)",
        within=COUNT,
        words=("auto",),
    )
    prediction_loss_only: bool = flag(False)
    load_best_model_at_end: bool = flag(True, "keep the weights of the evaluation with the best metric_for_best_model")
    metric_for_best_model: str = flag("loss", "metric of the evaluation that chooses the best weights")
    push_to_hub: bool = flag(help="upload the finished model to --hub_model_id")
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

    @classmethod
    def recipe_for(cls, encoder_config: PreTrainedConfig, mode: str) -> str:
        """Return the name of the recipe for the encoder; raises ValueError if the task has no model for it."""
        raise NotImplementedError

    @classmethod
    def values_for(
        cls, encoder_config: Any, values: Mapping[str, Any], origins: Mapping[str, Origin]
    ) -> dict[str, Any]:
        """Return the settings that follow from the encoder, here its image size if none is given."""
        height, width = height_and_width(encoder_config.image_size)
        if values["image_size"] is None and height != width:
            raise SettingsError(
                f"--model {values['model']} is for images of {height} x {width} pixels, but fine-tuning needs square "
                "ones: give --image_size with one side"
            )
        return {"image_size": values["image_size"] or height}

    def as_recipe(self) -> dict[str, Any]:
        """As in the base class, without the default task."""
        return {name: value for name, value in super().as_recipe().items() if (name, value) != ("task", _DEFAULT_TASK)}


def load_finetune_settings(
    argv: Sequence[str],
    settings_classes: Mapping[str, type[FinetuneSettings]],
    open_config: Callable[[str], PreTrainedConfig],
) -> FinetuneSettings:
    """Resolve the settings of a fine-tuning; raises SettingsError if they are invalid.

    Args:
        settings_classes: The settings class of each task.
        open_config: Called with the value of --model; returns the encoder's config.
    """
    command_line = CommandLine(settings_classes[chosen_task(argv)], argv)
    chosen, settings_class = command_line.chosen, command_line.settings_class
    command_line.require(model="the pre-trained encoder", dataset="the labeled images")
    config = open_config(chosen.model)
    recipe = RECIPES / f"{settings_class.recipe_for(config, chosen.mode)}.yaml"
    lower = {Origin.METHOD: command_line.read_recipe(recipe)}
    measured = None
    if getattr(config, "mim_value_range", None) is not None:
        if not settings_class.takes_measurements:
            raise SettingsError(
                f"--task {chosen.task} is for photographs, but the encoder of --model {chosen.model} takes "
                f"measurements of {config.num_channels} channels"
            )
        measured = measured_of(chosen, config.num_channels)
    elif chosen.channel_files:
        raise SettingsError(
            f"--channel_files has no effect: the encoder of --model {chosen.model} takes photographs; leave it out"
        )
    return command_line.resolve(
        lower, lambda values, origins: settings_class.values_for(config, values, origins), measured=measured
    )


def chosen_task(argv: Sequence[str]) -> str:
    """Return the task that the command line or its recipe names, before the flags of the task are known."""
    return chosen_among(argv, "task", _TASK_NAMES, _DEFAULT_TASK)

"""Settings of `run_pretraining.py`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from commands.channels import MeasurementFlags, channels_and_stats, check_measurements, measured_run
from commands.flags import (
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_UP_TO_ONE,
    RATIO,
    RISING,
    SIDES,
    CachedImageFlags,
    RunFlags,
    flag,
    method_flags,
)
from commands.presets import ENCODER_SIZES, METHOD_SIZES, mask_unit_of
from commands.settings import RECIPES, CommandLine, Layer, Origin, SettingsError, TrainingSettings, data_name, label_of
from commands.text_flags import TextFlags
from data.masks import MASK_STRATEGIES
from data.measured import Measured
from hub.export.native import PRETRAINING
from hub.init_from import StartingModel
from modeling import MODELS

HOG = "hog"  # in place of a teacher


def _methods_with(targets: str) -> str:
    return ", ".join(name for name, model in MODELS.items() if model.targets == targets)


_EPILOG = """\
small data: --schedule auto chooses batch, learning rate, warm-up and length by the number of images and the size of
the model, and the plan, printed before training, gives the reasons in lines that start with "note:". Settings that you
give are changed only where they are impossible: a step never takes more images than there are.

precedence: defaults < recipes/<method>.yaml < --config < command line. --mask-ratio is --mask_ratio.
"""


@dataclass(frozen=True, kw_only=True)
class ModelFlags:
    title: ClassVar = "model"

    model: str = flag(
        "vit-base",
        "size of the encoder, from vit-nano to vit-huge or from swin-nano to swin-large (default: vit-base; with "
        "--time_budget, for methods without --tokenizer and --teacher, the largest that sees enough images in it)",
        choices=ENCODER_SIZES,
        otherwise="to start from trained weights, use --init_from",
    )
    method: str = flag("mae", "pre-training method; its published settings are in recipes/<method>.yaml")
    image_size: tuple[int, int] = flag(None, "one side, or height and width, in pixels (default: the model's)", SIDES)
    image_size_schedule: list[int] | None = flag(
        None,
        "sides in pixels of the training images, in stages of equally many steps; the last one is --image_size, at "
        "which the encoder is evaluated and exported. Images per step stay the same (not for every method)",
        RISING,
    )
    patch_size: int = flag(None, "side of a patch in pixels (default: the model's)", COUNT)
    num_channels: int = flag(3, "3: color, 1: gray; others: measurements (default: 3, or by --channel_files)", COUNT)
    init_from: str | None = flag(
        None,
        "folder or Hub id of a trained encoder, or of a complete model of this project, to start from; its sizes "
        "replace those of --model",
    )
    repair_positions: bool = flag(
        False, "fill the position embeddings of a ViTMAE with sines and cosines if they are all zero"
    )


@dataclass(frozen=True, kw_only=True)
class PretrainingDataFlags(CachedImageFlags):
    streaming: bool = flag(
        False,
        "read a Hub data set or shards from beginning to end, without an index, if they are too large for one; with "
        "--max_steps",
    )
    eval_dataset: list[str] | None = flag(
        None,
        "labeled images (folder of class folders, Hub id, 'sample-fashion') on which kNN, a linear probe and RankMe "
        "of the frozen encoder are measured every eval_steps",
    )
    eval_label_column: str | None = flag(
        None, "column with the classes of --eval_dataset, if it is a table (default: found by type and name)"
    )
    image_stats: Literal["preset", "auto", "source"] = flag(
        None,
        "standardize with the mean and standard deviation of ImageNet (preset), of these images (auto), or of "
        "--init_from (source) (default: source if it has them, else preset for color, auto for gray)",
    )
    repeated_aug: int = flag(
        1,
        "crops of each decoded image, all in one batch if they fit; each counts as an image, so that an epoch has as "
        "many times more steps",
        COUNT,
    )
    interpolation: Literal["bicubic", "bilinear"] = flag(
        "bicubic", "filter that resizes crops (default: the recipe's)"
    )
    color_jitter: float = flag(
        0.0, "change brightness, contrast and saturation by up to this fraction (default: the recipe's)"
    )
    tokenizer: str | None = flag(
        None,
        f"for {_methods_with('tokenizer')}: folder or Hub id of the image tokenizer whose tokens are predicted",
    )
    trust_remote_code: bool = flag(False, "run the Python files that --tokenizer brings; read them first")
    teacher: str | None = flag(
        None,
        f"for {_methods_with('teacher')}: folder or Hub id of the frozen encoder whose features are predicted, or "
        f"'{HOG}' for histograms of oriented gradients (MaskFeat)",
    )
    teacher_image_size: tuple[int, int] | None = flag(
        None,
        "one side, or height and width, of the images that the teacher sees; smaller ones cost less (default: the "
        "teacher's own; for a convolutional network at most twice --image_size)",
        SIDES,
    )
    cache_tokens: bool = flag(
        False,
        "compute the tokens of --tokenizer, or the features of --teacher, of every image once, before training. Each "
        "image is then its central crop, never mirrored: for images that have the right size already",
    )


@dataclass(frozen=True, kw_only=True)
class MaskFlags:
    title: ClassVar = "masks"

    mask_ratio: float | tuple[float, float] = flag(
        None,
        "fraction of the patches that is masked, or lowest and highest to draw it from (default: the recipe's)",
        RATIO,
    )
    mask_strategy: str = flag(None, "which patches are masked (default: the recipe's)", choices=MASK_STRATEGIES)
    mask_unit: int = flag(None, "side in pixels of the squares that 'random-unit' masks (default: a patch)", COUNT)
    prediction_ratio: float = flag(
        1.0,
        "fraction of the masked patches that the decoder predicts, for methods whose encoder "
        "sees visible patches only; CrossMAE's 0.25 of all patches is 0.33 of those that a ratio of 0.75 masks",
        POSITIVE_UP_TO_ONE,
    )
    num_masks: int = flag(
        1,
        "masks per image, for the same methods: an image is decoded once and trained on with several masks; images "
        "per step and learning rate count images",
        COUNT,
    )


@dataclass(frozen=True, kw_only=True)
class PretrainingRunFlags(RunFlags):
    lr_drop_epoch: float | None = flag(
        None,
        "from this epoch on a tenth of the learning rate; with --lr_scheduler_type constant_with_warmup",
        POSITIVE,
    )
    advise: bool = flag(
        False,
        "look at the images and the hardware, print the two or three commands that are worth running, and stop; with "
        "--dataset, --time_budget, --num_channels and --use_cpu",
    )
    schedule: Literal["auto", "published"] = flag(
        "auto",
        "auto: below 100,000 images, or a batch below an eighth of the published one, learning rate, warm-up, length, "
        "batch (on a CPU) and drop path follow rules for few images (docs/small-data.md), unless given; published: "
        "always those of the recipe",
    )
    layer_decay: float = flag(
        1.0,
        "the learning rate of each layer of the encoder is this fraction of that of the layer above; for --init_from",
        POSITIVE_UP_TO_ONE,
    )
    head_warmup_epochs: float = flag(
        0.0,
        "first epochs, which train only what --init_from lacks, such as heads, on its encoder as it is; then the "
        "learning rate rises anew, and all is trained",
        NOT_NEGATIVE,
    )
    stop_on_collapse: bool = flag(
        True,
        "for methods with a teacher: stop when three evaluations in a row over 500 steps show that the features "
        "collapsed",
    )


@dataclass(frozen=True, kw_only=True)
class PretrainingSettings(
    ModelFlags, PretrainingDataFlags, MeasurementFlags, TextFlags, MaskFlags, PretrainingRunFlags, TrainingSettings
):
    """Settings of a pre-training run.

    Args:
        mask_unit: Side in patches of the squares that 'random-unit' masks; the flag counts pixels.
        method_settings: Keyword arguments of the method's config, next to `encoder_config`.
        start: The model that the run starts from.
    """

    method_settings: Mapping[str, Any]
    start: StartingModel | None

    uploads_at_saves: ClassVar = True
    program: ClassVar = {
        "prog": "run_pretraining.py",
        "usage": "accelerate launch run_pretraining.py [--flag value ...]",
        "description": "Pre-train an image encoder on unlabeled images by masked image modeling.",
        "epilog": _EPILOG,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.is_users("mask_unit") and self.mask_strategy != "random-unit":
            raise SettingsError(
                f"--mask_unit has no effect with --mask_strategy {self.mask_strategy}: use random-unit, or omit it"
            )
        if self.image_size_schedule and self.seconds is not None:
            raise SettingsError(
                "--time_budget needs steps that take the same time: leave out --image_size_schedule, or give "
                "--max_steps instead"
            )
        if self.image_size_schedule:
            self._check_schedule(self.image_size_schedule)
        if self.eval_label_column and not self.eval_dataset:
            raise SettingsError("--eval_label_column has no effect without --eval_dataset")
        changing = [name for name in ("crop_scale", "color_jitter") if self.is_users(name) and self.values[name]]
        if self.cache_tokens and changing:
            raise SettingsError(
                f"--cache_tokens keeps the targets of each image's central crop: leave out --{changing[0]}, which "
                "would show another crop every time"
            )
        if self.cache_tokens and self.repeated_aug > 1:
            raise SettingsError("--cache_tokens shows one crop of each image: leave out --repeated_aug")
        if self.cache_tokens and self.cache:
            raise SettingsError("--cache_tokens is for images that have the right size already: leave out --cache")
        if self.lr_drop_epoch is not None and self.lr_scheduler_type != "constant_with_warmup":
            raise SettingsError(
                f"--lr_drop_epoch needs --lr_scheduler_type constant_with_warmup, not {self.lr_scheduler_type}"
            )
        if self.image_stats == "preset" and self.num_channels != 3:
            raise SettingsError(
                "--image_stats is preset, expected auto for gray images: the statistics of ImageNet have three colors"
            )
        if self.is_users("weight_decay") and "weight_decay_end" in self.method_settings:
            raise SettingsError(
                f"--weight_decay has no effect with {self.method}, where it rises: give --weight_decay_start and "
                "--weight_decay_end"
            )
        if self.streaming:
            self._check_streaming()
        self._check_against_start()
        check_measurements(self, None if self.teacher == HOG else MODELS[self.method].targets)

    @property
    def measured(self) -> Measured | None:
        """How images are read whose values are measurements; None for photographs, which become 8 bits."""
        return measured_run(self)

    def _check_streaming(self) -> None:
        if not self.counts("max_steps"):
            raise SettingsError("--streaming needs --max_steps: the length of a stream is not known")
        for name in ("cache", "cache_tokens", "image_size_schedule", "pair_dataset", "text_dataset", "repeated_aug"):
            if self.values.get(name) not in (None, False, 1):
                raise SettingsError(f"--{name} needs all images at hand: leave it out, or leave out --streaming")

    @property
    def crops_per_image(self) -> int:  # type: ignore[override]
        return self.repeated_aug

    def _check_against_start(self) -> None:
        """Check that the weights to start from have these sizes, and that each setting has an effect."""
        start, name = self.start, self.init_from
        if start is None:
            if self.method_settings.get("gram_weight"):
                raise SettingsError(
                    "--gram_weight needs --init_from, the encoder whose similarities between patches are kept; give "
                    "it, or leave out --gram_weight"
                )
            if self.is_users("head_warmup_epochs") and self.head_warmup_epochs:
                raise SettingsError(
                    "--head_warmup_epochs has no effect without --init_from: there is no encoder yet; leave it out"
                )
            if self.repair_positions:
                raise SettingsError("--repair_positions has no effect without --init_from; leave it out")
            if self.image_stats == "source":
                raise SettingsError("--image_stats source needs --init_from; use preset or auto")
            return
        if self.image_stats == "source" and not start.image_stats:
            raise SettingsError(
                f"--image_stats source: {name} has no preprocessor_config.json with image_mean and image_std; "
                "use preset or auto"
            )
        for setting, required in sorted(start.fixed.items()):
            if setting == "num_channels" and self.channel_init is not None:
                continue
            if self.values[setting] != required and (self.is_users(setting) or setting == "num_channels"):
                hint = ", or adapt them with --channel_init" if setting == "num_channels" else ""
                raise SettingsError(
                    f"--{setting} {self.values[setting]} contradicts --init_from {name}, whose weights require "
                    f"{required}; leave it out{hint}"
                )
        if self.is_users("model"):
            for size, wanted in ENCODER_SIZES[self.model].items():
                if size not in (*start.defaults, *start.fixed, "model_type") and start.encoder.get(size) != wanted:
                    raise SettingsError(
                        f"--model {self.model} contradicts --init_from {name}: {size} is {wanted} instead of "
                        f"{start.encoder.get(size)}; leave --model out"
                    )

    def _check_schedule(self, sides: Sequence[int]) -> None:
        unit = self.patch_size * self.mask_unit
        shown = " ".join(map(str, sides))
        if any(side % unit for side in sides):
            raise SettingsError(
                f"--image_size_schedule is {shown}, expected multiples of {unit}: patch times mask unit"
            )
        if self.image_size != (sides[-1], sides[-1]):
            height, width = self.image_size
            raise SettingsError(
                f"--image_size_schedule ends at {sides[-1]}, but the model has images of {height} x {width} pixels: "
                f"add --image_size {sides[-1]}, or end at the model's size"
            )
        if not self.dataloader_drop_last:
            raise SettingsError("--image_size_schedule needs --dataloader_drop_last: a batch has images of one size")

    @classmethod
    def typed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        typed = super().typed(values)
        if values["mask_strategy"] != "random-unit":
            return {**typed, "mask_unit": 1}
        patch_size, (height, width) = values["patch_size"], typed["image_size"]
        unit = values["mask_unit"] or patch_size
        if height % unit or width % unit or unit % patch_size:
            fitting = [n for n in range(patch_size, min(height, width), patch_size) if not (height % n or width % n)]
            raise SettingsError(
                f"--mask_unit is {unit} pixels, expected a multiple of the patch of {patch_size} that divides "
                f"{height} x {width}: {', '.join(map(str, fitting)) or 'there is none'}"
            )
        return {**typed, "mask_unit": unit // patch_size}

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; the model checks that the sides divide."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def fits_encoder(self) -> bool:
        """Whether the size of the encoder is chosen by --time_budget: none is given, and no target depends on it."""
        return (
            self.init_from is None
            and self.seconds is not None
            and self.schedule == "auto"
            and not self.is_users("model")
            and MODELS[self.method].targets is None
        )

    def default_output_dir(self) -> str:
        model = "" if self.fits_encoder else f"{self.model}-"  # known only when the images are
        return f"outputs/{model}{self.method}-{data_name(self.dataset)}"

    def encoder_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of the encoder's native config."""
        own = {name: self.values[name] for name in ("image_size", "patch_size", "num_channels")}
        return {**(ENCODER_SIZES[self.model] if self.start is None else self.start.encoder), **own}

    def as_recipe(self) -> dict[str, Any]:
        """Return a flat recipe of everything that matters; what is left out has the default of transformers."""
        recipe = super().as_recipe()
        if self.start is not None:  # the model is only a name then
            del recipe["model"]
        return recipe


def load_pretraining_settings(
    argv: Sequence[str],
    configs: Mapping[str, Any],
    open_start: Callable[[PretrainingSettings], StartingModel] | None = None,
    fitting: Mapping[str, Any] = MappingProxyType({}),
) -> PretrainingSettings:
    """Resolve the settings of a pre-training run; raises SettingsError if they are invalid.

    Args:
        configs: Config class of each method.
        open_start: Opens what --init_from names; called with `CommandLine.chosen`.
        fitting: Model, image size and patch size where none are given, see `PretrainingSettings.fits_encoder`.
    """
    command_line = CommandLine(PretrainingSettings, argv, configs)
    chosen, method_defaults = command_line.chosen, command_line.method_defaults
    model, method = fitting.get("model", chosen.model), chosen.method
    recipe = RECIPES / f"{method}.yaml"
    if not recipe.is_file():
        raise SettingsError(f"method {method} has no {label_of(recipe)} with its published settings; write one")
    start, given = None, {}
    if chosen.init_from is None:
        families = configs[method].encoder_families
        if model.split("-")[0] not in families:
            possible = [name for name in ENCODER_SIZES if name.split("-")[0] in families]
            raise SettingsError(f"--method {method} cannot train {model}; it trains {', '.join(possible)}")
        preset = {name: ENCODER_SIZES[model][name] for name in ("image_size", "patch_size")}
        preset |= {name: size for name, size in METHOD_SIZES.get(model, {}).items() if name in method_defaults}
        preset |= fitting
    else:
        assert open_start is not None, "this command has no --init_from"
        path = Path(chosen.init_from).resolve()
        name = path.parent.name if path.name == PRETRAINING else path.name
        model = command_line.users.get("model", name)
        object.__setattr__(chosen, "model", model)
        start, preset = open_start(chosen), {}
        given = {"model": model, **start.fixed, **start.defaults}
    lower: dict[Origin, Layer] = {
        Origin.PRESET: (f"fits --time_budget {chosen.time_budget}" if fitting else f"size of {model}", preset),
        Origin.METHOD: command_line.read_recipe(recipe),
        Origin.SOURCE: (f"of {chosen.init_from}", given),
    }
    settings_of = {name: method_flags(config_class) for name, config_class in configs.items()}
    for label, layer in (*lower.values(), command_line.config, ("command line", command_line.given)):
        for name in layer:
            owners = [owner for owner, settings in settings_of.items() if name in settings]
            if owners and method not in owners:
                raise SettingsError(
                    f"{label}: {name} is a setting of {', '.join(owners)}, not of {method}, which has: "
                    f"{', '.join(settings_of[method]) or 'none of its own'}"
                )

    settings = command_line.resolve(lower, partial(_derived, start), start=start)
    chosen_unit, published = settings.values["mask_unit"], lower[Origin.METHOD][1].get("mask_unit")
    if settings.is_users("mask_unit") or chosen_unit == published:
        return settings
    return settings.derived(Origin.RULE, "schedule auto", mask_unit=chosen_unit)


def _derived(start: StartingModel | None, values: Mapping[str, Any], origins: Mapping[str, Origin]) -> dict[str, Any]:
    """Return the values that follow from others: of the channels, and of the size of the image."""
    found = channels_and_stats(start, values, origins)
    encoder = ENCODER_SIZES[values["model"]] if start is None else start.encoder
    is_rule = values["schedule"] == "auto" and origins["mask_unit"] == Origin.METHOD
    if is_rule and encoder.get("model_type") != "swin":  # of which a token has the published unit's size
        sides = values["image_size"]
        sides = sides if isinstance(sides, Sequence) else [sides]
        found["mask_unit"] = mask_unit_of(sides, values["patch_size"], values["mask_unit"])
    return found

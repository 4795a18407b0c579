"""From the command line to one resolved set of settings, each with the place that it comes from.

Lowest first: defaults, the model preset's sizes, recipes/<method>.yaml, what --init_from brings, the recipe of
--config, the command line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import IntEnum
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from commands.flags import OUR_GROUPS, RANGES, TRAINING_DEFAULTS, method_flags
from commands.parsing import SettingsError, as_argv, build_parser, nearest, parse
from commands.presets import ENCODER_SIZES, METHOD_SIZES
from commands.starting_point import OpenStart, StartingPoint, check_against_start, short_name

__all__ = ["RECIPES", "Origin", "Settings", "SettingsError", "load_settings"]

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
# Belong to one start of the program, or are secret: not part of what a recipe says.
_NOT_IN_A_RECIPE = frozenset(
    {"config", "resume", "overwrite", "dry_run", "debug", "hub_token", "output_dir", "resume_from_checkpoint"}
)
# The same thing said in two ways; the first is the one that counts if both come from the same place.
_ALTERNATIVES = {
    "learning_rate": "base_learning_rate",
    "warmup_steps": "warmup_epochs",
    "max_steps": "num_train_epochs",
}
_OF_THE_METHOD = ("mask_ratio", "mask_strategy", "crop_scale", "base_learning_rate", "warmup_epochs")


class Origin(IntEnum):
    """Where a value comes from; the larger wins."""

    DEFAULT = 0
    PRESET = 1
    METHOD = 2
    SOURCE = 3
    CONFIG = 4
    COMMAND_LINE = 5


@dataclass(frozen=True)
class Settings:
    """Every setting by flag name. `head_names` are those of the method's own config, `start` what it begins from.

    `mask_ratio` is a number or a list [lowest, highest], `image_size` a number or a list [height, width].
    """

    values: Mapping[str, Any]
    origins: Mapping[str, Origin]
    labels: Mapping[Origin, str]
    method_names: tuple[str, ...]
    start: StartingPoint | None = None

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def is_given(self, name: str) -> bool:
        """By a recipe, by what the run begins from, or on the command line."""
        return self.origins[name] >= Origin.METHOD

    def is_users(self, name: str) -> bool:
        """By the user's own recipe or on the command line."""
        return self.origins[name] >= Origin.CONFIG

    def is_on_command_line(self, name: str) -> bool:
        return self.origins[name] == Origin.COMMAND_LINE

    def counts(self, name: str) -> bool:
        """Whether this way to say it was given nearer to the command line than the other (`_ALTERNATIVES`)."""
        is_off = name == "max_steps" and self[name] < 0
        return self.is_given(name) and not is_off and self.origins[name] >= self.origins[_ALTERNATIVES[name]]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        size = self["image_size"]
        return (size, size) if isinstance(size, int) else (size[0], size[1])

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches; the head checks that the sides divide."""
        height, width = self.image_size
        return height // self["patch_size"], width // self["patch_size"]

    @property
    def mask_unit(self) -> int:
        """Side in patches of the squares that 'random-unit' hides; the flag counts pixels."""
        if self["mask_strategy"] != "random-unit":
            return 1
        patch_size, (height, width) = self["patch_size"], self.image_size
        unit = self["mask_unit"] or patch_size
        if any(length % unit for length in (height, width)) or unit % patch_size:
            fitting = [n for n in range(patch_size, min(height, width), patch_size) if not (height % n or width % n)]
            raise SettingsError(
                f"--mask_unit is {unit} pixels, expected a multiple of the patch of {patch_size} that divides "
                f"{height} x {width}: {', '.join(map(str, fitting)) or 'there is none'}"
            )
        return unit // patch_size

    @property
    def mask_ratio(self) -> float | tuple[float, float]:
        ratio = self["mask_ratio"]
        return (ratio[0], ratio[1]) if isinstance(ratio, list) else ratio

    @property
    def shows_tracebacks(self) -> bool:
        return self.origins["debug"] > Origin.DEFAULT

    def encoder_settings(self) -> dict[str, Any]:
        """Keyword arguments of the encoder's native config."""
        own = {name: self[name] for name in ("image_size", "patch_size", "num_channels")}
        return {**(ENCODER_SIZES[self["model"]] if self.start is None else self.start.encoder), **own}

    def method_settings(self) -> dict[str, Any]:
        """Keyword arguments of the head's config, next to `encoder_config`."""
        return {name: self[name] for name in self.method_names}

    def training_arguments(self) -> dict[str, Any]:
        """Keyword arguments of TrainingArguments, as far as they differ from transformers' defaults."""
        return {name: self[name] for name in _training_names() if self.is_given(name) or name in TRAINING_DEFAULTS}

    def as_recipe(self) -> dict[str, Any]:
        """A flat recipe with all that counts; what is left out has transformers' default."""
        left_out = _NOT_IN_A_RECIPE | {b if self.counts(a) else a for a, b in _ALTERNATIVES.items()}
        left_out |= set(_training_names()) - set(self.training_arguments())
        left_out |= {"model"} if self.start is not None else set()  # then it is but a name
        return {n: value for n, value in self.values.items() if n not in left_out and value is not None}

    def describe(self) -> str:
        """A line for each setting that a preset, a recipe or the user gave: name, value, origin."""
        names = [name for name in self.values if self.origins[name] > Origin.DEFAULT]
        rows = [(name, _shown(name, self[name]), self.labels[self.origins[name]]) for name in names]
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        return "\n".join(f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for name, value, origin in rows)


@dataclass(frozen=True)
class UsersLayers:
    """What the user says: the recipe of --config and the command line, which wins."""

    config: Mapping[str, Any]
    given: Mapping[str, Any]
    config_label: str

    @classmethod
    def read(cls, parser: Any, argv: Sequence[str]) -> "UsersLayers":
        given = parse(parser, argv)
        if "config" not in given:
            return cls({}, given, "")
        file = find_recipe(given["config"])
        return cls(read_recipe(parser, file), given, label_of(file))

    @property
    def values(self) -> dict[str, Any]:
        return {**self.config, **self.given}

    def over(self, layers: Mapping[Origin, Mapping[str, Any]]) -> dict[Origin, Mapping[str, Any]]:
        return {**layers, Origin.CONFIG: self.config, Origin.COMMAND_LINE: self.given}

    def labels(self, labels: Mapping[Origin, str]) -> dict[Origin, str]:
        """With those of the user's layers and of the defaults."""
        own = {Origin.CONFIG: self.config_label, Origin.COMMAND_LINE: "command line"}
        return {Origin.DEFAULT: "default", **labels, **own}


def load_settings(argv: Sequence[str], heads: Mapping[str, type], open_start: OpenStart | None = None) -> Settings:
    """Resolve the settings of a run. `heads`: method -> class of its head's config; `open_start` for --init_from.

    Raises:
        SettingsError: an unknown flag or method, a value that cannot be, or no such recipe.
    """
    parser = build_parser(heads)
    users = UsersLayers.read(parser, argv)
    chosen = {**_our_defaults(), **users.values}
    method, head_defaults = chosen["method"], method_flags(heads[chosen["method"]])
    method_file = RECIPES / f"{method}.yaml"
    if not method_file.is_file():
        raise SettingsError(f"method {method} has no {label_of(method_file)} with its published settings; write one")
    start = None
    if chosen["init_from"] is None:
        _refuse_encoder(chosen["model"], method, heads)
        preset = _preset_sizes(chosen["model"], head_defaults)
    else:
        assert open_start is not None, "this command has no --init_from"
        chosen["model"] = users.values.get("model", short_name(chosen["init_from"]))
        start, preset = open_start(chosen), {}
    layers = users.over(
        {
            Origin.DEFAULT: {**_our_defaults(), **head_defaults, **training_defaults()},
            Origin.PRESET: preset,
            Origin.METHOD: read_recipe(parser, method_file),
            Origin.SOURCE: {"model": chosen["model"], **start.fixed, **start.defaults} if start else {},
        }
    )
    labels = users.labels(
        {
            Origin.PRESET: f"size of {chosen['model']}",
            Origin.METHOD: label_of(method_file),
            Origin.SOURCE: f"of {chosen['init_from']}",
        }
    )
    for origin, layer in layers.items():
        _refuse_other_methods_settings(layer, method, heads, labels[origin])
    values, origins = merged(layers)
    _refuse_without_effect(values, origins)
    check_against_start(values, {name for name, origin in origins.items() if origin >= Origin.CONFIG}, start)
    missing = [name for name in _OF_THE_METHOD if values[name] is None]
    if missing:
        names = ", ".join(missing)
        raise SettingsError(f"{label_of(method_file)} must give every method's settings, and lacks {names}")
    return Settings(_checked(values), origins, labels, tuple(head_defaults), start)


def _our_defaults() -> dict[str, Any]:
    return {name: value for group in OUR_GROUPS for name, value in vars(group()).items()}


def _preset_sizes(model: str, head_defaults: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {name: ENCODER_SIZES[model][name] for name in ("image_size", "patch_size")}
    return sizes | {name: size for name, size in METHOD_SIZES.get(model, {}).items() if name in head_defaults}


def merged(layers: Mapping[Origin, Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Origin]]:
    """The values that win, lowest layer first, and where each comes from."""
    values: dict[str, Any] = {}
    origins: dict[str, Origin] = {}
    for origin, layer in layers.items():
        values |= layer
        origins |= dict.fromkeys(layer, origin)
    if origins["lr_scheduler_type"] > origins["lr_scheduler_kwargs"]:  # kwargs of a schedule that is not used
        values["lr_scheduler_kwargs"] = layers[Origin.DEFAULT]["lr_scheduler_kwargs"]
        origins["lr_scheduler_kwargs"] = Origin.DEFAULT
    return values, origins


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, tuple[Any, str]]) -> None:
    """Every number that is given lies where it can.

    Raises:
        SettingsError: one does not; the message has the flag, the value and what was expected.
    """
    for name in ranges.keys() & values.keys():
        is_possible, expected = ranges[name]
        numbers = values[name] if isinstance(values[name], list) else [values[name]]
        if values[name] is not None and not is_possible(numbers):
            raise SettingsError(f"--{name} is {' '.join(map(str, numbers))}, expected {expected}")


def training_defaults() -> dict[str, Any]:
    defaults = {}
    for argument in fields(TrainingArguments):
        if argument.init:
            factory = argument.default_factory
            defaults[argument.name] = argument.default if factory is MISSING else factory()
    return {**defaults, **TRAINING_DEFAULTS}


def _training_names() -> list[str]:
    return [argument.name for argument in fields(TrainingArguments) if argument.init]


def find_recipe(name: str) -> Path:
    """The file itself, or the one of this name among our recipes, with or without .yaml."""
    for path in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    close = nearest(Path(name).stem, known)
    hint = f"did you mean {close}? " if close else ""
    raise SettingsError(f"there is no recipe {name!r}; {hint}There are: {', '.join(known)}")


def read_recipe(parser: Any, path: Path) -> dict[str, Any]:
    label = label_of(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{label} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{label} holds no settings; a recipe has lines such as 'mask_ratio: 0.75'")
    if "config" in content:
        raise SettingsError(f"{label}: a recipe cannot name another one with config; copy its lines")
    return parse(parser, as_argv(parser, content, label), label)


class _UniqueKeys(yaml.SafeLoader):
    """YAML itself lets the last of two equal names win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(problem=f"{twice[0]} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def label_of(path: Path) -> str:
    return f"{RECIPES.name}/{path.name}" if path.resolve().parent == RECIPES else str(path)


def _refuse_other_methods_settings(
    layer: Mapping[str, Any], method: str, heads: Mapping[str, type], label: str
) -> None:
    own = method_flags(heads[method])
    for name in layer:
        owners = [other for other, config_class in heads.items() if name in method_flags(config_class)]
        if owners and method not in owners:
            raise SettingsError(
                f"{label}: {name} is a setting of {', '.join(owners)}, not of {method}, which has: "
                f"{', '.join(own) or 'none of its own'}"
            )


def _refuse_without_effect(values: Mapping[str, Any], origins: Mapping[str, Origin]) -> None:
    """What the user asks for and would not get, for a setting beside it."""
    if origins["mask_unit"] >= Origin.CONFIG and values["mask_strategy"] != "random-unit":
        raise SettingsError(
            f"--mask_unit has no effect with --mask_strategy {values['mask_strategy']}: use random-unit, or leave it"
        )
    if values["eval_label_column"] and not values["eval_dataset"]:
        raise SettingsError("--eval_label_column has no effect without --eval_dataset")
    if values["cache_tokens"]:
        changing = [name for name in ("crop_scale", "color_jitter") if origins[name] >= Origin.CONFIG and values[name]]
        if changing:
            raise SettingsError(
                f"--cache_tokens keeps the tokens of each image's central crop: leave out --{changing[0]}, which "
                "would show another crop every time"
            )
    refuse_hub_flags(values, origins)
    if values["lr_drop_epoch"] is not None and values["lr_scheduler_type"] != "constant_with_warmup":
        raise SettingsError(
            f"--lr_drop_epoch needs --lr_scheduler_type constant_with_warmup, not {values['lr_scheduler_type']}"
        )


def refuse_hub_flags(values: Mapping[str, Any], origins: Mapping[str, Origin]) -> None:
    if values["push_to_hub"] and not values["hub_model_id"]:
        raise SettingsError("--push_to_hub needs --hub_model_id organization/name (or user/name)")
    if values["hub_always_push"]:
        raise SettingsError("--hub_always_push: leave it out; every save is uploaded unless a newer one is there")
    flags = [name for name in values if name.startswith("hub_") and name != "hub_token"]
    given = [name for name in flags if origins[name] >= Origin.CONFIG]
    if given and not values["push_to_hub"]:
        raise SettingsError(f"--{given[0]} has no effect without --push_to_hub")


def _refuse_encoder(model: str, method: str, heads: Mapping[str, Any]) -> None:
    families = heads[method].encoder_families
    if model.split("-")[0] not in families:
        possible = [name for name in ENCODER_SIZES if name.split("-")[0] in families]
        raise SettingsError(f"--method {method} cannot train {model}; it trains {', '.join(possible)}")


def _checked(values: dict[str, Any]) -> dict[str, Any]:
    """With every number in its range, and lists of one number as that number."""
    check_ranges(values, RANGES)
    for name in ("image_size", "mask_ratio"):
        if isinstance(values[name], list) and len(values[name]) == 1:
            values[name] = values[name][0]
    if values["image_stats"] is None:  # ImageNet's are those of three colors
        values["image_stats"] = "preset" if values["num_channels"] == 3 else "auto"
    if values["image_stats"] == "preset" and values["num_channels"] != 3:
        raise SettingsError("--image_stats is preset, expected auto for gray images: ImageNet's has three colors")
    return values


def _shown(name: str, value: Any) -> str:
    if name == "hub_token":
        return "(secret)"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)

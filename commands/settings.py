"""Typed settings of a command, each with its origin, resolved from recipes and the command line.

From lowest to highest: defaults, the sizes of --model, the recipe of the method, what --init_from gives, the recipe
of --config, the command line.
"""

import argparse
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import Enum, IntEnum
from pathlib import Path
from types import MappingProxyType, NoneType
from typing import Any, ClassVar, Generic, Self, TypeVar, get_args, get_origin, get_type_hints

import yaml
from transformers import TrainingArguments
from transformers.trainer_utils import HubStrategy

from commands.flags import (
    SUCCESSORS,
    TRANSFORMERS_DEFAULT,
    DataFlags,
    RunFlags,
    TrainingFlags,
    default_of,
    flags_of,
    method_flags,
    tuple_in,
)
from commands.parsing import SettingsError, as_argv, make_parser, nearest, parse
from hub.card_rules import license_problem
from hub.push import check_repo_id

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
# These belong to one start of the program, or are secret: a recipe does not contain them.
_NOT_IN_A_RECIPE = frozenset(
    {
        *("config", "resume", "overwrite", "dry_run", "debug", "hub_token", "output_dir", "resume_from_checkpoint"),
        *("trust_remote_code", "advise", "time_budget"),  # max_steps is what the time is enough for
    }
)
# Two ways to give the same thing; the first one counts if both come from the same place.
_ALTERNATIVES = {
    "learning_rate": "base_learning_rate",
    "warmup_steps": "warmup_epochs",
    "max_steps": "num_train_epochs",
}
_WITH_OUR_DEFAULT = frozenset(
    name for name, declared in flags_of(TrainingFlags).items() if default_of(declared) is not TRANSFORMERS_DEFAULT
)


class Origin(IntEnum):
    """Where a value comes from; the larger overrides the smaller."""

    DEFAULT = 0
    PRESET = 1
    METHOD = 2
    SOURCE = 3
    CONFIG = 4
    COMMAND_LINE = 5
    RULE = 6  # by the number of images
    MEASURED = 7


# A label for messages and values by flag name.
Layer = tuple[str, Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base class of the settings of a command: one typed attribute per flag, valid and complete when constructed.

    Args:
        values: All values by flag name, as a recipe writes them (a list where the attribute is a tuple).
        origins: Where each of them comes from.
        labels: Name of each origin, such as the file of a recipe.
    """

    values: Mapping[str, Any]
    origins: Mapping[str, Origin]
    labels: Mapping[Origin, str]

    # Keyword arguments of argparse.ArgumentParser.
    program: ClassVar[Mapping[str, str]]
    successors: ClassVar[Mapping[str, str]] = SUCCESSORS

    @classmethod
    def groups(cls) -> dict[str, type]:
        """Return the groups of flags by title, in the order of the base classes."""
        groups: dict[str, type] = {}
        for base in cls.__mro__:
            if (title := getattr(base, "title", None)) and not issubclass(base, Settings):
                groups.setdefault(title, base)
        return groups

    @classmethod
    def typed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the attributes that `values` stand for."""
        hints = get_type_hints(cls)
        return {name: _typed(hints[name], values[name]) for name in flags_of(cls)}

    def is_given(self, name: str) -> bool:
        """Whether a recipe, the model that the run starts from, or the command line gives this setting."""
        return self.origins[name] >= Origin.METHOD

    def is_users(self, name: str) -> bool:
        """Whether the user's recipe or the command line gives this setting."""
        return self.origins[name] >= Origin.CONFIG

    def is_on_command_line(self, name: str) -> bool:
        return self.origins[name] == Origin.COMMAND_LINE

    def as_recipe(self) -> dict[str, Any]:
        """Return a flat recipe of everything that matters."""
        return {n: value for n, value in self.values.items() if n not in _NOT_IN_A_RECIPE and value is not None}

    def describe(self) -> str:
        """Return a line for each setting that is not a default: name, value, origin."""
        names = [name for name in self.values if self.origins[name] > Origin.DEFAULT]
        rows = [(name, _shown(name, self.values[name]), self.labels[self.origins[name]]) for name in names]
        widths = [max((len(row[column]) for row in rows), default=0) for column in (0, 1)]
        return "\n".join(f"  {name:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for name, value, origin in rows)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings(DataFlags, RunFlags, TrainingFlags, Settings):
    """Base class of the settings of a training command."""

    uploads_at_saves: ClassVar = False  # False: --hub_strategy can only be end
    crops_per_image: ClassVar = 1  # in an epoch
    default_batch_size: ClassVar[int | None] = None  # None: by the hardware

    def __post_init__(self) -> None:
        if self.license and (problem := license_problem(self.license)):
            raise SettingsError(f"--{problem}")
        if self.base_learning_rate is None and not self.counts("learning_rate"):
            raise SettingsError(f"{self.labels[Origin.METHOD]} must give base_learning_rate or learning_rate")
        if self.push_to_hub and not self.hub_model_id:
            raise SettingsError("--push_to_hub needs --hub_model_id organization/name (or user/name)")
        if self.hub_model_id:
            check_repo_id(self.hub_model_id)
        if not self.uploads_at_saves and self.is_users("hub_strategy") and self.hub_strategy != HubStrategy.END:
            raise SettingsError(f"--hub_strategy {self.hub_strategy.value}: only the finished run is uploaded")
        if self.hub_always_push:
            raise SettingsError("--hub_always_push: leave it out; every save is uploaded unless a newer one exists")
        _ = self.seconds  # checked
        flags = [name for name in self.values if name.startswith("hub_") and name != "hub_token"]
        given = [name for name in flags if self.is_users(name)]
        if given and not self.push_to_hub:
            raise SettingsError(f"--{given[0]} has no effect without --push_to_hub")

    def default_output_dir(self) -> str:
        """Return the output folder of a run without --output_dir."""
        raise NotImplementedError

    @property
    def seconds(self) -> float | None:
        """How long the run may take; None if --time_budget is not given, or further from the command line than its
        alternatives."""
        if self.time_budget is None:
            return None
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", self.time_budget.strip())
        if not found or not float(found[1]):
            raise SettingsError(f"--time_budget is {self.time_budget}, expected a time such as 45s, 30m or 2h")
        lengths = [name for name in ("max_steps", "num_train_epochs") if self.is_users(name)]
        for name in lengths:
            if self.origins[name] == self.origins["time_budget"]:
                raise SettingsError(f"--time_budget and --{name} both set the length of the run; give one")
        is_overruled = any(Origin.RULE > self.origins[n] > self.origins["time_budget"] for n in lengths)
        return None if is_overruled else float(found[1]) * {"s": 1, "m": 60, "h": 3600}[found[2]]

    @property
    def shows_tracebacks(self) -> bool:
        return self.origins["debug"] > Origin.DEFAULT

    def counts(self, name: str) -> bool:
        """Whether this way was given nearer to the command line than its alternative, such as base_learning_rate."""
        is_off = name == "max_steps" and self.max_steps < 0
        return self.is_given(name) and not is_off and self.origins[name] >= self.origins[_ALTERNATIVES[name]]

    def derived(self, origin: Origin, label: str, **values: Any) -> Self:
        """Return the settings with other values; `label` says where they come from."""
        origins = {**self.origins, **dict.fromkeys(values, origin)}
        labels = {**self.labels, origin: label}
        typed = self.typed({**self.values, **values})
        changed = {name: typed[name] for name in values}
        return replace(self, values={**self.values, **values}, origins=origins, labels=labels, **changed)

    def training_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of TrainingArguments that differ from the defaults of transformers."""
        return {
            name: self.values[name]
            for name in _transformers_defaults()
            if self.is_given(name) or name in _WITH_OUR_DEFAULT
        }

    def as_recipe(self) -> dict[str, Any]:
        """Return a flat recipe of everything that matters; what is left out has the default of transformers."""
        left_out = {b if self.counts(a) else a for a, b in _ALTERNATIVES.items()}
        left_out |= set(_transformers_defaults()) - set(self.training_arguments())
        return {name: value for name, value in super().as_recipe().items() if name not in left_out}


S = TypeVar("S", bound=Settings)


class CommandLine(Generic[S]):
    """What the user gives: the command line and the recipe of --config.

    `chosen` is an unchecked draft of the settings, the defaults overridden by what the user gives: recipes, presets
    and the model to start from are chosen by it.
    """

    def __init__(
        self, settings_class: type[S], argv: Sequence[str], methods: Mapping[str, type] = MappingProxyType({})
    ) -> None:
        self.settings_class, self.has_methods = settings_class, bool(methods)
        self.parser = make_parser(settings_class, methods)
        self.given = parse(self.parser, argv)
        self.config: Layer = ("", {})
        if "config" in self.given:
            self.config = self.read_recipe(find_recipe(self.given["config"]))
        defaults = {name: default_of(declared) for name, declared in flags_of(settings_class).items()}
        own = {name: default for name, default in defaults.items() if default is not TRANSFORMERS_DEFAULT}
        training: dict[str, Any] = _transformers_defaults() if issubclass(settings_class, TrainingFlags) else {}
        self.users = {**self.config[1], **self.given}
        chosen = {**training, **own, **self.users}
        self.chosen: S = object.__new__(settings_class)
        vars(self.chosen).update(chosen)
        self.method_defaults = method_flags(methods[chosen["method"]]) if methods else {}
        ours = {name: own.pop(name) for group in settings_class.groups().values() for name in flags_of(group)}
        self.defaults = {**ours, **self.method_defaults, **training, **own}

    def require(self, **descriptions: str) -> None:
        """Raise SettingsError if one of these flags is not given."""
        for name, description in descriptions.items():
            if not getattr(self.chosen, name):
                raise SettingsError(f"--{name} is missing: {description}, a folder or a Hub id")

    def read_recipe(self, path: Path) -> Layer:
        label = label_of(path)
        try:
            content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise SettingsError(f"{label} cannot be read: {error}") from None
        if not isinstance(content, dict):
            raise SettingsError(f"{label} holds no settings; a recipe has lines such as 'mask_ratio: 0.75'")
        if "config" in content:
            raise SettingsError(f"{label}: a recipe cannot name another one with config; copy its lines")
        values = parse(self.parser, as_argv(self.parser, content, label), label)
        if "trust_remote_code" in values:  # a recipe may come from anywhere
            raise SettingsError(f"{label}: trust_remote_code is accepted on the command line only; remove the line")
        return label, values

    def resolve(
        self,
        lower: Mapping[Origin, Layer],
        derive: Callable[[Mapping[str, Any], Mapping[str, Origin]], Mapping[str, Any]] = lambda values, origins: {},
        **attributes: Any,
    ) -> S:
        """Return the settings; raises SettingsError if a value is missing, out of range or contradicts another.

        Args:
            lower: Layers below those of the user, lowest first.
            derive: Called with values and origins; returns values that follow from others.
            attributes: Attributes of the settings that are not flags.
        """
        layers = {Origin.DEFAULT: ("default", self.defaults), **lower}
        layers |= {Origin.CONFIG: self.config, Origin.COMMAND_LINE: ("command line", self.given)}
        values: dict[str, Any] = {}
        origins: dict[str, Origin] = {}
        for origin, (_, layer) in layers.items():
            values |= layer
            origins |= dict.fromkeys(layer, origin)
        kwargs = "lr_scheduler_kwargs"
        if kwargs in values and origins["lr_scheduler_type"] > origins[kwargs]:  # they belong to another schedule
            values[kwargs], origins[kwargs] = self.defaults[kwargs], Origin.DEFAULT
        _check_ranges(self.settings_class, values)
        values |= derive(values, origins)
        labels = {origin: label for origin, (label, _) in layers.items()}
        typed = self.settings_class.typed(values)
        hints = get_type_hints(self.settings_class)
        missing = [name for name, value in typed.items() if value is None and NoneType not in get_args(hints[name])]
        if missing:
            raise SettingsError(f"{labels[Origin.METHOD]} must give a value for: {', '.join(missing)}")
        if self.has_methods:
            attributes["method_settings"] = {name: values[name] for name in self.method_defaults}
        return self.settings_class(values=values, origins=origins, labels=labels, **typed, **attributes)


def find_recipe(name: str) -> Path:
    """Return the file of this name, or the one among our recipes, with or without .yaml."""
    for path in (Path(name), RECIPES / name, RECIPES / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    close = nearest(Path(name).stem, known)
    hint = f"did you mean {close}? " if close else ""
    raise SettingsError(f"there is no recipe {name!r}; {hint}There are: {', '.join(known)}")


def chosen_among(argv: Sequence[str], flag: str, choices: Collection[str], default: str) -> str:
    """Return the choice that the command line or its recipe names by `flag`, before the other flags are known.

    Mistakes are left to the parser of the command; they lead to the default here.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in (flag, "config"):
        parser.add_argument(f"--{name}")
    try:
        given = vars(parser.parse_known_args(list(argv))[0])
        file = given["config"]
        recipe = yaml.safe_load(find_recipe(file).read_text(encoding="utf-8")) if file else {}
        chosen = given[flag] or recipe.get(flag, default)
    except (argparse.ArgumentError, SettingsError, yaml.YAMLError, UnicodeDecodeError, AttributeError):
        return default
    return chosen if chosen in choices else default


def data_name(dataset: Sequence[str]) -> str:
    """Return the names of the data as part of the name of a folder."""
    data = "-".join(re.sub(r"[^\w.-]+", "-", Path(name).resolve().name) for name in dataset[:3])
    return data.strip("-.") or "data"


def label_of(path: Path) -> str:
    return f"{RECIPES.name}/{path.name}" if path.resolve().parent == RECIPES else str(path)


class _UniqueKeys(yaml.SafeLoader):
    """YAML itself lets the last of two equal names win."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(problem=f"{twice[0]} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def _check_ranges(settings_class: type[Settings], values: dict[str, Any]) -> None:
    """Check that each number is in its range; a list of one number becomes that number."""
    hints = get_type_hints(settings_class)
    for name, declared in flags_of(settings_class).items():
        within, value = declared.metadata["within"], values[name]
        if within is None or value is None or value in declared.metadata["words"]:
            continue
        numbers = value if isinstance(value, list) else [value]
        takes_several = tuple_in(hints[name]) is not None
        if not within.contains(numbers if takes_several else value):
            raise SettingsError(f"--{name} is {' '.join(map(str, numbers))}, expected {within.description}")
        if takes_several and len(numbers) == 1:
            values[name] = numbers[0]


def _typed(hint: Any, value: Any) -> Any:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    if isinstance(value, list) and tuple_in(hint) is not None:
        return tuple(value)
    if get_origin(hint) is tuple and value is not None:  # the side of a square
        return (value, value)
    return value


def _transformers_defaults() -> dict[str, Any]:
    return {argument.name: default_of(argument) for argument in fields(TrainingArguments) if argument.init}


def _shown(name: str, value: Any) -> str:
    if name == "hub_token":
        return "(secret)"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)

"""From argv, or a recipe, to the values that were given, and the words for what cannot be parsed."""

import argparse
import difflib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import field, make_dataclass
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from commands.flags import (
    CHOICES,
    EPILOG,
    HELP_TEXTS,
    OUR_GROUPS,
    SUCCESSORS,
    TRAINING_DEFAULTS,
    TransformersFlags,
    method_flags,
)


class SettingsError(ValueError):
    """A flag or a line of a recipe that cannot be meant as it stands; the message says what would work."""


# Flags whose values stand in --help instead of X; those of --model are too many for a line.
_SHOWN_WITH_CHOICES = ("num_channels", "image_stats", "interpolation", "resume", "mask_strategy", "method")
_EXPECTED = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}


def parse(parser: argparse.ArgumentParser, argv: Sequence[str], source: str = "") -> dict[str, Any]:
    """Only what `argv` gives, by name and with its type. `source` goes in front of the message of an error.

    Raises:
        SettingsError: an unknown flag, or a value that is not of the flag's kind.
    """
    prefix = f"{source}: " if source else ""
    try:
        namespace, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").split("/")[0]
        raise SettingsError(f"{prefix}{name}: {error.message}") from None
    if rest:
        raise SettingsError(prefix + _unknown(parser, rest))
    return vars(namespace)


def build_parser(heads: Mapping[str, type]) -> argparse.ArgumentParser:
    """The parser of `run_pretraining.py`; `heads`: method -> class of its config."""
    return make_parser(
        (*OUR_GROUPS, _method_flags(heads)),
        {**CHOICES, "method": tuple(heads)},
        prog="run_pretraining.py",
        usage="accelerate launch run_pretraining.py [--flag value ...]",
        description="Pre-train an image encoder on unlabeled images by masked image modeling.",
        epilog=EPILOG,
    )


def make_parser(
    groups: Sequence[type],
    choices: Mapping[str, Collection[str]],
    help_texts: Mapping[str, str] = HELP_TEXTS,
    **texts: str,
) -> argparse.ArgumentParser:
    """A parser whose namespace holds only what was given: flags of `groups`, and every field of TrainingArguments."""
    parser = _Parser(
        [*groups, TransformersFlags],  # type: ignore[list-item]
        formatter_class=_Formatter,
        allow_abbrev=False,
        add_help=False,
        exit_on_error=False,
        **texts,
    )
    parser.shown = frozenset(help_texts)
    for action in parser._actions:
        action.choices = choices.get(action.dest, action.choices)
        if action.dest == "debug":  # bare, it is ours
            action.nargs = "*"
        _refine(action, help_texts)
    parser.add_argument("-h", "--help", action=_Help, nargs=0, default=argparse.SUPPRESS, help="show this and stop")
    parser.add_argument(
        "--help_all", "--help-all", action=_Help, nargs=0, default=argparse.SUPPRESS, help="show every flag and stop"
    )
    return parser


def as_argv(parser: argparse.ArgumentParser, settings: Mapping[str, Any], source: str) -> list[str]:
    """A recipe as the command line it stands for, so that one parser does all the typing.

    Raises:
        SettingsError: a name without a value, or one that is no flag.
    """
    actions = {action.dest: action for action in parser._actions if action.nargs != 0}
    argv: list[str] = []
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise SettingsError(f"{source}: {_unknown(parser, [f'--{name}'])}")
        if value is None or value == []:
            raise SettingsError(f"{source}: {name} has no value; give one, or remove the line")
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is True and actions[name].nargs in ("?", "*"):
            argv.append(f"--{name}")
        else:  # with "=", so that a value may begin with a minus
            argv.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def _unknown(parser: argparse.ArgumentParser, rest: Sequence[str]) -> str:
    flags = [text for text in rest if text.startswith("--")]
    if not flags:
        recipe = f"; a recipe is given as --config {rest[0]}" if rest[0].endswith((".yaml", ".yml")) else ""
        return f"{rest[0]!r} belongs to no flag{recipe or ', see --help'}"
    name = flags[0].removeprefix("--").split("=")[0].replace("-", "_")
    if name in SUCCESSORS:
        return f"there is no flag --{name}; use {SUCCESSORS[name]}"
    known = nearest(name, (action.dest for action in parser._actions))
    return f"unknown flag --{name}; " + (f"did you mean --{known}?" if known else "see --help_all for all there are")


def _method_flags(heads: Mapping[str, type]) -> type:
    """A dataclass of the heads' settings; methods may share a setting, each with a default of its own."""
    defaults: dict[str, dict[str, Any]] = {}
    for method, config_class in heads.items():
        for name, default in method_flags(config_class).items():
            defaults.setdefault(name, {})[method] = default
    flags = []
    for name, per_method in defaults.items():
        text = "of " + ", ".join(f"{method} (default: {_shown(default)})" for method, default in per_method.items())
        default = next(iter(per_method.values()))
        flags.append((name, type(default), field(default=default, metadata={"help": text})))
    return make_dataclass("HeadFlags", flags, namespace={"_argument_group_name": "method (settings of its head)"})


def _refine(action: argparse.Action, help_texts: Mapping[str, str]) -> None:
    """Own words for help and errors, and no default, so that what was not given stays out of the namespace."""
    default = TRAINING_DEFAULTS.get(action.dest, action.default)
    text = help_texts.get(action.dest, action.help or "")
    if "(default" not in text and default not in (None, "", []) and default is not False:
        text += f" (default: {_shown(default).replace('%', '%%')})"
    action.help = text
    if action.type is string_to_bool:  # also those that transformers lets be None and so wants a value for
        action.nargs, action.const = "?", True
    if action.type is not None:
        action.type = _strict(action.type, action.choices)  # type: ignore[arg-type]
    if action.nargs != 0 and action.dest not in _SHOWN_WITH_CHOICES:
        action.metavar = "X"
    action.default = argparse.SUPPRESS


def _strict(convert: Callable[[str], Any], choices: Iterable[Any] | None) -> Callable[[str], Any]:
    def typed(text: str) -> Any:
        try:
            value = convert(text)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            kind = getattr(convert, "__name__", "value")
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {_EXPECTED.get(kind, f'a {kind}')}") from None
        if choices is not None and value not in choices:
            close = nearest(text, map(str, choices))
            hint = f"; did you mean {close}?" if close else ""
            raise argparse.ArgumentTypeError(f"got {text!r}, expected one of {', '.join(map(str, choices))}{hint}")
        return value

    return typed


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


class _Formatter(argparse.HelpFormatter):
    """One spelling of each flag, in 100 columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[0] if action.dest != "help" else "-h, --help"
        values = self._format_args(action, "X") if action.nargs in (None, "+") else ""
        return f"{name} {values}".strip()

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(super(_Formatter, self)._fill_text(part, width, indent) for part in text.split("\n\n"))


class _Parser(HfArgumentParser):
    shown: frozenset[str] = frozenset()  # those flags of transformers that --help names, too

    def error(self, message: str) -> Any:
        raise SettingsError(message)

    def format_help_of(self, everything: bool) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for group in self._action_groups:
            of_transformers = group.title == TransformersFlags._argument_group_name
            formatter.start_section(group.title)
            formatter.add_arguments(
                action
                for action in group._group_actions
                if not action.option_strings[0].startswith("--no_")
                and (everything or not of_transformers or action.dest in self.shown)
            )
            formatter.end_section()
        if not everything:
            formatter.add_text("All flags of transformers.TrainingArguments work too: --help_all.")
        formatter.add_text(self.epilog)
        return formatter.format_help()


class _Help(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(parser.format_help_of(everything=(option_string or "").endswith("all")))
        parser.exit()

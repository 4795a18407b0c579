"""Parsing of a command line or a recipe into the given values, and the messages for what cannot be parsed."""

import argparse
import difflib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import field, make_dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool

from commands.flags import (
    TRANSFORMERS_DEFAULT,
    TrainingFlags,
    default_of,
    flags_of,
    method_flags,
    method_help,
    tuple_in,
)


class SettingsError(ValueError):
    """An invalid flag or line of a recipe; the message says what would be valid."""


class _TransformersFlags(TrainingArguments):
    """TrainingArguments with its own title in --help."""

    _argument_group_name = "training (flags of transformers.TrainingArguments)"


_MOST_CHOICES_SHOWN = 8  # in --help, instead of X
_SAID_OF_VALUES = ("refused", "words", "otherwise")  # by the metadata of a flag
_EXPECTED = {"int": "a whole number", "float": "a number", "string_to_bool": "true or false"}


def parse(parser: argparse.ArgumentParser, argv: Sequence[str], source: str = "") -> dict[str, Any]:
    """Return only what `argv` gives, by name and with its type; raises SettingsError, which names `source`."""
    prefix = f"{source}: " if source else ""
    try:
        namespace, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        name = (error.argument_name or "").split("/")[0]
        raise SettingsError(f"{prefix}{name}: {error.message}") from None
    if rest:
        raise SettingsError(prefix + _unknown(parser, rest))
    return vars(namespace)


def make_parser(settings_class: Any, methods: Mapping[str, type] = MappingProxyType({})) -> argparse.ArgumentParser:
    """Return the parser of a command, whose namespace holds only what was given.

    Flags are the fields of `settings_class`, a `commands.settings.Settings`, and of the configs of the `methods`.
    """
    flags, hints = flags_of(settings_class), get_type_hints(settings_class)
    parsed_groups: list[type] = []
    for title, group in settings_class.groups().items():
        parsed: list[Any] = []
        for name in flags_of(group):
            pair, default = tuple_in(hints[name]), default_of(flags[name])
            kind = hints[name] if pair is None else list[get_args(pair)[0]]  # type: ignore[misc]
            if isinstance(default, list):
                default = field(default_factory=partial(list, default))
            parsed.append((name, kind, default))
        parsed_groups.append(make_dataclass("Flags", parsed, namespace={"_argument_group_name": title}))
    if methods:
        parsed_groups.append(_method_group(methods))
    has_more_flags = issubclass(settings_class, TrainingFlags)
    if has_more_flags:
        parsed_groups.append(_TransformersFlags)
    parser = _Parser(
        parsed_groups,  # type: ignore[arg-type]
        formatter_class=_Formatter,
        allow_abbrev=False,
        add_help=False,
        exit_on_error=False,
        **settings_class.program,
    )
    parser.successors, parser.has_more_flags = settings_class.successors, has_more_flags
    parser.documented = frozenset(name for name, declared in flags.items() if declared.metadata["help"])
    own = {name for group in settings_class.groups().values() for name in flags_of(group)}
    for action in parser._actions:
        declared = flags.get(action.dest)
        if declared is not None and declared.metadata["choices"]:
            action.choices = declared.metadata["choices"]
        if action.dest == "method" and methods:
            action.choices = tuple(methods)
        if action.dest == "debug":  # without a value, it is ours
            action.nargs = "*"
        _refine(action, declared)
        shows_choices = action.dest in own and len(list(action.choices or range(99))) <= _MOST_CHOICES_SHOWN
        if action.nargs != 0 and not shows_choices:
            action.metavar = "X"
    add_help = partial(parser.add_argument, action=_Help, nargs=0, default=argparse.SUPPRESS)
    add_help("-h", "--help", help="show this and stop")
    if has_more_flags:
        add_help("--help_all", "--help-all", help="show every flag and stop")
    return parser


def as_argv(parser: argparse.ArgumentParser, recipe: Mapping[str, Any], source: str) -> list[str]:
    """Return a recipe as the equivalent command line, so that one parser converts all values."""
    actions = {action.dest: action for action in parser._actions if action.nargs != 0}
    argv: list[str] = []
    for key, value in recipe.items():
        name = str(key).replace("-", "_")
        if name not in actions:
            raise SettingsError(f"{source}: {_unknown(parser, [f'--{name}'])}")
        if value is None or value == []:
            raise SettingsError(f"{source}: {name} has no value; give one, or remove the line")
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is True and actions[name].nargs in ("?", "*"):
            argv.append(f"--{name}")
        else:  # with "=", so that a value may start with a minus
            argv.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return argv


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that was probably meant."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def _unknown(parser: Any, rest: Sequence[str]) -> str:
    flags = [text for text in rest if text.startswith("--")]
    if not flags:
        recipe = f"; a recipe is given as --config {rest[0]}" if rest[0].endswith((".yaml", ".yml")) else ""
        return f"{rest[0]!r} belongs to no flag{recipe or ', see --help'}"
    name = flags[0].removeprefix("--").split("=")[0].replace("-", "_")
    if name in parser.successors:
        return f"there is no flag --{name}; use {parser.successors[name]}"
    known = nearest(name, (action.dest for action in parser._actions))
    full_help = "--help_all" if parser.has_more_flags else "--help"
    return f"unknown flag --{name}; " + (f"did you mean --{known}?" if known else f"see {full_help} for all flags")


def _method_group(methods: Mapping[str, type]) -> type:
    """Return a dataclass of the methods' settings; methods may share a setting, each with its own default."""
    defaults: dict[str, dict[str, Any]] = {}
    descriptions: dict[str, dict[str, list[str]]] = {}  # by setting and sentence, the methods that say it
    for method, config_class in methods.items():
        for name, sentence in method_help(config_class).items():
            descriptions.setdefault(name, {}).setdefault(sentence, []).append(method)
        for name, default in method_flags(config_class).items():
            defaults.setdefault(name, {})[method] = default
    flags = []
    for name, per_method in defaults.items():
        methods_of: dict[str, list[str]] = {}  # by default
        for method, default in per_method.items():
            methods_of.setdefault(_shown(default), []).append(method)
        text = "of " + "; ".join(f"{', '.join(those)} (default: {shown})" for shown, those in methods_of.items())
        for sentence, saying in descriptions.get(name, {}).items():
            whose = "" if len(descriptions[name]) == 1 else f"; {', '.join(saying)}"
            text += f"{whose}: {sentence[0].lower()}{sentence[1:]}".replace("%", "%%")
        default = next(iter(per_method.values()))
        flags.append((name, type(default), field(default=default, metadata={"help": text})))
    return make_dataclass("MethodFlags", flags, namespace={"_argument_group_name": "method"})


def _refine(action: argparse.Action, declared: Any | None) -> None:
    """Set our help and error messages, and no default, so that the namespace holds only what was given."""
    default, text = action.default, action.help or ""
    if declared is not None:
        text = declared.metadata["help"] or text
        if default_of(declared) is not TRANSFORMERS_DEFAULT:
            default = default_of(declared)
    if "(default" not in text and default not in (None, "", []) and default is not False:
        text += f" (default: {_shown(default).replace('%', '%%')})"
    action.help = text
    if action.type is string_to_bool:  # also those that transformers lets be None and so wants a value for
        action.nargs, action.const = "?", True
    if action.type is not None:
        said = {} if declared is None else {name: declared.metadata[name] for name in _SAID_OF_VALUES}
        action.type = _strict(action.type, action.choices, **said)  # type: ignore[arg-type]
    action.default = argparse.SUPPRESS


def _strict(
    convert: Callable[[str], Any],
    choices: Iterable[Any] | None,
    refused: Mapping[str, str] = MappingProxyType({}),
    words: Collection[str] = (),
    otherwise: str = "",
) -> Callable[[str], Any]:
    def typed(text: str) -> Any:
        if text in words:
            return text
        if text in refused:
            raise argparse.ArgumentTypeError(f"there is no {text}: {refused[text]}")
        try:
            value = convert(text)
        except (ValueError, TypeError, argparse.ArgumentTypeError):
            kind = getattr(convert, "__name__", "value")
            expected = " or ".join([_EXPECTED.get(kind, f"a {kind}"), *words])
            raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}") from None
        if choices is not None and value not in choices:
            close = nearest(text, map(str, choices))
            hint = f"did you mean {close}?" if close else otherwise
            expected = f"expected one of {', '.join(map(str, choices))}"
            raise argparse.ArgumentTypeError("; ".join(filter(None, [f"got {text!r}, {expected}", hint])))
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
    documented: frozenset[str] = frozenset()  # flags that --help shows; --help_all shows the others too
    successors: Mapping[str, str] = {}
    has_more_flags = False

    def error(self, message: str) -> Any:
        raise SettingsError(message)

    def format_help_of(self, everything: bool) -> str:
        formatter = self._get_formatter()
        formatter.add_usage(self.usage, [], [])
        formatter.add_text(self.description)
        for group in self._action_groups:
            of_transformers = group.title == _TransformersFlags._argument_group_name
            formatter.start_section(group.title)
            formatter.add_arguments(
                action
                for action in group._group_actions
                if not action.option_strings[0].startswith("--no_")
                and (everything or not of_transformers or action.dest in self.documented)
            )
            formatter.end_section()
        if self.has_more_flags and not everything:
            formatter.add_text("All flags of transformers.TrainingArguments work too: --help_all.")
        formatter.add_text(self.epilog)
        return formatter.format_help()


class _Help(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        print(parser.format_help_of(everything=(option_string or "").endswith("all")))
        parser.exit()

"""Take out of a text what must not leave the user's machine: the folders of absolute paths, and Hub tokens."""

import re
import shlex
from typing import Any

_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_TOKEN_FLAG = re.compile(r"--hub[-_]token(=|$)")
_HIDDEN = "hf_..."
# The folders of an absolute path: its root (/, ~/, C:\, file:///), then every component that another one follows.
# The slashes of a URL do not match: they follow a colon, a slash or a word. Nor does a slash between spaces.
_FOLDERS = re.compile(
    r"""(?<![\w/.~\\-])(?:file://)?(?:~[\w.-]*/+|(?<!:)/+|/(?!/)|[A-Za-z]:[\\/]+|\\\\)(?=\S)
        (?:[^/\\,;:=\n]*[^\s/\\,;:=][/\\]+(?=[^\s/\\,;:="'`\[\](){}<>]))*""",
    re.VERBOSE,
)


def shorten_paths(text: str) -> str:
    """Keep the last component of each absolute path in a text (others name the user and the machine), and no token."""
    return _TOKEN.sub(_HIDDEN, _FOLDERS.sub("", text))


def shorten_command(command: str) -> str:
    """`shorten_paths` of each word of a shell command, so that a path may contain spaces; no value of --hub_token."""
    try:
        words = shlex.split(command)
    except ValueError:  # an unpaired quote: not a command that a shell would run, but still to be shown
        words = command.split()
    flags = [_TOKEN_FLAG.match(word) for word in words]
    for index, flag in enumerate(flags):
        if flag and flag[1]:
            words[index] = flag[0] + _HIDDEN
        elif flag and index + 1 < len(words):
            words[index + 1] = _HIDDEN
    return shlex.join(shorten_paths(word) for word in words)


def shorten_values(value: Any) -> Any:
    """`shorten_paths` of every text in a tree of dicts and lists, as JSON or YAML holds it."""
    if isinstance(value, dict):
        return {name: shorten_values(item) for name, item in value.items()}
    if isinstance(value, list):
        return [shorten_values(item) for item in value]
    return shorten_paths(value) if isinstance(value, str) else value

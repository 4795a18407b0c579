"""Remove private information from texts: the folders of absolute paths, and Hub tokens."""

import re
import shlex
from typing import Any

_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_TOKEN_FLAG = re.compile(r"--hub[-_]token(=|$)")
_REDACTED = "hf_..."
_LOGIN = re.compile(r"(\w+://)[^\s/@]+@")  # s3://key:secret@bucket
_QUERY = re.compile(r"(\w+://[^\s?\"']+)\?[^\s\"']+")  # the signature of a URL that grants access
# The folders of an absolute path: its root (/, ~/, C:\, file:///), then every component but the last. The slashes
# of a URL do not match, since they follow a colon, a slash or a word; nor does a slash between spaces.
_FOLDERS = re.compile(
    r"""(?<![\w/.~\\-])(?:file://)?(?:~[\w.-]*/+|(?<!:)/+|/(?!/)|[A-Za-z]:[\\/]+|\\\\)(?=\S)
        (?:[^/\\,;:=\n]*[^\s/\\,;:=][/\\]+(?=[^\s/\\,;:="'`\[\](){}<>]))*""",
    re.VERBOSE,
)


def shorten_paths(text: str) -> str:
    """Reduce each absolute path in a text to its last component, and replace tokens and the secrets of URLs."""
    return _TOKEN.sub(_REDACTED, _FOLDERS.sub("", _QUERY.sub(r"\1?...", _LOGIN.sub(r"\1", text))))


def shorten_command(command: str) -> str:
    """Apply `shorten_paths` to each word of a shell command, and replace the value of --hub_token, in one line."""
    try:
        words = shlex.split(command)
    except ValueError:  # an unpaired quote: not a valid command, but still shown
        words = command.split()
    flags = [_TOKEN_FLAG.match(word) for word in words]
    for index, flag in enumerate(flags):
        if flag and flag[1]:
            words[index] = flag[0] + _REDACTED
        elif flag and index + 1 < len(words):
            words[index + 1] = _REDACTED
    return shlex.join(" ".join(shorten_paths(word).splitlines()) for word in words)


def shorten_values(value: Any) -> Any:
    """Apply `shorten_paths` to every string in a tree of dicts and lists, as in JSON or YAML."""
    if isinstance(value, dict):
        return {name: shorten_values(item) for name, item in value.items()}
    if isinstance(value, list):
        return [shorten_values(item) for item in value]
    return shorten_paths(value) if isinstance(value, str) else value

"""Escape text of the user, such as names of classes and folders, for a model card."""

import re

from hub.redaction import shorten_paths


def escape(text: str) -> str:
    """Return the text on one line and without paths, as Markdown that shows it literally, in a table too."""
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", " ".join(shorten_paths(text).split()))


def code(text: str) -> str:
    """Return the text on one line and without paths, for a place between backticks."""
    return " ".join(shorten_paths(text).replace("`", "'").split())

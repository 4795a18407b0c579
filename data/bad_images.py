"""A record of unreadable images, which the processes of a run share in a file."""

import json
import os
from itertools import islice
from pathlib import Path

_NUM_EXAMPLES = 10


class BadImages(dict[str, str]):
    """The reasons why images cannot be read, by name of the image."""

    @classmethod
    def read(cls, file: Path) -> "BadImages":
        """Read what all processes have appended to a file, which may not exist yet."""
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return cls((entry["name"], entry["reason"]) for entry in map(json.loads, lines))

    def append_to(self, file: Path) -> None:
        """Append one JSON line {name, reason} per image to a file."""
        if not self:
            return
        lines = [json.dumps({"name": name, "reason": reason}) + "\n" for name, reason in self.items()]
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("ab", buffering=0) as stream:  # a single write, so that lines of several processes do not mix
            stream.write("".join(lines).encode())

    def describe(self, separator: str = "; ") -> str:
        """Return the first ten names with their reasons, and the number of the others."""
        examples = [f"{printable(name)}: {reason}" for name, reason in islice(self.items(), _NUM_EXAMPLES)]
        others = [f"... and {len(self) - _NUM_EXAMPLES:,} more"] if len(self) > _NUM_EXAMPLES else []
        return separator.join(examples + others)


def printable(name: str) -> str:
    """Return the name of a file with escapes for bytes that are not Unicode and for unprintable characters."""
    text = os.fsencode(name).decode(errors="backslashreplace")
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)

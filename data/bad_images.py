"""A record of unreadable images, which the processes of a run share in a file."""

import json
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
        examples = [f"{name}: {reason}" for name, reason in islice(self.items(), _NUM_EXAMPLES)]
        others = [f"... and {len(self) - _NUM_EXAMPLES:,} more"] if len(self) > _NUM_EXAMPLES else []
        return separator.join(examples + others)

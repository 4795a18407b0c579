"""Find the newest complete checkpoint to resume from.

`Trainer` writes a checkpoint file by file, `trainer_state.json` last, and deletes old ones file by file. If it is
killed in between, an incomplete folder remains.
"""

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open


def problem_with(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be resumed, or None if it is complete; reads headers only."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json is missing or truncated (it is written last)"
    if any(checkpoint.glob("pytorch_model_fsdp*")):  # sharded by FSDP, which keeps its own inventory
        return None
    return _problem_with_weights(checkpoint) or _problem_with_states(checkpoint)


def last_whole_checkpoint(output_dir: Path) -> tuple[Path | None, dict[str, str]]:
    """Return the newest complete checkpoint in `output_dir`, and why each newer one was skipped, by name."""
    skipped: dict[str, str] = {}
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        problem = problem_with(checkpoint)
        if problem is None:
            return checkpoint, skipped
        skipped[checkpoint.name] = problem
    return None, skipped


def _problem_with_weights(checkpoint: Path) -> str | None:
    index = checkpoint / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    except (ValueError, KeyError):
        return f"{index.name} is truncated"
    for name in sorted(names):
        try:
            with safe_open(checkpoint / name, framework="pt"):
                pass  # opening checks that the file is as long as its header says
        except (OSError, SafetensorError):
            return f"{name} is missing or truncated"
    return None


def _problem_with_states(checkpoint: Path) -> str | None:
    states = ["optimizer.pt", "scheduler.pt", *(path.name for path in checkpoint.glob("rng_state*.pth"))]
    for name in states:
        if not zipfile.is_zipfile(checkpoint / name):  # looks for the directory that torch.save writes last
            return f"{name} is missing or truncated"
    return None

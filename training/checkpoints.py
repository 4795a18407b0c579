"""Which checkpoint to resume from: the newest one that is whole.

`Trainer` writes a checkpoint file by file, `trainer_state.json` last, and deletes old ones file by file; killed in
between, it leaves a folder that has the right name and not the right content.
"""

import json
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open


def problem_with(checkpoint: Path) -> str | None:
    """What keeps this checkpoint from being resumed, in words, or None if it is whole. Reads headers only."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json, which is written last, is missing or cut"
    if any(checkpoint.glob("pytorch_model_fsdp*")):  # sharded by FSDP, which keeps its own inventory
        return None
    return _problem_with_weights(checkpoint) or _problem_with_states(checkpoint)


def last_whole_checkpoint(output_dir: Path) -> tuple[Path | None, dict[str, str]]:
    """The newest whole checkpoint in `output_dir`, and the newer ones that were passed over with the reason."""
    passed_over: dict[str, str] = {}
    numbered = [path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for checkpoint in sorted(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        problem = problem_with(checkpoint)
        if problem is None:
            return checkpoint, passed_over
        passed_over[checkpoint.name] = problem
    return None, passed_over


def _problem_with_weights(checkpoint: Path) -> str | None:
    index = checkpoint / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    except (ValueError, KeyError):
        return f"{index.name} is cut"
    for name in sorted(names):
        try:
            with safe_open(checkpoint / name, framework="pt"):
                pass  # opening checks that the file is as long as its header says
        except (OSError, SafetensorError):
            return f"{name} is missing or cut"
    return None


def _problem_with_states(checkpoint: Path) -> str | None:
    states = ["optimizer.pt", "scheduler.pt", *(path.name for path in checkpoint.glob("rng_state*.pth"))]
    for name in states:
        if not zipfile.is_zipfile(checkpoint / name):  # looks for the directory that torch.save writes last
            return f"{name} is missing or cut"
    return None

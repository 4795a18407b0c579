"""Find the newest complete checkpoint to resume from.

`Trainer` writes a checkpoint file by file, `trainer_state.json` last, and deletes old ones file by file. If it is
killed in between, an incomplete folder remains. Storage may also damage a file later, and PyTorch loads an optimizer
state with flipped bits without complaint: `checksums.json` has the SHA-256 of each file.
"""

import hashlib
import json
import math
import os
import zipfile
from functools import lru_cache
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import nn

_CHECKSUMS = "checksums.json"


def problem_with(checkpoint: Path) -> str | None:
    """Return why a checkpoint cannot be resumed, or None if it is complete and undamaged."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json is missing or truncated (it is written last)"
    if any(checkpoint.glob("pytorch_model_fsdp*")):  # sharded by FSDP, under names of its own
        return _damage(checkpoint)
    return _problem_with_weights(checkpoint) or _problem_with_states(checkpoint) or _damage(checkpoint)


def last_whole_checkpoint(output_dir: Path, before: float = math.inf) -> tuple[Path | None, dict[str, str]]:
    """Return the newest complete checkpoint in `output_dir`, and why each newer one was skipped, by name.

    Args:
        before: Only checkpoints of earlier steps count.
    """
    skipped: dict[str, str] = {}
    named = [(path.name.removeprefix("checkpoint-"), path) for path in output_dir.glob("checkpoint-*")]
    numbered = {int(number): path for number, path in named if number.isdigit() and int(number) < before}
    for _, checkpoint in sorted(numbered.items(), reverse=True):
        problem = problem_with(checkpoint)
        if problem is None:
            return checkpoint, skipped
        skipped[checkpoint.name] = problem
    return None, skipped


def what_is_safe(output_dir: Path) -> str:
    """Return from what a run that ends now can be continued."""
    checkpoint, _ = last_whole_checkpoint(output_dir)
    if checkpoint is None:
        return "no checkpoint is complete yet: the same command starts again"
    return f"{checkpoint} is complete: the same command continues from there"


def check_fits(checkpoint: Path, model: nn.Module) -> None:
    """Check that the weights of a checkpoint are those of a model, some of which `Trainer` would silently leave out.

    Raises:
        ValueError: If a name or a shape differs.
    """
    file, own = checkpoint / "model.safetensors", {name: list(v.shape) for name, v in model.state_dict().items()}
    if not file.exists():  # several files, or those of DeepSpeed
        return
    with safe_open(file, framework="pt") as weights:
        saved = {name: list(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    parameters = {name for name, _ in model.named_parameters()}
    wrong = [name for name in sorted(saved.keys() | parameters) if saved.get(name) != own.get(name)]
    if wrong:
        raise ValueError(
            f"{checkpoint} holds the weights of another model: {len(wrong)} names or shapes differ, as {wrong[0]}: "
            "train in another output_dir, or delete this folder"
        )


def write_checksums(checkpoint: Path) -> None:
    """Write the SHA-256 of each file of a complete checkpoint."""
    digests = {
        path.relative_to(checkpoint).as_posix(): _digest(path)
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file() and path.name != _CHECKSUMS
    }
    unfinished = checkpoint / f"{_CHECKSUMS}.tmp"
    unfinished.write_text(json.dumps(digests, indent=0), encoding="utf-8")
    unfinished.replace(checkpoint / _CHECKSUMS)


def _damage(checkpoint: Path) -> str | None:
    """Return which file differs from what was written; None if none does, or if there are no checksums."""
    file = checkpoint / _CHECKSUMS
    if not file.exists():  # of an earlier version, or killed in the meantime: the other checks have to do
        return None
    try:
        digests = json.loads(file.read_text(encoding="utf-8"))
        changed = [name for name, digest in digests.items() if _digest(checkpoint / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        return f"its checksums cannot be verified ({error})"
    return f"{', '.join(changed)} is damaged: its checksum is not the one that was written" if changed else None


def _digest(path: Path) -> str:
    status = os.stat(path)
    return _digest_of_version(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=256)  # a run asks for the last whole checkpoint several times
def _digest_of_version(path: Path, size: int, mtime_ns: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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

"""Store checkpoints on the Hub and fetch them on another machine."""

import json
import os
import shutil
import tempfile
from pathlib import Path

import yaml
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from hub.push import Repository, explained
from hub.redaction import shorten_values

LAST_CHECKPOINT = "last-checkpoint"  # transformers' name
_STATE = "trainer_state.json"
_SCRATCH = ".hub"  # in an output folder, where a run empties it
_LEFT_OUT = "training_args.bin"  # a pickle with the token and absolute paths, which nothing reads


def stage_checkpoint(checkpoint: Path, settings_file: Path, target: Path) -> None:
    """Link a checkpoint to `target` for the upload, so that `Trainer` may delete it, and copy its settings."""
    for path in checkpoint.rglob("*"):
        if path.is_file() and path.name != _LEFT_OUT:
            link = target / path.relative_to(checkpoint)
            link.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(path, link)
            except OSError:  # not supported by this file system
                shutil.copy(path, link)
    settings = shorten_values(yaml.safe_load(settings_file.read_text(encoding="utf-8")))
    text = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    (target / settings_file.name).write_text(text, encoding="utf-8")


def fetch_checkpoint(repository: Repository, output_dir: Path, settings_name: str) -> Path | None:
    """Download the latest checkpoint as `output_dir/checkpoint-<step>`, and its settings to `output_dir`.

    Returns the checkpoint, or None if there is none. Raises HubError if the Hub cannot be reached.
    """
    with explained(repository.repo_id):
        try:
            files = repository.api.list_repo_files(repository.repo_id, revision=repository.revision)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return None
    name = _latest({file.partition("/")[0] for file in files if file.endswith(f"/{_STATE}")})
    if name is None:
        return None
    (output_dir / _SCRATCH).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir / _SCRATCH) as scratch:
        with explained(repository.repo_id):
            repository.api.snapshot_download(
                repository.repo_id, revision=repository.revision, allow_patterns=f"{name}/*", local_dir=scratch
            )
        found = Path(scratch) / name
        step = json.loads((found / _STATE).read_text(encoding="utf-8"))["global_step"]
        if (found / settings_name).exists():
            (found / settings_name).replace(output_dir / settings_name)
        return found.rename(output_dir / f"checkpoint-{step}")


def _latest(folders: set[str]) -> str | None:
    numbered = [name for name in folders if name.removeprefix("checkpoint-").isdigit()]
    if numbered:
        return max(numbered, key=lambda name: int(name.removeprefix("checkpoint-")))
    return LAST_CHECKPOINT if LAST_CHECKPOINT in folders else None

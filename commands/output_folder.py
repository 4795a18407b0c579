"""Check of the output folder before training: it is new, or holds a finished run or one to continue."""

import errno
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from commands.pretraining_settings import PretrainingSettings
from commands.settings import Origin, TrainingSettings
from data.bad_images import BadImages
from hub.export.native import UNFINISHED_EXPORT
from training.checkpoints import last_whole_checkpoint, problem_with

SETTINGS_FILE = "settings.yaml"
BAD_IMAGES_FILE = "bad_images.jsonl"
CURVE_FILE, PANEL_FILE, PANELS = "training_curve.png", "reconstructions.png", "panels"
STREAM = "stream"  # folder with the places of a stream where windows begin
ANCHOR = "gram_anchor"  # folder with the frozen encoder of a loss, which every continuation of the run needs
# Files of a fine-tuning run.
SUBSET_FILE, METRICS_FILE, CONFUSION_FILE = "labelled_images.txt", "metrics.json", "confusion_matrix.png"
# Settings that do not change the result, so that a continued run may have other values.
FREE_TO_CHANGE = (
    *("dataloader_", "logging_", "eval_", "save_", "report_to", "disable_tqdm", "hub_", "push_to_hub"),
    *("max_bad", "stop_on_collapse", "shard_cache"),
)
# Settings that must be those of the checkpoint to load it.
SHAPES = (
    *("model", "init_from", "method", "image_size", "patch_size", "num_channels", "decoder", "vocab_size"),
    *("text_", "max_text_length", "pair_dataset", "num_fusion_layers", "use_sub_layernorm"),
    *("task", "pooling", "mode", "num_trained_blocks"),  # of a fine-tuning run
)
# What runs write, besides the code files of the model, which are named as in `modeling`.
WRITTEN_FOLDERS = ("checkpoint-*", "pretraining", "text", PANELS, ANCHOR, STREAM, "runs", ".hub")
WRITTEN_FILES = (
    *("README.md", "config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("trainer_state.json", "codebook.json", "targets-*.npy", CURVE_FILE, PANEL_FILE, BAD_IMAGES_FILE),
    *(SUBSET_FILE, METRICS_FILE, CONFUSION_FILE, "retrieved.png", "segments.png", "detections.png"),
    *("tokenizer.json", "tokenizer_config.json"),
)
# What a run that was killed may have left behind.
LEFT_BEHIND = (f"{UNFINISHED_EXPORT}*", ".export", "targets-*.part.npy")
# What run_evaluation.py writes besides METRICS_FILE; deleted only if it wrote that, as users may have such files.
_OF_AN_EVALUATION = ("report.html", "feature_maps.png", "labels.txt", "patch_similarity.png", "segmentation.png")


def check_output_dir(folder: Path) -> None:
    """Raise OSError if a folder cannot be made or written; nothing is created."""
    advice = "give another --output_dir"
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"Not a directory, {advice}", str(existing))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(
            errno.EACCES, f"Nothing can be written here, change the permissions or {advice}", existing
        )


def refuse_finished(settings: TrainingSettings, written_last: str) -> None:
    """Raise ValueError if --output_dir holds a finished run that stays, before images are opened for nothing."""
    if settings.output_dir and not (settings.overwrite or settings.dry_run):
        _check_unfinished(Path(settings.output_dir), written_last)


def prepare_output_dir(
    output_dir: Path,
    settings: TrainingSettings,
    bad: BadImages,
    log: Callable[[str], None],
    written_last: str,
    check: Callable[[Path], None] | None = None,
) -> Path | None:
    """Prepare the output folder of a new or a continued run; returns the checkpoint to continue from, if any.

    Args:
        written_last: File that exists only in the folder of a finished run.
        check: Raises ValueError if a checkpoint does not fit, before anything is written.

    Raises:
        ValueError: If the folder holds a finished run, or one that cannot or must not be continued.
    """
    if settings.overwrite:
        _delete_old_run(output_dir)
    _check_unfinished(output_dir, written_last)
    checkpoint, skipped = last_whole_checkpoint(output_dir)
    for name, problem in skipped.items():
        log(f"warning: {output_dir / name} is skipped: {problem}")
    if given := settings.resume_from_checkpoint:
        checkpoint = Path(given) if given not in ("true", "True") else checkpoint
        reason = "no complete checkpoint there" if checkpoint is None else problem_with(checkpoint)
        if reason:
            raise ValueError(f"--resume_from_checkpoint {given}: {reason}")
    elif checkpoint is not None and settings.resume == "never":
        raise ValueError(
            f"{output_dir} holds an unfinished run: leave --resume at auto to continue it, or add --overwrite"
        )
    if checkpoint is not None:
        _compare_settings(output_dir / SETTINGS_FILE, settings, log)
        if check is not None:
            check(checkpoint)
        log(f"continuing from {checkpoint}")
    output_dir.mkdir(parents=True, exist_ok=True)
    _delete(output_dir, LEFT_BEHIND)
    (output_dir / SETTINGS_FILE).write_text(_as_yaml(settings), encoding="utf-8")
    found = BadImages() if checkpoint is None else BadImages.read(output_dir / BAD_IMAGES_FILE)  # while decoding
    (output_dir / BAD_IMAGES_FILE).unlink(missing_ok=True)
    BadImages(found | bad).append_to(output_dir / BAD_IMAGES_FILE)
    return checkpoint


def interrupted_run(chosen: PretrainingSettings) -> Path | None:
    """Return the checkpoint of an interrupted run with the same method and --init_from, if any."""
    output_dir = Path(chosen.output_dir or chosen.default_output_dir())
    if chosen.overwrite or chosen.resume == "never" or not (output_dir / SETTINGS_FILE).is_file():
        return None
    given = chosen.resume_from_checkpoint
    if given is not None and given not in ("true", "True"):
        return None if problem_with(Path(given)) else Path(given)
    saved = yaml.safe_load((output_dir / SETTINGS_FILE).read_text(encoding="utf-8"))
    if (saved.get("init_from"), saved.get("method")) != (chosen.init_from, chosen.method):
        return None
    return last_whole_checkpoint(output_dir)[0]


def settings_of_interrupted_run(settings: TrainingSettings) -> dict[str, Any]:
    """Return what the run to be continued was started with, as a recipe; empty if there is none."""
    if settings.overwrite or settings.resume == "never":
        return {}
    folder, given = Path(settings.output_dir or settings.default_output_dir()), settings.resume_from_checkpoint
    if given is not None and given not in ("true", "True"):
        folder = Path(given).parent
    if not (folder / SETTINGS_FILE).is_file() or last_whole_checkpoint(folder)[0] is None:
        return {}
    saved: dict[str, Any] = yaml.safe_load((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    return saved


def _as_yaml(settings: TrainingSettings) -> str:
    return yaml.safe_dump(settings.as_recipe(), sort_keys=False, allow_unicode=True)


def _compare_settings(saved_file: Path, settings: TrainingSettings, log: Callable[[str], None]) -> None:
    """Log settings that differ from those of the interrupted run; raise ValueError if it cannot continue with them."""
    if not saved_file.exists():
        return
    saved, now = yaml.safe_load(saved_file.read_text(encoding="utf-8")), yaml.safe_load(_as_yaml(settings))
    # An older version did not save settings that it did not have.
    saved = {name: value for name, value in now.items() if settings.origins[name] == Origin.DEFAULT} | saved
    changed = [n for n in sorted(saved.keys() | now.keys()) if saved.get(n) != now.get(n)]
    changed = [name for name in changed if not name.startswith(FREE_TO_CHANGE)]
    shown = ", ".join(f"{name} {saved.get(name)} -> {now.get(name)}" for name in changed)
    if any(name.startswith(SHAPES) for name in changed):
        raise ValueError(
            f"{saved_file.parent} holds an unfinished run with other settings ({shown}): continue it with its own, "
            "add --overwrite, or give another --output_dir"
        )
    if changed:
        log(f"warning: continuing with other settings than before: {shown}")


def _check_unfinished(output_dir: Path, written_last: str) -> None:
    if (output_dir / written_last).exists():
        raise ValueError(
            f"{output_dir} holds a finished run, which is not changed: add --overwrite to replace it, or give another "
            "--output_dir"
        )


def _delete_old_run(output_dir: Path) -> None:
    """Delete the files of an earlier run, and nothing else."""
    if not (output_dir / SETTINGS_FILE).exists():
        return
    code = {path.name for path in output_dir.glob("pretraining/*.py")} | _code_of_tokenizer(output_dir)
    metrics = output_dir / METRICS_FILE
    was_evaluated = metrics.is_file() and '"written_by": "run_evaluation.py"' in metrics.read_text(encoding="utf-8")
    report = _OF_AN_EVALUATION if was_evaluated else ()
    _delete(output_dir, (*WRITTEN_FOLDERS, *WRITTEN_FILES, *code, *report))


def _code_of_tokenizer(output_dir: Path) -> set[str]:
    """Return the names of the files that the tokenizer in a folder needs, which lie beside it."""
    config = output_dir / "config.json"
    if not config.is_file() or '"auto_map"' not in config.read_text(encoding="utf-8"):
        return {"dvae.py"}
    return {path.name for path in (Path(__file__).parent.parent / "modeling").glob("*.py")}


def _delete(output_dir: Path, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        for path in output_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def logging_into(output_dir: Path) -> Iterator[None]:
    """Within this context a new `Trainer` writes its TensorBoard files to this folder."""
    name = "TENSORBOARD_LOGGING_DIR"
    given = name in os.environ
    os.environ.setdefault(name, str(output_dir / "runs"))
    try:
        yield
    finally:
        if not given:
            del os.environ[name]

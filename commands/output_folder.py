"""What a run finds in its output folder: nothing, a finished run, or one to continue."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from commands.settings import TrainingSettings
from data.bad_images import BadImages
from training.checkpoints import last_whole_checkpoint, problem_with

SETTINGS_FILE = "settings.yaml"
BAD_IMAGES_FILE = "bad_images.jsonl"
CURVE_FILE, PANEL_FILE, PANELS = "training_curve.png", "reconstructions.png", "panels"
# Of a fine-tuning.
SUBSET_FILE, METRICS_FILE, CONFUSION_FILE = "labelled_images.txt", "metrics.json", "confusion_matrix.png"
# Settings that may change between a run and its continuation without changing what is computed.
FREE_TO_CHANGE = (
    "dataloader_",
    "logging_",
    "eval_",
    "save_",
    "report_to",
    "disable_tqdm",
    "hub_",
    "push_to_hub",
    "max_bad",
)
# Settings that a checkpoint cannot be read without.
SHAPES = (
    *("model", "init_from", "method", "image_size", "patch_size", "num_channels", "decoder_", "vocab_size"),
    *("pooling", "mode", "num_trained_blocks"),  # of a fine-tuning
)
# What runs write, beside folders; the code of the model lies there under the names that it has in `modeling`.
WRITTEN_FOLDERS = ("checkpoint-*", "pretraining", PANELS, "runs", ".hub")
WRITTEN_FILES = (
    *("README.md", "config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *(
        "trainer_state.json",
        "codebook.json",
        "tokens-*.npy",
        CURVE_FILE,
        SUBSET_FILE,
        METRICS_FILE,
        CONFUSION_FILE,
        PANEL_FILE,
        BAD_IMAGES_FILE,
    ),
)
# What run_evaluation.py writes beside METRICS_FILE; a folder may hold such files of the user's own.
_OF_AN_EVALUATION = ("report.html", "feature_maps.png", "labels.txt")


def prepare_output_dir(
    output_dir: Path,
    settings: TrainingSettings,
    bad: BadImages,
    log: Callable[[str], None],
    written_last: str,
    check: Callable[[Path], None] | None = None,
) -> Path | None:
    """Decide between a new run, a continued one and a refusal; returns the checkpoint to continue from.

    A folder with the file `written_last` holds a finished run. `bad`: the images left out.
    `check` may refuse the checkpoint with a ValueError, before anything is written.

    Raises:
        ValueError: the folder holds a finished run, or one that cannot or must not be continued.
    """
    if settings.overwrite:
        _delete_old_run(output_dir)
    if (output_dir / written_last).exists():
        raise ValueError(
            f"{output_dir} holds a finished run, which is not touched: add --overwrite to start anew in its place, "
            "or give another --output_dir"
        )
    checkpoint, passed_over = last_whole_checkpoint(output_dir)
    for name, problem in passed_over.items():
        log(f"note: {output_dir / name} is passed over: {problem}")
    if given := settings.resume_from_checkpoint:
        checkpoint = Path(given) if given not in (True, "true", "True") else checkpoint
        reason = "no whole checkpoint there" if checkpoint is None else problem_with(checkpoint)
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
    (output_dir / SETTINGS_FILE).write_text(_as_yaml(settings), encoding="utf-8")
    found = BadImages() if checkpoint is None else BadImages.read(output_dir / BAD_IMAGES_FILE)  # while decoding
    (output_dir / BAD_IMAGES_FILE).unlink(missing_ok=True)
    BadImages(found | bad).append_to(output_dir / BAD_IMAGES_FILE)
    return checkpoint


def interrupted_run(output_dir: Path, chosen: Mapping[str, Any]) -> Path | None:
    """The checkpoint from which a run that begins from the same model with the same method will go on, if any."""
    if chosen["overwrite"] or chosen["resume"] == "never" or not (output_dir / SETTINGS_FILE).is_file():
        return None
    given = chosen.get("resume_from_checkpoint")
    if given not in (None, True, "true", "True"):
        return None if problem_with(Path(given)) else Path(given)
    saved = yaml.safe_load((output_dir / SETTINGS_FILE).read_text(encoding="utf-8"))
    if any(saved.get(name) != chosen[name] for name in ("init_from", "method")):
        return None
    return last_whole_checkpoint(output_dir)[0]


def _as_yaml(settings: TrainingSettings) -> str:
    return yaml.safe_dump(settings.as_recipe(), sort_keys=False, allow_unicode=True)


def _compare_settings(saved_file: Path, settings: TrainingSettings, log: Callable[[str], None]) -> None:
    """A continued run with other settings is not the run that was interrupted: say so, or refuse."""
    if not saved_file.exists():
        return
    saved, now = yaml.safe_load(saved_file.read_text(encoding="utf-8")), yaml.safe_load(_as_yaml(settings))
    changed = [n for n in sorted(saved.keys() | now.keys()) if saved.get(n) != now.get(n)]
    changed = [name for name in changed if not name.startswith(FREE_TO_CHANGE)]
    shown = ", ".join(f"{name} {saved.get(name)} -> {now.get(name)}" for name in changed)
    if any(name.startswith(SHAPES) for name in changed):
        raise ValueError(
            f"{saved_file.parent} holds an unfinished run with other settings ({shown}): continue it with its own, "
            "add --overwrite, or give another --output_dir"
        )
    if changed:
        log(f"note: continuing with other settings than the run began with: {shown}")


def _delete_old_run(output_dir: Path) -> None:
    """What a run of ours wrote, and nothing else that may lie in the folder."""
    if not (output_dir / SETTINGS_FILE).exists():
        return
    code = {path.name for path in output_dir.glob("pretraining/*.py")} | {"dvae.py"}
    report = _OF_AN_EVALUATION if _was_evaluated(output_dir) else ()
    for pattern in (*WRITTEN_FOLDERS, *WRITTEN_FILES, *code, *report):
        for path in output_dir.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _was_evaluated(output_dir: Path) -> bool:
    """Whether run_evaluation.py wrote its results into this folder."""
    file = output_dir / METRICS_FILE
    return file.is_file() and '"written_by": "run_evaluation.py"' in file.read_text(encoding="utf-8")


@contextmanager
def logging_into(output_dir: Path) -> Iterator[None]:
    """Where a `Trainer` made meanwhile writes for TensorBoard: several may follow each other in one process."""
    name = "TENSORBOARD_LOGGING_DIR"
    given = name in os.environ
    os.environ.setdefault(name, str(output_dir / "runs"))
    try:
        yield
    finally:
        if not given:
            del os.environ[name]

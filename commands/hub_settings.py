"""Use of the Hub as the flags ask for it: where to upload, how often, and which checkpoint to continue from."""

from collections.abc import Callable
from pathlib import Path

from transformers.trainer_utils import HubStrategy

from commands.output_folder import SETTINGS_FILE
from commands.settings import TrainingSettings
from hub.checkpoints import LAST_CHECKPOINT, fetch_checkpoint
from hub.push import HubError, Repository
from training.checkpoints import last_whole_checkpoint
from training.hub_push import HubPush

_NAMES_OF_STATES: dict[HubStrategy, Callable[[int], str]] = {
    HubStrategy.CHECKPOINT: lambda step: LAST_CHECKPOINT,
    HubStrategy.ALL_CHECKPOINTS: lambda step: f"checkpoint-{step}",
}


def open_repository(settings: TrainingSettings) -> Repository | None:
    """Return the repository to upload to, or None; makes no request."""
    if not settings.push_to_hub:
        return None
    assert settings.hub_model_id is not None
    return Repository(settings.hub_model_id, settings.hub_private_repo, settings.hub_token, settings.hub_revision)


def bring_back(
    repository: Repository, settings: TrainingSettings, output_dir: Path, written_last: str, log: Callable[[str], None]
) -> None:
    """Download the checkpoint of an earlier run into an output folder that has none."""
    starts_anew = settings.overwrite or settings.resume == "never"
    if settings.hub_strategy not in _NAMES_OF_STATES or starts_anew or settings.resume_from_checkpoint:
        return
    if (output_dir / written_last).exists() or last_whole_checkpoint(output_dir)[0] is not None:
        return
    try:
        found = fetch_checkpoint(repository, output_dir, SETTINGS_FILE)
    except HubError as error:
        log(
            f"warning: no checkpoint could be downloaded from the Hub ({error}), so training starts from step 0; "
            "if there is one, stop now and try again"
        )
        return
    if found is not None:
        log(f"found a checkpoint of this run in {repository.url}: {found}")


def build_hub_push(
    repository: Repository,
    settings: TrainingSettings,
    output_dir: Path,
    stage: Callable[[Path, str | None], None] | None,
    log: Callable[[str], None],
) -> HubPush:
    """Return the callback that uploads the result, and what `stage` writes at every save if --hub_strategy says so."""
    if stage is None or settings.hub_strategy is HubStrategy.END:
        return HubPush(repository, output_dir, stage or _stage_nothing, log, at_saves=False)
    return HubPush(repository, output_dir, stage, log, _NAMES_OF_STATES.get(settings.hub_strategy))


def _stage_nothing(folder: Path, checkpoint_name: str | None) -> None:
    raise AssertionError("only the result is uploaded")

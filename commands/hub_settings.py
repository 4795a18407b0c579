"""What the hub flags ask for: where to push, how often, and a checkpoint from there where this machine has none."""

from collections.abc import Callable
from pathlib import Path

from transformers.trainer_utils import HubStrategy

from commands.artifacts import Artifacts
from commands.output_folder import SETTINGS_FILE
from commands.settings import TrainingSettings
from hub.card_rules import license_problem
from hub.checkpoints import LAST_CHECKPOINT, fetch_checkpoint
from hub.push import HubError, Repository
from training.checkpoints import last_whole_checkpoint
from training.hub_push import HubPush

_NAMES_OF_STATES: dict[HubStrategy, Callable[[int], str]] = {
    HubStrategy.CHECKPOINT: lambda step: LAST_CHECKPOINT,
    HubStrategy.ALL_CHECKPOINTS: lambda step: f"checkpoint-{step}",
}


def open_repository(settings: TrainingSettings) -> Repository | None:
    """Where `--push_to_hub` goes; nothing is asked of the Hub yet.

    Raises:
        ValueError: it cannot be the id of a repository, or the Hub would refuse the license.
    """
    if settings.license and (problem := license_problem(settings.license)):
        raise ValueError(f"--{problem}")
    if not settings.push_to_hub:
        return None
    assert settings.hub_model_id is not None
    return Repository(settings.hub_model_id, settings.hub_private_repo, settings.hub_token, settings.hub_revision)


def bring_back(
    repository: Repository, settings: TrainingSettings, output_dir: Path, written_last: str, log: Callable[[str], None]
) -> None:
    """A checkpoint that another machine pushed, into an output folder that has none."""
    starts_anew = settings.overwrite or settings.resume == "never"
    if settings.hub_strategy not in _NAMES_OF_STATES or starts_anew or settings.resume_from_checkpoint:
        return
    if (output_dir / written_last).exists() or last_whole_checkpoint(output_dir)[0] is not None:
        return
    try:
        found = fetch_checkpoint(repository, output_dir, SETTINGS_FILE)
    except HubError as error:
        log(
            f"note: the run begins anew, for no checkpoint of it could be fetched from the Hub ({error}); "
            "if there is one, stop now and try again"
        )
        return
    if found is not None:
        log(f"found a checkpoint of this run in {repository.url}: {found}")


def build_hub_push(
    repository: Repository, artifacts: Artifacts, settings: TrainingSettings, log: Callable[[str], None]
) -> HubPush:
    """Uploads at every save what there is at the end, and training states if `--hub_strategy` asks for them."""
    strategy, output_dir = settings.hub_strategy, artifacts.trainer.output_dir
    name = _NAMES_OF_STATES.get(strategy)
    return HubPush(repository, output_dir, artifacts.stage, log, name, at_saves=strategy is not HubStrategy.END)

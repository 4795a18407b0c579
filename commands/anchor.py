"""The frozen encoder that a training stays close to: the one that it starts from, kept in the output folder."""

from pathlib import Path

from accelerate import PartialState

from commands.launch import first_on_main
from commands.output_folder import ANCHOR
from commands.pretraining_settings import PretrainingSettings
from hub.open_model import open_model
from modeling import MimConfig
from modeling.frozen_teacher import FrozenTeacher
from training.targets import AnchorTargets


def open_anchor(settings: PretrainingSettings, config: MimConfig) -> AnchorTargets | None:
    """Open the encoder of --init_from, or what `keep_anchor` has kept of an interrupted run; None without the loss."""
    if not getattr(config, "gram_weight", 0):
        return None
    kept = Path(settings.output_dir or settings.default_output_dir()) / ANCHOR
    is_resumed = settings.start is not None and settings.start.sizes_only
    source = str(kept) if is_resumed and (kept / "config.json").is_file() else str(settings.init_from)
    encoder = open_model(source, "init_from").model
    return AnchorTargets(FrozenTeacher(encoder, config.image_mean, config.image_std, settings.image_size, source))


def keep_anchor(anchor: AnchorTargets, output_dir: Path) -> None:
    """Save the encoder beside the checkpoints: the source may change or vanish before a run is continued."""
    encoder = anchor.model.model
    if Path(encoder.name_or_path) != output_dir / ANCHOR:
        first_on_main(PartialState(), lambda: encoder.save_pretrained(output_dir / ANCHOR))

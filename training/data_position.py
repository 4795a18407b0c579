"""Where a run is in its data, so that it goes on at the same image with another number of images per step."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from data.streams import StreamDataset

if TYPE_CHECKING:
    from training.trainer import MimTrainer

_FILE = "data_position.json"


def save_position(trainer: "MimTrainer", folder: Path) -> None:
    """Write the number of the next image (`EpochSampler`) to a checkpoint, and where a stream is."""
    if hasattr(trainer, "_epoch_sampler"):
        (folder / _FILE).write_text(json.dumps({"next_image": _next_image(trainer)}), encoding="utf-8")
    if isinstance(trainer.train_dataset, StreamDataset):
        trainer.train_dataset.save(folder)


def go_on_at_the_same_image(trainer: "MimTrainer") -> None:
    """Shift the order of images, if a step had another number of them before the run was resumed."""
    if not hasattr(trainer, "_epoch_sampler"):
        return
    file = None if trainer.resumed_from is None else trainer.resumed_from / _FILE
    if file is not None and file.exists():  # not in checkpoints of older versions
        position = int(json.loads(file.read_text(encoding="utf-8"))["next_image"])
        trainer._epoch_sampler.shift = position - _next_image(trainer)
        if hasattr(trainer.train_dataset, "shift_steps"):
            trainer.train_dataset.shift_steps(trainer._epoch_sampler.shift)
    if isinstance(trainer.train_dataset, StreamDataset):
        trainer.train_dataset.go_on(_next_image(trainer), trainer.resumed_from, trainer.is_world_process_zero())
        trainer.accelerator.wait_for_everyone()  # the main process may have emptied the folder


def _next_image(trainer: "MimTrainer") -> int:
    """Return the number of the first image of the current step."""
    args, sampler = trainer.args, trainer._epoch_sampler
    images_per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    epoch, step = divmod(trainer.state.global_step, trainer.steps_per_epoch)
    return epoch * sampler.num_images + step * images_per_step + sampler.shift

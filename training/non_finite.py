"""Say which step, images or weights made a training non-finite, and what to do about it."""

from typing import Any

from accelerate.utils import gather_object

from data.images import NamedItems
from training.checkpoints import last_whole_checkpoint
from training.guard import has_only_finite_weights


def find_non_finite(trainer: Any) -> str | None:
    """Describe the first non-finite loss, gradient or weight in any process, or return None; waits for the device.

    Every process calls it.
    """
    if trainer.guard.is_raised_anywhere():
        step = trainer.guard.first_bad_step()
        return (
            f"the loss or its gradient became NaN or infinite at step {step + 1}. {_cause(trainer)} No weight was "
            f"updated from that step on. {_last_good(trainer)}"
        )
    if not has_only_finite_weights(trainer.model):
        return (
            f"weights became NaN or infinite by step {trainer.state.global_step}, with a learning rate of "
            f"{trainer._get_learning_rate():.3g}. {_last_good(trainer)} Lower `learning_rate`."
        )
    return None


def _cause(trainer: Any) -> str:
    # With several processes their losses wait for each other, and each may have another number of images to try.
    is_compared = trainer.accelerator.num_processes > 1 and getattr(trainer.model, "compares_images", False)
    is_sharded = trainer.is_sharded
    culprits, batch = _bad_images(trainer, tries_each=not (is_compared or is_sharded))
    calmer = "lower `learning_rate`, or clip with `max_grad_norm` 1; under `fp16` use `bf16`"
    if not batch:
        return f"every loss was finite, the gradient was not: {calmer}."
    if 0 < len(culprits) < len(batch):
        return f"the loss of these images is not finite: {', '.join(culprits)}. Repair or remove them."
    if is_compared or is_sharded:
        why = "the processes share the model" if is_sharded else "the loss compares the images of all processes"
        return f"{why}, so none was tried alone. Look for damaged ones, or {calmer}. The batch was {', '.join(batch)}."
    which = "every image" if culprits else "no single image"
    return f"{which} of its batch does it alone, so it is not the data: {calmer}. It was {', '.join(batch)}."


def _bad_images(trainer: Any, tries_each: bool) -> tuple[list[str], list[str]]:
    """Return the names of the images that alone give a non-finite loss, if each is tried, and of the bad batch."""
    dataset, indices = trainer.train_dataset, [i for i in trainer.guard.image_index.tolist() if i >= 0]
    if not isinstance(dataset, NamedItems):
        indices = []
    epoch = int(trainer.guard.step) // trainer.steps_per_epoch
    tried = indices if tries_each else []
    alone = [index for index in tried if not trainer.has_finite_loss(dataset.item(index, epoch))]
    names = [dataset.name(index) for index in alone], [dataset.name(index) for index in indices]
    return tuple(sorted(set(gather_object(part))) for part in names)  # type: ignore[return-value]


def _last_good(trainer: Any) -> str:
    checkpoint, _ = last_whole_checkpoint(trainer.output_dir)
    return f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was written."

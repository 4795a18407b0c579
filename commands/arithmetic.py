"""Rules that derive the training schedule from the settings, the number of images and the hardware.

Small data never stops a run: a rule that lowers or raises a number for its sake adds a sentence to `notes`.
"""

import math
from dataclasses import dataclass

from commands.settings import TrainingSettings

_MAX_WARMUP_SHARE = 0.1  # of all steps, unless the warm-up is given on the command line
REFERENCE_BATCH = 256  # images per step that base_learning_rate is meant for
_BATCH_ON_GPU = 64
_MAX_WORKERS_ON_GPU, _MAX_WORKERS_ON_CPU = 16, 4


@dataclass(frozen=True)
class Hardware:
    """The devices and processes of a run; `num_cpus` and `num_local_processes` are those of one node."""

    device_type: str
    num_cpus: int
    world_size: int = 1
    num_local_processes: int = 1
    has_bf16: bool = False

    @property
    def is_cpu(self) -> bool:
        return self.device_type == "cpu"


def batch_size_and_accumulation(
    settings: TrainingSettings, hardware: Hardware, num_images: int, notes: list[str], batch_on_cpu: int
) -> tuple[int, int]:
    """Return the images per micro-batch, and the micro-batches per optimizer step."""
    if num_images < hardware.world_size:
        raise ValueError(
            f"{hardware.world_size} processes cannot share {num_images} training image(s): "
            f"start at most {num_images}, or give more images"
        )
    wanted = settings.default_batch_size or (batch_on_cpu if hardware.is_cpu else _BATCH_ON_GPU)
    if settings.is_given("per_device_train_batch_size"):
        assert settings.per_device_train_batch_size != "auto", "commands.batch_size has replaced it"
        wanted = settings.per_device_train_batch_size
    batch_size = min(wanted, num_images // hardware.world_size)
    if batch_size < wanted:
        notes.append(f"{batch_size} images per device instead of {wanted}: there are only {num_images:,}")
    wanted = settings.gradient_accumulation_steps
    accumulation = min(wanted, micro_batches(settings, num_images, batch_size, hardware))
    if accumulation < wanted:
        notes.append(f"accumulation over {accumulation} instead of {wanted} batches: an epoch has no more")
    return batch_size, accumulation


def micro_batches(settings: TrainingSettings, num_images: int, batch_size: int, hardware: Hardware) -> int:
    """Return the number of micro-batches of one process in one epoch, as accelerate distributes them."""
    if settings.dataloader_drop_last:
        return num_images // batch_size // hardware.world_size
    return math.ceil(math.ceil(num_images / batch_size) / hardware.world_size)


def number_of_steps(settings: TrainingSettings, steps_per_epoch: int, notes: list[str], min_steps: int) -> int:
    """Return the optimizer steps of a run: at least `min_steps` unless the user chose its length."""
    if settings.counts("max_steps"):
        return settings.max_steps
    num_epochs = settings.num_train_epochs
    num_steps = math.ceil(num_epochs * steps_per_epoch)
    if num_steps >= min_steps or settings.is_users("num_train_epochs"):
        return num_steps
    raised = math.ceil(min_steps / steps_per_epoch)
    notes.append(
        f"{raised:,} epochs instead of {num_epochs:g}: those would be {num_steps:,} steps, too few to learn from; "
        "--num_train_epochs or --max_steps sets another length"
    )
    return raised * steps_per_epoch


def peak_learning_rate(settings: TrainingSettings, images_per_step: int) -> float:
    if settings.counts("learning_rate"):
        return settings.learning_rate
    assert settings.base_learning_rate is not None, "one of the two rates is given"
    return settings.base_learning_rate * images_per_step / REFERENCE_BATCH


def number_of_warmup_steps(settings: TrainingSettings, steps_per_epoch: int, num_steps: int, notes: list[str]) -> int:
    if settings.counts("warmup_steps"):
        name, given = "warmup_steps", settings.warmup_steps
        wanted = math.ceil(given * num_steps) if given < 1 else int(given)  # below 1 a fraction, as in transformers
        most = num_steps
    else:
        name, wanted = "warmup_epochs", round(settings.warmup_epochs * steps_per_epoch)
        most = num_steps if settings.is_on_command_line(name) else int(_MAX_WARMUP_SHARE * num_steps)
    if wanted > most:
        share = "all steps" if most == num_steps else "a tenth of the run"
        notes.append(f"warm-up of {most:,} steps, {share}, instead of {wanted:,} (--{name})")
    return min(wanted, most)


def precision_of(settings: TrainingSettings, hardware: Hardware) -> str:
    if settings.fp16:
        return "float16"
    wanted = settings.bf16 if settings.is_given("bf16") else hardware.has_bf16 and not hardware.is_cpu
    if wanted and not hardware.is_cpu and not hardware.has_bf16:
        raise ValueError("--bf16: this device does not support bfloat16; use --fp16, or --bf16 false")
    return "bfloat16" if wanted else "float32"


def number_of_workers(settings: TrainingSettings, hardware: Hardware) -> int:
    if settings.is_given("dataloader_num_workers"):
        return settings.dataloader_num_workers
    cores = hardware.num_cpus // hardware.num_local_processes
    if not hardware.is_cpu:
        return min(_MAX_WORKERS_ON_GPU, cores)
    return min(_MAX_WORKERS_ON_CPU, cores - 1) if cores > 2 else 0  # on a CPU they take cores from the model

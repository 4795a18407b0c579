"""`--schedule auto`: batch, learning rate, warm-up and length of a pre-training run by rules where data are few.

Published numbers are for more than a million images in batches of thousands. The rules and what is known about them
are in docs/small-data.md. Whatever the user gives stays.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from accelerate import PartialState

from commands.arithmetic import REFERENCE_BATCH, Hardware
from commands.launch import first_on_main
from commands.output_folder import settings_of_interrupted_run
from commands.pretraining_settings import PretrainingSettings
from commands.settings import Origin
from data.splits import PretrainingSplits
from modeling import CONFIGS

FEW_IMAGES = 100_000
_FAR_BELOW = 8  # a batch that is so many times smaller than the published one
_MOST_WIDTH_FACTOR = 4.0
_LEAST_WARMUP, _MOST_WARMUP = 0.05, 0.1  # of the run
_LEAST_STEPS, _LEAST_STEPS_PER_EPOCH = 2000, 8
_PUBLISHED_BLOCKS = 12  # for which a method's drop path is meant
# On a CPU, in FLOP: of a step (seconds), and of a run without a time budget (an hour or two on two cores).
_MOST_PER_STEP, _MOST_PER_RUN = 4e11, 4e14
_SMALLEST_BATCH, _LARGEST_BATCH = 8, 16
_LEAST_BATCH_FOR_RATE = 64  # the learning rate of smaller batches is that of so many images
_MOST_VALIDATION_IMAGES = 500  # of an evaluation on a CPU: the mean of their losses varies little
_LEAST_SIZE_FOR_LOCAL_CROPS = 48  # pixels; a twentieth of the area of a smaller image is a few pixels wide
_LABEL = "schedule auto"


def follows_rules(settings: PretrainingSettings, num_images: int, images_per_step: float = math.inf) -> bool:
    """Return whether --schedule auto means the rules for few images, or for a batch far below the published one."""
    is_few = num_images < FEW_IMAGES or images_per_step * _FAR_BELOW < CONFIGS[settings.method].published_batch
    return settings.schedule == "auto" and is_few


def keep_schedule(settings: PretrainingSettings) -> PretrainingSettings:
    """Continue a run of an earlier version, which had no rules, without them."""
    saved = first_on_main(PartialState(), lambda: settings_of_interrupted_run(settings))
    if saved and "schedule" not in saved and not settings.is_given("schedule"):
        is_by_rule = settings.origins["mask_unit"] == Origin.RULE
        kept = {"mask_unit": saved["mask_unit"]} if is_by_rule and "mask_unit" in saved else {}
        return settings.derived(Origin.RULE, "as before the interruption", schedule="published", **kept)
    return settings


def config_rules(settings: PretrainingSettings, num_images: int) -> dict[str, tuple[Any, str]]:
    """Return the settings of the method's config that the rules replace, each with the reason."""
    if not follows_rules(settings, num_images):
        return {}
    chosen: dict[str, tuple[Any, str]] = {}
    num_blocks = settings.encoder_settings().get("num_hidden_layers", _PUBLISHED_BLOCKS)
    if (rate := settings.method_settings.get("drop_path_rate", 0)) and num_blocks < _PUBLISHED_BLOCKS:
        chosen["drop_path_rate"] = round(rate * num_blocks / _PUBLISHED_BLOCKS, 3), "the number of blocks"
    if settings.method_settings.get("num_local_crops", 0) and min(settings.image_size) < _LEAST_SIZE_FOR_LOCAL_CROPS:
        chosen["num_local_crops"] = 0, f"images below {_LEAST_SIZE_FOR_LOCAL_CROPS} pixels"
    return {name: choice for name, choice in chosen.items() if not settings.is_given(name)}


def with_validation_rule(
    settings: PretrainingSettings, hardware: Hardware, splits: PretrainingSplits
) -> tuple[PretrainingSplits, list[str]]:
    """Evaluate on some of the validation images only, if there are many and the device is a CPU."""
    num_images = len(splits.validation)
    if not hardware.is_cpu or settings.schedule != "auto" or settings.is_users("validation_fraction"):
        return splits, []
    if num_images <= _MOST_VALIDATION_IMAGES:
        return splits, []
    chosen = np.linspace(0, num_images - 1, _MOST_VALIDATION_IMAGES).round().astype(np.int64)
    note = f"{len(chosen)} of {num_images:,} validation images are evaluated, which a CPU does in less time"
    return replace(splits, validation=splits.validation.select(chosen)), [note]


def with_batch_rule(
    settings: PretrainingSettings, hardware: Hardware, num_images: int, flops_per_image: int
) -> tuple[PretrainingSettings, list[str]]:
    """Choose the images per device of a run on a CPU: few, because many small steps learn more than few large ones."""
    name = "per_device_train_batch_size"
    if not hardware.is_cpu or settings.is_given(name) or not follows_rules(settings, num_images):
        return settings, []
    fitting = _MOST_PER_STEP / max(1, flops_per_image)
    size = 2 ** int(math.log2(min(_LARGEST_BATCH, max(_SMALLEST_BATCH, fitting))))
    most = num_images * settings.crops_per_image // (_LEAST_STEPS_PER_EPOCH * hardware.world_size)
    chosen = max(min(_SMALLEST_BATCH, size), min(size, most))
    reason = f"an epoch has at least {_LEAST_STEPS_PER_EPOCH} steps" if chosen < size else "a step takes a few seconds"
    if chosen > most:
        reason = "the fewest that a step has"
    if chosen == _LARGEST_BATCH:
        reason = "more steps in the same time; larger batches are hardly faster per image on a CPU"
    return settings.derived(Origin.RULE, _LABEL, **{name: chosen}), [f"{chosen} images per device: {reason}"]


def with_schedule_rules(
    settings: PretrainingSettings, hardware: Hardware, num_images: int, flops_per_image: int, images_per_step: int
) -> tuple[PretrainingSettings, list[str]]:
    """Choose learning rate, warm-up and length; returns the settings, and the choices with their reasons."""
    if not follows_rules(settings, num_images, images_per_step):
        return settings, []
    notes = [
        f"--schedule auto: rules for few images or small batches ({num_images:,} images, {images_per_step} a step)"
    ]
    values: dict[str, float] = {}
    if not any(map(settings.is_users, ("learning_rate", "base_learning_rate"))) and settings.base_learning_rate:
        values["learning_rate"], reason = _learning_rate(settings, images_per_step)
        notes.append(f"learning rate {values['learning_rate']:.3g}: {reason}")
    if not any(map(settings.is_users, ("warmup_steps", "warmup_epochs"))):
        published = settings.warmup_epochs / settings.num_train_epochs
        values["warmup_steps"] = round(min(_MOST_WARMUP, max(_LEAST_WARMUP, published)), 4)
        notes.append(
            f"warm-up {values['warmup_steps']:.1%} of the run: published {published:.1%}, kept between "
            f"{_LEAST_WARMUP:.0%} and {_MOST_WARMUP:.0%}"
        )
    has_length = any(map(settings.is_users, ("max_steps", "num_train_epochs"))) or settings.seconds is not None
    if not has_length:
        steps_per_epoch = max(1, num_images * settings.crops_per_image // images_per_step)
        most = _MOST_PER_RUN / flops_per_image / images_per_step / steps_per_epoch if hardware.is_cpu else math.inf
        least = _LEAST_STEPS / steps_per_epoch
        epochs = math.ceil(max(least, min(most, settings.num_train_epochs)))
        if epochs != settings.num_train_epochs:
            values["num_train_epochs"] = epochs
            why = f"{_LEAST_STEPS:,} steps are the least" if epochs >= least > most else "an hour or two on a CPU"
            if epochs > settings.num_train_epochs:
                why = f"fewer than {_LEAST_STEPS:,} steps are too few to learn from"
            notes.append(
                f"{epochs:,} epochs instead of {settings.num_train_epochs:g}: {why}; --time_budget 30m, "
                "--num_train_epochs or --max_steps sets another length"
            )
    return settings.derived(Origin.RULE, _LABEL, **values), notes


def _learning_rate(settings: PretrainingSettings, images_per_step: int) -> tuple[float, str]:
    """Return the published rate, scaled by the batch or its root, and from scratch by the encoder's width."""
    assert settings.base_learning_rate is not None
    published = CONFIGS[settings.method]
    peak = settings.base_learning_rate * published.published_batch / REFERENCE_BATCH
    counted = max(images_per_step, min(_LEAST_BATCH_FOR_RATE, published.published_batch))
    share = counted / published.published_batch
    rate = peak * (share if published.learning_rate_is_linear else math.sqrt(share))
    root = "" if published.learning_rate_is_linear else "the square root of "
    reason = f"{peak:.3g} x {root}{counted:,} / {published.published_batch:,} images per step"
    if counted > images_per_step:
        reason += f" (that of {counted} for fewer)"
    width = settings.encoder_settings().get("hidden_size", published.published_width)
    if settings.start is None and published.learning_rate_follows_width and width < published.published_width:
        factor = min(_MOST_WIDTH_FACTOR, published.published_width / width)
        rate, reason = rate * factor, f"{reason} x {factor:g} for an encoder of width {width}"
    return float(f"{rate:.3g}"), reason

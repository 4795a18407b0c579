"""`--schedule auto` of a fine-tuning: settings by rules where labels are few, and a head that starts fitted.

The published recipes are for more than a million labels in batches of a thousand. The rules and what is known about
them are in docs/small-data.md. Whatever the user gives stays.
"""

import math
from typing import Any, TypeVar

from accelerate import PartialState

from commands.arithmetic import REFERENCE_BATCH
from commands.finetune_settings import FinetuneSettings
from commands.launch import first_on_main
from commands.output_folder import settings_of_interrupted_run
from commands.settings import Origin

FEW_LABELS, VERY_FEW_LABELS = 100_000, 10_000
_PUBLISHED_WIDTH, _PUBLISHED_BLOCKS = 768, 12
_MOST_WIDTH_FACTOR = 4.0
_REFERENCE_LABELS, _EXPONENT = 200, 0.3  # as many epochs as published for so many labels, fewer for more
_WARMUP = 0.1  # of the run
_SMALL_IMAGE = 64  # pixels below which RandAugment removes too much
_LABEL = "schedule auto"

S = TypeVar("S", bound=FinetuneSettings)


def with_rules_for_few_labels(settings: S, encoder_config: Any, num_labels: int) -> tuple[S, list[str]]:
    """Choose epochs, warm-up, drop path and views; returns the settings, and the choices with their reasons.

    Where there are no rules, the settings that are returned have the published schedule. With masks or boxes, there
    is only one for the learning rate.
    """
    saved = first_on_main(PartialState(), lambda: settings_of_interrupted_run(settings))
    is_older = bool(saved) and "schedule" not in saved
    has_rules = settings.published_batch is not None and settings.mode != "linear" and num_labels < FEW_LABELS
    if settings.schedule != "auto" or not has_rules or is_older:
        notes = []
        if settings.schedule == "auto" and settings.is_users("schedule"):
            why = f"its rules are for fewer than {FEW_LABELS:,} labels, and not for --mode linear"
            if settings.published_batch is None:
                why = f"there are no rules for --task {settings.task}"
            if is_older:
                why = "the run was started without its rules"
            notes.append(f"--schedule auto has no effect: {why}")
        return settings.derived(Origin.RULE, _LABEL, schedule="published"), notes
    if not settings.has_rules_for_few_labels:
        return settings, []
    notes = [f"--schedule auto: rules for few labels ({num_labels:,}; docs/small-data.md)"]
    values: dict[str, Any] = {}

    def choose(reason: str, **chosen: Any) -> None:
        new = {name: value for name, value in chosen.items() if not settings.is_users(name)}
        new = {
            name: value for name, value in new.items() if name in settings.values and settings.values[name] != value
        }
        if new:
            values.update(new)
            shown = ", ".join(f"{name} {value}" for name, value in new.items())
            notes.append(f"{shown}: {reason}")

    if not any(map(settings.is_users, ("max_steps", "num_train_epochs"))) and settings.seconds is None:
        published = settings.num_train_epochs
        epochs = published * (_REFERENCE_LABELS / num_labels) ** (_EXPONENT if num_labels > _REFERENCE_LABELS else 1)
        values["num_train_epochs"] = math.ceil(epochs)
        notes.append(
            f"{math.ceil(epochs)} epochs: {published:g}, as published, for {_REFERENCE_LABELS} labels; fewer for more "
            "labels, and as many images for fewer labels"
        )
    if not any(map(settings.is_users, ("warmup_steps", "warmup_epochs"))):
        choose("a tenth of the run", warmup_steps=_WARMUP)
    num_blocks = getattr(encoder_config, "num_hidden_layers", _PUBLISHED_BLOCKS)
    if num_blocks < _PUBLISHED_BLOCKS:
        share = num_blocks / _PUBLISHED_BLOCKS
        choose(
            f"published for {_PUBLISHED_BLOCKS} blocks, here {num_blocks}",
            drop_path=round(settings.drop_path * share, 3),
            layer_decay=max(settings.layer_decay, 0.75),
        )
    if num_labels < VERY_FEW_LABELS:
        choose(f"weaker views below {VERY_FEW_LABELS:,} labels", mixup=0.0, cutmix=0.0, erasing=0.0)
        low, high = settings.crop_scale
        choose(f"less is cut off below {VERY_FEW_LABELS:,} labels", crop_scale=[max(low, 0.4), high])
        strength = 0.0 if settings.image_size < _SMALL_IMAGE else 5.0
        weak = f"weaker views below {VERY_FEW_LABELS:,} labels"
        choose(weak if strength else f"off for images below {_SMALL_IMAGE} pixels", rand_augment=strength)
    return settings.derived(Origin.RULE, _LABEL, **values), notes


def with_rate_for_few_labels(settings: S, encoder_config: Any, images_per_step: int) -> tuple[S, list[str]]:
    """Scale the published learning rate by the square root of the batch and by the encoder's width."""
    if settings.schedule != "auto" or any(map(settings.is_users, ("learning_rate", "base_learning_rate"))):
        return settings, []
    assert settings.base_learning_rate is not None, "every recipe has it"
    published = settings.published_batch
    assert published is not None, "without rules the schedule is the published one"
    peak = settings.base_learning_rate * published / REFERENCE_BATCH
    width = getattr(encoder_config, "hidden_size", _PUBLISHED_WIDTH)
    factor = min(_MOST_WIDTH_FACTOR, max(1.0, _PUBLISHED_WIDTH / width))
    rate = float(f"{peak * math.sqrt(images_per_step / published) * factor:.3g}")
    reason = f"{peak:g} x the square root of {images_per_step:,} / {published:,} images per step"
    width_reason = f" x {factor:g} for an encoder of width {width}" if factor > 1 else ""
    return settings.derived(Origin.RULE, _LABEL, learning_rate=rate), [f"learning rate {rate}: {reason}{width_reason}"]

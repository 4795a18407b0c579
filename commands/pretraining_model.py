"""The model of a pre-training run before it has weights: its config, its memory, and a batch of its shapes."""

from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForPreTraining

from commands.channels import find_value_range
from commands.launch import printer
from commands.memory import Footprint, measure_footprint
from commands.pretraining_settings import PretrainingSettings
from commands.small_data import config_rules
from commands.texts import TextSplits
from data.augmentations import CenterCrop, single_view
from data.collators import MaskingCollator
from data.images import ImageDataset, measure_image_stats
from data.splits import PretrainingSplits
from data.text_batches import MixedCollator
from modeling import CONFIGS, MimConfig, MimPreTrainedModel
from training.targets import Targets


def model_config(
    settings: PretrainingSettings,
    splits: PretrainingSplits,
    targets: Targets | None = None,
    texts: TextSplits | None = None,
) -> MimConfig:
    """Return the method's config: the encoder's sizes, the method's settings, and how pixels are standardized."""
    derived: dict[str, Any] = dict(targets.config_settings) if targets is not None else {}
    for name, value in derived.items():
        if settings.is_given(name) and settings.values[name] != value:
            raise ValueError(f"--{name} {settings.values[name]}: the source of the targets has {value}; leave it out")
    if settings.image_stats == "source" and settings.start is not None:
        derived |= settings.start.image_stats
    transform = single_view(CenterCrop(settings.image_size), settings.num_channels)
    images = ImageDataset(splits.train, transform, seed=settings.seed)
    if (measured := splits.train.source.measured) and ("value_range" not in derived or settings.value_range):
        derived["value_range"] = find_value_range(settings, images, measured.dtype)
    if settings.image_stats == "auto":
        mean, std = measure_image_stats(images, value_range=derived.get("value_range"))
        if 0.0 in std:
            log = printer(PartialState())
            log("warning: a channel has one value in all images, so its standard deviation is set to 1 instead of 0")
        derived |= {"image_mean": mean, "image_std": [value or 1.0 for value in std]}
    derived |= settings_for_images(settings, splits.num_train_images)
    derived |= {name: value for name, (value, _) in config_rules(settings, splits.num_train_images).items()}
    if texts is not None:
        derived["text_config"] = texts.tokens.config
        if texts.pairs is None:
            derived["num_fusion_layers"] = 0  # nothing would train them
    return CONFIGS[settings.method](
        encoder_config=settings.encoder_settings(), **{**settings.method_settings, **derived}
    )


def settings_for_images(settings: PretrainingSettings, num_images: int) -> dict[str, Any]:
    """Return the settings that the method chooses by the number of images, as far as they are not given."""
    chosen = CONFIGS[settings.method].settings_for(num_images)
    return {name: value for name, value in chosen.items() if not settings.values[name]}


def without_weights(config: MimConfig) -> MimPreTrainedModel:
    """Return the model on the meta device."""
    with torch.device("meta"):
        return AutoModelForPreTraining.from_config(config)


def model_footprint(
    settings: PretrainingSettings, config: MimConfig, collator: MaskingCollator | MixedCollator
) -> Footprint:
    """Return the memory that the model needs; computes nothing."""
    model = without_weights(config).train()
    batch = black_images(settings, config, collator, 1)
    if has_texts := isinstance(collator, MixedCollator):  # which are read for the loss only; any targets will do
        batch |= {
            key.replace("bool_masked_pos", "labels"): mask.long()
            for key, mask in batch.items()
            if key.endswith("bool_masked_pos")
        }
    batch = {key: value.to("meta") if torch.is_tensor(value) else value for key, value in batch.items()}
    return measure_footprint(model, {**batch, "return_loss": has_texts or model.targets is None})


def black_images(
    settings: PretrainingSettings,
    config: MimConfig,
    collator: MaskingCollator | MixedCollator,
    num_images: int,
    targets: Targets | None = None,
) -> dict[str, Any]:
    """Return a batch of black images with the masks of a run."""
    item = {
        view.name: torch.zeros(
            *(() if view.num_crops is None else (view.num_crops,)),
            config.encoder_config.num_channels,
            *(view.image_size or settings.image_size),
            dtype=torch.uint8 if config.value_range is None else torch.int32,
        )
        for view in config.views
    }
    if targets is not None and targets.view is not None:
        item[targets.view.name] = torch.zeros(settings.num_channels, *targets.view.image_size, dtype=torch.uint8)
    items = [{**item, "epoch": 0, "step": 0, "image_index": index} for index in range(num_images)]
    if isinstance(collator, MixedCollator):
        items = collator.with_longest_texts(items, has_pairs=settings.pair_dataset is not None)
    batch = collator(items)
    batch.pop("image_index")
    return batch

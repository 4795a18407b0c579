"""Base class of the fine-tuning tasks: everything that depends on what the labels are.

A task is one class in a file of this folder. `run_finetune.py` asks it for settings, data, model, loss, metrics,
figure and export, and knows no task by name.

Shapes: N images of a split.
"""

import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from commands.finetune_settings import FinetuneSettings
from data.collators import stack_items
from data.images import ImageDataset, StackedImages
from data.size_schedule import Transform
from data.splits import Splits
from hub.model_card import TaskCard
from hub.open_model import open_model
from modeling.image_classification import random_encoder
from modeling.patches import standardize

_MAX_KEPT_BYTES = 2**28  # of decoded images for evaluation; more are decoded at every evaluation
NUM_MEASURED, _MEASURED_BATCH = 32, 16  # images whose statistics a head with BatchNorms has
_IN_WORDS = {
    "finetune": "fine-tuned",
    "linear": "linear classifier on frozen features",
    "partial": "last blocks tuned",
}
_UNWRITTEN_LABELS = {"0": "LABEL_0", "1": "LABEL_1"}  # transformers leaves its default out of config.json


@dataclass(frozen=True)
class Task(ABC):
    """A fine-tuning task.

    Args:
        encoder_config: The config of the pre-trained encoder.
        image_stats: `image_mean` and `image_std` of the encoder's image processor, three channels in [0, 1]; of an
            encoder of measurements, of its channels relative to their `value_range`.
        splits: What `open_splits` returned.
    """

    settings_class: ClassVar[type[FinetuneSettings]]  # its fields are the flags of the command
    label_names: ClassVar[tuple[str, ...]] = ("labels",)  # of a batch, gathered in evaluation for `compute_metrics`
    has_views_of_one_size: ClassVar = True  # False: images differ in size or in the number of their labels

    settings: Any
    encoder_config: PreTrainedConfig
    image_stats: Mapping[str, Any]
    splits: Any

    # ---- data ----

    @classmethod
    @abstractmethod
    def open_splits(cls, settings: Any) -> Splits:
        """Open the labeled data in the main process; raises ValueError if the task cannot use it."""

    @abstractmethod
    def transform(self, train: bool) -> Transform:
        """Return the transform of samples to views: random crops in training, fixed ones in evaluation."""

    def training_set(self, bad_images_file: Path) -> ImageDataset:
        return self._dataset("train", bad_images_file)

    def evaluation_set(self, split: str, bad_images_file: Path) -> ImageDataset | StackedImages | None:
        """Return a split for evaluation, kept in memory if it is small; None if there is no such split."""
        if split not in self.splits.by_name:
            return None
        images = self._dataset(split, bad_images_file)
        bytes_each = 4 if "value_range" in self.image_stats else 1  # of measurements, at most
        num_values = len(images) * len(self.image_stats["image_mean"]) * self.settings.image_size**2
        if not self.has_views_of_one_size or num_values * bytes_each > _MAX_KEPT_BYTES:
            return images
        return StackedImages(images, num_threads=min(8, os.cpu_count() or 1))

    def _dataset(self, split: str, bad_images_file: Path) -> ImageDataset:
        train, samples, seed = split == "train", self.splits.by_name[split], self.settings.seed
        return ImageDataset(samples, self.transform(train), seed=seed, train=train, bad_images_file=bad_images_file)

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return a batch of items, by default with every view stacked."""
        return stack_items(items)

    # ---- model ----

    def open_encoder(self) -> PreTrainedModel:
        """Return the encoder with its pre-trained weights, or with random ones for `from_scratch`."""
        if self.settings.from_scratch:
            return random_encoder(self.encoder_config)
        return open_model(self.settings.model).model

    @abstractmethod
    def build_model(self) -> PreTrainedModel:
        """Return the model to train: its `base_model` is the encoder, and everything else is the head."""

    def fit_head(self, model: PreTrainedModel, device: torch.device) -> str | None:
        """Prepare the new head by training images, before the first step of a run.

        Returns a sentence about what was done, or None if nothing was.
        """
        return None

    def standardized_batches(
        self, images: ImageDataset, indices: np.ndarray, device: torch.device
    ) -> Iterator[Tensor]:
        """Yield pixels of some images as the encoder gets them, to measure the features of a head."""
        stats = torch.tensor(list(self.image_stats.values()), device=device)
        for chunk in np.array_split(indices, -(-len(indices) // _MEASURED_BATCH)):
            batch = self.collate(images.__getitems__(chunk.tolist()))
            yield standardize(batch["pixel_values"].to(device), *stats)

    def check_checkpoint(self, checkpoint: Path) -> None:  # noqa: B027
        """Raise ValueError if the run that wrote this checkpoint cannot be continued: its data had other classes."""

    def black_batch(self, num_images: int) -> dict[str, Any]:
        """Return a batch of black images, to measure how much memory the model needs."""
        size = (self.settings.image_size, self.settings.image_size)
        return {"pixel_values": torch.zeros(num_images, len(self.image_stats["image_mean"]), *size)}

    @abstractmethod
    def loss(
        self, model: Any, batch: dict[str, Any], counters: tuple[int, ...] | None
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Return the mean loss over the images, and the predictions to gather in evaluation.

        Args:
            batch: A batch on the device of the model, with standardized images.
            counters: Step, micro-batch and process, which seed random choices; None in evaluation.
        """

    # ---- description ----

    def notes(self) -> list[str]:
        """Return what the user should know about this combination of data and encoder."""
        return []

    @abstractmethod
    def plan_rows(self) -> dict[str, str]:
        """Return rows of the plan about input, labels and views, by name."""

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        """Return phrases about the metrics for one line of the log; evaluation prefixes names by `eval_`."""
        return []

    # ---- results ----

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of the metrics that may choose the best checkpoint, "loss" among them."""

    @abstractmethod
    def compute_metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Return the metrics of the predictions that `loss` returned, gathered over a split of N images."""

    def results(self, predictions: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
        """Return the metrics as entries of metrics.json."""
        return [
            {"name": self.result_name, "metric": metric, "value": value, "interval": None, "n": len(labels)}
            for metric, value in self.compute_metrics(predictions, labels).items()
        ]

    @property
    def result_name(self) -> str:
        """How the model was trained."""
        return _IN_WORDS[self.settings.mode] + (", from random weights" if self.settings.from_scratch else "")

    @abstractmethod
    def draw(
        self, predictions: np.ndarray, labels: np.ndarray, dataset: Any, folder: Path, title: str, model: Any
    ) -> str:
        """Write a figure of the results on a data set to `folder`, and return the name of its file.

        Called on the main process only, with the model for predictions that were too large to gather.
        """

    # ---- export ----

    def before_training(self, folder: Path) -> None:  # noqa: B027
        """Write to the output folder what is known before training; runs in the main process only."""

    @property
    def pretraining(self) -> tuple[str | None, dict[str, Any]]:
        """Method and recipe of the encoder's pre-training, which the exported model records; none from scratch."""
        config = self.encoder_config
        if self.settings.from_scratch:
            return None, {}
        return getattr(config, "mim_method", None), getattr(config, "mim_recipe", {})

    @abstractmethod
    def export(self, model: PreTrainedModel, folder: Path) -> None:
        """Write the trained model and its image processor, config.json last; runs in the main process only."""

    @abstractmethod
    def card(self) -> TaskCard:
        """Return the parts of the model card that depend on the task."""

    @abstractmethod
    def how_to_open(self, folder: Path) -> str:
        """Return a sentence about how to use the exported model."""


def check_same_classes(checkpoint: Path, class_names: Sequence[str]) -> None:
    """Raise ValueError if the run that wrote this checkpoint had other classes."""
    saved = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    names = saved.get("id2label", _UNWRITTEN_LABELS)
    before = tuple(names[str(number)] for number in range(len(names)))
    if before != tuple(class_names):
        pairs = itertools.zip_longest(before, class_names, fillvalue="none")
        number, (old, new) = next((n, pair) for n, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ValueError(
            f"{checkpoint.parent} holds an unfinished run with other classes (number {number} was {old!r} and is "
            f"now {new!r}): give it its own data again, add --overwrite, or give another --output_dir"
        )

"""Image classification: one class per image, and a linear head on the pooled patches.

Papers: He et al. 2021 (MAE), arXiv:2111.06377, App. A.1; Bao et al. 2021 (BEiT), arXiv:2106.08254, App. H; Xie et al.
2021 (SimMIM), arXiv:2111.09886, App. A.
Shapes: B images of a micro-batch, C channels, H W pixels, N images of a split, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from commands.channels import channel_names
from commands.finetune_settings import FinetuneSettings
from commands.flags import BELOW_ONE, COUNT, FRACTION, NOT_NEGATIVE, POSITIVE_UP_TO_ONE, Range, flag
from commands.launch import set_by
from commands.output_folder import CONFUSION_FILE, SUBSET_FILE
from commands.settings import Origin, SettingsError
from data.augmentations import single_view
from data.classification import CROP_SHARE, EvalView, eval_view, train_view
from data.images import ImageDataset
from data.labeled import write_subset
from data.randaugment import RandAugment
from data.size_schedule import Transform
from data.splits import LabeledSplits, open_labeled_splits
from evaluation.confusion import draw_confusion_matrix
from evaluation.linear_probe import fit_logistic
from evaluation.metrics import classification_metrics, classification_results, confusion_matrix
from hub.export.native import export_native
from hub.measurements import usage
from hub.model_card import TaskCard
from modeling import CONFIGS, MimConfig
from modeling.base import FinetuneRecipe
from modeling.image_classification import POOLINGS, add_batch_norm, build_classifier, check_family, native_classifier
from modeling.patches import patch_grid, standardize
from training.mixing import Mixing

from .base import Task, check_same_classes

_METRICS = ("accuracy", "top5_accuracy", "balanced_accuracy", "macro_f1", "calibration_error", "loss")
_TOP = 5
_MOST_PROBED, _PROBE_BATCH = 5000, 64  # images whose features the head is fitted to at the start
_RECIPES = "(default: the recipe's)"
_USAGE = """\
This is a standard transformers model and needs no other code:

```python
from transformers import pipeline

checkpoint = ""
classify = pipeline("image-classification", model=checkpoint)
print(classify("photo.jpg"))
```

Without the pipeline:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

checkpoint = ""
processor = AutoImageProcessor.from_pretrained(checkpoint)
model = AutoModelForImageClassification.from_pretrained(checkpoint).eval()

inputs = processor(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")
with torch.no_grad():
    probabilities = model(**inputs).logits.softmax(-1)
```
"""


@dataclass(frozen=True, kw_only=True)
class ClassificationFlags:
    title: ClassVar = "classification"

    pooling: Literal["mean", "class"] = flag(
        None, "input of the head: the mean of the patches or the class token (default: the recipe's)"
    )
    label_column: str | None = flag(
        None, "column with the classes, if the data is a table (default: found by type and name)"
    )
    label_fraction: float | None = flag(
        None, "train on this fraction of the labels of each class (default: all)", POSITIVE_UP_TO_ONE
    )
    labels_per_class: int | None = flag(None, "train on this number of labels of each class (default: all)", COUNT)
    class_weights: Literal["none", "balanced"] = flag(
        "none", "none, or balanced: an image of a rare class has a larger weight"
    )
    eval_crop_share: float = flag(
        None,
        "side of the central crop at evaluation, as a fraction of the resized short side (default: as published, "
        "0.875 up to 224 pixels for MAE, below 384 for BEiT and always for SimMIM, else 1)",
        POSITIVE_UP_TO_ONE,
    )
    rand_augment: float = flag(
        0.0, f"strength of RandAugment, up to 10; 0: off {_RECIPES}", Range(lambda x: 0 <= x <= 10, "0 (off) to 10")
    )
    mixup: float = flag(
        0.0, f"parameter of the Beta distribution that blends two images; 0: off {_RECIPES}", NOT_NEGATIVE
    )
    cutmix: float = flag(
        0.0, f"parameter of the Beta distribution of the size of a pasted box; 0: off {_RECIPES}", NOT_NEGATIVE
    )
    erasing: float = flag(0.0, f"probability that a box of an image is replaced by noise {_RECIPES}", FRACTION)


@dataclass(frozen=True, kw_only=True)
class ClassificationSettings(FinetuneSettings, ClassificationFlags):
    """Settings of a fine-tuning for classification."""

    published_batch: ClassVar = 1024
    has_rules_for_few_labels: ClassVar = True
    takes_measurements: ClassVar = True

    dataset: list[str] = flag(
        [],
        "a folder of class folders (with train/ beside val/ or test/, or without), a table or a Hub id with a column "
        "of labels, a folder of MNIST's idx files, or sample-fashion",
    )
    validation_fraction: float | None = flag(
        None,
        "fraction of the training images used for validation if the data has no validation split (default: 0.1; 0 if "
        "it has a test split and only some labels are used)",
        BELOW_ONE,
    )
    label_smoothing_factor: float = flag(
        help="fraction of the target that is spread over all classes (default: the recipe's)", within=BELOW_ONE
    )
    metric_for_best_model: str = flag(
        "accuracy", "accuracy, balanced_accuracy, macro_f1, top5_accuracy, loss or calibration_error"
    )
    push_to_hub: bool = flag(help="upload the finished classifier to --hub_model_id")

    program: ClassVar = {
        **FinetuneSettings.program,
        "epilog": 'The result opens without this project: pipeline("image-classification", model=FOLDER).\n'
        + FinetuneSettings.program["epilog"],
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_fraction is not None and self.labels_per_class is not None:
            raise SettingsError("--label_fraction and --labels_per_class both set the number of labels; give one")

    @property
    def interpolation_filter(self) -> Image.Resampling:
        return Image.Resampling[self.interpolation.upper()]

    @property
    def evaluation_view(self) -> EvalView:
        return eval_view((self.image_size, self.image_size), self.eval_crop_share, self.interpolation_filter)

    @classmethod
    def recipe_for(cls, encoder_config: PreTrainedConfig, mode: str) -> str:
        check_family(encoder_config)
        return "finetune_linear" if mode == "linear" else _published(encoder_config).name

    @classmethod
    def values_for(
        cls, encoder_config: Any, values: Mapping[str, Any], origins: Mapping[str, Origin]
    ) -> dict[str, Any]:
        found = super().values_for(encoder_config, values, origins)
        share = CROP_SHARE if found["image_size"] <= _published(encoder_config).largest_cropped_size else 1.0
        found["eval_crop_share"] = values["eval_crop_share"] or share
        # A recipe's value gives way to what is possible; the user's is refused later if it is impossible.
        possible = POOLINGS[encoder_config.model_type]
        if origins["pooling"] < Origin.CONFIG and values["pooling"] not in possible:
            found["pooling"] = possible[0]
        if origins["drop_path"] < Origin.CONFIG and encoder_config.model_type == "deit":
            found["drop_path"] = 0.0
        return found


def _published(encoder_config: PreTrainedConfig) -> FinetuneRecipe:
    """Return the published settings of the method that trained the encoder."""
    return CONFIGS.get(getattr(encoder_config, "mim_method", ""), MimConfig).finetune_recipe(encoder_config)


@dataclass(frozen=True)
class ClassificationTask(Task):
    """Classification with the native classifiers of transformers."""

    settings_class = ClassificationSettings

    settings: ClassificationSettings
    splits: LabeledSplits

    # ---- data ----

    @classmethod
    def open_splits(cls, settings: ClassificationSettings) -> LabeledSplits:
        return open_labeled_splits(
            settings.dataset,
            settings.label_column,
            num_per_class=settings.labels_per_class,
            label_fraction=settings.label_fraction,
            validation_fraction=settings.validation_fraction,
            max_bad_fraction=settings.max_bad_fraction,
            seed=settings.seed,
            checks=settings.check_images,
            measured=settings.measured,
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.splits.images.class_names

    def transform(self, train: bool) -> Transform:
        settings = self.settings
        if not train:
            return single_view(settings.evaluation_view, 3)
        mean, is_measured = tuple(self.image_stats["image_mean"]), settings.measured is not None
        augment = RandAugment(mean, settings.rand_augment) if settings.rand_augment and not is_measured else None
        size = (settings.image_size, settings.image_size)
        return single_view(train_view(size, augment, settings.crop_scale, settings.interpolation_filter), 3)

    # ---- model ----

    def build_model(self) -> PreTrainedModel:
        settings = self.settings
        with set_by(drop_path_rate="drop_path"):
            classifier = build_classifier(
                self.open_encoder(),
                self.class_names,
                image_size=settings.image_size,
                pooling=settings.pooling,
                drop_path_rate=settings.drop_path,
            )
        if settings.mode == "linear":
            add_batch_norm(classifier)
        return classifier

    @torch.no_grad()
    def fit_head(self, model: Any, device: torch.device) -> str | None:
        if self.settings.schedule != "auto" or self.settings.from_scratch:
            return None
        train, samples = self.transform(train=False), self.splits.by_name["train"]
        images = ImageDataset(samples, train, seed=self.settings.seed)
        chosen = np.random.default_rng(self.settings.seed).permutation(len(images))[:_MOST_PROBED]
        read: list[Tensor] = []
        hook = model.classifier.register_forward_pre_hook(lambda head, inputs: read.append(inputs[0].float().cpu()))
        labels: list[Tensor] = []
        model.eval().to(device)
        for indices in np.array_split(chosen, -(-len(chosen) // _PROBE_BATCH)):
            batch = self.collate(images.__getitems__(indices.tolist()))
            labels.append(batch["labels"])
            model(pixel_values=standardize(batch["pixel_values"].to(device), *self.image_stats.values()))
        hook.remove()
        num_classes = len(self.class_names)
        probe = fit_logistic(torch.cat(read), torch.cat(labels), num_classes, self.settings.seed)
        weight = probe.scale[:, None] * probe.weight  # (D, K)
        model.classifier.weight.copy_(weight.T)
        model.classifier.bias.copy_(probe.bias - probe.mean @ weight)
        found = "" if probe.validation_accuracy is None else f", accuracy {probe.validation_accuracy:.1%} in folds"
        return f"the head starts as a logistic regression on frozen features of {len(chosen):,} images{found}"

    def check_checkpoint(self, checkpoint: Path) -> None:
        check_same_classes(checkpoint, self.class_names)

    def loss(
        self, model: Any, batch: dict[str, Any], counters: tuple[int, ...] | None
    ) -> tuple[Tensor, dict[str, Any]]:
        return self._loss(model, batch, counters)

    @cached_property
    def _loss(self) -> "MixedCrossEntropy":
        settings = self.settings
        mixing = Mixing(
            len(self.class_names),
            mixup_alpha=settings.mixup,
            cutmix_alpha=settings.cutmix,
            label_smoothing=settings.label_smoothing_factor,
            erasing_prob=settings.erasing,
            seed=settings.seed,
        )
        is_balanced = settings.class_weights == "balanced"
        return MixedCrossEntropy(mixing, balanced_weights(self.splits.images.train.labels) if is_balanced else None)

    # ---- description ----

    def notes(self) -> list[str]:
        if self.settings.measured is not None:
            skipped = "; rand_augment is left out: it changes colors" if self.settings.rand_augment else ""
            return [f"values are read as stored, and scaled by the range of the encoder's channels{skipped}"]
        if self.encoder_config.num_channels == 1:
            return ["the encoder's one channel becomes three: it starts by seeing a color image in gray"]
        if num_gray := self.splits.num_gray:
            return [f"{num_gray:,} gray images are shown to the encoder in three equal channels"]
        return []

    def plan_rows(self) -> dict[str, str]:
        settings, size = self.settings, self.settings.image_size
        rows, columns = patch_grid(size, self.encoder_config.patch_size)
        low, high = settings.crop_scale
        views = [f"crops of {low:g} to {high:g} of the image", "flipped half the time"]
        names = () if settings.measured is not None else ("rand_augment",)
        for name in (*names, "mixup", "cutmix", "label_smoothing_factor", "erasing", "drop_path"):
            if value := getattr(settings, name):
                views.append(f"{name.removesuffix('_factor').replace('_', ' ')} {value:g}")
        return {
            "input": f"{size} x {size} pixels, {rows} x {columns} patches; the head reads the {settings.pooling}",
            "classes": f"{len(self.class_names):,}",
            "views": ", ".join(views),
        }

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        return [f"validation accuracy {logs['eval_accuracy']:.1%}"] if "eval_accuracy" in logs else []

    # ---- results ----

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(name for name in _METRICS if name != "top5_accuracy" or len(self.class_names) > _TOP)

    def compute_metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return classification_metrics(predictions, labels)

    def results(self, predictions: np.ndarray, labels: np.ndarray) -> list[dict[str, Any]]:
        return classification_results(predictions, labels, self.result_name, self.settings.seed)

    def draw(
        self, predictions: np.ndarray, labels: np.ndarray, dataset: Any, folder: Path, title: str, model: Any
    ) -> str:
        matrix = confusion_matrix(labels, predictions.argmax(axis=1), len(self.class_names))
        draw_confusion_matrix(matrix, self.class_names, folder / CONFUSION_FILE, title)
        return CONFUSION_FILE

    # ---- export ----

    def before_training(self, folder: Path) -> None:
        if self.splits.has_subset:
            write_subset(folder / SUBSET_FILE, self.splits.images.train, self.class_names)

    def export(self, model: PreTrainedModel, folder: Path) -> None:
        method, recipe = self.pretraining
        export_native(
            native_classifier(model),
            folder,
            method=method,
            recipe=recipe,
            **self.image_stats,
            resize_to=self.settings.evaluation_view.resize_to,
            resample=self.settings.interpolation_filter,
        )

    def card(self) -> TaskCard:
        card, ends = classification_card(self.class_names), self.image_stats.get("value_range")
        if ends is None:
            return card
        view = self.settings.evaluation_view
        measured_usage = usage(
            ends,
            channel_names(self.settings, len(ends)),
            "AutoModelForImageClassification",
            "probabilities = outputs.logits.softmax(-1)",
            share=view.size[0] / view.resize_to,
            resample=self.settings.interpolation.upper(),
        )
        return card._replace(usage=measured_usage)

    def how_to_open(self, folder: Path) -> str:
        if self.settings.measured is not None:
            return f'AutoModelForImageClassification.from_pretrained("{folder}") opens it'
        return f'pipeline("image-classification", model="{folder}") opens it'


@dataclass(frozen=True)
class MixedCrossEntropy:
    """Cross entropy with mixed images and soft targets in training, and with plain ones in evaluation.

    Args:
        class_weights: (K,), the weight of each class in the training loss.
    """

    mixing: Mixing
    class_weights: Tensor | None = None

    def __call__(
        self, model: Any, batch: dict[str, Any], counters: tuple[int, ...] | None
    ) -> tuple[Tensor, dict[str, Any]]:
        pixel_values, targets, weights = batch["pixel_values"], batch["labels"], None  # (B, C, H, W), (B,)
        if counters is not None:
            pixel_values, targets = self.mixing(pixel_values, targets, *counters)  # (B, K)
            weights = None if self.class_weights is None else self.class_weights.to(targets.device)
        logits = model(pixel_values=pixel_values).logits  # (B, K)
        return nn.functional.cross_entropy(logits.float(), targets, weight=weights), {"logits": logits}


def balanced_weights(labels: np.ndarray) -> Tensor:
    """Return weights (K,) that balance the classes, with a mean of 1 over the images."""
    counts = np.bincount(labels)
    return torch.tensor(len(labels) / (len(counts) * counts), dtype=torch.float32)


def classification_card(class_names: Sequence[str]) -> TaskCard:
    return TaskCard(
        pipeline_tag="image-classification",
        kind=f"An image classifier of {len(class_names)} classes",
        usage=_USAGE,
        limitations="Intended for images like those it was fine-tuned on; it assigns one of the classes above to any "
        "image.",
        caption="Confusion matrix",
        classes=class_names,
    )

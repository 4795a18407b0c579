"""A toy task: semantic segmentation with one linear layer, which predicts the most frequent class of each patch.

The data is a folder of images/, masks/ (a PNG of class numbers for each image, of the same name and size), and
classes.txt with a name on each line.
Shapes: B images of a micro-batch, H W pixels, h w rows and columns of patches, p side of a patch, D width, N images of
a split, K classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from commands.finetune_settings import FinetuneSettings
from commands.flags import flag
from data.augmentations import CenterCrop, RandomResizedCrop, to_tensor
from data.decoding import BadImage, decode
from data.images import Samples
from data.splits import PretrainingSplits, Splits, open_pretraining_splits
from evaluation.metrics import confusion_matrix
from evaluation.pictures import labeled_grid, panel_indices
from hub.export.native import export_native
from hub.model_card import TaskCard
from modeling.patches import patch_grid

from .base import Task

HEAD_FILE, FIGURE_FILE = "head.safetensors", "segmentations.png"
_FAMILIES = ("vit", "beit", "deit")
_USAGE = f"""\
The encoder is a standard transformers model. The head maps each patch of its `last_hidden_state` to class scores:

```python
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from transformers import AutoModel

checkpoint = ""
encoder = AutoModel.from_pretrained(checkpoint).eval()
head = load_file(hf_hub_download(checkpoint, "{HEAD_FILE}"))
```
"""


@dataclass(frozen=True, kw_only=True)
class PatchClassesFlags:
    title: ClassVar = "segmentation"

    ignored_class: int = flag(-1, "class number of pixels that do not count; -1: none")


@dataclass(frozen=True, kw_only=True)
class PatchClassesSettings(FinetuneSettings, PatchClassesFlags):
    """Settings of the task."""

    metric_for_best_model: str = flag("mean_iou", "mean_iou, pixel_accuracy or loss")

    @classmethod
    def recipe_for(cls, encoder_config: PreTrainedConfig, mode: str) -> str:
        if encoder_config.model_type not in _FAMILIES:
            raise ValueError(f"`model` is a {encoder_config.model_type}, expected one of {', '.join(_FAMILIES)}")
        return "finetune_patch_classes"


@dataclass(frozen=True)
class MaskedSamples:
    """Images with the path of the mask of the same name."""

    images: Samples
    masks: Path

    def __len__(self) -> int:
        return len(self.images)

    def sample(self, index: int) -> dict[str, Any]:
        return {**self.images.sample(index), "mask": self.masks / f"{Path(self.name(index)).stem}.png"}

    def name(self, index: int) -> str:
        return self.images.name(index)


@dataclass(frozen=True)
class MaskedSplits(Splits):
    """Images with masks, and the names of their classes."""

    opened: PretrainingSplits
    masks: Path
    class_names: tuple[str, ...]

    @property
    def bad(self):
        return self.opened.bad

    @property
    def by_name(self) -> Mapping[str, Samples]:
        splits = {"train": self.opened.train, "validation": self.opened.validation}
        return {name: MaskedSamples(split, self.masks) for name, split in splits.items() if len(split)}

    def describe(self) -> tuple[str, str]:
        return self.opened.train.source.describe(), self.opened.summary.describe()


@dataclass(frozen=True)
class CropBoth:
    """The transform: one crop of image and mask, flipped half of the time in training."""

    crop: RandomResizedCrop | CenterCrop

    def __call__(self, sample: Mapping[str, Any], generator: torch.Generator) -> dict[str, Tensor]:
        image = decode(sample["image"], 3)
        try:
            mask = Image.open(sample["mask"])
            mask.load()
        except OSError as error:
            raise BadImage(f"its mask cannot be read: {error}") from None
        choose_box, is_flipped = self.crop.choose_box, False
        if isinstance(self.crop, RandomResizedCrop):
            *numbers, flip = torch.rand(41, generator=generator).tolist()
            choose_box, is_flipped = partial(self.crop.choose_box, numbers=numbers), flip < 0.5
        box, size = choose_box(*image.size), self.crop.size[::-1]
        image, mask = (
            image.resize(size, Image.Resampling.BICUBIC, box),
            mask.resize(size, Image.Resampling.NEAREST, box),
        )
        if is_flipped:
            image, mask = ImageOps.mirror(image), ImageOps.mirror(mask)
        return {"pixel_values": to_tensor(image), "labels": torch.from_numpy(np.array(mask, np.int64))}


class PatchClassifierConfig(PreTrainedConfig):
    model_type = "patch_classifier"
    sub_configs: ClassVar = {"encoder_config": AutoConfig}
    encoder_config: Any = None


class PatchClassifier(PreTrainedModel):
    """An encoder and a linear layer on its patches."""

    config_class = PatchClassifierConfig
    base_model_prefix = "encoder"

    def __init__(self, config: PatchClassifierConfig, encoder: PreTrainedModel | None = None):
        super().__init__(config)
        self.encoder = AutoModel.from_config(config.encoder_config) if encoder is None else encoder
        self.encoder.pooler = None
        self.head = nn.Linear(config.encoder_config.hidden_size, config.num_labels)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, pixel_values: Tensor) -> ModelOutput:
        rows, columns = patch_grid(self.encoder.config.image_size, self.encoder.config.patch_size)
        patches = self.encoder(pixel_values).last_hidden_state[:, -rows * columns :]  # (B, h*w, D)
        return ModelOutput(logits=self.head(patches).transpose(1, 2).unflatten(2, (rows, columns)))  # (B, K, h, w)


@dataclass(frozen=True)
class PatchClasses(Task):
    """Segmentation by classes of patches."""

    settings_class = PatchClassesSettings

    settings: PatchClassesSettings
    splits: MaskedSplits

    @classmethod
    def open_splits(cls, settings: PatchClassesSettings) -> MaskedSplits:
        folder = Path(settings.dataset[0])
        if not (folder / "classes.txt").is_file():
            raise ValueError(f"`dataset` {folder} has no classes.txt; expected images/, masks/ and classes.txt in it")
        opened = open_pretraining_splits(
            [str(folder / "images")],
            validation_fraction=0.1 if settings.validation_fraction is None else settings.validation_fraction,
            max_bad_fraction=settings.max_bad_fraction,
            seed=settings.seed,
            checks=settings.check_images,
        )
        return MaskedSplits(opened, folder / "masks", tuple((folder / "classes.txt").read_text().split()))

    def transform(self, train: bool) -> CropBoth:
        size = (self.settings.image_size, self.settings.image_size)
        return CropBoth(RandomResizedCrop(size, self.settings.crop_scale) if train else CenterCrop(size))

    def build_model(self) -> PatchClassifier:
        encoder, config = self.open_encoder(), self.encoder_config
        if self.settings.image_size != config.image_size or self.settings.drop_path:
            raise ValueError(f"image_size must be {config.image_size}, as for the encoder, and drop_path 0")
        return PatchClassifier(
            PatchClassifierConfig(encoder_config=config, num_labels=len(self.splits.class_names)), encoder
        )

    def loss(
        self, model: Any, batch: dict[str, Any], counters: tuple[int, ...] | None
    ) -> tuple[Tensor, dict[str, Any]]:
        logits = model(batch["pixel_values"]).logits  # (B, K, h, w)
        side = self.encoder_config.patch_size
        pixels = batch["labels"].unfold(1, side, side).unfold(2, side, side).flatten(3)  # (B, h, w, p*p)
        classes = pixels.mode(dim=-1).values
        loss = nn.functional.cross_entropy(logits.float(), classes, ignore_index=self.settings.ignored_class)
        return loss, {"predictions": logits.argmax(dim=1)}  # (B, h, w)

    def plan_rows(self) -> dict[str, str]:
        return {"input": f"{self.settings.image_size} pixels", "classes": ", ".join(self.splits.class_names)}

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        return [f"validation IoU {logs['eval_mean_iou']:.1%}"] if "eval_mean_iou" in logs else []

    @property
    def metrics(self) -> tuple[str, ...]:
        return ("mean_iou", "pixel_accuracy", "loss")

    def compute_metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """Compare predictions (N, h, w) with masks (N, H, W)."""
        counted = labels != self.settings.ignored_class
        found, true = self._pixels(predictions)[counted], labels[counted]
        matrix = confusion_matrix(true, found, len(self.splits.class_names))  # (K, K)
        correct, union = matrix.diagonal(), matrix.sum(0) + matrix.sum(1) - matrix.diagonal()
        present = union > 0
        return {
            "mean_iou": float((correct[present] / union[present]).mean()),
            "pixel_accuracy": float(correct.sum() / matrix.sum()),
        }

    def draw(
        self, predictions: np.ndarray, labels: np.ndarray, dataset: Any, folder: Path, title: str, model: Any
    ) -> str:
        shown, last = panel_indices(len(labels)), max(len(self.splits.class_names) - 1, 1)
        masks = {"mask": labels, "predicted": self._pixels(predictions)}
        views = {name: torch.from_numpy(values[shown] / last)[:, None].float() for name, values in masks.items()}
        images = torch.stack([dataset[index]["pixel_values"] for index in shown]) / 255
        labeled_grid({"image": images, **{name: view.expand_as(images) for name, view in views.items()}}, title).save(
            folder / FIGURE_FILE
        )
        return FIGURE_FILE

    def _pixels(self, predictions: np.ndarray) -> np.ndarray:
        side = self.encoder_config.patch_size
        return predictions.repeat(side, axis=1).repeat(side, axis=2)

    def export(self, model: Any, folder: Path) -> None:
        save_file({name: tensor.contiguous() for name, tensor in model.head.state_dict().items()}, folder / HEAD_FILE)
        method, recipe = self.pretraining
        export_native(model.encoder, folder, method=method, recipe=recipe, **self.image_stats)

    def card(self) -> TaskCard:
        return TaskCard(
            pipeline_tag="image-segmentation",
            kind=f"A segmentation of patches into {len(self.splits.class_names)} classes",
            usage=_USAGE,
            limitations="It is an example.",
            caption="Images, masks and predictions",
            classes=self.splits.class_names,
        )

    def how_to_open(self, folder: Path) -> str:
        return f"encoder for AutoModel.from_pretrained, head in {HEAD_FILE}"

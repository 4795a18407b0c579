"""Semantic segmentation: a class for every pixel, by a UPerNet or by a linear layer on frozen patch features.

Papers: Bao et al. 2021 (BEiT), arXiv:2106.08254, App. H, for UPerNet; Oquab et al. 2023 (DINOv2), arXiv:2304.07193,
Sec. 7.4, for the linear layer.
Shapes: B images of a micro-batch, C channels, H W pixels of a mask, S side of a crop, N images of a split, K classes.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForSemanticSegmentation, PreTrainedConfig, PreTrainedModel

from commands.dense_settings import DenseSettings
from commands.flags import COUNT, Range, flag
from commands.launch import set_by
from commands.settings import SettingsError
from data.dense_views import RandomPlacement
from data.images import ImageDataset
from data.mask_codes import IGNORED
from data.masked_images import MaskedSplits, open_masked_splits
from data.segmentation import EvalViews, TrainViews, collate_padded, window_boxes
from data.size_schedule import Transform
from evaluation.boundaries import boundary_counts
from evaluation.iou import class_areas, mean_of_areas, pixel_confusion
from evaluation.segmentation import rows_of_classes, segmentation_metrics
from evaluation.segmentation_pictures import Segmentation, draw_segmentations, ranked
from hub.encoder_states import as_beit_model
from hub.export.dense import export_dense, stretched
from hub.model_card import TaskCard
from modeling import CONFIGS, MimConfig
from modeling.linear_segmentation import FAMILIES as LINEAR_FAMILIES
from modeling.linear_segmentation import build_linear_segmenter, native_linear_segmenter
from modeling.patches import patch_grid, standardize
from modeling.segmentation import FAMILIES, build_segmenter, check_family, native_segmenter

from .base import NUM_MEASURED, Task, check_same_classes

FIGURE_FILE, CLASSES_FILE = "segmentations.png", "class_iou.json"
_OTHER_FAMILIES = ("data2vec-vision", "dinov2")  # that a BEiT can hold
_MOST_WEIGHT = 10.0  # of a rare class, relative to an average pixel
_USAGE = """\
This is a standard transformers model and needs no other code. It resizes an image to the size that it was trained at:

```python
from transformers import pipeline

checkpoint = ""
segment = pipeline("image-segmentation", model=checkpoint)
for part in segment("photo.jpg"):
    print(part["label"], part["mask"])
```

Without the pipeline:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

checkpoint = ""
processor = AutoImageProcessor.from_pretrained(checkpoint)
model = AutoModelForSemanticSegmentation.from_pretrained(checkpoint).eval()

image = Image.open("photo.jpg").convert("RGB")
inputs = processor(image, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
(classes,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])
```
"""


@dataclass(frozen=True, kw_only=True)
class SegmentationFlags:
    title: ClassVar = "segmentation"

    class_file: str | None = flag(
        None,
        "a text file with the name of a class on each line, and its color if masks have colors, as `road #804080` or "
        "`road 128 64 128` (default: classes.txt beside the images; without one, the values in the masks)",
    )
    ignore_index: int = flag(
        255,
        "value in masks of pixels that do not count; with 0, the classes of a file are numbered from 1",
        Range(lambda x: 0 <= x <= 65535, "0 to 65535"),
    )
    mask_column: str | None = flag(None, "column with the masks, if the data is a table (default: found by name)")
    tile: int | None = flag(
        None,
        "for large images: crops in training, and windows in evaluation, show this number of pixels of the image on "
        "each side, at scale 1 (default: the short side of the image)",
        COUNT,
    )
    boundary_f: bool = flag(
        False,
        "also measure the boundaries of each class (mean_boundary_f): right if another is at most 0.8% of the "
        "image's diagonal away",
    )
    head_hidden_size: int | None = flag(
        None,
        "channels of the UPerNet; fewer suit a small encoder, which otherwise does less of the work than the head "
        "(default: the published number, the encoder's width, at most 512 for Swin)",
        COUNT,
    )
    class_weights: Literal["none", "balanced"] = flag(
        "none", "none, or balanced: a pixel of a rare class has a larger weight, by the root of its class's share"
    )


@dataclass(frozen=True, kw_only=True)
class SegmentationSettings(DenseSettings, SegmentationFlags):
    """Settings of the task."""

    dataset: list[str] = flag(
        [],
        "a folder of images/ and masks/ with the same file names (with train/ and val/ above or below them, or "
        "without), COCO json, or a table or Hub id with a column of images and one of masks",
    )
    metric_for_best_model: str = flag("mean_iou", "mean_iou, pixel_accuracy, mean_accuracy, mean_boundary_f or loss")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode == "linear" and self.head_hidden_size is not None:
            raise SettingsError("--head_hidden_size has no effect with --mode linear, which has no UPerNet")

    @classmethod
    def recipe_for(cls, encoder_config: PreTrainedConfig, mode: str) -> str:
        check_family(encoder_config, LINEAR_FAMILIES if mode == "linear" else (*FAMILIES, *_OTHER_FAMILIES))
        if mode == "linear":
            return "finetune_segmentation_linear"
        method = CONFIGS.get(getattr(encoder_config, "mim_method", ""), MimConfig)
        return method.segmentation_recipe(encoder_config)


@dataclass(frozen=True)
class SegmentationTask(Task):
    """Semantic segmentation with the UPerNet of transformers."""

    settings_class = SegmentationSettings
    label_names = ("num_counted_pixels",)
    has_views_of_one_size = False

    settings: SegmentationSettings
    splits: MaskedSplits

    # ---- data ----

    @classmethod
    def open_splits(cls, settings: SegmentationSettings) -> MaskedSplits:
        return open_masked_splits(
            settings.dataset,
            class_file=settings.class_file,
            ignore_index=settings.ignore_index,
            mask_column=settings.mask_column,
            validation_fraction=settings.validation_fraction,
            max_bad_fraction=settings.max_bad_fraction,
            seed=settings.seed,
            checks=settings.check_images,
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.splits.class_names

    def transform(self, train: bool) -> Transform:
        settings, side = self.settings, self.settings.image_size
        interpolation = Image.Resampling[settings.interpolation.upper()]
        if not train:
            return EvalViews(side, self.splits.codes, interpolation=interpolation, tile=settings.tile)
        fill = tuple(round(255 * value) for value in self._rgb_mean)
        placement = RandomPlacement((side, side), settings.resize_scale, tile=settings.tile)
        return TrainViews(placement, self.splits.codes, fill, interpolation)

    @property
    def _rgb_mean(self) -> list[float]:
        mean = list(self.image_stats["image_mean"])
        return mean * 3 if len(mean) == 1 else mean

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return super().collate(items) if "num_counted_pixels" not in items[0] else collate_padded(items)

    # ---- model ----

    def build_model(self) -> PreTrainedModel:
        settings, side = self.settings, self.settings.image_size
        if settings.mode == "linear":
            return build_linear_segmenter(self.open_encoder(), self.class_names, image_size=side)
        encoder = self.open_encoder()
        if encoder.config.model_type in _OTHER_FAMILIES:
            encoder = as_beit_model(encoder)
        with set_by(drop_path_rate="drop_path"):
            return build_segmenter(
                encoder,
                self.class_names,
                image_size=side,
                drop_path_rate=settings.drop_path,
                head_hidden_size=settings.head_hidden_size,
            )

    def fit_head(self, model: Any, device: torch.device) -> str | None:
        images = ImageDataset(self.splits.by_name["train"], self.transform(train=True), seed=self.settings.seed)
        order = np.random.default_rng(self.settings.seed).permutation(len(images))
        chosen = np.resize(order, max(2, min(len(order), NUM_MEASURED)))
        weights = torch.ones(len(self.class_names)) if self._weights is None else self._weights
        counts = torch.from_numpy(self.splits.pixels) * weights
        model.to(device).calibrate(
            self.standardized_batches(images, chosen, device), (counts / counts.sum()).to(device)
        )
        return (
            f"the head's features are standardized by {len(set(chosen.tolist()))} training images, and its scores "
            "start with the frequencies of the classes"
        )

    def check_checkpoint(self, checkpoint: Path) -> None:
        check_same_classes(checkpoint, self.class_names)

    def loss(
        self, model: Any, batch: dict[str, Any], counters: tuple[int, ...] | None
    ) -> tuple[Tensor, dict[str, Any]]:
        if counters is None:
            return self._evaluate(model, batch)
        outputs, labels = model(batch["pixel_values"]), batch["labels"].long()  # (B, S, S)
        weights = self._weights.to(labels.device) if self._weights is not None else None
        own = getattr(model, "module", model)  # of DDP
        total = torch.zeros((), device=labels.device)
        for share, logits in own.losses(outputs):
            total = total + share * nn.functional.cross_entropy(
                logits.float(), labels, weight=weights, ignore_index=IGNORED, reduction="sum"
            )
        # By all pixels, also those that do not count: a step then does not depend on how images are spread over it.
        return total / labels.numel(), {}

    @cached_property
    def _weights(self) -> Tensor | None:
        return class_weights(self.splits.pixels) if self.settings.class_weights == "balanced" else None

    def _evaluate(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the mean over the images of their loss per pixel, and their `class_areas` int32 (B, 3, K).

        With `boundary_f`, four rows of `boundary_counts` follow: (B, 7, K).
        """
        losses, areas, images = [], [], batch["pixel_values"]
        has_one_window = bool((batch["sizes"] == self.settings.image_size).all())
        together = model(images)["logits"].float() if has_one_window else None  # (B, K, S, S)
        for index, ((height, width), (rows, columns)) in enumerate(
            zip(batch["sizes"].tolist(), batch["mask_sizes"].tolist(), strict=True)
        ):
            labels = batch["labels"][index, :rows, :columns]  # (H, W)
            if together is None:
                logits = self.scores(model, images[index, :, :height, :width], (rows, columns), len(images))
            else:
                logits = resized(together[index], (rows, columns))
            loss = nn.functional.cross_entropy(logits[None], labels[None].long(), ignore_index=IGNORED)
            # Without checks of all masks, one may have no pixel that counts, whose mean would not be a number.
            losses.append(loss if (labels != IGNORED).any() else torch.zeros_like(loss))
            found = logits.argmax(0).cpu().numpy()
            pair = labels.cpu().numpy(), found, len(self.class_names)
            rows_of_image = [class_areas(pixel_confusion(*pair))]
            rows_of_image += [boundary_counts(*pair)] if self.settings.boundary_f else []
            areas.append(np.concatenate(rows_of_image))
        # Not the confusions, which would be large: those of all images are gathered.
        stacked = torch.from_numpy(np.stack(areas).astype(np.int32)).to(batch["pixel_values"].device)
        return torch.stack(losses).mean(), {"areas": stacked}

    def scores(self, model: Any, image: Tensor, size: tuple[int, int], batch_size: int) -> Tensor:
        """Return the scores (K, H, W) of a standardized image (C, h, w), means over the windows that cover it."""
        side, (height, width) = self.settings.image_size, image.shape[1:]
        corners = window_boxes(height, width, side)
        total = image.new_zeros(len(self.class_names), height, width)
        count = image.new_zeros(height, width)
        for start in range(0, len(corners), batch_size):
            own = corners[start : start + batch_size]
            windows = torch.stack([image[:, top : top + side, left : left + side] for top, left in own])
            for (top, left), each in zip(own, model(windows)["logits"].float(), strict=True):
                total[:, top : top + side, left : left + side] += each
                count[top : top + side, left : left + side] += 1
        return resized(total.div_(count), size)

    # ---- description ----

    def notes(self) -> list[str]:
        config, side = self.encoder_config, self.settings.image_size
        if config.model_type != "swin":
            return []
        last = side // config.patch_size // 2 ** (len(config.depths) - 1)
        if last > config.window_size:
            return []
        return [
            f"the last stage of the Swin has {last} x {last} patches, not more than its window of {config.window_size}"
            ": in a backbone, transformers shifts windows there too, unlike in pre-training; use a larger --image_size"
        ]

    def plan_rows(self) -> dict[str, str]:
        settings, size = self.settings, self.settings.image_size
        rows, columns = patch_grid(size, self.encoder_config.patch_size)
        low, high = settings.resize_scale
        head = "a linear layer on frozen patches" if settings.mode == "linear" else "UPerNet"
        tiles = f"tiles of {settings.tile:,} pixels, " if settings.tile else ""
        views = [f"{tiles}resized by {low:g} to {high:g}", "cropped", "flipped half the time", "colors changed"]
        weighted = ", weighted by rarity" if settings.class_weights == "balanced" else ""
        return {
            "input": f"{size} x {size} pixels, {rows} x {columns} patches; {head}",
            "classes": f"{len(self.class_names):,}{weighted}",
            "views": ", ".join(views) + (f", drop path {settings.drop_path:g}" if settings.drop_path else ""),
        }

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        return [f"validation mean IoU {logs['eval_mean_iou']:.1%}"] if "eval_mean_iou" in logs else []

    # ---- results ----

    @property
    def metrics(self) -> tuple[str, ...]:
        own = ("mean_boundary_f",) if self.settings.boundary_f else ()
        return ("mean_iou", "pixel_accuracy", "mean_accuracy", *own, "loss")

    def compute_metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return segmentation_metrics(predictions.sum(0, dtype=np.int64))

    def draw(
        self, predictions: np.ndarray, labels: np.ndarray, dataset: Any, folder: Path, title: str, model: Any
    ) -> str:
        self._write_class_ious(predictions.sum(0, dtype=np.int64), folder)
        scores = mean_of_areas(predictions[:, :3])
        rows = [
            self._segmentation(dataset, position, model, f"{name}: mean IoU {scores[position]:.2f}")
            for name, position in ranked(scores)
        ]
        draw_segmentations(rows, self.class_names, title).save(folder / FIGURE_FILE)
        return FIGURE_FILE

    def _write_class_ious(self, areas: np.ndarray, folder: Path) -> None:
        rows = rows_of_classes(areas, self.class_names)
        (folder / CLASSES_FILE).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")

    @torch.no_grad()
    def _segmentation(self, dataset: Any, position: int, model: Any, title: str) -> Segmentation:
        item = dataset[position]
        device = next(model.parameters()).device
        stats = torch.tensor(list(self.image_stats.values()), device=device)
        image, mask = item["pixel_values"], item["labels"].numpy()
        found = self.scores(model, standardize(image.to(device), *stats), mask.shape, 1).argmax(0)
        pixels = nn.functional.interpolate(image[None].float(), mask.shape, mode="bilinear")[0]
        shown = pixels.permute(1, 2, 0).round().clamp(0, 255).byte().numpy()
        return Segmentation(shown, mask, found.cpu().numpy().astype(np.uint8), title)

    # ---- export ----

    def export(self, model: Any, folder: Path) -> None:
        native = native_linear_segmenter(model.cpu()) if self.settings.mode == "linear" else native_segmenter(model)
        side, resample = self.settings.image_size, Image.Resampling[self.settings.interpolation.upper()]
        export_dense(
            native,
            folder,
            trained=native,
            auto_class=AutoModelForSemanticSegmentation,
            image_processor={**stretched("SegformerImageProcessor", side, resample), "do_reduce_labels": False},
            image_stats=self.image_stats,
            image_size=side,
            outputs=("logits",),
            origin=self.pretraining,
        )

    def card(self) -> TaskCard:
        tile = self.settings.tile
        parts = f" It was trained on parts of {tile} x {tile} pixels: cut larger images into such." if tile else ""
        return TaskCard(
            pipeline_tag="image-segmentation",
            kind=f"A semantic segmentation into {len(self.class_names)} classes",
            usage=_USAGE,
            limitations="Intended for images like those it was fine-tuned on; it assigns one of the classes above to "
            f"every pixel.{parts} The results are of images with their proportions kept, in windows that overlap.",
            caption="Best, median and worst images",
            classes=self.class_names,
        )

    def how_to_open(self, folder: Path) -> str:
        return f'pipeline("image-segmentation", model="{folder}") opens it'


def resized(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize scores (K, h, w) to (K, H, W); those of this size are not copied, as they may be large."""
    if scores.shape[1:] == size:
        return scores
    return nn.functional.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]


def class_weights(pixels: np.ndarray) -> Tensor:
    """Return weights (K,) by the inverse square root of the number of pixels (K,), with a mean of 1 over the pixels.

    A class that does not occur has the weight 0, and none has more than ten times the mean.
    """
    weights = np.where(pixels > 0, np.maximum(pixels, 1) ** -0.5, 0.0)
    weights /= (weights * pixels).sum() / pixels.sum()
    return torch.tensor(weights.clip(max=_MOST_WEIGHT), dtype=torch.float32)

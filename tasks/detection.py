"""Object detection: boxes with classes, by an RF-DETR on the encoder.

Papers: Robinson et al. 2025 (RF-DETR), arXiv:2511.09554; Li et al. 2022 (ViTDet), arXiv:2203.16527, App. A.2, for the
optimization and large-scale jitter.
Shapes: B images of a micro-batch, C channels, S side of a view, N images of a split, P predicted boxes of an image, M
boxes of the image with the most.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image
from torch import Tensor
from transformers import AutoModelForObjectDetection, PreTrainedConfig, PreTrainedModel

from commands.dense_settings import DenseSettings
from commands.flags import COUNT, flag
from commands.settings import Origin, SettingsError
from data.box_datasets import BoxSplits, open_box_splits
from data.box_views import BoxViews, collate_boxes
from data.size_schedule import Transform
from evaluation.box_pictures import draw_detections
from evaluation.detection import METRICS, detection_metrics, require_coco_eval
from evaluation.pictures import panel_indices
from hub.export.dense import export_dense, stretched
from hub.model_card import TaskCard
from modeling.detection import (
    best_boxes,
    build_detector,
    check_encoder,
    native_detector,
    num_windowed_blocks,
    num_windows_per_side,
)
from modeling.patches import patch_grid

from .base import Task, check_same_classes

FIGURE_FILE = "detections.png"
_FEWEST_QUERIES, _MOST_QUERIES, _QUERIES_PER_BOX = 30, 300, 4  # 300 are the authors', for up to 93 boxes in COCO
_SMALLEST_VIEW = 102.4  # pixels that a whole image has at least
_STANDARD_JITTER = 0.8  # the smallest scale where large-scale jitter is not used (Ghiasi et al. 2020, Sec. 4)
_USAGE = """\
This is a standard transformers model and needs no other code:

```python
from transformers import pipeline

checkpoint = ""
detect = pipeline("object-detection", model=checkpoint)
for found in detect("photo.jpg", threshold=0.3):
    print(found["label"], found["score"], found["box"])
```

Without the pipeline:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForObjectDetection

checkpoint = ""
processor = AutoImageProcessor.from_pretrained(checkpoint)
model = AutoModelForObjectDetection.from_pretrained(checkpoint).eval()

image = Image.open("photo.jpg").convert("RGB")
inputs = processor(image, return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
(found,) = processor.post_process_object_detection(outputs, threshold=0.3, target_sizes=[image.size[::-1]])
```
"""


@dataclass(frozen=True, kw_only=True)
class DetectionFlags:
    title: ClassVar = "detection"

    num_queries: int | None = flag(
        None,
        "largest number of objects that can be found in an image (default: four times the number of a training image "
        "with the most, 30 to 300); no more than the patches; fewer are faster to train",
        COUNT,
    )


@dataclass(frozen=True, kw_only=True)
class DetectionSettings(DenseSettings, DetectionFlags):
    """Settings of the task."""

    published_batch: ClassVar = 64

    dataset: list[str] = flag(
        [],
        "images with boxes: a folder with COCO json (annotations.json, or one in train/ and val/), a YOLO folder "
        "(images/, labels/, data.yaml), or a table or Hub id with a column of objects",
    )
    metric_for_best_model: str = flag("ap", "ap, ap50, ap75 or loss")

    @classmethod
    def recipe_for(cls, encoder_config: PreTrainedConfig, mode: str) -> str:
        check_encoder(encoder_config)
        width = getattr(encoder_config, "hidden_size", 0)
        size = "huge" if width >= 1280 else "large" if width >= 1024 else "base"
        return f"finetune_vitdet_vit-{size}"

    @classmethod
    def values_for(
        cls, encoder_config: Any, values: Mapping[str, Any], origins: Mapping[str, Origin]
    ) -> dict[str, Any]:
        found = super().values_for(encoder_config, values, origins)
        if origins["resize_scale"] < Origin.CONFIG:  # no smaller than the smallest views of the published 1024 pixels
            low, high = values["resize_scale"]
            least = min(_STANDARD_JITTER, _SMALLEST_VIEW / found["image_size"])
            found["resize_scale"] = [max(low, round(least, 3)), high]
        return found

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.dataset) != 1:
            raise SettingsError(f"--dataset names {len(self.dataset)} datasets, expected one")
        if self.drop_path:
            raise SettingsError(
                f"--drop_path {self.drop_path:g}: a detector is trained without drop path; leave it out"
            )


@dataclass(frozen=True)
class DetectionTask(Task):
    """Object detection with the RF-DETR of transformers."""

    settings_class = DetectionSettings
    has_views_of_one_size = False

    settings: DetectionSettings
    splits: BoxSplits

    # ---- data ----

    @classmethod
    def open_splits(cls, settings: DetectionSettings) -> BoxSplits:
        require_coco_eval()
        return open_box_splits(
            settings.dataset[0],
            validation_fraction=settings.validation_fraction,
            max_bad_fraction=settings.max_bad_fraction,
            seed=settings.seed,
            checks=settings.check_images,
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.splits.class_names

    @property
    def num_queries(self) -> int:
        """Largest number of objects that are found in an image, at most one for each patch."""
        return min(self._wanted_queries, self._num_patches)

    @property
    def _wanted_queries(self) -> int:
        most = self.splits.samples["train"].most_boxes
        return self.settings.num_queries or min(_MOST_QUERIES, max(_FEWEST_QUERIES, _QUERIES_PER_BOX * most))

    @property
    def _num_patches(self) -> int:
        rows, columns = patch_grid(self.settings.image_size, self.encoder_config.patch_size)
        return rows * columns

    def transform(self, train: bool) -> Transform:
        settings, mean = self.settings, self.image_stats["image_mean"]
        fill = [round(255 * value) for value in (mean * 3 if len(mean) == 1 else mean)]
        resampling = Image.Resampling[settings.interpolation.upper()]
        return BoxViews(settings.image_size, settings.resize_scale if train else None, fill, resampling)

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return collate_boxes(items)

    # ---- model ----

    def build_model(self) -> PreTrainedModel:
        return build_detector(
            self.open_encoder(),
            self.class_names,
            image_size=self.settings.image_size,
            num_queries=self.num_queries,
            box_size=self.splits.samples["train"].median_size,
        )

    def check_checkpoint(self, checkpoint: Path) -> None:
        check_same_classes(checkpoint, self.class_names)

    def loss(
        self, model: Any, batch: dict[str, Any], counters: tuple[int, ...] | None
    ) -> tuple[Tensor, dict[str, Any]]:
        outputs = model(pixel_values=batch["pixel_values"], labels=batch["targets"])
        if counters is not None:
            return outputs.loss, {}
        found = best_boxes(outputs.logits, outputs.pred_boxes)  # (B, P, 6)
        found[..., :4] *= batch["sizes"].repeat(1, 2)[:, None]
        return outputs.loss, {"predictions": found}

    # ---- description ----

    def notes(self) -> list[str]:
        most = max(split.most_boxes for split in self.splits.samples.values())
        notes = []
        matters = self.settings.num_queries is not None or most > self.num_queries
        if matters and self._wanted_queries > self._num_patches:
            notes.append(f"num_queries is {self._num_patches}, the number of patches: --image_size gives more of them")
        if most > self.num_queries:
            notes.append(f"an image has {most:,} objects, of which at most num_queries {self.num_queries} are found")
        return notes

    def plan_rows(self) -> dict[str, str]:
        settings, size = self.settings, self.settings.image_size
        rows, columns = patch_grid(size, self.encoder_config.patch_size)
        num_sides, num_blocks = num_windows_per_side(size, self.encoder_config), self.encoder_config.num_hidden_layers
        in_blocks = f"{num_windowed_blocks(self.encoder_config)} of {num_blocks} blocks"
        windows = f", {num_sides} x {num_sides} windows in {in_blocks}" if num_sides > 1 else ""
        low, high = settings.resize_scale
        counts = ", ".join(f"{split.num_boxes:,} {name}" for name, split in self.splits.samples.items())
        return {
            "input": f"{size} x {size} pixels, {rows} x {columns} patches{windows}; RF-DETR",
            "classes": f"{len(self.class_names):,}",
            "boxes": f"{counts}; at most {self.num_queries:,} are found in an image",
            "views": f"resized by {low:g} to {high:g}, cropped or padded, flipped half the time",
        }

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        return [f"validation AP {logs['eval_ap']:.1%}"] if "eval_ap" in logs else []

    # ---- results ----

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*METRICS[:3], "loss")

    def compute_metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return detection_metrics(predictions, labels, self.class_names)

    @property
    def result_name(self) -> str:
        return super().result_name.replace("linear classifier on frozen features", "detector on a frozen encoder")

    def draw(
        self, predictions: np.ndarray, labels: np.ndarray, dataset: Any, folder: Path, title: str, model: Any
    ) -> str:
        shown = panel_indices(len(labels))
        items = [dataset[index] for index in shown]
        draw_detections(
            [item["pixel_values"] for item in items],
            np.stack([item["sizes"].numpy() for item in items]),
            predictions[shown],
            labels[shown],
            self.class_names,
            folder / FIGURE_FILE,
            title,
        )
        return FIGURE_FILE

    # ---- export ----

    def export(self, model: Any, folder: Path) -> None:
        side, resample = self.settings.image_size, Image.Resampling[self.settings.interpolation.upper()]
        export_dense(
            native_detector(model),
            folder,
            trained=model,
            auto_class=AutoModelForObjectDetection,
            image_processor={**stretched("DeformableDetrImageProcessor", side, resample), "do_pad": False},
            image_stats=self.image_stats,
            image_size=side,
            outputs=("logits", "pred_boxes"),
            origin=self.pretraining,
        )

    def card(self) -> TaskCard:
        return TaskCard(
            pipeline_tag="object-detection",
            kind=f"An object detector of {len(self.class_names)} classes",
            usage=_USAGE,
            limitations="Intended for images like those it was fine-tuned on; it finds objects of the classes above "
            f"only, and at most {self.num_queries} in an image.",
            caption="True and predicted boxes",
            classes=self.class_names,
        )

    def how_to_open(self, folder: Path) -> str:
        return f'pipeline("object-detection", model="{folder}") opens it'

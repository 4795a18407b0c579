"""Instance segmentation: a class and a mask for each object, by queries that pass through the last blocks of a ViT.

Paper: Kerssies et al. 2025 (EoMT), arXiv:2503.19108.
Shapes: B images of a micro-batch, H W pixels of a view, M places for objects, N images of a split, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from transformers import AutoModelForUniversalSegmentation, PreTrainedConfig, PreTrainedModel

from commands.dense_settings import DenseSettings
from commands.flags import COUNT, flag
from commands.launch import set_by
from commands.settings import SettingsError
from data.box_datasets import BoxSplits, open_box_splits
from data.coco_masks import BACKGROUND
from data.instances import NO_OBJECT, InstanceView, collate_instances, with_masks
from data.size_schedule import Transform
from evaluation.detection import require_coco_eval
from evaluation.instances import (
    THRESHOLD,
    ImageResult,
    evaluate_image,
    instance_metrics,
    panoptic_segments,
    segment_map,
)
from evaluation.iou import IGNORED
from evaluation.panoptic_quality import panoptic_quality
from evaluation.segmentation_pictures import Segmentation, draw_segmentations, ranked
from hub.export.dense import export_dense
from hub.model_card import TaskCard
from modeling.instance_segmentation import (
    FAMILIES,
    build_instance_segmenter,
    native_instance_segmenter,
    segmentation_loss,
)
from modeling.patches import patch_grid, standardize

from .base import Task, check_same_classes

FIGURE_FILE = "segments.png"
_METRICS = (
    *("mask_ap", "mask_ap50", "mask_ap75"),
    *("panoptic_quality", "segmentation_quality", "recognition_quality", "loss"),
)
_USAGE = f"""\
This is a standard transformers model and needs no other code:

```python
from transformers import pipeline

checkpoint = ""
segment = pipeline("image-segmentation", model=checkpoint)
for found in segment("photo.jpg", threshold={THRESHOLD}):
    print(found["label"], found["score"], found["mask"].getbbox())
```
"""


@dataclass(frozen=True, kw_only=True)
class InstanceFlags:
    title: ClassVar = "instance segmentation"

    num_queries: int = flag(100, "largest number of objects in an image (default: the recipe's)", COUNT)


@dataclass(frozen=True, kw_only=True)
class InstanceSettings(DenseSettings, InstanceFlags):
    """Settings of a fine-tuning for instance segmentation."""

    dataset: list[str] = flag(
        [], "COCO json with masks: a file, or a folder with it (and train/ beside val/ or test/, or without)"
    )
    metric_for_best_model: str = flag("mask_ap", ", ".join(_METRICS))
    push_to_hub: bool = flag(help="upload the finished model to --hub_model_id")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode != "finetune":
            raise SettingsError(
                f"--mode is {self.mode}, expected finetune: the encoder's own last blocks find the objects"
            )
        if len(self.dataset) > 1:
            raise SettingsError(f"--dataset names {len(self.dataset)} datasets, expected one for --task instance")

    @classmethod
    def recipe_for(cls, encoder_config: PreTrainedConfig, mode: str) -> str:
        if encoder_config.model_type not in FAMILIES:
            raise ValueError(f"`model` is a {encoder_config.model_type}, expected one of {', '.join(FAMILIES)}")
        return "finetune_instance"


@dataclass(frozen=True)
class InstanceTask(Task):
    """Instance segmentation with an EomtForUniversalSegmentation.

    Results are kept here by the number of the image, because masks are too large to gather: `own` are those that this
    process computes, and `found` those of the last evaluation, of all processes.
    """

    settings_class = InstanceSettings
    label_names = ("sample_index",)
    has_views_of_one_size = False

    settings: InstanceSettings
    splits: BoxSplits
    own: dict[int, ImageResult] = field(default_factory=dict)
    found: dict[int, ImageResult] = field(default_factory=dict)

    # ---- data ----

    @classmethod
    def open_splits(cls, settings: InstanceSettings) -> BoxSplits:
        require_coco_eval()
        (dataset,) = settings.dataset
        splits = open_box_splits(
            dataset,
            validation_fraction=settings.validation_fraction,
            max_bad_fraction=settings.max_bad_fraction,
            seed=settings.seed,
            checks=settings.check_images,
        )
        return with_masks(splits, dataset, settings.max_bad_fraction)

    def transform(self, train: bool) -> Transform:
        scale = self.settings.resize_scale if train else None
        return InstanceView(self.settings.image_size, scale, self._filter)

    @property
    def _filter(self) -> Image.Resampling:
        return Image.Resampling[self.settings.interpolation.upper()]

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return collate_instances(items)

    # ---- model ----

    def build_model(self) -> PreTrainedModel:
        settings = self.settings
        with set_by(drop_path_rate="drop_path"):
            return build_instance_segmenter(
                self.open_encoder(),
                self.splits.class_names,
                image_size=settings.image_size,
                num_queries=settings.num_queries,
                drop_path_rate=settings.drop_path,
            )

    def check_checkpoint(self, checkpoint: Path) -> None:
        check_same_classes(checkpoint, self.splits.class_names)

    def loss(
        self, model: Any, batch: dict[str, Any], counters: tuple[int, ...] | None
    ) -> tuple[Tensor, dict[str, Any]]:
        outputs = model(pixel_values=batch["pixel_values"])
        inner = getattr(model, "module", model)
        is_shown = batch["masks"].flatten(2).any(2).bool() & ~batch["is_crowd"]
        objects = {**batch, "classes": batch["classes"].masked_fill(~is_shown, NO_OBJECT)}
        loss = segmentation_loss(inner, outputs["layers"], objects)
        if counters is None:
            self._remember(outputs, batch)
        return loss, {"sample_index": batch["sample_index"]}

    def _remember(self, outputs: Any, batch: dict[str, Any]) -> None:
        """Keep the results for the images of a batch."""
        arrays = {name: batch[name].cpu().numpy() for name in ("masks", "classes", "is_crowd")}
        for row, number in enumerate(batch["sample_index"].tolist()):
            own = arrays["classes"][row] >= 0
            self.own[number] = evaluate_image(
                outputs["masks_queries_logits"][row],
                outputs["class_queries_logits"][row],
                *(values[row][own] for values in arrays.values()),
            )

    # ---- description ----

    def plan_rows(self) -> dict[str, str]:
        settings, size = self.settings, self.settings.image_size
        rows, columns = patch_grid(size, self.encoder_config.patch_size)
        objects = ", ".join(f"{split.num_boxes:,} {name}" for name, split in self.splits.samples.items())
        low, high = settings.resize_scale
        return {
            "input": f"{size} x {size} pixels, {rows} x {columns} patches, {settings.num_queries} queries",
            "objects": f"{objects}; {len(self.splits.class_names):,} classes",
            "views": f"scaled by {low:g} to {high:g}, cropped or padded, flipped half the time, colors distorted",
        }

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        if "eval_mask_ap" not in logs:
            return []
        return [f"mask AP {logs['eval_mask_ap']:.1%}, panoptic quality {logs['eval_panoptic_quality']:.1%}"]

    # ---- results ----

    @property
    def metrics(self) -> tuple[str, ...]:
        return _METRICS

    def compute_metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        parts = gather_object([dict(self.own)])  # empty when asked again about the same evaluation
        self.own.clear()  # the next evaluation may give these images to other processes
        self.found.update((number, result) for part in parts for number, result in part.items())
        results = [self.found[number] for number in sorted(labels.tolist())]
        return instance_metrics(results, len(self.splits.class_names))

    def draw(
        self, predictions: np.ndarray, labels: np.ndarray, dataset: Any, folder: Path, title: str, model: Any
    ) -> str:
        numbers = sorted(labels.tolist())
        quality = np.array([panoptic_quality(self.found[each].counts)["panoptic_quality"] for each in numbers])
        device = next(model.parameters()).device
        stats = torch.tensor(list(self.image_stats.values()), device=device)
        rows = []
        for name, position in ranked(quality):
            item = dataset[numbers[position]]
            with torch.no_grad():
                outputs = model(pixel_values=standardize(item["pixel_values"][None].to(device), *stats))
            logits = outputs["masks_queries_logits"][0], outputs["class_queries_logits"][0]
            is_crowd, masks = item["is_crowd"].numpy(), item["masks"].numpy()
            true = _painted(segment_map(masks, is_crowd), item["classes"].numpy()[~is_crowd])
            predicted = _painted(*panoptic_segments(*logits, (masks.shape[1], masks.shape[2])))
            image = item["pixel_values"].permute(1, 2, 0).numpy()
            rows.append(Segmentation(image, true, predicted, f"{name}: panoptic quality {quality[position]:.0%}"))
        draw_segmentations(rows, _painted_names(self.splits.class_names), title).save(folder / FIGURE_FILE)
        return FIGURE_FILE

    # ---- export ----

    def export(self, model: PreTrainedModel, folder: Path) -> None:
        side = self.settings.image_size
        export_dense(
            native_instance_segmenter(model.float()),  # type: ignore[arg-type]
            folder,
            trained=model,
            auto_class=AutoModelForUniversalSegmentation,
            # The longer side is resized, the rest is padded with black.
            image_processor={
                "image_processor_type": "EomtImageProcessor",
                "do_resize": True,
                "size": {"shortest_edge": side, "longest_edge": side},
                "resample": int(self._filter),
                "do_split_image": False,
                "do_pad": True,
            },
            image_stats=self.image_stats,
            image_size=side,
            outputs=("masks_queries_logits", "class_queries_logits"),
            origin=self.pretraining,
        )

    def card(self) -> TaskCard:
        return TaskCard(
            pipeline_tag="image-segmentation",
            kind=f"An instance segmentation model of {len(self.splits.class_names)} classes",
            usage=_USAGE,
            limitations="Intended for images like those it was fine-tuned on.",
            caption="Objects and predicted segments",
            classes=self.splits.class_names,
        )

    def how_to_open(self, folder: Path) -> str:
        return f'pipeline("image-segmentation", model="{folder}") opens it'


def _painted(segments: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Return the number of each pixel's class in `_painted_names`, 0 without a segment, `IGNORED` for void."""
    numbers = classes + 1 + (classes + 1 >= IGNORED)
    table = np.concatenate([numbers, [IGNORED, 0]])  # of the last two, negative numbers choose
    painted: np.ndarray = table[segments]
    return painted


def _painted_names(class_names: Sequence[str]) -> list[str]:
    """Return the names of the numbers in a figure: a background, and the classes, of which none has `IGNORED`."""
    names = [BACKGROUND, *class_names]
    return names if len(names) <= IGNORED else [*names[:IGNORED], "", *names[IGNORED:]]

"""Average precision of predicted masks, and their panoptic quality.

AP: COCO's, https://cocodataset.org/#detection-eval, computed by faster-coco-eval. A query's score is the probability
of its class times the mean probability inside of its mask, as in Mask2Former.
Shapes: Q queries, K classes, H, W height and width in pixels, n true objects of an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import EomtImageProcessorPil
from transformers.utils import ModelOutput

from evaluation.panoptic_quality import NO_SEGMENT, VOID, count_matches, panoptic_quality

THRESHOLD = 0.5  # of class, mask and visible share of a segment; pipelines take it as an argument
_MAX_DETECTIONS = 100  # of an image, as COCO counts


@dataclass(frozen=True)
class ImageResult:
    """Predicted and true masks of one image as COCO's run lengths, and the counts (K, 4) of its panoptic quality."""

    size: tuple[int, int]
    predicted: list[dict[str, Any]]  # segmentation, category_id, score
    true: list[dict[str, Any]]  # segmentation, category_id, iscrowd, area
    counts: np.ndarray


def evaluate_image(
    mask_logits: Tensor, class_logits: Tensor, masks: np.ndarray, classes: np.ndarray, is_crowd: np.ndarray
) -> ImageResult:
    """Compare the predictions for an image with its objects.

    Args:
        mask_logits: (Q, h, w), enlarged to the size of the masks.
        class_logits: (Q, K + 1), the last one for no object.
        masks: uint8 (n, H, W), with classes (n,) and whether each marks a group of objects (n,).
    """
    size, num_classes = (masks.shape[1], masks.shape[2]), class_logits.shape[1] - 1
    found = [
        {"segmentation": mask, "category_id": int(label), "score": float(score)}
        for mask, label, score in zip(*detections(mask_logits, class_logits, size), strict=True)
    ]
    true = [
        {"segmentation": mask, "category_id": int(label), "iscrowd": int(crowd), "area": int(area)}
        for mask, label, crowd, area in zip(_encode(masks), classes, is_crowd, masks.sum((1, 2)), strict=True)
    ]
    segments, labels = panoptic_segments(mask_logits, class_logits, size)
    counts = count_matches(segments, labels, segment_map(masks, is_crowd), classes[~is_crowd], num_classes)
    return ImageResult(size, found, true, counts)


def detections(
    mask_logits: Tensor, class_logits: Tensor, size: tuple[int, int]
) -> tuple[list[dict[str, Any]], np.ndarray, np.ndarray]:
    """Return the masks of the best queries as run lengths, their classes and their scores."""
    scores, classes = class_logits.softmax(1)[:, :-1].max(1)
    best = scores.topk(min(_MAX_DETECTIONS, len(scores))).indices
    logits = torch.nn.functional.interpolate(mask_logits[best][None].float(), size=size, mode="bilinear")[0]
    inside = logits > 0
    areas = inside.sum((1, 2))
    quality = (logits.sigmoid() * inside).sum((1, 2)) / areas.clamp(min=1)
    kept = (areas > 0).cpu()
    masks = inside.byte().cpu()[kept].numpy()
    return _encode(masks), classes[best].cpu()[kept].numpy(), (scores[best] * quality).cpu()[kept].numpy()


def panoptic_segments(
    mask_logits: Tensor, class_logits: Tensor, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the number of each pixel's segment (H, W), as transformers' image processor does, and their classes."""
    outputs = ModelOutput(masks_queries_logits=mask_logits[None].float(), class_queries_logits=class_logits[None])
    processor = EomtImageProcessorPil(size={"shortest_edge": size[0], "longest_edge": size[1]})
    (found,) = processor.post_process_panoptic_segmentation(
        outputs,
        target_sizes=[size],
        threshold=THRESHOLD,
        mask_threshold=THRESHOLD,
        overlap_mask_area_threshold=THRESHOLD,
    )
    classes = np.array([segment["label_id"] for segment in found["segments_info"]], np.int64)
    return found["segmentation"].cpu().numpy().astype(np.int64), classes


def segment_map(masks: np.ndarray, is_crowd: np.ndarray) -> np.ndarray:
    """Return the number of each pixel's object (H, W), of those that are no groups; the later of two is above."""
    segments = np.full(masks.shape[1:], NO_SEGMENT, np.int64)
    for mask in masks[is_crowd]:
        segments[mask > 0] = VOID
    for number, mask in enumerate(masks[~is_crowd]):
        segments[mask > 0] = number
    return segments


def instance_metrics(results: Sequence[ImageResult], num_classes: int) -> dict[str, float]:
    """Return mask AP, AP50 and AP75, and the panoptic quality."""
    return average_precision(results, num_classes) | panoptic_quality(
        np.sum([result.counts for result in results], axis=0)
    )


def average_precision(results: Sequence[ImageResult], num_classes: int) -> dict[str, float]:
    """Return the mean over the classes with objects of the average precision of masks; 0 without any object."""
    from faster_coco_eval import COCO, COCOeval_faster  # imported late: it takes a second

    images = [
        {"id": number, "height": result.size[0], "width": result.size[1]} for number, result in enumerate(results)
    ]
    true, found = (
        [{**entry, "image_id": number} for number, result in enumerate(results) for entry in entries_of(result)]
        for entries_of in (lambda result: result.true, lambda result: result.predicted)
    )
    content = {
        "images": images,
        "categories": [{"id": label, "name": str(label)} for label in range(num_classes)],
        "annotations": [{**entry, "id": number} for number, entry in enumerate(true, start=1)],
    }
    truth = COCO(content)
    evaluation = COCOeval_faster(truth, truth.loadRes(found), iouType="segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    names = ("mask_ap", "mask_ap50", "mask_ap75")
    # -1 stands for no object at all.
    return {name: max(0.0, float(value)) for name, value in zip(names, evaluation.stats[:3], strict=True)}


def _encode(masks: np.ndarray) -> list[dict[str, Any]]:
    """Return masks uint8 (n, H, W) as COCO's compressed run lengths."""
    from faster_coco_eval import mask

    if not len(masks):
        return []
    encoded: list[dict[str, Any]] = mask.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
    return encoded

"""Segmentation by simple classifiers of frozen patch features, compared with raw pixels and an untrained encoder.

Paper: Darcet et al. 2025 (CAPI), arXiv:2502.08769, Sec. 4.1: kNN and a linear classifier of standardized patch
features; every pixel of a patch gets the class of the patch.
Code: facebookresearch/capi, eval_segmentation.py.
Differs: a patch of the bank has one class, that of most of its pixels, instead of one per pixel; neighbors vote with
their similarities; at most 100,000 patches are learned from; SGD replaces L-BFGS; the images are prepared by the
encoder's own image processor.
Everything is selected on a fifth of the training images. Shapes: B images of a batch, C channels, H, W height and
width in pixels, P patches of an image, M training patches, Q test images, K classes, D feature dimension.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from data.mask_codes import IGNORED
from data.seeds import seeded_generator
from evaluation.frozen import PIXELS, TRAINED, UNTRAINED
from evaluation.iou import class_areas, ious_of_areas, mean_iou, mean_of_areas, pixel_confusion
from evaluation.knn import TEMPERATURES, Knn, neighbors, weighted_votes
from evaluation.linear_probe import LinearClassifier, statistics, train_by_sgd
from evaluation.patch_labels import majority_labels, patch_of_pixel

COMPARED, PERFECT = "compared", "perfect"
PROBES = {"knn": "kNN", "linear": "linear probe"}
MAX_PATCHES = 100_000
_NUM_NEIGHBORS = (1, 3, 10, 30)  # as in CAPI
_DEFAULT_LEARNING_RATE = 1e-1  # if there are too few images to select one
_LEARNING_RATES, _NUM_EPOCHS = (1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0), 30
_SELECTION_SHARE = 0.2  # of the training images
_MAX_SELECTION_QUERIES = 20_000
_NUM_RESAMPLES, _LEVEL = 1_000, 0.95

Featurizer = Callable[[Tensor], Tensor]  # pixels (B, C, H, W) to features of patches (B, h, w, D)
Classifier = Callable[[Tensor], Tensor]  # features (M, D) to scores (M, K)


@dataclass(frozen=True)
class MaskedBatch:
    """Prepared images (B, C, H, W) with their masks int64 (B, H, W), and their positions among the requested ones."""

    positions: list[int]
    pixel_values: Tensor
    masks: np.ndarray


@dataclass(frozen=True)
class LabeledPatches:
    """Training patches: features (M, D), classes int64 (M,) and the number of their image int64 (M,)."""

    features: Tensor
    labels: Tensor
    images: Tensor


@dataclass(frozen=True)
class DenseRow:
    """One classifier of one kind of patch features, measured on the pixels of Q test images.

    `positions` (Q,) are those of the images in their split, `areas` (Q, 3, K) those of `evaluation.iou`, and `patches`
    int (Q, P) the predicted classes.
    """

    probe: str
    source: str  # TRAINED, or what it is compared with
    chosen: dict[str, float]
    validation_iou: float | None
    grid: tuple[int, int]
    positions: np.ndarray
    areas: np.ndarray
    patches: np.ndarray
    seed: int = field(repr=False)

    @property
    def name(self) -> str:
        if self.source == PERFECT:
            return "the best possible classes of the patches"
        of = {TRAINED: "patches", UNTRAINED: "patches, untrained", PIXELS: "raw pixels", COMPARED: "patches, compared"}
        return f"{PROBES[self.probe]}, {of[self.source]}"

    @property
    def score(self) -> float:
        return float(mean_of_areas(self.areas.sum(0)))

    @cached_property
    def resampled(self) -> np.ndarray:
        """The mean IoU of resampled test images; the same ones for every row, so that differences are paired."""
        num_images = len(self.areas)
        generator = seeded_generator(self.seed, "resampled images")
        drawn = torch.randint(num_images, (_NUM_RESAMPLES, num_images), generator=generator).numpy()
        counts = np.stack([np.bincount(each, minlength=num_images) for each in drawn])
        return mean_of_areas((counts @ self.areas.reshape(num_images, -1)).reshape(-1, *self.areas.shape[1:]))

    @property
    def interval(self) -> tuple[float, float]:
        return percentiles(self.resampled)

    @property
    def class_ious(self) -> np.ndarray:
        return ious_of_areas(self.areas.sum(0))

    @property
    def ious_of_images(self) -> np.ndarray:
        return mean_of_areas(self.areas)

    def as_result(self) -> dict[str, Any]:
        """Return the entry of metrics.json."""
        total = self.areas.sum((0, 2))
        return {
            "name": self.name,
            "metric": "mean_iou",
            "value": self.score,
            "interval": list(self.interval),
            "n": len(self.areas),
            "reference": self.source != TRAINED,
            "pixel_accuracy": float(total[0] / max(total[1], 1)),
            "class_ious": [None if np.isnan(iou) else float(iou) for iou in self.class_ious],
            "probe": self.probe,
            "features": PIXELS if self.source == PIXELS else "patches",
            "chosen": self.chosen,
            "mean_iou_where_chosen": self.validation_iou,
        }


def percentiles(values: np.ndarray) -> tuple[float, float]:
    """Return the 95 % interval of resampled values."""
    low, high = np.quantile(values, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return float(low), float(high)


@torch.no_grad()
def collect_patches(
    featurizers: Mapping[str, Featurizer],
    batches: Iterable[MaskedBatch],
    num_classes: int,
    num_images: int,
    seed: int,
) -> dict[str, LabeledPatches]:
    """Compute the features of random patches of the training images in one pass, the same patches for all sources.

    Raises:
        ValueError: If no patch has a label.
    """
    per_image, generator = max(1, MAX_PATCHES // num_images), seeded_generator(seed, "patches")
    features: dict[str, list[Tensor]] = {source: [] for source in featurizers}
    labels, images = [], []
    for batch in batches:
        computed = {source: featurize(batch.pixel_values) for source, featurize in featurizers.items()}
        grid = next(iter(computed.values())).shape[1:3]
        majority = torch.from_numpy(majority_labels(batch.masks, (grid[0], grid[1]), num_classes))  # (B, P)
        for row, position in enumerate(batch.positions):
            labeled = (majority[row] != IGNORED).nonzero()[:, 0]
            chosen = labeled[torch.randperm(len(labeled), generator=generator)[:per_image]]
            labels.append(majority[row, chosen])
            images.append(torch.full_like(chosen, position))
            for source, values in computed.items():
                features[source].append(values[row].flatten(0, 1)[chosen.to(values.device)].float().cpu())
    if not sum(map(len, labels)):
        raise ValueError("no patch of the training images has a label: all pixels of their masks are ignored")
    return {
        source: LabeledPatches(torch.cat(values), torch.cat(labels), torch.cat(images))
        for source, values in features.items()
    }


def fit_probe(
    probe: str, train: LabeledPatches, num_classes: int, seed: int, device: torch.device | str = "cpu"
) -> tuple[Classifier, dict[str, float], float | None]:
    """Fit a probe with the hyperparameters that have the best mean IoU of patches on a fifth of the images.

    Returns the classifier, the hyperparameters and that IoU; None if there are too few images to select anything.
    """
    images = train.images.unique()
    order = images[torch.randperm(len(images), generator=seeded_generator(seed, "dense probes"))]
    held_out = torch.isin(train.images, order[: int(_SELECTION_SHARE * len(images))])
    features, labels, held_out = train.features.to(device), train.labels.to(device), held_out.to(device)
    return (_fit_knn if probe == "knn" else _fit_linear)(features, labels, held_out, num_classes, seed)


def measure(
    classifiers: Mapping[tuple[str, str], Classifier],
    featurizers: Mapping[str, Featurizer],
    batches: Iterable[MaskedBatch],
    num_classes: int,
) -> tuple[list[int], dict[tuple[str, str], tuple[tuple[int, int], np.ndarray, np.ndarray]]]:
    """Classify the patches of the test images by classifiers of (probe, source), in one pass.

    Returns the positions of the images, and for each classifier the grid, the areas (Q, 3, K) and the classes (Q, P);
    also for the `PERFECT` classes of the patches.
    """
    positions: list[int] = []
    areas: dict[tuple[str, str], list[np.ndarray]] = {}
    patches: dict[tuple[str, str], list[np.ndarray]] = {}
    grid = (0, 0)
    for batch in batches:
        positions += batch.positions
        computed = {source: featurize(batch.pixel_values) for source, featurize in featurizers.items()}
        rows, columns = next(iter(computed.values())).shape[1:3]
        grid = (rows, columns)
        predicted = {("", PERFECT): majority_labels(batch.masks, grid, num_classes)}
        for (probe, source), classify in classifiers.items():
            scores = classify(computed[source].flatten(0, 2).float())
            predicted[probe, source] = scores.argmax(1).view(len(batch.positions), -1).cpu().numpy()
        patch = patch_of_pixel(batch.masks.shape[1:], grid)
        for key, classes in predicted.items():
            confusions = [
                pixel_confusion(mask, own[patch], num_classes) for mask, own in zip(batch.masks, classes, strict=True)
            ]
            areas.setdefault(key, []).append(class_areas(np.stack(confusions)))
            patches.setdefault(key, []).append(classes.astype(np.int32))
    return positions, {key: (grid, np.concatenate(areas[key]), np.concatenate(patches[key])) for key in areas}


def _fit_knn(
    features: Tensor, labels: Tensor, held_out: Tensor, num_classes: int, seed: int
) -> tuple[Classifier, dict[str, float], float | None]:
    mean, scale = statistics(features[~held_out])
    bank = F.normalize((features - mean) * scale, dim=1)
    chosen, best = {"k": _NUM_NEIGHBORS[0], "temperature": TEMPERATURES[0]}, None
    if held_out.any():
        own_bank, own_labels = bank[~held_out], labels[~held_out]
        queries, truth = (each[held_out][:_MAX_SELECTION_QUERIES] for each in (bank, labels))
        possible = [k for k in _NUM_NEIGHBORS if k <= len(own_bank)]
        similarity, index = neighbors(own_bank, queries, max(possible))
        for k in possible:
            for temperature in TEMPERATURES if k > 1 else TEMPERATURES[:1]:
                votes = weighted_votes(similarity[:, :k], own_labels[index[:, :k]], num_classes, temperature)
                iou = _patch_iou(votes, truth, num_classes)
                if best is None or iou > best:
                    chosen, best = {"k": k, "temperature": temperature}, iou
    knn = Knn(bank, labels, num_classes, int(chosen["k"]), chosen["temperature"], best)
    return lambda queries: knn((queries - mean) * scale), chosen, best


def _fit_linear(
    features: Tensor, labels: Tensor, held_out: Tensor, num_classes: int, seed: int
) -> tuple[Classifier, dict[str, float], float | None]:
    rate, best = _DEFAULT_LEARNING_RATE, None
    if held_out.any():
        mean, scale = statistics(features[~held_out])
        x = (features - mean) * scale
        fitted = train_by_sgd(x[~held_out], labels[~held_out], num_classes, _LEARNING_RATES, seed, _NUM_EPOCHS)
        for candidate, (weight, bias) in zip(_LEARNING_RATES, fitted, strict=True):
            # A rate that is too large ends in NaN, whose argmax is class 0.
            iou = _patch_iou(torch.addmm(bias, x[held_out], weight), labels[held_out], num_classes)
            if best is None or iou > best:
                rate, best = candidate, iou
    mean, scale = statistics(features)
    ((weight, bias),) = train_by_sgd((features - mean) * scale, labels, num_classes, [rate], seed, _NUM_EPOCHS)
    return LinearClassifier(mean, scale, weight, bias, rate, best), {"learning_rate": rate}, best


def _patch_iou(scores: Tensor, labels: Tensor, num_classes: int) -> float:
    return float(mean_iou(pixel_confusion(labels.cpu().numpy(), scores.argmax(1).cpu().numpy(), num_classes)))


def difference(row: DenseRow, other: DenseRow) -> tuple[float, tuple[float, float]]:
    """Return the difference of the scores of `row` and `other`, with its 95 % interval over resampled images."""
    return row.score - other.score, percentiles(row.resampled - other.resampled)


def best_row(rows: Sequence[DenseRow], source: str = TRAINED) -> DenseRow:
    """Return the row of a source that is best on the training images."""
    return max((row for row in rows if row.source == source), key=lambda row: row.validation_iou or 0)

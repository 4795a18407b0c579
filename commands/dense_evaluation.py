"""`run_evaluation.py --dense`: patch features, measured by the segmentation of images with masks.

Shapes: B images of a batch, H, W height and width in pixels, h, w rows and columns of patches, Q test images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from commands.evaluation_output import (
    MAPS_FILE,
    MAX_BAD_FRACTION,
    METRICS_FILE,
    REPORT_FILE,
    EvaluationOutput,
    short_name,
    with_progress,
)
from commands.evaluation_settings import EvaluationSettings
from data.bad_images import BadImages
from data.decoding import BadImage
from data.masked_images import MaskedImages, open_masked_splits
from data.seeds import seeded_generator
from evaluation.dense import (
    COMPARED,
    PERFECT,
    PROBES,
    DenseRow,
    Featurizer,
    MaskedBatch,
    best_row,
    collect_patches,
    fit_probe,
    measure,
)
from evaluation.dense_figures import similarity_figure
from evaluation.dense_report import write_dense_report
from evaluation.features import FrozenEncoder, check_finite, untrained
from evaluation.frozen import PIXELS, TRAINED, UNTRAINED
from evaluation.maps import feature_maps
from evaluation.patch_labels import patch_of_pixel, prepare_masks, raw_patches
from evaluation.preprocessing import Preprocessor, batches
from evaluation.segmentation_pictures import Segmentation, draw_segmentations, ranked

SIMILARITY_FILE, MASKS_FILE = "patch_similarity.png", "segmentation.png"
_TEST_FRACTION = 0.2  # of a dataset without a test or validation split
_NUM_EXAMPLES = 6
_ORDER = (TRAINED, COMPARED, UNTRAINED, PIXELS, PERFECT)


@dataclass(frozen=True)
class _Reader:
    """Reads batches of images and masks, both prepared for one encoder."""

    preprocessor: Preprocessor
    output: EvaluationOutput
    device: torch.device

    def __call__(
        self, split: MaskedImages, positions: Sequence[int] | np.ndarray, name: str = ""
    ) -> Iterator[MaskedBatch]:
        settings, bad = self.output.settings, self.output.bad
        images = batches(
            split.source,
            split.indices[positions],
            self.preprocessor,
            bad.__setitem__,
            settings.per_device_eval_batch_size,
        )
        for batch in with_progress(images, len(positions), name) if name else images:
            masks: dict[int, np.ndarray] = {}  # by row of the batch
            for row, position in enumerate(batch.positions):
                try:
                    masks[row] = split.mask(int(positions[position]))
                except BadImage as error:
                    bad[split.name(int(positions[position]))] = str(error)
            if masks:
                rows = list(masks)
                prepared = prepare_masks(self.preprocessor, list(masks.values()))
                yield MaskedBatch(
                    [int(positions[batch.positions[row]]) for row in rows], batch.pixel_values[rows], prepared
                )


def evaluate_dense(
    settings: EvaluationSettings,
    encoder: tuple[FrozenEncoder, Preprocessor],
    compared: tuple[FrozenEncoder, Preprocessor] | None,
    argv: Sequence[str],
) -> None:
    """Evaluate the patch features of an encoder on images with masks, and write metrics and a report."""
    probes = [probe for probe in settings.probes if probe in PROBES]
    if not probes:
        raise ValueError(
            f"none of --probes {' '.join(settings.probes)} classifies patches; expected {' or '.join(PROBES)}"
        )
    output = EvaluationOutput(settings, argv)
    task = open_masks(settings, output.bad)
    model, preprocessor = encoder
    read = _Reader(preprocessor, output, model.device)
    featurizers: dict[str, Featurizer] = {
        TRAINED: partial(_patches, model),
        UNTRAINED: partial(_patches, untrained(model, settings.seed)),
        PIXELS: partial(_raw_patches, model, preprocessor),
    }
    rows = _measure(read, featurizers, task, probes)
    if compared is not None:
        found = _measure(
            _Reader(compared[1], output, compared[0].device), {COMPARED: partial(_patches, compared[0])}, task, probes
        )
        rows += [row for row in found if row.source == COMPARED]
    output.check_bad(len(task.train) + len(task.test))
    rows.sort(key=lambda row: _ORDER.index(row.source))
    headline = best_row(rows)

    figures, size = draw_figures(encoder, read, task, headline)
    facts = {
        **output.facts(model, preprocessor, size, task.tested_on),
        "patches": f"{headline.grid[0]} x {headline.grid[1]} of each image",
    }
    other = None if settings.compare_with is None else short_name(settings.compare_with)
    content = {
        "results": [row.as_result() for row in rows],
        "headline": headline.name,
        "dataset": output.dataset,
        "compared_with": other,
        "num_train": len(task.train),
        "num_test": len(task.test),
        "class_names": list(task.class_names),
        "facts": facts,
    }
    output.write(content, {name: figure for name, (_, figure, _) in figures.items()})
    write_dense_report(
        output.folder / REPORT_FILE,
        rows=rows,
        headline=headline,
        class_names=task.class_names,
        compared=other,
        figures={title: (figure, text) for title, figure, text in figures.values()},
        model=output.model,
        data=f"{output.dataset}: {len(task.train):,} training images, {len(task.test):,} test images, "
        f"{len(task.class_names)} classes",
        facts=facts,
        command=output.command,
    )
    print(f"{output.folder}: {headline.name} {headline.score:.1%} mean IoU; {METRICS_FILE}, {REPORT_FILE}, figures")


@dataclass(frozen=True)
class DenseTask:
    """The images with masks that the probes are trained and tested on."""

    class_names: tuple[str, ...]
    train: MaskedImages
    test: MaskedImages
    tested_on: str


def open_masks(settings: EvaluationSettings, bad: BadImages) -> DenseTask:
    """Open the training split, and the test or validation split or a share; adds what cannot be read to `bad`."""
    opened = open_masked_splits(
        settings.dataset,
        class_file=settings.class_file,
        ignore_index=settings.ignore_index,
        mask_column=settings.mask_column,
        validation_fraction=0,
        max_bad_fraction=MAX_BAD_FRACTION,
        seed=settings.seed,
    )
    bad.update(opened.bad)
    for note in opened.notes:
        print(f"note: {note}")
    train, test, tested_on = opened.by_name["train"], opened.by_name.get("test"), "its test split"
    if test is None:
        test, tested_on = opened.by_name.get("validation"), "its validation split"
    if test is None:
        order = torch.randperm(len(train), generator=seeded_generator(settings.seed, "dense test images")).numpy()
        num_test = max(1, round(_TEST_FRACTION * len(train)))
        if num_test == len(train):
            raise ValueError(f"{train.name(0)} is the only image; expected at least two, to train on and to test on")
        train, test = train.select(np.sort(order[num_test:])), train.select(np.sort(order[:num_test]))
        tested_on = f"{_TEST_FRACTION:.0%} of the images, held out because there is no test or validation split"
        print(f"note: tested on {tested_on}")
    return DenseTask(opened.class_names, train, test, tested_on)


def _patches(encoder: FrozenEncoder, pixel_values: Tensor) -> Tensor:
    patches = encoder(pixel_values).patches
    check_finite(patches)
    return patches


def _raw_patches(encoder: FrozenEncoder, preprocessor: Preprocessor, pixel_values: Tensor) -> Tensor:
    """Return the pixels of the patches of an encoder's grid."""
    rows, columns = encoder(pixel_values[:1]).patches.shape[1:3]
    return raw_patches(preprocessor.unnormalize(pixel_values), (rows, columns)).unflatten(1, (rows, columns))


def _measure(
    read: _Reader, featurizers: Mapping[str, Featurizer], task: DenseTask, probes: Sequence[str]
) -> list[DenseRow]:
    """Fit and measure the probes of some kinds of features."""
    num_classes, seed = len(task.class_names), read.output.settings.seed
    images = read(task.train, range(len(task.train)), "training images")
    train = collect_patches(featurizers, images, num_classes, len(task.train), seed)
    fitted = {
        (probe, source): fit_probe(probe, train[source], num_classes, seed, read.device)
        for source in featurizers
        for probe in probes
    }
    classifiers = {key: classify for key, (classify, _, _) in fitted.items()}
    images = read(task.test, range(len(task.test)), "test images")
    positions, measured = measure(classifiers, featurizers, images, num_classes)
    rows = []
    for (probe, source), (grid, areas, patches) in measured.items():
        chosen, validation_iou = fitted[probe, source][1:] if probe else ({}, None)
        rows.append(DenseRow(probe, source, chosen, validation_iou, grid, np.array(positions), areas, patches, seed))
        print(f"{rows[-1].name}: {rows[-1].score:.1%}")
    return rows


Figures = dict[str, tuple[str, Image.Image, str]]  # title, figure and description by file name


def draw_figures(
    encoder: tuple[FrozenEncoder, Preprocessor], read: _Reader, task: DenseTask, headline: DenseRow
) -> tuple[Figures, tuple[int, int]]:
    """Draw segmentations, similarities and components of some images, and return their height and width."""
    model, preprocessor = encoder
    scores = headline.ious_of_images
    shown = {name: position for name, position in ranked(scores)}
    batch = _join(read(task.test, headline.positions[list(shown.values())]))
    patch = patch_of_pixel(batch.masks.shape[1:], headline.grid)
    pixels = (255 * preprocessor.unnormalize(batch.pixel_values)).round().byte().expand(-1, 3, -1, -1)
    segmentations = [
        Segmentation(
            image.permute(1, 2, 0).numpy(),
            mask,
            headline.patches[position][patch].astype(np.uint8),
            f"{name}: mean IoU {scores[position]:.0%}",
        )
        for (name, position), image, mask in zip(shown.items(), pixels, batch.masks.astype(np.uint8), strict=True)
    ]
    footer = f"{headline.name}, test images"
    masks = draw_segmentations(segmentations, task.class_names, footer)
    masks_text = f"Test images from the best to the worst of the {headline.name}, with masks, predictions and errors."

    spread = np.linspace(0, len(headline.positions) - 1, min(_NUM_EXAMPLES, len(headline.positions)))
    batch = _join(read(task.test, headline.positions[spread.round().astype(int)]))
    similarity = similarity_figure(model, preprocessor, batch.pixel_values, batch.masks, len(task.class_names))
    maps = feature_maps(model, preprocessor, batch.pixel_values)
    figures = {
        MASKS_FILE: ("Predicted masks", masks, masks_text),
        SIMILARITY_FILE: ("Similarity to chosen patches", *similarity),
        MAPS_FILE: ("Feature maps", *maps),
    }
    return figures, (batch.pixel_values.shape[2], batch.pixel_values.shape[3])


def _join(batches: Iterator[MaskedBatch]) -> MaskedBatch:
    found = list(batches)
    return MaskedBatch(
        [position for batch in found for position in batch.positions],
        torch.cat([batch.pixel_values for batch in found]),
        np.concatenate([batch.masks for batch in found]),
    )

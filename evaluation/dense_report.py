"""HTML report of an evaluation of frozen patch features. Shapes: K classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from evaluation.dense import COMPARED, PERFECT, DenseRow, best_row, difference
from evaluation.frozen import PIXELS, TRAINED, UNTRAINED
from evaluation.report import in_page, render, verdict

_MAX_CLASSES = 20


def write_dense_report(
    path: Path,
    *,
    rows: Sequence[DenseRow],
    headline: DenseRow,
    class_names: Sequence[str],
    compared: str | None,
    figures: Mapping[str, tuple[Image.Image, str]],
    **values: Any,
) -> None:
    """Render the report to `path`.

    Args:
        compared: Name of the second encoder.
        figures: Each with a description, by title.
        values: The other values of the template.
    """
    groups = {
        TRAINED: "This encoder",
        COMPARED: f"The encoder {compared}",
        UNTRAINED: "Same architecture, untrained",
        PIXELS: "Raw pixels of the patches, no encoder",
        PERFECT: "The most that one class for each patch can reach",
    }
    classes, num_omitted = iou_by_class(headline, class_names)
    render(
        path,
        "dense_report_template.html",
        rows=rows,
        headline=headline,
        groups=groups,
        comparisons=comparisons(rows, headline, compared),
        classes=classes,
        num_omitted_classes=num_omitted,
        figures={title: (in_page(figure), text) for title, (figure, text) in figures.items()},
        **values,
    )


def comparisons(rows: Sequence[DenseRow], headline: DenseRow, compared: str | None) -> list[str]:
    """Compare the headline with the best row of each reference, in one sentence each."""
    sentences = []
    for source, name in ((PIXELS, "raw pixels"), (UNTRAINED, "the untrained encoder"), (COMPARED, compared)):
        if any(row.source == source for row in rows):
            best = best_row(rows, source)
            sentences.append(verdict(*difference(headline, best), f"{name} ({best.name}, {best.score:.1%})"))
    return sentences


def iou_by_class(row: DenseRow, class_names: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """Return the IoU of each class and its share of the pixels, lowest first, and how many classes are omitted."""
    ious, labeled = row.class_ious, row.areas[:, 1].sum(0)  # (K,)
    order = [int(label) for label in np.argsort(ious, kind="stable") if not np.isnan(ious[label])]
    shown = [
        {"name": class_names[label], "iou": float(ious[label]), "share": float(labeled[label] / labeled.sum())}
        for label in order[:_MAX_CLASSES]
    ]
    return shown, len(order) - len(shown)

"""HTML report of an evaluation of frozen features: a single file without external resources.

Shapes: Q test images, K classes.
"""

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from evaluation.class_balance import BALANCED
from evaluation.frozen import PIXELS, TRAINED, UNTRAINED, Row, difference
from evaluation.metrics import confusion_matrix

_MAX_CLASSES = 20
_GROUPS = {TRAINED: "This encoder", UNTRAINED: "Same architecture, untrained", PIXELS: "Raw pixels, no encoder"}


def write_report(
    path: Path,
    *,
    model: str,
    data: str,
    rows: Sequence[Row],
    headline: Row,
    quality: Sequence[Mapping[str, Any]],
    labels: np.ndarray,
    class_names: Sequence[str],
    figure: Image.Image,
    figure_text: str,
    facts: Mapping[str, Any],
    command: str,
) -> None:
    """Render the report to `path`.

    Args:
        quality: The entries of `evaluation.frozen.measure_quality`.
        labels: Labels of the test images (Q,).
        figure_text: Description of `figure`, whose text is too small on a phone.
    """
    classes, num_omitted = accuracy_by_class(headline, labels, class_names)
    render(
        path,
        "report_template.html",
        model=model,
        data=data,
        headline=headline,
        comparisons=comparisons(rows, headline),
        groups=_GROUPS,
        rows=rows,
        balanced=BALANCED,
        constant=1 / len(np.unique(labels)) if headline.is_unbalanced else np.bincount(labels).max() / len(labels),
        quality=quality,
        classes=classes,
        num_omitted_classes=num_omitted,
        figure=in_page(figure),
        figure_text=figure_text,
        facts=facts,
        command=command,
    )


def render(path: Path, template: str, **values: Any) -> None:
    """Write a page from a template of this folder."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    path.write_text(environment.get_template(template).render(**values), encoding="utf-8", errors="backslashreplace")


def in_page(figure: Image.Image) -> str:
    """Return a figure as base64 of a PNG file, for a page without other files."""
    png = BytesIO()
    figure.save(png, "PNG", optimize=True)
    return base64.b64encode(png.getvalue()).decode()


def comparisons(rows: Sequence[Row], headline: Row) -> list[str]:
    """Compare the headline with the best row of each kind of reference, in one sentence each."""
    sentences = []
    for source, name in ((PIXELS, "raw pixels"), (UNTRAINED, "the untrained encoder")):
        of_source = [row for row in rows if row.source == source]
        if not of_source:
            continue
        best = max(of_source, key=lambda row: row.score)
        sentences.append(verdict(*difference(headline, best), f"{name} ({best.name}, {best.score_text})"))
    return sentences


def verdict(gain: float, interval: tuple[float, float], other: str) -> str:
    """Say whether a paired difference of scores to `other` is significant."""
    low, high = interval
    found = f"{abs(100 * gain):.1f} points {'better' if gain > 0 else 'worse'} than"
    if low <= 0 <= high:
        found = "Not significantly different from"
    bounds = f"{100 * low:+.1f} to {100 * high:+.1f}".replace("-", "\N{MINUS SIGN}")
    return f"{found} {other}; 95\N{NO-BREAK SPACE}% confidence interval of the paired difference: {bounds}."


def accuracy_by_class(row: Row, labels: np.ndarray, class_names: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """Return the accuracy of each class, lowest first, and how many of the best classes are omitted."""
    matrix = confusion_matrix(labels, row.predictions, len(class_names))  # (K, K)
    present = np.flatnonzero(matrix.sum(1))
    accuracy = matrix.diagonal()[present] / matrix.sum(1)[present]
    order = present[np.argsort(accuracy, kind="stable")]
    entries = []
    for label in order[:_MAX_CLASSES]:
        num_images, mistakes = int(matrix[label].sum()), matrix[label] * (np.arange(len(class_names)) != label)
        entries.append(
            {
                "name": class_names[label],
                "accuracy": matrix[label, label] / num_images,
                "n": num_images,
                "confused_with": class_names[mistakes.argmax()] if mistakes.any() else None,
            }
        )
    return entries, len(order) - len(entries)

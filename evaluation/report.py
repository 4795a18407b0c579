"""HTML report of an evaluation of frozen features: a single file without external resources.

Shapes: Q test images, K classes.
"""

import base64
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from PIL import Image

from evaluation.frozen import PIXELS, TRAINED, UNTRAINED, Row, difference
from evaluation.metrics import confusion_matrix

_TEMPLATE = Path(__file__).parent / "report_template.html"
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
        facts: Further information about how the evaluation was done.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    classes, num_omitted = accuracy_by_class(headline, labels, class_names)
    groups = [
        {
            "title": title,
            "reference": source != TRAINED,
            "rows": [_format_row(row) for row in rows if row.source == source],
        }
        for source, title in _GROUPS.items()
    ]
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        model=model,
        data=data,
        headline=_format_row(headline),
        comparisons=comparisons(rows, headline),
        groups=groups,
        majority=_percent(np.bincount(labels).max() / len(labels)),
        quality=_quality_table(quality),
        classes=classes,
        num_omitted_classes=num_omitted,
        figure=_as_base64(figure),
        figure_text=figure_text,
        facts=[(name, str(value)) for name, value in facts.items()],
        selected=[_format_selection(row) for row in rows],
        command=command,
    )
    path.write_text(page, encoding="utf-8")


def comparisons(rows: Sequence[Row], headline: Row) -> list[str]:
    """Compare the headline with the best row of each kind of reference, in one sentence each."""
    sentences = []
    for source, name in ((PIXELS, "raw pixels"), (UNTRAINED, "the untrained encoder")):
        of_source = [row for row in rows if row.source == source]
        if not of_source:
            continue
        best = max(of_source, key=lambda row: row.accuracy)
        gain, (low, high) = difference(headline, best)
        points = f"{abs(100 * gain):.1f} points"
        bounds = f"{100 * low:+.1f} to {100 * high:+.1f}".replace("-", "\N{MINUS SIGN}")
        span = f"95 % confidence interval of the paired difference: {bounds}"
        if low <= 0 <= high:
            verdict = f"Not significantly different from {name} ({best.name}, {best.accuracy:.1%})"
        else:
            verdict = f"{points} {'better' if gain > 0 else 'worse'} than {name} ({best.name}, {best.accuracy:.1%})"
        sentences.append(f"{verdict}; {span}.")
    return sentences


def accuracy_by_class(row: Row, labels: np.ndarray, class_names: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """Return the accuracy of each class, lowest first, and how many of the best classes are omitted."""
    matrix = confusion_matrix(labels, row.predictions, len(class_names))  # (K, K)
    present = np.flatnonzero(matrix.sum(1))
    accuracy = matrix.diagonal()[present] / matrix.sum(1)[present]
    order = present[np.argsort(accuracy, kind="stable")]
    entries = []
    for label in order[:_MAX_CLASSES]:
        mistakes = matrix[label] * (np.arange(len(class_names)) != label)
        share = matrix[label, label] / matrix[label].sum()
        entries.append(
            {
                "name": class_names[label],
                "percent": f"{share:.0%}",
                "width": _percent(share),
                "n": int(matrix[label].sum()),
                "confused_with": class_names[mistakes.argmax()] if mistakes.any() else None,
            }
        )
    return entries, len(order) - len(entries)


def _format_row(row: Row) -> dict[str, Any]:
    low, high = row.interval
    return {
        "name": row.name,
        "n": f"{len(row.correct):,}",
        "percent": f"{row.accuracy:.1%}",
        "interval": f"{100 * low:.1f}\N{EN DASH}{100 * high:.1f}",
        "width": _percent(row.accuracy),
        "low": _percent(low),
        "span": _percent(high - low),
    }


def _format_selection(row: Row) -> dict[str, str | None]:
    return {
        "name": row.name,
        "setting": ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in row.chosen.items()),
        "accuracy": None if row.validation_accuracy is None else f"{row.validation_accuracy:.1%}",
        "balanced": f"{row.balanced_accuracy:.1%}",
    }


def _quality_table(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for entry in entries:
        row = rows.setdefault(entry["features"], {"features": entry["features"], "width": entry["width"]})
        is_rank = entry["metric"] == "effective rank"
        row["rankme" if is_rank else "std"] = f"{entry['value']:.1f}" if is_rank else f"{entry['value']:.2f}"
    return list(rows.values())


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _as_base64(image: Image.Image) -> str:
    stream = BytesIO()
    image.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()

"""One page about an encoder's frozen features: `report.html`, which stands alone and is readable on a phone.

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
_GROUPS = {TRAINED: "This encoder", UNTRAINED: "The same architecture, untrained", PIXELS: "No encoder: raw pixels"}


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
    picture: Image.Image | None,
    picture_text: str,
    facts: Mapping[str, Any],
    command: str,
) -> None:
    """Write the page.

    Args:
        labels: of the test images (Q,).
        quality: entries of `evaluation.frozen.quality`.
        picture_text: what `picture` shows; its own letters are too small for a phone.
        facts: what else a reader wants to know of how it was measured.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    weakest, num_left_out = by_class(headline, labels, class_names)
    groups = [
        {
            "title": title,
            "reference": source != TRAINED,
            "rows": [_shown(row) for row in rows if row.source == source],
        }
        for source, title in _GROUPS.items()
    ]
    page = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        model=model,
        data=data,
        headline=_shown(headline),
        comparisons=comparisons(rows, headline),
        groups=groups,
        chance=_percent_number(np.bincount(labels).max() / len(labels)),
        quality=_quality_table(quality),
        classes=weakest,
        classes_left_out=num_left_out,
        picture=_as_base64(picture) if picture is not None else None,
        picture_text=picture_text,
        facts=[(name, str(value)) for name, value in facts.items()],
        chosen=[_choice(row) for row in rows],
        command=command,
    )
    path.write_text(page, encoding="utf-8")


def comparisons(rows: Sequence[Row], headline: Row) -> list[str]:
    """A sentence for each kind of reference: the best row of it against the headline, on the same images."""
    sentences = []
    for source, name in ((PIXELS, "raw pixels"), (UNTRAINED, "the untrained encoder")):
        of_source = [row for row in rows if row.source == source]
        if not of_source:
            continue
        best = max(of_source, key=lambda row: row.accuracy)
        gain, (low, high) = difference(headline, best)
        points = f"{abs(100 * gain):.1f} points"
        bounds = f"{100 * low:+.1f} to {100 * high:+.1f}".replace("-", "\N{MINUS SIGN}")
        span = f"95 % interval of the difference on these images: {bounds}"
        if low <= 0 <= high:
            verdict = f"Not told apart from {name} ({best.name}, {best.accuracy:.1%})"
        else:
            verdict = f"{points} {'better' if gain > 0 else 'worse'} than {name} ({best.name}, {best.accuracy:.1%})"
        sentences.append(f"{verdict}; {span}.")
    return sentences


def by_class(row: Row, labels: np.ndarray, class_names: Sequence[str]) -> tuple[list[dict[str, Any]], int]:
    """Accuracy of each class, weakest first, and how many of the strongest are left out."""
    matrix = confusion_matrix(labels, row.predictions, len(class_names))  # (K, K)
    present = np.flatnonzero(matrix.sum(1))
    accuracy = matrix.diagonal()[present] / matrix.sum(1)[present]
    order = present[np.argsort(accuracy, kind="stable")]
    shown = []
    for label in order[:_MAX_CLASSES]:
        mistakes = matrix[label] * (np.arange(len(class_names)) != label)
        share = matrix[label, label] / matrix[label].sum()
        shown.append(
            {
                "name": class_names[label],
                "percent": f"{share:.0%}",
                "width": _percent_number(share),
                "n": int(matrix[label].sum()),
                "taken_for": class_names[mistakes.argmax()] if mistakes.any() else None,
            }
        )
    return shown, len(order) - len(shown)


def _shown(row: Row) -> dict[str, Any]:
    low, high = row.interval
    return {
        "name": row.name,
        "n": f"{len(row.correct):,}",
        "percent": f"{row.accuracy:.1%}",
        "interval": f"{100 * low:.1f}\N{EN DASH}{100 * high:.1f}",
        "width": _percent_number(row.accuracy),
        "low": _percent_number(low),
        "span": _percent_number(high - low),
    }


def _choice(row: Row) -> dict[str, str]:
    return {
        "name": row.name,
        "setting": ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in row.chosen.items()),
        "at": "too few labels" if row.chosen_at is None else f"{row.chosen_at:.1%}",
        "balanced": f"{row.balanced_accuracy:.1%}",
    }


def _quality_table(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    kinds: dict[str, dict[str, Any]] = {}
    for entry in entries:
        shown = kinds.setdefault(entry["features"], {"features": entry["features"], "width": entry["width"]})
        is_rank = entry["metric"] == "effective rank"
        shown["rankme" if is_rank else "deviation"] = f"{entry['value']:.1f}" if is_rank else f"{entry['value']:.2f}"
    return list(kinds.values())


def _percent_number(share: float) -> str:
    return f"{100 * share:.2f}"


def _as_base64(picture: Image.Image) -> str:
    stream = BytesIO()
    picture.save(stream, "PNG", optimize=True)
    return base64.b64encode(stream.getvalue()).decode()

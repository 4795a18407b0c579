"""Put the results of `metrics.json` into a model card: a table for readers, `model-index` for the Hub."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult

from hub.markdown import escape
from hub.redaction import shorten_paths

RESULTS_FILE = "metrics.json"
NOT_MEASURED = """\
**The quality of the features has not been measured.** A pre-training loss shows that training progressed, not how
good the features are, and losses of different methods, mask ratios or targets cannot be compared. Fine-tune or probe
the encoder on your own task before relying on it."""
_BEGIN, _END = "<!-- measured -->", "<!-- end of measured -->"  # around a table that later results can replace
_SECTION = re.compile(f"{_BEGIN}.*?{_END}", re.DOTALL)
_QUALITY = ("accuracy", "f1", "iou")


class Result(NamedTuple):
    """A row of the table: `interval` has 95 % confidence, `is_reference` marks raw pixels or an untrained encoder."""

    name: str
    metric: str
    value: float
    interval: tuple[float, float] | None
    num_images: int | None
    dataset: str | None
    is_reference: bool

    @property
    def is_quality(self) -> bool:
        """Whether the value is a score between 0 and 1 that measures the features."""
        metric = self.metric.lower()
        is_score = any(word in metric for word in _QUALITY) or metric.startswith("ap")  # average precision
        return is_score and 0 <= self.value <= 1


def read_results(folder: Path) -> list[Result]:
    """Read the entries of `folder/metrics.json`, if there is such a file; raises ValueError if they are malformed."""
    file = folder / RESULTS_FILE
    if not file.exists():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return as_results(content.get("results", []), content.get("dataset"))
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is not a list of results as written by run_evaluation.py: {error!r}") from None


def as_results(entries: Sequence[Mapping[str, Any]], dataset: str | None = None) -> list[Result]:
    """Convert entries of `metrics.json`; `dataset` is the default for entries without one."""
    return [_result(entry, dataset) for entry in entries]


def with_results(card: str, results: Sequence[Result]) -> str:
    """Replace the table of results in the text of a card, if it has one."""
    return _SECTION.sub(lambda _: results_section(results), card)


def results_section(results: Sequence[Result]) -> str:
    """Return the table as Markdown between its markers, or a note that nothing was measured."""
    parts = [_table(results)] if results else []
    if not any(result.is_quality and not result.is_reference for result in results):
        parts.append(NOT_MEASURED)
    return "\n\n".join([_BEGIN, *parts, _END])


def eval_results(results: Sequence[Result], pipeline_tag: str | None = None) -> list[EvalResult]:
    """Return the entries of `model-index`, without the references; an encoder is evaluated by classification or
    segmentation.
    """
    if pipeline_tag in (None, "image-feature-extraction"):
        pipeline_tag = "image-classification"
    return [
        EvalResult(
            task_type="image-segmentation" if "iou" in result.metric.lower() else str(pipeline_tag),
            dataset_type=_identifier(result.dataset or "unnamed"),
            dataset_name=result.dataset or "unnamed",
            metric_type=_identifier(result.metric),
            metric_name=result.name,
            metric_value=round(result.value, 6),
        )
        for result in results
        if result.is_quality and not result.is_reference
    ]


def _result(entry: Mapping[str, Any], dataset: str | None) -> Result:
    value = float(entry["value"])
    if not math.isfinite(value):
        raise ValueError(f"{entry['name']} is {value}")
    interval, number = entry.get("interval"), entry.get("n")
    dataset = entry.get("dataset") or dataset
    return Result(
        name=shorten_paths(str(entry["name"])),
        metric=str(entry.get("metric", "accuracy")),
        value=value,
        interval=(float(interval[0]), float(interval[1])) if interval else None,
        num_images=None if number is None else int(number),
        dataset=shorten_paths(str(dataset)) if dataset else None,
        is_reference=bool(entry.get("reference", False)),
    )


def _table(results: Sequence[Result]) -> str:
    rows = ["| result | metric | value | 95 % interval | images |", "|---|---|---|---|---|"]
    for result in results:
        interval = "" if result.interval is None else " to ".join(f"{bound:.4g}" for bound in result.interval)
        number = "" if result.num_images is None else f"{result.num_images:,}"
        cells = (escape(result.name), escape(result.metric.replace("_", " ")), f"{result.value:.4g}", interval, number)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _identifier(name: str) -> str:
    """Return a Hub id unchanged, and any other name in lower case with hyphens."""
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        return name
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"

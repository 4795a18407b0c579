"""The history of an online evaluation: a summary line for the log, results for the model card, and a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from matplotlib.axes import Axes

from evaluation.class_balance import BALANCED, NUM_ERRORS, interval_of_share

LINEAR, KNN = "eval_linear_accuracy", "eval_knn_accuracy"
RANKME, FEATURE_STD = "eval_rankme", "eval_feature_std"
BALANCED_LINEAR, BALANCED_KNN = "eval_linear_balanced_accuracy", "eval_knn_balanced_accuracy"
_MIN_POINTS = 4  # of a trend
_GREEN, _PURPLE, _GRAY = "#009E73", "#CC79A7", "#767676"  # Okabe and Ito


def error_of(name: str) -> str:
    """Return the name under which the standard error of an accuracy is logged."""
    return f"{name}_standard_error"


@dataclass(frozen=True)
class OnlineHistory:
    """The evaluations in a trainer's `log_history`, and the names of the accuracies in them."""

    entries: Sequence[Mapping[str, Any]]
    linear: str
    knn: str

    @classmethod
    def of(cls, log_history: Sequence[Mapping[str, Any]]) -> Self:
        """Select the evaluations with the metric of the last one, which differs if a resume changed the dataset."""
        entries = [entry for entry in log_history if LINEAR in entry or BALANCED_LINEAR in entry]
        is_unbalanced = bool(entries) and BALANCED_LINEAR in entries[-1]
        linear, knn = (BALANCED_LINEAR, BALANCED_KNN) if is_unbalanced else (LINEAR, KNN)
        return cls([entry for entry in entries if linear in entry], linear, knn)

    @property
    def is_unbalanced(self) -> bool:
        return self.linear == BALANCED_LINEAR

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Return the steps and the values of a metric."""
        return [entry["step"] for entry in self.entries], [entry[name] for entry in self.entries]

    def trend(self) -> str:
        """Describe the trend of the linear probe; there must be an evaluation."""
        return describe_trend(*self.series(self.linear), self.entries[-1].get(error_of(self.linear), 0.0))


def summarize(log_history: Sequence[Mapping[str, Any]], start: str | None = None) -> str:
    """Summarize the last evaluation in one line: the gain over step 0, then the trend.

    Args:
        start: What step 0 is called, if it is a trained encoder, of which kNN shows what is kept.
    """
    history = OnlineHistory.of(log_history)
    if not history.entries:
        return "no online evaluation yet"
    first, last = history.entries[0], history.entries[-1]
    has_start = first["step"] == 0 < last["step"]
    gain = _compare(first, last, history.linear, start or "untrained") if has_start else ""
    kept = f" ({start} {first[history.knn]:.1%})" if has_start and start else ""
    metric = f" ({BALANCED})" if history.is_unbalanced else ""
    values = (
        f"linear probe {last[history.linear]:.1%}{gain}, kNN {last[history.knn]:.1%}{kept}, RankMe {last[RANKME]:.1f}"
    )
    return f"{values}{metric}: {history.trend()}"


def summarize_spread(log_history: Sequence[Mapping[str, Any]]) -> str:
    """Summarize the last measurement of `evaluation.online.FeatureSpread` in one line."""
    last = [entry for entry in log_history if RANKME in entry][-1]
    return f"features: RankMe {last[RANKME]:.1f}, std {last[FEATURE_STD]:.3f}"


def results_at(
    log_history: Sequence[Mapping[str, Any]], step: int, dataset: str, start: str | None = None
) -> list[dict[str, Any]]:
    """Return the evaluation at `step` as entries of metrics.json; empty if there was none at exactly this step.

    Args:
        start: What step 0 is called if it is a trained encoder, whose evaluation follows as a reference.
    """
    history = OnlineHistory.of(log_history)
    entry = next((entry for entry in reversed(history.entries) if entry["step"] == step), None)
    if entry is None:
        return []
    results = _results(history, entry, dataset)
    if start and (first := history.entries[0])["step"] == 0 < step:
        before = _results(history, first, dataset)
        results += [{**result, "name": f"{start}: {result['name']}", "reference": True} for result in before]
    return results


def _results(history: OnlineHistory, entry: Mapping[str, Any], dataset: str) -> list[dict[str, Any]]:
    metric, classes = ("balanced_accuracy", " (unbalanced classes)") if history.is_unbalanced else ("accuracy", "")
    results: list[dict[str, Any]] = []
    for key, name in ((history.linear, "linear probe"), (history.knn, "kNN")):
        error = entry.get(error_of(key))
        interval = None if error is None else list(interval_of_share(entry[key], error))
        name = f"online {name}, mean of patches{classes}"
        results.append({"name": name, "metric": metric, "value": entry[key], "interval": interval, "dataset": dataset})
    name = "online RankMe, mean of patches"
    return [*results, {"name": name, "metric": "effective rank", "value": entry[RANKME], "dataset": dataset}]


def describe_trend(
    steps: Sequence[int] | np.ndarray, accuracies: Sequence[float] | np.ndarray, standard_error: float = 0.0
) -> str:
    """Describe whether the second half of a curve still rises, by the slope of a linear fit.

    A trend must exceed the scatter of the points around the line, by Student's t because they are few, and the
    sampling error of one accuracy. That error does not cancel although the images are always the same: neighboring
    points err together, because the encoder changes slowly.
    """
    num_points = max(_MIN_POINTS, (len(steps) + 1) // 2)
    if len(steps) < num_points:
        return f"too few evaluations for a trend ({len(steps)} of {_MIN_POINTS})"
    from scipy.special import stdtrit  # scipy.stats.t.ppf, whose import takes a second

    x, y = np.array(steps[-num_points:], dtype=float), np.array(accuracies[-num_points:], dtype=float)
    x -= x.mean()
    slope = (x @ y) / (x @ x)
    residuals = y - y.mean() - slope * x
    error = np.sqrt(residuals @ residuals / (num_points - 2) / (x @ x))
    is_scatter = abs(slope) <= stdtrit(num_points - 2, 0.975) * error
    gain, span = slope * (x[-1] - x[0]), f"over the last {num_points} evaluations"
    if is_scatter or abs(gain) <= NUM_ERRORS * standard_error or abs(gain) < 0.0005:
        return f"no significant improvement ({100 * gain:+.1f} points {span})"
    return f"{'still improving' if slope > 0 else 'getting worse'} ({100 * gain:+.1f} points {span})"


def _compare(first: Mapping[str, Any], last: Mapping[str, Any], name: str, start: str) -> str:
    """Compare the last accuracy with the first one, which may come from a version that logged no errors."""
    if error_of(name) not in first or error_of(name) not in last:
        return f" ({start} {first[name]:.1%})"
    gain = last[name] - first[name]
    # As if other images had been drawn for either accuracy. They are the same, and the errors mostly move together, so
    # that the interval is wider than a paired one, for which the log would need the prediction of each image.
    half = NUM_ERRORS * np.hypot(first[error_of(name)], last[error_of(name)])
    bounds = f"95 % interval {100 * (gain - half):+.1f} to {100 * (gain + half):+.1f}"
    if abs(gain) <= half:
        return f", not significantly different from {start} ({100 * gain:+.1f} points, {bounds})"
    return f", {abs(100 * gain):.1f} points {'better' if gain > 0 else 'worse'} than {start} ({bounds})"


def draw_history(axes: Axes, history: OnlineHistory) -> None:
    """Plot the accuracies on the left axis and RankMe on the right one."""
    for key, name, color, marker in (
        (history.linear, "linear probe", _GREEN, "o"),
        (history.knn, "kNN", _PURPLE, "^"),
    ):
        steps, accuracies = history.series(key)
        axes.plot(steps, accuracies, color=color, marker=marker, markersize=4, linewidth=1.6, label=name)
        if steps[0] == 0:  # what the run began with
            axes.axhline(accuracies[0], color=color, linewidth=0.8, linestyle="--", alpha=0.6)
    axes.set_ylabel(
        BALANCED.replace("because ", "because\n") if history.is_unbalanced else "accuracy on frozen features"
    )
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_title(history.trend(), fontsize="medium", loc="left", pad=24)  # above the legend
    finish_axes(axes, add_right_axis(axes, "RankMe", *history.series(RANKME)), num_columns=3)


def add_right_axis(
    axes: Axes, label: str, steps: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray
) -> Axes:
    """Plot a secondary curve on an axis of its own on the right."""
    right = axes.twinx()
    right.plot(steps, values, color=_GRAY, linewidth=0.9, linestyle=":", label=label)
    right.set_ylabel(label, color=_GRAY)
    right.set_ylim(bottom=0)
    right.tick_params(axis="y", colors=_GRAY)
    right.spines[["top", "left", "right"]].set_visible(False)
    return right


def finish_axes(axes: Axes, right: Axes | None, num_columns: int) -> None:
    """Add a grid, and a legend of both axes above the plot."""
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [handle for each in (axes, right) if each is not None for handle in each.get_legend_handles_labels()[0]]
    axes.legend(
        handles=handles, frameon=False, ncols=num_columns, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2
    )

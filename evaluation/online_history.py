"""The history of an online evaluation: a summary line for the log, results for the model card, and a plot."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

LINEAR, KNN, RANKME = "eval_linear_accuracy", "eval_knn_accuracy", "eval_rankme"
_MIN_POINTS = 4  # of a trend
_SIGNIFICANT = 2.0  # standard errors
_GREEN, _PURPLE, _GRAY = "#009E73", "#CC79A7", "#767676"  # Okabe and Ito


def summarize(log_history: Sequence[Mapping[str, Any]]) -> str:
    """Summarize the last evaluation and the trend of the linear probe in one line."""
    entries = [entry for entry in log_history if LINEAR in entry]
    if not entries:
        return "no online evaluation yet"
    first, last = entries[0], entries[-1]
    untrained = f" (untrained {first[LINEAR]:.1%})" if first["step"] == 0 < last["step"] else ""
    values = f"linear probe {last[LINEAR]:.1%}{untrained}, kNN {last[KNN]:.1%}, RankMe {last[RANKME]:.1f}"
    return f"{values}: {describe_trend([entry['step'] for entry in entries], [entry[LINEAR] for entry in entries])}"


def results_at(log_history: Sequence[Mapping[str, Any]], step: int, dataset: str) -> list[dict[str, Any]]:
    """Return the evaluation at `step` as entries of metrics.json; empty if there was none at exactly this step."""
    entry = next((entry for entry in reversed(log_history) if LINEAR in entry and entry["step"] == step), None)
    if entry is None:
        return []
    names = {LINEAR: ("linear probe", "accuracy"), KNN: ("kNN", "accuracy"), RANKME: ("RankMe", "effective rank")}
    return [
        {"name": f"online {name}, mean of patches", "metric": metric, "value": entry[key], "dataset": dataset}
        for key, (name, metric) in names.items()
    ]


def describe_trend(steps: Sequence[int] | np.ndarray, accuracies: Sequence[float] | np.ndarray) -> str:
    """Describe whether the second half of a curve still rises, by the slope of a linear fit and its standard error.

    The sampling error of the test images does not matter: they are always the same and shift all points together.
    """
    num_points = max(_MIN_POINTS, (len(steps) + 1) // 2)
    if len(steps) < num_points:
        return f"too few evaluations for a trend ({len(steps)} of {_MIN_POINTS})"
    x, y = np.array(steps[-num_points:], dtype=float), np.array(accuracies[-num_points:], dtype=float)
    x -= x.mean()
    slope = (x @ y) / (x @ x)
    residuals = y - y.mean() - slope * x
    error = np.sqrt(residuals @ residuals / (num_points - 2) / (x @ x))
    gain, span = 100 * slope * (x[-1] - x[0]), f"over the last {num_points} evaluations"
    if abs(slope) <= _SIGNIFICANT * error or abs(gain) < 0.05:
        return f"no significant improvement ({gain:+.1f} points {span})"
    return f"{'still improving' if slope > 0 else 'getting worse'} ({gain:+.1f} points {span})"


def draw_history(axes: Axes, history: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> None:
    """Plot the accuracies on the left axis and RankMe on the right one, given (steps, values) of each metric."""
    for key, name, color, marker in ((LINEAR, "linear probe", _GREEN, "o"), (KNN, "kNN", _PURPLE, "^")):
        axes.plot(*history[key], color=color, marker=marker, markersize=4, linewidth=1.6, label=name)
    axes.set_ylabel("accuracy on frozen features")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_title(title, fontsize="medium", loc="left", pad=24)  # above the legend
    finish_axes(axes, add_right_axis(axes, "RankMe", *history[RANKME]), num_columns=3)


def add_right_axis(axes: Axes, label: str, steps: np.ndarray, values: np.ndarray) -> Axes:
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

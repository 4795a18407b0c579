"""What was seen of the features while an encoder was trained: a line for the log, and a panel below the loss curve."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

LINEAR, KNN, RANKME = "eval_linear_accuracy", "eval_knn_accuracy", "eval_rankme"
_MIN_POINTS = 4  # looks that a trend is read from
_SURE = 2.0  # standard errors
_GREEN, _PURPLE, _GRAY = "#009E73", "#CC79A7", "#767676"  # Okabe and Ito


def summary(log_history: Sequence[Mapping[str, Any]]) -> str:
    """The last look in one line, and whether the linear probe still improves; for people who watch a log."""
    looks = [entry for entry in log_history if LINEAR in entry]
    if not looks:
        return "the features were not looked at yet"
    last = looks[-1]
    untrained = f" (untrained {looks[0][LINEAR]:.1%})" if looks[0]["step"] == 0 < last["step"] else ""
    numbers = f"linear probe {last[LINEAR]:.1%}{untrained}, kNN {last[KNN]:.1%}, RankMe {last[RANKME]:.1f}"
    return f"{numbers}: {trend([entry['step'] for entry in looks], [entry[LINEAR] for entry in looks])}"


def results_at(log_history: Sequence[Mapping[str, Any]], step: int, dataset: str) -> list[dict[str, Any]]:
    """The look at this very step as entries of a `metrics.json`; none if there was none: older ones are of others."""
    look = next((entry for entry in reversed(log_history) if LINEAR in entry and entry["step"] == step), None)
    if look is None:
        return []
    names = {LINEAR: ("linear probe", "accuracy"), KNN: ("kNN", "accuracy"), RANKME: ("RankMe", "effective rank")}
    return [
        {
            "name": f"{name}, mean of patches, seen in training",
            "metric": metric,
            "value": look[key],
            "dataset": dataset,
        }
        for key, (name, metric) in names.items()
    ]


def trend(steps: Sequence[int] | np.ndarray, accuracies: Sequence[float] | np.ndarray) -> str:
    """Whether the later half of a curve still rises: a line through it, against how far its points scatter.

    The test images are the same at each look, so which ones they are moves all points together and counts for nothing.
    """
    num_points = max(_MIN_POINTS, (len(steps) + 1) // 2)
    if len(steps) < num_points:
        return f"too early to say whether they improve ({len(steps)} of {_MIN_POINTS} looks)"
    x, y = np.array(steps[-num_points:], dtype=float), np.array(accuracies[-num_points:], dtype=float)
    x -= x.mean()
    slope = (x @ y) / (x @ x)
    scatter = y - y.mean() - slope * x
    error = np.sqrt(scatter @ scatter / (num_points - 2) / (x @ x))
    gain, span = 100 * slope * (x[-1] - x[0]), f"over the last {num_points} looks"
    if abs(slope) <= _SURE * error or abs(gain) < 0.05:
        return f"no clear improvement ({gain:+.1f} points {span}, within the scatter)"
    return f"{'still improving' if slope > 0 else 'getting worse'} ({gain:+.1f} points {span})"


def draw_looks(axes: Axes, looks: Mapping[str, tuple[np.ndarray, np.ndarray]], title: str) -> None:
    """Accuracies on the left axis and RankMe on the right one; each of `looks` is (steps, values)."""
    for key, name, color, marker in ((LINEAR, "linear probe", _GREEN, "o"), (KNN, "kNN", _PURPLE, "^")):
        steps, values = looks[key]
        axes.plot(steps, values, color=color, marker=marker, markersize=4, linewidth=1.6, label=name)
    axes.set_ylabel("accuracy, frozen features")
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_title(title, fontsize="medium", loc="left", pad=24)  # above the legend
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    rank_axes = axes.twinx()
    rank_axes.plot(*looks[RANKME], color=_GRAY, linewidth=0.9, linestyle=":", label="RankMe")
    rank_axes.set_ylabel("RankMe", color=_GRAY)
    rank_axes.set_ylim(bottom=0)
    rank_axes.tick_params(axis="y", colors=_GRAY)
    rank_axes.spines[["top", "left", "right"]].set_visible(False)
    handles = axes.get_legend_handles_labels()[0] + rank_axes.get_legend_handles_labels()[0]
    axes.legend(
        handles,
        [str(handle.get_label()) for handle in handles],
        frameon=False,
        ncols=3,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
    )

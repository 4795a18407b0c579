"""Plot of a confusion matrix. Shapes: K classes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

_MAX_CLASSES_WITH_NUMBERS = 25
_MAX_CLASSES_WITH_NAMES = 60
_MAX_NAME_LENGTH = 24
_INCHES_PER_CLASS = 0.42
_DARK_FROM = 0.55  # row share above which text is white


def draw_confusion_matrix(matrix: np.ndarray, class_names: Sequence[str], path: Path, title: str = "") -> None:
    """Write a PNG of counts (K, K) with true classes as rows; colors are row shares, to make rare classes visible."""
    num_classes = len(class_names)
    if matrix.shape != (num_classes, num_classes):
        raise ValueError(
            f"the confusion matrix has shape {matrix.shape}, expected {(num_classes, num_classes)} for the class names"
        )
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)  # (K, K)
    side = min(max(num_classes * _INCHES_PER_CLASS, 3.0), 12.0)
    figure = Figure(figsize=(side + 2.4, side + 1.6), dpi=120, layout="constrained")  # for names and color bar
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if num_classes <= _MAX_CLASSES_WITH_NUMBERS:
        for (row, column), count in np.ndenumerate(matrix):
            if count:  # zeros would distract
                color = "white" if shares[row, column] > _DARK_FROM else "#1a1a1a"
                axes.text(column, row, f"{count:,}", ha="center", va="center", color=color, fontsize=8)
    _name_classes(axes, class_names)
    axes.set(xlabel="predicted class", ylabel="true class", title=title)
    bar = figure.colorbar(image, ax=axes, shrink=0.7, format=PercentFormatter(1, decimals=0))
    bar.set_label("share of the true class's images")
    figure.savefig(path, format="png")


def _name_classes(axes: Axes, class_names: Sequence[str]) -> None:
    if len(class_names) > _MAX_CLASSES_WITH_NAMES:
        axes.set_xticks([])
        axes.set_yticks([])
        return
    names = [name if len(name) <= _MAX_NAME_LENGTH else f"{name[: _MAX_NAME_LENGTH - 1]}…" for name in class_names]
    positions = np.arange(len(names))
    axes.set_xticks(positions, names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(positions, names, fontsize=8)
    axes.tick_params(length=0)

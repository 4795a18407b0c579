"""Figures of a run: panels of labeled images, which show what a model predicts, and training curves.

Shapes: B images, C channels, H, W height and width in pixels.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from evaluation.online_history import OnlineHistory, add_right_axis, draw_history, finish_axes

Drawer = Callable[[Any, dict[str, Any], int, float | None], Image.Image]

MAX_ROWS = 8
_ENLARGE_TO, _SHRINK_TO, _MIN_COLUMN_WIDTH = 224, 256, 128  # pixels
_MARGIN, _GAP, _FONT_SIZE, _LINE_HEIGHT = 16, 8, 14, 18  # pixels
_INK, _PALE_INK = "#1a1a1a", "#595959"
_BLUE, _VERMILLION = "#0072B2", "#D55E00"  # Okabe and Ito: distinguishable for color-blind readers
_MEDIAN_FROM_POINTS = 60  # shorter curves need no smoothing


def panel_drawer(
    name: str,
    views_of: Callable[[Any, dict[str, Any]], Mapping[str, Any]],
    channels: Sequence[int] | None = None,
) -> Drawer:
    """Return `draw(model, batch, step, eval_loss)`; `views_of(model, batch)` gives the columns, `name` the footer.

    Args:
        channels: One or three that are shown of images of any number of channels.
    """

    def draw(model: Any, batch: dict[str, Any], step: int, eval_loss: float | None) -> Image.Image:
        facts = [name, f"step {step:,}"]
        if eval_loss is not None:
            facts.append(f"validation loss {eval_loss:.4g}")
        if "bool_masked_pos" in batch and batch["bool_masked_pos"].any():
            facts.append(f"mask ratio {batch['bool_masked_pos'].float().mean().item():.2f}")
        views = {label: images[:MAX_ROWS] for label, images in views_of(model, batch).items()}
        if channels is not None:
            facts.append(f"channel{'s' * (len(channels) > 1)} {', '.join(map(str, channels))}")
            views = {label: shown(images, channels) for label, images in views.items()}
        return labeled_grid(views, footer="  ·  ".join(facts))

    return draw


def shown(images: Tensor, channels: Sequence[int]) -> Tensor:
    """Return these channels of images (B, C, H, W); those of one or three are returned unchanged."""
    return images if images.shape[1] in (1, 3) else images[:, list(channels)]


def panel_indices(num_images: int) -> list[int]:
    """Return the indices of up to eight evenly spaced images, since neighbors may show the same scene."""
    return np.linspace(0, num_images - 1, min(MAX_ROWS, num_images)).round().astype(int).tolist()


def training_curve(log_history: list[dict[str, Any]], path: Path, label: str = "training loss") -> None:
    """Plot the losses and the learning rate of a trainer's `log_history`, and the online evaluation if there was one.

    Raises ValueError if no loss was logged.

    Args:
        label: Of the training loss.
    """
    train, validation = _series(log_history, "loss"), _series(log_history, "eval_loss")
    if not len(train[0]) and not len(validation[0]):
        raise ValueError('the log history has no entry with "step" and "loss" or "eval_loss"; log at least once first')
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")  # pyplot would keep figures alive
    history = OnlineHistory.of(log_history)
    if history.entries:
        figure.set_size_inches(8, 7.5)
        axes, feature_axes = figure.subplots(2, sharex=True, height_ratios=(3, 2))
        draw_history(feature_axes, history)
    else:
        axes = feature_axes = figure.subplots()
    rate_axes = _draw_learning_rate(axes, *_series(log_history, "learning_rate"))
    _draw_training_loss(axes, *train, label)
    if len(validation[0]):
        style = {"linewidth": 1.6, "linestyle": "--", "marker": "s", "markersize": 4}
        axes.plot(*validation, color=_VERMILLION, label=f"validation loss (last: {validation[1][-1]:.4g})", **style)
    axes.set(ylabel="loss")
    feature_axes.set(xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    finish_axes(axes, rate_axes, num_columns=2)
    figure.savefig(path, format="png")


def labeled_grid(views: dict[str, Tensor], footer: str) -> Image.Image:
    """Draw images (B, C, H, W) in [0, 1] in a column per label, with the labels on top and the footer below."""
    rows = list(zip(*(map(_to_cell, view) for view in views.values()), strict=True))
    cell_width, cell_height = rows[0][0].size
    column_width = max(cell_width, _MIN_COLUMN_WIDTH)
    width = len(views) * (column_width + _GAP) - _GAP
    font = ImageFont.load_default(size=_FONT_SIZE)
    headers = [_wrap(label, font, column_width) for label in views]
    footer = _wrap(footer, font, width)
    top = _MARGIN + _LINE_HEIGHT * max(header.count("\n") + 1 for header in headers) + _GAP
    bottom = top + len(rows) * (cell_height + _GAP)
    height = bottom + _LINE_HEIGHT * (footer.count("\n") + 1) + _MARGIN

    panel = Image.new("RGB", (width + 2 * _MARGIN, height), "white")
    draw = ImageDraw.Draw(panel)
    for column, header in enumerate(headers):
        x = _MARGIN + column * (column_width + _GAP)
        draw.text((x, top - _GAP), header, fill=_INK, font=font, anchor="ld", spacing=_LINE_HEIGHT - _FONT_SIZE)
        for row, cells in enumerate(rows):
            panel.paste(cells[column], (x, top + row * (cell_height + _GAP)))
    draw.text((_MARGIN, bottom), footer, fill=_PALE_INK, font=font, spacing=_LINE_HEIGHT - _FONT_SIZE)
    return panel


def _to_cell(image: Tensor) -> Image.Image:
    """Convert an image (C, H, W) in [0, 1] for display, scaled by an integer factor to keep pixels sharp."""
    array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()  # (H, W, C)
    cell = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)
    longest = max(cell.size)
    if longest > _SHRINK_TO:
        return cell.reduce(math.ceil(longest / _SHRINK_TO))
    factor = max(1, _ENLARGE_TO // longest)
    return cell.resize((cell.width * factor, cell.height * factor), Image.Resampling.NEAREST)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    lines = [""]
    for word in text.split(" "):
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


def _series(log_history: list[dict[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(entry["step"], entry[key]) for entry in log_history if key in entry and "step" in entry]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps), np.array(values, dtype=float)


def _draw_training_loss(axes: Axes, steps: np.ndarray, losses: np.ndarray, label: str) -> None:
    if len(steps) < _MEDIAN_FROM_POINTS:
        axes.plot(steps, losses, color=_BLUE, linewidth=1.6, marker="o", markersize=3, label=label)
        return
    window = min(len(steps) // 20, 100) | 1  # odd, so that it has a middle point
    medians = np.median(np.lib.stride_tricks.sliding_window_view(losses, window), axis=1)
    middle = steps[window // 2 : window // 2 + len(medians)]
    axes.plot(steps, losses, color=_BLUE, alpha=0.35, linewidth=0.7, label=label)
    axes.plot(middle, medians, color=_BLUE, linewidth=1.8, label=f"running median over {window} log entries")


def _draw_learning_rate(axes: Axes, steps: np.ndarray, rates: np.ndarray) -> Axes | None:
    if not len(steps):
        return None
    rate_axes = add_right_axis(axes, "learning rate", steps, rates)
    rate_axes.yaxis.set_major_locator(MaxNLocator(4))
    rate_axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.1e}" if rate else "0"))
    axes.set_zorder(rate_axes.get_zorder() + 1)  # draw the loss above the learning rate
    axes.patch.set_visible(False)
    return rate_axes

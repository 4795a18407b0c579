"""Figures of detections: validation images with their true and their predicted boxes."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from evaluation.detection import PADDING
from evaluation.pictures import labeled_grid

_SIDE, _FONT_SIZE = 256, 11  # pixels
_DARK = ("#D55E00", "#0072B2", "#009E73")
_COLORS = (*_DARK, "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")  # Okabe and Ito
_LEAST_SCORE, _MOST_SHOWN = 0.3, 20


def draw_detections(
    images: Sequence[Tensor],
    sizes: np.ndarray,
    predictions: np.ndarray,
    labels: np.ndarray,
    class_names: Sequence[str],
    path: Path,
    title: str,
) -> None:
    """Write a figure with a row for each image: its true boxes, and the predicted ones with their scores.

    Args:
        images: uint8 (C, S, S), stretched to a square.
        sizes: (N, 2), width and height of each image in pixels.
        predictions, labels: As in `detection_metrics`.
    """
    views: dict[str, list[Tensor]] = {"true": [], "predicted": []}
    for image, size, found, true in zip(images, sizes, predictions, labels, strict=True):
        scale = np.tile(_SIDE / size, 2)
        rows = [(row[:4] * scale, int(row[4]), "") for row in true if row[4] != PADDING]
        views["true"].append(_with_boxes(image, rows, class_names))
        best = found[found[:, 5] >= 0]
        best = best[np.argsort(-best[:, 4])]
        num_certain = int((best[:, 4] >= _LEAST_SCORE).sum())
        best = best[: min(max(num_certain, 1), _MOST_SHOWN)]
        rows = [(row[:4] * scale, int(row[5]), f" {row[4]:.2f}") for row in best]
        views["predicted"].append(_with_boxes(image, rows, class_names))
    shown = f"predictions with a score of at least {_LEAST_SCORE:g}, or else the best one"
    footer = f"{title}; {shown}; images are stretched to squares"
    labeled_grid({name: torch.stack(cells) for name, cells in views.items()}, footer).save(path)


def _with_boxes(image: Tensor, rows: Sequence[tuple[np.ndarray, int, str]], class_names: Sequence[str]) -> Tensor:
    """Return the image (C, S, S) in [0, 1] with boxes in pixels of the figure, their classes and a text."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = picture.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=_FONT_SIZE)
    for box, number, text in rows:
        color = _COLORS[number % len(_COLORS)]
        left, top, right, bottom = box.clip(0, _SIDE - 1).tolist()
        draw.rectangle((left, top, max(left, right), max(top, bottom)), outline=color, width=2)
        words, corner = f"{class_names[number]}{text}", (left + 2, max(0.0, top - _FONT_SIZE - 2))
        draw.rectangle(draw.textbbox(corner, words, font=font), fill=color)
        draw.text(corner, words, fill="white" if color in _DARK else "black", font=font)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255

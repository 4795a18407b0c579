"""Figures of segmentations: images beside their masks, predictions and errors, with a legend.

Shapes: H W pixels, K classes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from data.mask_codes import IGNORED

_CELL, _GAP, _MARGIN, _LINE, _FONT_SIZE, _SWATCH = 224, 8, 16, 18, 14, 12  # pixels
_INK = "#1a1a1a"
_WRONG, _RIGHT, _UNCOUNTED = (213, 94, 0), (225, 235, 245), (120, 120, 120)
_BACKGROUND, _DARK = "background", (40, 40, 40)
_COLUMNS = ("image", "mask", "prediction", "errors")
_MAX_LEGEND = 40


class Segmentation(NamedTuple):
    """An image of a data set with its mask and prediction.

    Args:
        image: uint8 (H, W, 3).
        mask, prediction: Classes, int (H, W).
        title: What is said above the row.
    """

    image: np.ndarray
    mask: np.ndarray
    prediction: np.ndarray
    title: str


def ranked(scores: np.ndarray) -> list[tuple[str, int]]:
    """Return the position of the best, the median and the worst image, and of those between, with their names."""
    order = np.argsort(-scores, kind="stable")
    names = ("best", "upper quartile", "median", "lower quartile", "worst")
    found: dict[int, str] = {}
    for name, share in zip(names, np.linspace(0, 1, len(names)), strict=True):
        found.setdefault(int(order[round(share * (len(order) - 1))]), name)
    return [(name, position) for position, name in found.items()]


def draw_segmentations(rows: Sequence[Segmentation], class_names: Sequence[str], footer: str) -> Image.Image:
    """Draw a row for each image."""
    colors = palette(class_names)
    found = np.unique(np.concatenate([np.unique(part) for row in rows for part in (row.mask, row.prediction)]))
    shown = [k for k in found.tolist() if k < len(class_names) and k != IGNORED][:_MAX_LEGEND]
    font = ImageFont.load_default(size=_FONT_SIZE)
    width = len(_COLUMNS) * (_CELL + _GAP) - _GAP
    per_line = max(1, width // 150)
    legend_height = _LINE * math.ceil(len(shown) / per_line)
    heights = [_cell_size(row.image)[1] for row in rows]
    top = _MARGIN + _LINE + _GAP
    height = top + sum(cell + _LINE + _GAP for cell in heights) + legend_height + 2 * _LINE + _MARGIN
    figure = Image.new("RGB", (width + 2 * _MARGIN, height), "white")
    draw = ImageDraw.Draw(figure)
    for number, name in enumerate(_COLUMNS):
        draw.text((_MARGIN + number * (_CELL + _GAP), _MARGIN), name, fill=_INK, font=font)
    for row, cell_height in zip(rows, heights, strict=True):
        draw.text((_MARGIN, top), row.title, fill=_INK, font=font)
        cells = (row.image, colors[row.mask], colors[row.prediction], _errors(row))
        for number, cell in enumerate(cells):
            resample = Image.Resampling.BILINEAR if number == 0 else Image.Resampling.NEAREST
            picture = Image.fromarray(cell).resize(_cell_size(row.image), resample)
            figure.paste(picture, (_MARGIN + number * (_CELL + _GAP), top + _LINE))
        top += cell_height + _LINE + _GAP
    for number, k in enumerate(shown):
        x, y = _MARGIN + number % per_line * (width // per_line), top + number // per_line * _LINE
        draw.rectangle((x, y + 2, x + _SWATCH, y + 2 + _SWATCH), fill=tuple(colors[k].tolist()))
        draw.text((x + _SWATCH + 4, y), class_names[k][:18], fill=_INK, font=font)
    note = f"{footer}  ·  errors: orange is wrong, gray does not count"
    draw.text((_MARGIN, top + legend_height + _GAP), note, fill=_INK, font=font)
    return figure


def palette(class_names: Sequence[str]) -> np.ndarray:
    """Return colors uint8 (256 or more, 3) that differ for neighboring numbers; a background is nearly black."""
    colors = np.zeros((max(IGNORED + 1, len(class_names)), 3), np.uint8)
    for k, name in enumerate(class_names):
        if name == _BACKGROUND:
            colors[k] = _DARK
            continue
        hue, dark = (k * 0.618034) % 1, 1 - 0.35 * (k // 8 % 3)
        sixth = 6 * hue
        wheel = [abs(sixth - 3) - 1, 2 - abs(sixth - 2), 2 - abs(sixth - 4)]
        colors[k] = [round(255 * dark * (0.15 + 0.85 * min(max(part, 0), 1))) for part in wheel]
    colors[IGNORED] = _UNCOUNTED
    return colors


def _errors(row: Segmentation) -> np.ndarray:
    errors = np.where((row.mask == row.prediction)[..., None], _RIGHT, _WRONG)
    return np.where((row.mask == IGNORED)[..., None], _UNCOUNTED, errors).astype(np.uint8)


def _cell_size(image: np.ndarray) -> tuple[int, int]:
    height, width = image.shape[:2]
    scale = min(_CELL / width, _CELL / height)
    return max(1, round(width * scale)), max(1, round(height * scale))

"""Read COCO json files: images, classes, boxes and masks.

Format: https://cocodataset.org/#format-data. Masks are polygons or run lengths, as lists of numbers or compressed.
Code: cocodataset/cocoapi/common/maskApi.c; the masks are equal to those of pycocotools, which is not needed.
Shapes: N images, M annotations, K classes, H W pixels.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

_NUM_BYTES = 1 << 16  # at both ends of a file, by which it is recognized
_SCALE = 5  # steps per pixel of the outline of a polygon
_NO_BOX = (np.nan,) * 4
_MOST = 1e15  # pixels; json may have integers of any length, which no array holds
_FARTHEST = 1e6  # pixels of a corner of a polygon


@dataclass(frozen=True)
class CocoFile:
    """The content of a COCO json file.

    Args:
        file_names: (N,), as they are in the file.
        sizes: int64 (N, 2), width and height in pixels; 0 where the file has none.
        class_names: (K,), in the order of the category ids.
        annotations: (M,), as they are in the file.
    """

    path: Path
    file_names: tuple[str, ...]
    image_ids: Sequence[Any]
    sizes: np.ndarray
    class_names: tuple[str, ...]
    category_ids: Sequence[Any]
    annotations: Sequence[Mapping[str, Any]]

    @cached_property
    def images(self) -> np.ndarray:
        """The image of each annotation, int64 (M,); -1 if it is not in the list of images."""
        return self._numbers("image_id", self.image_ids)

    @cached_property
    def classes(self) -> np.ndarray:
        """The class of each annotation, int64 (M,); -1 if it is not in the list of categories."""
        return self._numbers("category_id", self.category_ids)

    @cached_property
    def boxes(self) -> np.ndarray:
        """Left, top, right and bottom in pixels, float64 (M, 4); NaN where they are not four numbers."""
        found = np.array([_four_numbers(annotation.get("bbox")) for annotation in self.annotations], np.float64)
        boxes = found.reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes

    @cached_property
    def areas(self) -> np.ndarray:
        """Areas of the masks in pixels, float64 (M,); those of the boxes where the file has none."""
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        given = [annotation.get("area") for annotation in self.annotations]
        areas = np.array([area if _is_number(area) else np.nan for area in given], np.float64)
        return np.where(areas > 0, areas, sides.prod(axis=1))

    @cached_property
    def is_crowd(self) -> np.ndarray:
        """Whether an annotation marks a group of objects, bool (M,)."""
        return np.array([bool(annotation.get("iscrowd", 0)) for annotation in self.annotations], bool)

    def name(self, index: int) -> str:
        """Return what a person needs to find an annotation."""
        annotation = self.annotations[index]
        found = f"annotation {annotation['id']}" if "id" in annotation else f"annotation number {index}"
        image = self.images[index]
        of = self.file_names[image] if image >= 0 else f"image_id {annotation.get('image_id')!r}"
        return f"{found} of {of}"

    def mask(self, index: int) -> np.ndarray:
        """Return the mask of an annotation, bool (H, W).

        Raises:
            ValueError: If it has none, or is damaged.
        """
        width, height = self.sizes[self.images[index]].tolist()
        return decode_mask(self.annotations[index].get("segmentation"), height, width, self.name(index))

    def _numbers(self, key: str, ids: Sequence[Any]) -> np.ndarray:
        number_of = {one: number for number, one in enumerate(ids)}
        found = (annotation.get(key) for annotation in self.annotations)
        return np.array([number_of.get(one, -1) if isinstance(one, int | str) else -1 for one in found], np.int64)


def read_coco(path: Path) -> CocoFile:
    """Read a COCO json file; whether each annotation can be used is not checked.

    Raises:
        ValueError: If it is not such a file, or has no images or classes.
    """
    try:
        content = json.loads(path.read_bytes() or b"null")
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as json ({error}); repair or replace it") from None
    if not content:
        raise ValueError(f"{path} is empty; expected COCO json with images, annotations and categories")
    images, annotations, categories = (_dicts(content, key, path) for key in ("images", "annotations", "categories"))
    if not images:
        raise ValueError(f"{path} lists no images; expected COCO json with images, annotations and categories")
    if not categories:
        raise ValueError(f"{path} lists no categories; expected one with id and name for each class")
    categories = sorted(categories, key=lambda category: str(category.get("id")).zfill(20))
    ids = _each_once(images, "id", "image", path)
    category_ids = _each_once(categories, "id", "category", path)
    names = _each_once(categories, "name", "category", path)
    files = [image.get("file_name") for image in images]
    if without := [number for number, file in enumerate(files) if not isinstance(file, str) or not file]:
        raise ValueError(f"{path}: {len(without):,} images have no file_name, such as id {ids[without[0]]!r}")
    sizes = [(image.get("width"), image.get("height")) for image in images]
    known = [both if all(isinstance(side, int) and 0 < side <= _MOST for side in both) else (0, 0) for both in sizes]
    return CocoFile(path, tuple(files), ids, np.array(known, np.int64), tuple(names), category_ids, annotations)


def is_coco(path: Path) -> bool:
    """Return whether a json file looks like COCO's, from its first and last bytes."""
    with path.open("rb") as file:
        text = file.read(_NUM_BYTES)
        if len(text) == _NUM_BYTES:
            file.seek(-_NUM_BYTES, os.SEEK_END)
            text += file.read()
    return text.strip() in (b"", b"{}", b"[]", b"null") or any(
        key in text for key in (b'"annotations"', b'"categories"', b'"images"')
    )


def _dicts(content: Any, key: str, path: Path) -> list[Any]:
    found = content.get(key) if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ValueError(f"{path} has no list {key!r} of objects; expected COCO json")
    return found


def _each_once(entries: Sequence[Mapping[str, Any]], key: str, what: str, path: Path) -> list[Any]:
    """Return a value of each entry, which needs to have one of its own."""
    values = [entry.get(key) for entry in entries]
    if missing := sum(not isinstance(value, int | str) or value == "" for value in values):
        raise ValueError(f"{path}: {missing:,} entries of the kind {what} have no {key}")
    if doubles := [value for value, count in Counter(values).items() if count > 1]:
        raise ValueError(f"{path}: {what} {key} {doubles[0]!r} is there more than once ({len(doubles):,} such)")
    return values


def _four_numbers(box: Any) -> Sequence[float]:
    return box if isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) else _NO_BOX


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _MOST


# ---- masks ----


def decode_mask(segmentation: Any, height: int, width: int, name: str = "the annotation") -> np.ndarray:
    """Return the mask bool (H, W) of polygons or run lengths.

    Raises:
        ValueError: If it is neither, or of another size.
    """
    if isinstance(segmentation, dict):
        size = segmentation.get("size")
        if size != [height, width]:
            raise ValueError(
                f"the mask of {name} has size {size}, but the image has {[height, width]} (height, width)"
            )
        counts = segmentation.get("counts")
        try:
            runs = _decompress(counts) if isinstance(counts, str | bytes) else np.array(counts, np.int64)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"the run lengths of {name} are no whole numbers, nor a string of them") from None
        if runs.ndim != 1 or (runs < 0).any() or runs.sum() != height * width:
            raise ValueError(f"the run lengths of {name} do not add up to {height} x {width} pixels")
        is_set = np.arange(len(runs)) % 2 == 1
        return np.repeat(is_set, runs).reshape(width, height).T
    if isinstance(segmentation, list) and segmentation:
        try:
            polygons = [np.array(polygon, np.float64) for polygon in segmentation]
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"the polygons of {name} have corners that are no numbers") from None
        if not all((abs(polygon) <= _FARTHEST).all() for polygon in polygons):
            raise ValueError(f"the polygons of {name} have corners that are no numbers, or far outside of the image")
        if all(polygon.ndim == 1 and len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons):
            masks = [_fill_polygon(polygon.reshape(-1, 2), height, width) for polygon in polygons]
            return np.logical_or.reduce(masks)
    raise ValueError(f"{name} has no mask; expected polygons of at least three points, or run lengths")


def _decompress(text: str | bytes) -> np.ndarray:
    """Return run lengths of a string: 5 bits per character, and from the fourth on differences to the last but one."""
    counts: list[int] = []
    number, shift = 0, 0
    for code in text.encode() if isinstance(text, str) else text:
        bits = code - 48
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:
                number |= -1 << shift
            counts.append(number + counts[-2] if len(counts) > 2 else number)
            number, shift = 0, 0
    return np.array(counts, np.int64)


def _fill_polygon(points: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return the inside of a polygon with corners (x, y): a column changes where the outline crosses its middle."""
    corners = (_SCALE * points + 0.5).astype(np.int64)
    flips = np.zeros(height * width + 1, np.int64)
    outline = [_line(start, end) for start, end in zip(corners, np.roll(corners, -1, axis=0), strict=True)]
    u, v = np.concatenate(outline).T
    changes = np.flatnonzero(u[1:] != u[:-1]) + 1
    x = np.where(u[changes] < u[changes - 1], u[changes], u[changes] - 1)
    x_pixel = (x + 0.5) / _SCALE - 0.5
    is_middle = (np.floor(x_pixel) == x_pixel) & (x_pixel >= 0) & (x_pixel <= width - 1)
    y = np.minimum(v[changes], v[changes - 1])[is_middle]
    y_pixel = np.ceil(np.clip((y + 0.5) / _SCALE - 0.5, 0, height)).astype(np.int64)
    np.add.at(flips, x_pixel[is_middle].astype(np.int64) * height + y_pixel, 1)
    return (flips[:-1].cumsum() % 2 == 1).reshape(width, height).T


def _line(start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Return the points (n, 2) of a line, one for each step along its longer direction."""
    (xs, ys), (xe, ye) = start.tolist(), end.tolist()
    dx, dy = abs(xe - xs), abs(ys - ye)
    is_flipped = (dx >= dy and xs > xe) or (dx < dy and ys > ye)
    if is_flipped:
        xs, xe, ys, ye = xe, xs, ye, ys
    steps = np.arange(max(dx, dy) + 1)
    if is_flipped:
        steps = steps[::-1]
    if dx >= dy:
        slope = (ye - ys) / dx if dx else 0.0
        return np.stack([steps + xs, (ys + slope * steps + 0.5).astype(np.int64)], axis=1)
    slope = (xe - xs) / dy
    return np.stack([(xs + slope * steps + 0.5).astype(np.int64), steps + ys], axis=1)

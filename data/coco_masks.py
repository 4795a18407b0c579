"""Masks of classes from a COCO json file: what its annotations cover, and a background."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from data.bad_images import BadImages
from data.box_datasets import coco_files, image_folder
from data.coco import CocoFile, read_coco
from data.crops import raw_header
from data.decoding import BadImage, check
from data.image_source import FileSource, ImageSource

BACKGROUND = "background"


class CocoMasks(ImageSource):
    """A mask for each image of a COCO json file: 0 is the background, k + 1 the class k; small objects are on top.

    Args:
        images: The images of the file, in its order.
    """

    def __init__(self, content: CocoFile, images: FileSource) -> None:
        super().__init__(f"{content.path}: {len(content.file_names):,} images with masks")
        self.content, self._images = content, images
        self._order = np.argsort(content.images, kind="stable")
        self._starts = np.searchsorted(content.images[self._order], np.arange(len(content.file_names) + 1))

    def __len__(self) -> int:
        return len(self.content.file_names)

    def name(self, index: int) -> str:
        return f"{self.content.path}#{self.content.file_names[index]}"

    def entry(self, index: int) -> bytes:
        content = self.content
        width, height = content.sizes[index].tolist()
        if not width:  # the file does not say how large the image is
            header = check(self._images.entry(index))
            width, height = header.width, header.height
            content.sizes[index] = width, height
        mask = np.zeros((height, width), np.uint8)
        own = self._order[self._starts[index] : self._starts[index + 1]]
        try:
            shown = [(content.mask(annotation), content.classes[annotation]) for annotation in own.tolist()]
        except ValueError as error:
            raise BadImage(str(error)) from None
        for pixels, label in sorted(shown, key=lambda pair: -int(pair[0].sum())):
            if label >= 0:
                mask[pixels] = label + 1
        return raw_header((width, height), 1) + mask.tobytes()


def open_coco_masks(path: Path, bad: BadImages) -> Iterator[tuple[str, FileSource, CocoMasks]]:
    """Yield the name of each split with its images and masks; record annotations in `bad` that cannot be used."""
    files = {"train": path} if path.suffix.lower() == ".json" else coco_files(path) if path.is_dir() else {}
    for split, file in files.items():
        content = read_coco(file)
        for index in np.flatnonzero((content.images < 0) | (content.classes < 0)).tolist():
            missing = "image" if content.images[index] < 0 else "category"
            bad[content.name(index)] = f"its {missing} is not in the list of {file.name}"
        where = image_folder(content, split)
        names = pa.array([os.fsencode(name) for name in content.file_names], pa.large_binary())
        images = FileSource(names, os.fsencode(where), f"{file}: {len(names):,} images", where)
        yield split, images, CocoMasks(content, images)

"""The image sets of `benchmarks.hour`: what is trained on without labels, and where few labels are learned and tested.

Shapes: N images.
"""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from data.idx import find_idx_files, read_idx

_NUM_VALIDATION, _NUM_LABELED = 100, 200  # images of each class that are held back, and that few labels are taken from
LABELS_PER_CLASS = 20


@dataclass(frozen=True)
class ImageSet:
    """Images and flags of the commands.

    Args:
        unlabeled: Folders.
        validation, test: Flags that name the labeled images: two disjoint splits each.
        finetune_test: Flags of fine-tuning with all labels of `test`.
        finetuning: Recipe for few labels.
    """

    name: str
    image_size: int
    patch_size: int
    unlabeled: tuple[Path, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    finetune_test: tuple[str, ...]
    finetuning: str
    description: str

    @property
    def sizes(self) -> tuple[str, ...]:
        return "--image_size", str(self.image_size), "--patch_size", str(self.patch_size)


def tuxstamps(folder: Path) -> ImageSet:
    """Return the photographed objects that `benchmarks.tuxstamps` wrote to a folder."""
    if not (folder / "tuning").is_dir():
        raise SystemExit(f"{folder} is missing: python -m benchmarks.tuxstamps --output_dir {folder}")
    test = ("--dataset", str(folder / "stamps"))
    return ImageSet(
        "tuxstamps",
        64,
        8,
        (folder / "photographs", folder / "stamps" / "train"),
        ("--dataset", str(folder / "tuning")),
        test,
        (*test, "--validation_fraction", "0"),
        "finetune_tuxstamps_few",
        "crops of photographs, and views of the training stamps without their labels",
    )


def fashion_mnist(source: Path, folder: Path) -> ImageSet:
    """Return Fashion-MNIST, whose training images are written to `folder`.

    Without the test split, classifiers learn from some training images and are tested on others, which are held back.
    """
    if not folder.exists():
        write_fashion_mnist(source, folder)
    few = ("--labels_per_class", str(LABELS_PER_CLASS))
    test = ("--dataset", str(source), *few)
    return ImageSet(
        "fashion-mnist",
        28,
        4,
        (folder / "unlabeled",),
        ("--dataset", str(folder / "labeled"), *few),
        test,
        test,
        "finetune_fashion_few",
        f"the training images of Fashion-MNIST; {LABELS_PER_CLASS} labels of each class",
    )


def write_fashion_mnist(source: Path, folder: Path) -> None:
    """Write unlabeled/, with all training images, and labeled/{train,val}/CLASS/, with links to a few of them."""
    files = find_idx_files(source) if source.is_dir() else {}
    if "train" not in files:
        raise SystemExit(f"{source} has no Fashion-MNIST: sudo apt-get install dataset-fashion-mnist")
    images, labels = read_idx(*files["train"])  # (N, H, W), (N,)
    assert labels is not None
    scratch = folder.with_name(f"{folder.name}.part")
    (scratch / "unlabeled").mkdir(parents=True, exist_ok=True)
    seen: Counter[int] = Counter()
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        file = scratch / "unlabeled" / f"{number:05d}.png"
        Image.fromarray(image).save(file)
        if seen[label] < _NUM_VALIDATION + _NUM_LABELED:
            into = scratch / "labeled" / ("val" if seen[label] < _NUM_VALIDATION else "train") / str(label)
            into.mkdir(parents=True, exist_ok=True)
            (into / file.name).unlink(missing_ok=True)
            os.link(file, into / file.name)
            seen[label] += 1
    scratch.rename(folder)

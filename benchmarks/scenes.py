"""Create scenes with masks and boxes: Tux Paint's photographed stamps on photographs, 16 classes and a background.

    python -m benchmarks.scenes          # or --root DIR; the packages are those of benchmarks.tuxstamps

Real pixels, composed layouts: one to three stamps on a crop of a photograph. Stamps of train, val and test differ,
with every series of similar stamps in one of them; the photographs of test differ from those of train and val. Writes

    outputs/scenes/{train,val,test}/images/*.jpg          and masks/*.png, class numbers from 0, the background
    outputs/scenes/{train,val,test}/annotations.json      boxes and masks as COCO has them
    outputs/scenes/classes.txt
    outputs/scenes/photographs/                           crops without labels, none from a photograph of test

The files are identical every time for the same packages and Pillow version; `benchmarks.tuxstamps` says what their
licenses are.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import tuxstamps
from benchmarks.tuxstamps import Stamp

_NUM_SCENES = {"train": 1000, "val": 100, "test": 250}
_MOST_STAMPS, _SCALE = 3, (0.4, 0.8)  # of the side of a scene
_FEWEST_PIXELS = 30  # of a stamp that others cover; below, it is left out
_NUM_CROPS = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the Debian packages are unpacked")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/scenes"))
    parser.add_argument("--size", type=int, default=96, help="side of a scene in pixels")
    options = parser.parse_args()
    if options.output_dir.exists():
        raise SystemExit(f"{options.output_dir} already exists; remove it or use another --output_dir")
    stamps, files = tuxstamps.find_stamps(options.root), tuxstamps.find_photographs(options.root)
    if not stamps or len(files) < 2:
        raise SystemExit(f"{len(stamps)} stamps and {len(files)} photographs under {options.root}; see --help")
    training = [stamp for stamp in stamps if not stamp.is_for_test]
    validation = tuxstamps.hold_out(training, 1 / 3, "scenes ")
    by_split = {
        "train": [stamp for stamp in training if stamp not in validation],
        "val": [stamp for stamp in training if stamp in validation],
        "test": [stamp for stamp in stamps if stamp.is_for_test],
    }
    crops = {name: list(tuxstamps.tiles(file)) for name, file in files.items()}
    is_test = {name: tuxstamps.number_of(tuxstamps.place_of(name)) % 6 == 0 for name in crops}
    photographs = {
        part: tuxstamps.interleave({name: crops[name] for name in crops if is_test[name] == part}, _NUM_CROPS)
        for part in (False, True)
    }
    names = sorted({stamp.class_name for stamp in stamps})
    options.output_dir.mkdir(parents=True)
    (options.output_dir / "classes.txt").write_text("\n".join(["background", *names]) + "\n")
    (options.output_dir / "photographs").mkdir()
    for crop in photographs[False]:
        crop.image.save(options.output_dir / "photographs" / f"{crop.name}.jpg", quality=92)
    for split, of_split in by_split.items():
        backgrounds = [crop.image for crop in photographs[split == "test"]]
        num_objects = write_split(options.output_dir / split, of_split, backgrounds, names, options.size)
        print(f"{split}: {_NUM_SCENES[split]} scenes with {num_objects} objects, of {len(of_split)} stamps")


def write_split(
    folder: Path, stamps: Sequence[Stamp], backgrounds: Sequence[Image.Image], names: Sequence[str], size: int
) -> int:
    """Write the scenes of a split; returns the number of objects in them."""
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    content: dict[str, Any] = {"images": [], "annotations": []}
    content["categories"] = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    for number in range(_NUM_SCENES[folder.name]):
        rng = np.random.RandomState(tuxstamps.number_of(f"{folder.name}|{number}") % 2**32)
        image, objects = draw_scene(rng, stamps, backgrounds, size)
        mask = np.zeros((size, size), np.uint8)
        for stamp, visible in objects:
            category = names.index(stamp.class_name) + 1
            mask[visible] = category
            rows, columns = visible.nonzero()
            left, top = int(columns.min()), int(rows.min())
            box = [left, top, int(columns.max()) + 1 - left, int(rows.max()) + 1 - top]
            facts = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": category, "bbox": box}
            more = {"area": int(visible.sum()), "iscrowd": 0, "segmentation": run_lengths(visible)}
            content["annotations"].append({**facts, **more})
        image.save(folder / "images" / f"{number:04}.jpg", quality=92)
        Image.fromarray(mask).save(folder / "masks" / f"{number:04}.png")
        file_name = f"images/{number:04}.jpg"
        content["images"].append({"id": number, "file_name": file_name, "width": size, "height": size})
    (folder / "annotations.json").write_text(json.dumps(content) + "\n")
    return len(content["annotations"])


def draw_scene(
    rng: Any, stamps: Sequence[Stamp], backgrounds: Sequence[Image.Image], size: int
) -> tuple[Image.Image, list[tuple[Stamp, np.ndarray]]]:
    """Return a scene, and its stamps with their visible pixels (size, size)."""
    background = backgrounds[rng.randint(len(backgrounds))]
    crop = rng.uniform(0.6, 1) * min(background.size)
    x, y = rng.uniform(0, background.width - crop), rng.uniform(0, background.height - crop)
    image = background.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + crop, y + crop))
    classes = sorted({stamp.class_name for stamp in stamps})
    objects: list[tuple[Stamp, np.ndarray]] = []
    for _ in range(rng.randint(1, _MOST_STAMPS + 1)):
        chosen = classes[rng.randint(len(classes))]
        of_class = [stamp for stamp in stamps if stamp.class_name == chosen]
        stamp = of_class[rng.randint(len(of_class))]
        cut_out = tuxstamps.cut(stamp)
        scale = rng.uniform(*_SCALE) * size / max(cut_out.size)
        sides = max(2, round(cut_out.width * scale)), max(2, round(cut_out.height * scale))
        cut_out = cut_out.resize(sides, Image.Resampling.LANCZOS)
        if rng.rand() < 0.5:
            cut_out = cut_out.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left, top = rng.randint(size - sides[0] + 1), rng.randint(size - sides[1] + 1)
        image.paste(cut_out, (left, top), cut_out)
        visible = np.zeros((size, size), bool)
        visible[top : top + sides[1], left : left + sides[0]] = np.asarray(cut_out.getchannel("A")) > 127
        objects = [(other, pixels & ~visible) for other, pixels in objects] + [(stamp, visible)]
    return image, [(stamp, pixels) for stamp, pixels in objects if pixels.sum() >= _FEWEST_PIXELS]


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """Return the lengths of runs of 0 and 1 down the columns, as COCO has them."""
    flat = np.concatenate([[0], mask.T.ravel().astype(np.int8), [0]])
    changes = np.flatnonzero(np.diff(flat))
    edges = [0, *changes.tolist()] + ([mask.size] if not len(changes) or changes[-1] != mask.size else [])
    return {"size": list(mask.shape), "counts": np.diff(edges).tolist()}


if __name__ == "__main__":
    main()

"""Create a few-label dataset: Tux Paint's photographed stamps on photographs, 64 pixels, 16 classes.

    sudo apt-get install tuxpaint-stamps-default lomiri-wallpapers-16.04 mate-backgrounds plasma-workspace-wallpapers
    pip install --no-deps mvtb-data==1.6.1 pixit scikit-image
    python -m benchmarks.tuxstamps                                  # or --root DIR, where the packages are unpacked

Each image is a cut-out photograph of an object, pasted on a crop of another photograph. A stamp, and every series of
similar stamps of a class, is in one split only. The test images have other background photographs than the training
images; the two splits for tuning share theirs. Stamps of a class whose names start with a number form one series: of
the planets, the test split contains the moons. Writes

    outputs/tuxstamps/photographs/            unlabeled crops, none from a background photograph of the test images
    outputs/tuxstamps/stamps/{train,test}/    12 views of each of 179 stamps, 4 views of each of 115 others
    outputs/tuxstamps/tuning/{train,val}/     the training views, split into two thirds of the stamps and the rest

The files are identical every time for the same packages and Pillow version. The stamps are licensed under GPL-2, the
photographs under GPL-2, MIT, CC BY, CC BY-SA or in the public domain; none of them is in this repository.
"""

import argparse
import hashlib
import importlib.util
import itertools
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIZE = 64  # pixels of a view, unless --size says otherwise
_NUM_CROPS, _CROP_SIZE, _MAX_SCALE, _STRIDE = 10_000, 96, 16, 0.5
_NUM_VIEWS = {"train": 12, "test": 4}
_TEST_SHARE, _TUNING_SHARE = 0.4, 1 / 3  # of the stamps of a class

_STAMPS = "usr/share/tuxpaint/stamps"
_CLASSES = {  # class: path prefixes of its stamps; the first match counts
    "bird": ["animals/birds/"],
    "sea-animal": ["animals/fish/", "animals/mammals/aquatic/", "animals/shellfish/"],
    "insect": ["animals/insects/"],
    "hoofed-mammal": [
        *("animals/mammals/" + name for name in ("bovines/", "deer/", "equines/", "camel/", "elephant", "giraffe")),
        *("animals/mammals/" + name for name in ("hippopotamus", "pig", "rhino_black", "wildboar")),
    ],
    "furry-mammal": ["animals/mammals/", "animals/marsupials/"],
    "fruit": ["food/fruit/", "food/nuts/", "plants/trees/rambutan"],
    "vegetable": ["food/vegetables/", "food/spices/", "plants/mushrooms/"],
    "flower": ["plants/flowers/"],
    "tree-herb": ["plants/trees/", "plants/"],
    "instrument": ["hobbies/music/"],
    "ball": ["sports/"],
    "planet": ["space/planets/", "space/moon/"],
    "tool": ["household/tools/", "household/arttools/", "household/key", "medical/"],
    "kitchenware": [
        *("household/" + name for name in ("dishes/", "kettle", "garbagecan", "home_compost", "wheelie")),
        "town/u",
    ],
    "vehicle": ["vehicles/", "military/vehicles/"],
    "gravestone": ["seasonal/halloween/grave"],
}
_DRAWN = re.compile(
    r"cartoon|/toys/|plastic|_mirror|/(fly|hedgehog|echidna|tooth|rugby_goal_posts|trophy_cup|tennis_racket|7spoke256|"
    r"wheel_tractor|0_sun|cementmixer|pinecone|garbagecan|paintbrush_large|balloon360)\.png"
)
_NO_SERIES = ("flower", "grave", "tree")  # generic names, which do not identify an object

_BACKGROUNDS, _WALLPAPERS = "usr/share/backgrounds", "usr/share/wallpapers"
_OF_LOMIRI = "Bridge Dragonfly Picture_* Wine aitzgorri free friends greentock life picosdeeuropa seeding sunset"
_OF_PLASMA = "BytheWater ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path summer_1am"
_OF_DEBIAN = {
    "lomiri16": [f"{_BACKGROUNDS}/{name}_by*.jpg" for name in _OF_LOMIRI.split()],
    "mate": [f"{_BACKGROUNDS}/mate/nature/*.jpg"],
    "plasma": [f"{_WALLPAPERS}/{name}/contents/images/*.jpg" for name in _OF_PLASMA.split()],
}
_OF_PYTHON = {  # package: its folder and files, without drawings, renderings and second shots of a scene
    "mvtbdata": (
        "images",
        "campus/P*.png campus/holdout/*.png flowers*.png butterfly.jpg building2-3.png castle.png church.jpg "
        "eiffel-1.png greenscreen.png image3.jpg lab-scene.png notre-dame.png parks.png penguins.png road.png "
        "rocks2-l.png roof.png street.png tags.png tomato_*.png walls-l.png yellowtargets.png mosaic/aerialphoto.png "
        "mosaic/aerial-08.png mosaic/aerial2-001.png mosaic/aerial2-010.png",
    ),
    "pixit": ("datasets/images/animals", "*.jpg"),
    "skimage": (
        "data",
        "astronaut.png brick.png camera.png chelsea.png coffee.png coins.png grass.png gravel.png ihc.png "
        "motorcycle_left.png retina.jpg rocket.jpg",
    ),
    "sklearn": ("datasets/images", "china.jpg flower.jpg"),
}
_TWIN = "pixit_animal-elephant-endangered-133394"  # the same shot as -133393


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the Debian packages are unpacked")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/tuxstamps"))
    parser.add_argument("--size", type=int, default=SIZE, help="side of a view in pixels")
    options = parser.parse_args()
    if options.output_dir.exists():
        raise SystemExit(f"{options.output_dir} already exists; remove it or use another --output_dir")
    stamps, files = find_stamps(options.root), find_photographs(options.root)
    if not stamps or len(files) < 2:
        raise SystemExit(
            f"{len(stamps)} stamps and {len(files)} photographs under {options.root}; install the packages listed in "
            "--help, or give the folder with the unpacked packages as --root"
        )
    crops = {name: list(tiles(file)) for name, file in files.items()}
    validation = {name for name in crops if number_of(place_of(name)) % 6 == 0}
    splits = {
        "train": interleave({name: crops[name] for name in crops if name not in validation}, _NUM_CROPS),
        "test": interleave({name: crops[name] for name in validation}, _NUM_CROPS // 4),
    }
    folder = options.output_dir / "photographs"
    folder.mkdir(parents=True)
    for crop in splits["train"]:
        crop.image.save(folder / f"{crop.name}.jpg", quality=92)
    num_train = len(crops) - len(validation)
    print(f"{len(splits['train'])} crops of {num_train} photographs; {len(validation)} more for the test backgrounds")
    for split in ("train", "test"):
        backgrounds = [crop.image for crop in splits[split]]
        of_split = [stamp for stamp in stamps if stamp.is_for_test == (split == "test")]
        for stamp in of_split:
            into = options.output_dir / "stamps" / split / stamp.class_name
            into.mkdir(parents=True, exist_ok=True)
            for view in range(_NUM_VIEWS[split]):
                draw(stamp, view, backgrounds, options.size).save(into / f"{stamp.file.stem}_{view:02d}.png")
        print(f"{split}: {_NUM_VIEWS[split]} views of each of {len(of_split)} stamps, {_by_class(of_split)}")
    write_tuning(options.output_dir, [stamp for stamp in stamps if not stamp.is_for_test])


# ---- photographs without labels ----


@dataclass(frozen=True)
class Crop:
    name: str
    image: Image.Image


def find_photographs(root: Path) -> dict[str, Path]:
    """Return the photographs by a name with their origin; packages that are not installed are skipped."""
    found = {}
    for package, patterns in _OF_DEBIAN.items():
        for file in itertools.chain.from_iterable(sorted(root.glob(pattern)) for pattern in patterns):
            if not file.is_symlink() and file.stat().st_size > 2_000:
                name = file.parents[2].name if package == "plasma" else file.stem.split("_by_")[0]
                found[f"{package}_{name}"] = file
    for package, (folder, names) in _OF_PYTHON.items():
        spec = importlib.util.find_spec(package)
        for where in (spec.submodule_search_locations or [])[:1] if spec else []:
            for pattern in names.split():
                found.update(
                    (f"{package}_{file.stem[:40]}", file) for file in sorted(Path(where, folder).glob(pattern))
                )
    found.pop(_TWIN, None)
    return dict(sorted(found.items()))


def tiles(file: Path) -> Iterator[Crop]:
    """Yield squares of a photograph at full size, at 2/3 of it, and so on, except for those without content."""
    photograph = Image.open(file).convert("RGB")
    stride, scale = round(_STRIDE * _CROP_SIZE), 1.0
    while min(photograph.size) / scale >= _CROP_SIZE and scale <= _MAX_SCALE:
        size = round(photograph.width / scale), round(photograph.height / scale)
        smaller = photograph if scale == 1 else photograph.resize(size, Image.Resampling.LANCZOS)
        across, down = ((length - _CROP_SIZE) // stride for length in smaller.size)
        left, top = (
            (length - _CROP_SIZE - n * stride) // 2 for length, n in zip(smaller.size, (across, down), strict=True)
        )
        for row, column in itertools.product(range(down + 1), range(across + 1)):
            x, y = left + column * stride, top + row * stride
            tile = smaller.crop((x, y, x + _CROP_SIZE, y + _CROP_SIZE))
            gray = np.asarray(tile.convert("L"), np.float32)
            flat_share = (np.abs(np.diff(gray, axis=1)) < 1).mean()
            if gray.std() > 10 and flat_share < 0.5:
                yield Crop(f"{scale:.2f}_{x}_{y}", tile)
        scale *= 1.5


def interleave(crops: Mapping[str, Sequence[Crop]], num_crops: int) -> list[Crop]:
    """Take one crop of each photograph in turn, so that large photographs do not dominate."""
    queues = [
        [
            Crop(f"{name}_{crop.name}", crop.image)
            for crop in sorted(crops[name], key=lambda each: number_of(each.name))
        ]
        for name in sorted(crops)
    ]
    rounds = itertools.zip_longest(*queues)
    return list(itertools.islice((crop for each in rounds for crop in each if crop is not None), num_crops))


def place_of(photograph: str) -> str:
    """Return the same name for all photographs of a place, which must be in the same split."""
    package, name = photograph.split("_", 1)
    series = re.match(r"[A-Za-z]+", name) if package == "mvtbdata" else None
    return f"{package}_{series.group() if series else name}"


# ---- objects with a class ----


@dataclass(frozen=True)
class Stamp:
    class_name: str
    file: Path
    series: str
    is_for_test: bool

    @property
    def key(self) -> str:
        return self.file.as_posix().split(_STAMPS + "/")[1]


def find_stamps(root: Path) -> list[Stamp]:
    folder = root / _STAMPS
    found = []
    for file in sorted(folder.rglob("*.png")):
        key = file.relative_to(folder).as_posix()
        name = next((name for name, prefixes in _CLASSES.items() if key.startswith(tuple(prefixes))), None)
        if name and not _DRAWN.search("/" + key):
            stem = re.split(r"[-_0-9]", file.stem)[0].lower()
            found.append(Stamp(name, file, file.stem.lower() if stem in _NO_SERIES else stem, is_for_test=False))
    test = hold_out(found, _TEST_SHARE, "")
    return [Stamp(each.class_name, each.file, each.series, each in test) for each in found]


def hold_out(stamps: Sequence[Stamp], share: float, salt: str) -> set[Stamp]:
    """Return about this share of the stamps of each class, in whole series."""
    held_out: set[Stamp] = set()
    for name in _CLASSES:
        of_class = [stamp for stamp in stamps if stamp.class_name == name]
        room = round(share * len(of_class))
        for series in sorted({stamp.series for stamp in of_class}, key=lambda each: number_of(f"{salt}{name}/{each}")):
            members = {stamp for stamp in of_class if stamp.series == series}
            if len(members) <= room:
                room -= len(members)
                held_out |= members
    return held_out


def draw(stamp: Stamp, view: int, backgrounds: Sequence[Image.Image], size: int = SIZE) -> Image.Image:
    """Paste a stamp at a random position on a random background; drawn at twice the size, then reduced to it."""
    rng = np.random.RandomState(number_of(f"{stamp.key}|{view}") % 2**32)
    side = 2 * size
    background = backgrounds[rng.randint(len(backgrounds))]
    crop = rng.uniform(0.5, 1) * min(background.size)
    x, y = rng.uniform(0, background.width - crop), rng.uniform(0, background.height - crop)
    image = background.resize((side, side), Image.Resampling.BILINEAR, box=(x, y, x + crop, y + crop))
    image = _flip_randomly(image, rng)
    cut_out = cut(stamp)
    scale = rng.uniform(0.6, 0.98) * side / max(cut_out.size)
    sides = max(2, round(cut_out.width * scale)), max(2, round(cut_out.height * scale))
    cut_out = _flip_randomly(cut_out.resize(sides, Image.Resampling.LANCZOS), rng)
    image.paste(cut_out, (rng.randint(side - sides[0] + 1), rng.randint(side - sides[1] + 1)), cut_out)
    return image.resize((size, size), Image.Resampling.LANCZOS)


def cut(stamp: Stamp) -> Image.Image:
    """Return the smallest part of a stamp that holds all of it, in mode RGBA."""
    cut_out = Image.open(stamp.file).convert("RGBA")
    return cut_out.crop(cut_out.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())


def write_tuning(folder: Path, stamps: Sequence[Stamp]) -> None:
    """Copy the training views, split by stamp, for tuning."""
    validation = hold_out(stamps, _TUNING_SHARE, "tuning ")
    for stamp in stamps:
        into = folder / "tuning" / ("val" if stamp in validation else "train") / stamp.class_name
        into.mkdir(parents=True, exist_ok=True)
        for view in range(_NUM_VIEWS["train"]):
            name = f"{stamp.file.stem}_{view:02d}.png"
            shutil.copyfile(folder / "stamps" / "train" / stamp.class_name / name, into / name)
    num_train = len(stamps) - len(validation)
    print(f"tuning: {num_train} training stamps and {len(validation)} validation stamps, {_by_class(validation)}")


def _flip_randomly(image: Image.Image, rng: Any) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.rand() < 0.5 else image


def _by_class(stamps: Sequence[Stamp] | set[Stamp]) -> str:
    counts = sorted(Counter(stamp.class_name for stamp in stamps).items())
    return ", ".join(f"{number} {name}" for name, number in counts)


def number_of(text: str) -> int:
    """Hash a text to a number, the same on every platform."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


if __name__ == "__main__":
    main()

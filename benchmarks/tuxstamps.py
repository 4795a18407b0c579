"""Objects to recognize with few labels: Tux Paint's photographed stamps on photographs, 64 pixels, 16 classes.

    sudo apt-get install tuxpaint-stamps-default lomiri-wallpapers-16.04 mate-backgrounds plasma-workspace-wallpapers
    pip install --no-deps mvtb-data==1.6.1 pixit scikit-image
    python -m benchmarks.tuxstamps                                  # or --root DIR, where the packages are unpacked

The images are composed: a real cut-out object on a crop of a real photograph of somewhere else. A stamp, and every
series of alike stamps of a class, is on one side of a split only. The photographs behind the test images are others
too; the two parts for tuning share theirs. Stamps of a class whose names begin with a number are one series: of the
planets, the test part has the moons. Writes

    outputs/tuxstamps/photographs/            crops without labels, none from a photograph behind a test image
    outputs/tuxstamps/stamps/{train,test}/    12 views of each of 179 stamps, 4 views of each of 115 others
    outputs/tuxstamps/tuning/{train,val}/     the training views again, two thirds of the stamps and the others

The same bytes every time for the same packages and the same Pillow. The stamps are under GPL-2, the photographs under
GPL-2, MIT, CC BY, CC BY-SA or in the public domain: none of them is in this repository.
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

SIZE = 64  # pixels, of a view
_NUM_CROPS, _CROP_SIZE, _MAX_SCALE, _STRIDE = 10_000, 96, 16, 0.5
_NUM_VIEWS = {"train": 12, "test": 4}
_HELD_OUT_SHARE, _TUNING_SHARE = 0.4, 1 / 3  # of the stamps of a class

_STAMPS = "usr/share/tuxpaint/stamps"
_CLASSES = {  # a class and where its stamps begin; the first that fits
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
_NO_SERIES = ("flower", "grave", "tree")  # a name that they share does not mean the same object

_BACKGROUNDS, _WALLPAPERS = "usr/share/backgrounds", "usr/share/wallpapers"
_OF_LOMIRI = "Bridge Dragonfly Picture_* Wine aitzgorri free friends greentock life picosdeeuropa seeding sunset"
_OF_PLASMA = "BytheWater ColorfulCups DarkestHour EveningGlow FallenLeaf Grey Kite OneStandsOut Path summer_1am"
_OF_DEBIAN = {
    "lomiri16": [f"{_BACKGROUNDS}/{name}_by*.jpg" for name in _OF_LOMIRI.split()],
    "mate": [f"{_BACKGROUNDS}/mate/nature/*.jpg"],
    "plasma": [f"{_WALLPAPERS}/{name}/contents/images/*.jpg" for name in _OF_PLASMA.split()],
}
_OF_PYTHON = {  # package: folder in it, and files; drawings, renderings and second shots of a scene are left out
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
    options = parser.parse_args()
    if options.output_dir.exists():
        raise SystemExit(f"{options.output_dir} is there already; remove it, or name another --output_dir")
    stamps, files = find_stamps(options.root), find_photographs(options.root)
    if not stamps or len(files) < 2:
        raise SystemExit(
            f"{len(stamps)} stamps and {len(files)} photographs under {options.root}; install the packages named in "
            "--help, or name the folder that they are unpacked in with --root"
        )
    crops = {name: list(tiles(file)) for name, file in files.items()}
    validation = {name for name in crops if _number(_place(name)) % 6 == 0}
    sides = {
        "train": in_turn({name: crops[name] for name in crops if name not in validation}, _NUM_CROPS),
        "test": in_turn({name: crops[name] for name in validation}, _NUM_CROPS // 4),
    }
    folder = options.output_dir / "photographs"
    folder.mkdir(parents=True)
    for crop in sides["train"]:
        crop.image.save(folder / f"{crop.name}.jpg", quality=92)
    num_train = len(crops) - len(validation)
    print(f"{len(sides['train'])} crops of {num_train} photographs; {len(validation)} others behind the test images")
    for side in ("train", "test"):
        backgrounds = [crop.image for crop in sides[side]]
        mine = [stamp for stamp in stamps if stamp.is_held_out == (side == "test")]
        for stamp in mine:
            into = options.output_dir / "stamps" / side / stamp.class_name
            into.mkdir(parents=True, exist_ok=True)
            for view in range(_NUM_VIEWS[side]):
                draw(stamp, view, backgrounds).save(into / f"{stamp.file.stem}_{view:02d}.png")
        print(f"{side}: {_NUM_VIEWS[side]} views of each of {len(mine)} stamps, {_by_class(mine)}")
    write_tuning(options.output_dir, [stamp for stamp in stamps if not stamp.is_held_out])


# ---- photographs without labels ----


@dataclass(frozen=True)
class Crop:
    name: str
    image: Image.Image


def find_photographs(root: Path) -> dict[str, Path]:
    """Files by a name that says where they are from; what is not installed is left out."""
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
    """Squares of a photograph at its own size, at 2/3 of it, and so on, but for those with nothing to see."""
    picture = Image.open(file).convert("RGB")
    stride, scale = round(_STRIDE * _CROP_SIZE), 1.0
    while min(picture.size) / scale >= _CROP_SIZE and scale <= _MAX_SCALE:
        size = round(picture.width / scale), round(picture.height / scale)
        smaller = picture if scale == 1 else picture.resize(size, Image.Resampling.LANCZOS)
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


def in_turn(crops: Mapping[str, Sequence[Crop]], num_crops: int) -> list[Crop]:
    """One crop of each photograph after the other, so that a large one does not swamp the rest."""
    queues = [
        [Crop(f"{name}_{crop.name}", crop.image) for crop in sorted(crops[name], key=lambda each: _number(each.name))]
        for name in sorted(crops)
    ]
    rounds = itertools.zip_longest(*queues)
    return list(itertools.islice((crop for each in rounds for crop in each if crop is not None), num_crops))


def _place(photograph: str) -> str:
    """Of several photographs of one place or walk the same name: they stay on one side."""
    package, name = photograph.split("_", 1)
    series = re.match(r"[A-Za-z]+", name) if package == "mvtbdata" else None
    return f"{package}_{series.group() if series else name}"


# ---- objects with a class ----


@dataclass(frozen=True)
class Stamp:
    class_name: str
    file: Path
    series: str
    is_held_out: bool

    @property
    def key(self) -> str:
        return self.file.as_posix().split(_STAMPS + "/")[1]


def find_stamps(root: Path) -> list[Stamp]:
    folder = root / _STAMPS
    found = []
    for file in sorted(folder.rglob("*.png")):
        key = file.relative_to(folder).as_posix()
        name = next((name for name, begins in _CLASSES.items() if key.startswith(tuple(begins))), None)
        if name and not _DRAWN.search("/" + key):
            stem = re.split(r"[-_0-9]", file.stem)[0].lower()
            found.append(Stamp(name, file, file.stem.lower() if stem in _NO_SERIES else stem, is_held_out=False))
    validation = hold_out(found, _HELD_OUT_SHARE, "")
    return [Stamp(each.class_name, each.file, each.series, each in validation) for each in found]


def hold_out(stamps: Sequence[Stamp], share: float, salt: str) -> set[Stamp]:
    """About this share of each class, and whole series."""
    validation: set[Stamp] = set()
    for name in _CLASSES:
        mine = [stamp for stamp in stamps if stamp.class_name == name]
        room = round(share * len(mine))
        for series in sorted({stamp.series for stamp in mine}, key=lambda each: _number(f"{salt}{name}/{each}")):
            members = {stamp for stamp in mine if stamp.series == series}
            if len(members) <= room:
                room -= len(members)
                validation |= members
    return validation


def draw(stamp: Stamp, view: int, backgrounds: Sequence[Image.Image]) -> Image.Image:
    """A stamp somewhere on one of the backgrounds, (SIZE, SIZE), drawn at twice the size."""
    rng = np.random.RandomState(_number(f"{stamp.key}|{view}") % 2**32)
    side = 2 * SIZE
    behind = backgrounds[rng.randint(len(backgrounds))]
    shown = rng.uniform(0.5, 1) * min(behind.size)
    x, y = rng.uniform(0, behind.width - shown), rng.uniform(0, behind.height - shown)
    picture = behind.resize((side, side), Image.Resampling.BILINEAR, box=(x, y, x + shown, y + shown))
    picture = _perhaps_mirrored(picture, rng)
    cut_out = Image.open(stamp.file).convert("RGBA")
    cut_out = cut_out.crop(cut_out.getchannel("A").point(lambda alpha: 255 * (alpha > 16)).getbbox())
    scale = rng.uniform(0.6, 0.98) * side / max(cut_out.size)
    size = max(2, round(cut_out.width * scale)), max(2, round(cut_out.height * scale))
    cut_out = _perhaps_mirrored(cut_out.resize(size, Image.Resampling.LANCZOS), rng)
    picture.paste(cut_out, (rng.randint(side - size[0] + 1), rng.randint(side - size[1] + 1)), cut_out)
    return picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def write_tuning(folder: Path, stamps: Sequence[Stamp]) -> None:
    """The training views once more, split by stamp, to choose settings by."""
    validation = hold_out(stamps, _TUNING_SHARE, "tuning ")
    for stamp in stamps:
        into = folder / "tuning" / ("val" if stamp in validation else "train") / stamp.class_name
        into.mkdir(parents=True, exist_ok=True)
        for view in range(_NUM_VIEWS["train"]):
            name = f"{stamp.file.stem}_{view:02d}.png"
            shutil.copyfile(folder / "stamps" / "train" / stamp.class_name / name, into / name)
    num_train = len(stamps) - len(validation)
    print(f"tuning: {num_train} stamps to train, {len(validation)} to choose by, {_by_class(validation)}")


def _perhaps_mirrored(picture: Image.Image, rng: Any) -> Image.Image:
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.rand() < 0.5 else picture


def _by_class(stamps: Sequence[Stamp] | set[Stamp]) -> str:
    counts = sorted(Counter(stamp.class_name for stamp in stamps).items())
    return ", ".join(f"{number} {name}" for name, number in counts)


def _number(text: str) -> int:
    """The same for the same text, everywhere and always."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")


if __name__ == "__main__":
    main()

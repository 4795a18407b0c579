"""From a tokenizer to retrieval on real images with texts: does a masked word gain from its image?

    python -m benchmarks.tuxstamps                                  # once; see its --help for the packages
    sudo apt-get install openclipart-png fonts-noto-color-emoji     # more pairs, each optional
    python -m benchmarks.pairs                                      # or --root DIR, where the packages are unpacked

Pairs: views of Tux Paint's stamps and scenes of two of them, with their English captions; drawings of openclipart,
with their file names; emoji, with their Unicode names. No stamp or drawing of a training pair is in a held-out one.
Steps, each of which is skipped if its result exists, so that an interrupted run continues: an image tokenizer, BEiT-3
with a tokenizer trained on the captions, the accuracy of masked words on held-out pairs with the image, a gray one and
that of another pair, and fine-tuning to retrieval. `--minutes` bounds the time of the training steps together, for
each seed.

Baselines of retrieval: chance, and a bag of colors: the words of the training images with the closest color histogram.
With --reference (`python -m benchmarks.efficientnet_lite0 FOLDER` writes one), also the words of the images with the
closest features of that encoder. Writes benchmarks/pairs_<hardware>_<date>.md.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining, AutoTokenizer

import modeling  # noqa: F401  # registers the methods
from benchmarks.provenance import TODAY, command, hardware, hardware_slug, versions, write_report
from benchmarks.tuxstamps import Stamp, draw, find_stamps, number_of
from data.collators import MaskingCollator
from data.text_batches import MixedCollator
from data.text_tokens import TextTokens
from evaluation.features import FrozenEncoder
from evaluation.retrieval import retrieval_metrics

ROOT = Path(__file__).resolve().parent.parent
SIZE, PATCH = 64, 8
_VIEWS = {"train": 12, "test": 4}
_SCENES = {"train": 1000, "test": 200}
_MAX_PIXELS, _MAX_DRAWINGS = 4_000_000, 2000  # of openclipart, which has drawings of hundreds of megapixels
_TEST_SHARE = 0.1  # of drawings and emoji
_EMOJI_SIZE = 109  # the only one of the bitmap font
_FONT, _CLIPART = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", "usr/share/openclipart/png"
# Shares of --minutes for the tokenizer, BEiT-3 and retrieval; steps per minute on two cores, measured while they run.
_SHARES = {"tokenizer": 0.1, "beit3": 0.6, "retrieval": 0.3}
_WRITTEN_LAST = {"tokenizer": "config.json", "beit3": "pretraining/config.json", "retrieval": "config.json"}
_WORDS_DRAWS = 8  # masks for each held-out pair
_HISTOGRAM_BINS, _NEIGHBORS = 4, 10


@dataclass(frozen=True)
class Pair:
    image: Image.Image
    text: str
    source: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the Debian packages are unpacked")
    parser.add_argument("--photographs", type=Path, default=Path("outputs/tuxstamps/photographs"), help="backgrounds")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/pairs"))
    parser.add_argument("--minutes", type=float, default=36.0, help="of training, for each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--reference", type=Path, help="an encoder whose nearest images are a baseline as well")
    parser.add_argument("--max_steps", type=int, help="of every training, instead of --minutes, to try the script")
    options = parser.parse_args()
    counts = write_pairs(options)
    tokenizer = train(options, "tokenizer", "run_tokenizer.py", ["--image_size", str(SIZE), *_DVAE])
    results = []
    for seed in options.seeds:
        encoder = train(options, "beit3", "run_pretraining.py", beit3_flags(options, tokenizer), seed)
        words = cached(encoder / "words.json", lambda encoder=encoder: word_accuracies(encoder, options.output_dir))
        tuned = train(options, "retrieval", "run_finetune.py", retrieval_flags(options, encoder), seed)
        results.append({"seed": seed, "words": words, "retrieval": read_metrics(tuned / "metrics.json")})
    folder = options.output_dir
    baselines = {"bag of colors": cached(folder / "colors.json", lambda: bag_of_words(folder, histogram))}
    if options.reference is not None:
        name = f"bag of features of {options.reference.name}"
        baselines[name] = cached(folder / "features.json", lambda: bag_of_words(folder, Features(options.reference)))
    report(options, counts, results, baselines)


# ---- pairs ----


def write_pairs(options: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Write pairs/ (train, validation) and stamps/ (train, test), and return the number of pairs of each source.

    The splits of retrieval/ are all training pairs, and the stamps for the test.
    """
    done = options.output_dir / "counts.json"
    if not done.exists():
        photographs = sorted(options.photographs.glob("*.jpg"))
        stamps = find_stamps(options.root)
        if not stamps or not photographs:
            raise SystemExit(f"{len(stamps)} stamps in {options.root}, {len(photographs)} images in --photographs")
        backgrounds = [Image.open(file).convert("RGB") for file in photographs[::20]]
        counts: dict[str, dict[str, int]] = {}
        for split in ("train", "test"):
            views = [pair for stamp in of_split(stamps, split) for pair in views_of(stamp, backgrounds, split)]
            others = [*scenes(of_split(stamps, split), backgrounds, split), *drawings(options.root, split)]
            others += emoji(options.root, split)
            write(options.output_dir / "stamps" / split, views)
            write(options.output_dir / "pairs" / ("validation" if split == "test" else split), [*views, *others])
            counts[split] = dict(Counter(pair.source for pair in [*views, *others]))
        done.write_text(json.dumps(counts))
    retrieval = options.output_dir / "retrieval"
    retrieval.mkdir(exist_ok=True)
    for split, source in (("train", "pairs"), ("test", "stamps")):
        if not (retrieval / split).exists():
            (retrieval / split).symlink_to(Path("..") / source / split, target_is_directory=True)
    found: dict[str, dict[str, int]] = json.loads(done.read_text())
    return found


def of_split(stamps: list[Stamp], split: str) -> list[Stamp]:
    return [stamp for stamp in stamps if stamp.is_for_test == (split == "test") and caption(stamp)]


def caption(stamp: Stamp) -> str:
    """Return the English caption of a stamp, the first line of the text file beside it; maybe none."""
    file = stamp.file.with_suffix(".txt")
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    return lines[0].strip() if lines else ""


def views_of(stamp: Stamp, backgrounds: list[Image.Image], split: str) -> Iterator[Pair]:
    for view in range(_VIEWS[split]):
        yield Pair(draw(stamp, view, backgrounds, SIZE), caption(stamp), "stamps")


def scenes(stamps: list[Stamp], backgrounds: list[Image.Image], split: str) -> Iterator[Pair]:
    """Yield images with one stamp on the left and another on the right."""
    rng = np.random.RandomState(0)
    for number in range(_SCENES[split]):
        pair = [stamps[index] for index in rng.choice(len(stamps), 2, replace=False)]
        scene = Image.new("RGB", (SIZE, SIZE))
        for place, stamp in enumerate(pair):
            view = draw(stamp, 1000 + number, backgrounds, SIZE).resize((SIZE // 2, SIZE))
            scene.paste(view, (place * SIZE // 2, 0))
        yield Pair(scene, " ".join(map(caption, pair)), "scenes of two stamps")


def drawings(root: Path, split: str) -> Iterator[Pair]:
    files = sorted((root / _CLIPART).rglob("*.png"), key=lambda file: number_of(file.stem))
    num_found = 0
    Image.MAX_IMAGE_PIXELS = None  # Pillow refuses to open the largest ones, which are left out below
    for file in files:
        text = " ".join(re.findall(r"[a-z]+", file.stem.lower()))
        if is_test(re.sub(r"\d+", "", file.stem)) != (split == "test") or len(text) < 3:
            continue
        image = Image.open(file)
        if math.prod(image.size) > _MAX_PIXELS or min(image.size) < SIZE // 2:
            continue
        yield Pair(on_white(image), text, "openclipart")
        num_found += 1
        if num_found == round(_MAX_DRAWINGS * (_TEST_SHARE if split == "test" else 1 - _TEST_SHARE)):
            return


def emoji(root: Path, split: str) -> Iterator[Pair]:
    if not (root / _FONT).exists():
        return
    font = ImageFont.truetype(str(root / _FONT), _EMOJI_SIZE)
    for code in (*range(0x231A, 0x2BFF), *range(0x1F300, 0x1FAFF)):
        name = unicodedata.name(chr(code), "").lower()
        if not name or is_test(name) != (split == "test"):
            continue
        image = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(image).text((0, 0), chr(code), font=font, embedded_color=True)
        if image.getbbox() is not None and len(image.getcolors(2**16) or range(9)) > 8:
            yield Pair(on_white(image), name, "emoji")


def is_test(name: str) -> bool:
    return number_of(name) % 1000 < 1000 * _TEST_SHARE


def on_white(image: Image.Image) -> Image.Image:
    """Return the drawing in the middle of a white square."""
    image = image.convert("RGBA")
    image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (SIZE, SIZE), "white")
    square.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2), image)
    return square


def write(folder: Path, pairs: list[Pair]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, pair in enumerate(pairs):
        pair.image.save(folder / f"{number:06d}.png")
        lines.append(json.dumps({"file_name": f"{number:06d}.png", "text": pair.text}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n")


def read(folder: Path) -> tuple[list[Path], list[str]]:
    rows = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    return [folder / row["file_name"] for row in rows], [row["text"] for row in rows]


# ---- training ----

_DVAE = ["--config", "dvae_nano_sample"]


def beit3_flags(options: argparse.Namespace, tokenizer: Path) -> list[str]:
    pairs = options.output_dir / "pairs"
    return [
        "--method", "beit3", "--model", "vit-nano", "--tokenizer", str(tokenizer), "--num_fusion_layers", "1",
        "--pair_dataset", str(pairs / "train"), "--validation_fraction", "0", "--text_tokenizer", "trained",
        "--text_vocab_size", "2048", "--max_text_length", "24", "--learning_rate", "1e-3", "--warmup_steps", "0.05",
        "--per_device_train_batch_size", "32", "--crop_scale", "0.6", "1.0",
    ]  # fmt: skip


def retrieval_flags(options: argparse.Namespace, encoder: Path) -> list[str]:
    # Rates were chosen on the held-out drawings and emoji, in runs of 150 steps.
    return [
        "--task", "retrieval", "--model", str(encoder), "--max_text_length", "24", "--projection_size", "128",
        "--learning_rate", "1e-3", "--layer_decay", "1.0", "--warmup_steps", "0.1", "--crop_scale", "0.6", "1.0",
        "--per_device_train_batch_size", "64", "--validation_fraction", "0", "--drop_path", "0",
    ]  # fmt: skip


def train(options: argparse.Namespace, step: str, script: str, flags: list[str], seed: int = 0) -> Path:
    """Run one of the commands for its share of the minutes, unless it has finished; return its output folder."""
    folder: Path = options.output_dir / (step if step == "tokenizer" else f"{step}-{seed}")
    if (folder / _WRITTEN_LAST[step]).exists():
        return folder
    data = options.output_dir / ("retrieval" if step == "retrieval" else "pairs/train")
    flags = [*flags, "--dataset", str(data), "--seed", str(seed), "--report_to", "none"]
    flags += ["--eval_strategy", "no"] if step != "tokenizer" else []
    flags += ["--load_best_model_at_end", "false"] if step == "retrieval" else []
    num_steps = options.max_steps or measured_steps(options, step, script, flags)
    run(script, *flags, "--max_steps", str(num_steps), "--output_dir", str(folder), "--save_steps", "0.2")
    return folder


def measured_steps(options: argparse.Namespace, step: str, script: str, flags: list[str]) -> int:
    """Return the number of steps that fit into the step's share of the minutes; measured once, then kept."""
    file = options.output_dir / f"steps-{step}.json"

    def measure() -> int:
        output = run(script, *flags, "--max_steps", "100000", "--output_dir", "unused", "--dry_run", quiet=True)
        seconds = re.search(r"\((\S+) s per step\)", output)
        if seconds is None:
            raise SystemExit(f"{script} --dry_run named no seconds per step:\n{output[-2000:]}")
        return max(20, round(60 * options.minutes * _SHARES[step] / float(seconds[1])))

    return int(cached(file, measure))


def run(script: str, *flags: str, quiet: bool = False) -> str:
    print(" ".join([script, *flags]), flush=True)
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *flags],
        text=True,
        check=False,
        stdout=subprocess.PIPE if quiet else None,
        stderr=subprocess.STDOUT if quiet else None,
    )
    if result.returncode:
        raise SystemExit(f"{script} failed: {(result.stdout or '')[-2000:]}")
    return result.stdout or ""


def cached(file: Path, measure: Any) -> Any:
    if not file.exists():
        file.write_text(json.dumps(measure()))
    return json.loads(file.read_text())


# ---- measurements ----


@torch.no_grad()
def word_accuracies(encoder: Path, folder: Path) -> dict[str, Any]:
    """Return the share of masked words of held-out pairs that is predicted, with the image and with other ones."""
    model: Any = AutoModelForPreTraining.from_pretrained(encoder / "pretraining").eval()
    length = model.encoder.text_embeddings.position_embeddings.shape[1]
    tokens = TextTokens(AutoTokenizer.from_pretrained(encoder / "text"), length)
    grid = (SIZE // PATCH, SIZE // PATCH)
    collator = MixedCollator(MaskingCollator(grid, 0.4, seed=0), tokens, 0.15, 0.5)
    files, texts = read(folder / "pairs" / "validation")
    others = np.random.default_rng(0).permutation(len(files))
    right = Counter[str]()
    for start in range(0, len(files), 64):
        pixels = torch.stack([as_pixels(file) for file in files[start : start + 64]])
        other = torch.stack([as_pixels(files[number]) for number in others[start : start + 64]])
        seen = {"image": pixels, "gray": torch.full_like(pixels, 127), "other": other}
        for number in range(_WORDS_DRAWS):
            items = [
                {"text": text, "epoch": number, "text_index": start + row}
                for row, text in enumerate(texts[start : start + 64])
            ]
            batch = collator.masked_words(items, "words", 0.5)
            masked = batch["masked_words"] != -100
            right["words"] += int(masked.sum())
            for name, images in seen.items():
                encoded = model.encoder.encode_pair(
                    model.standardize(images), None, batch["input_ids"], batch["attention_mask"]
                )[:, -masked.shape[1] :]
                predicted = model.predict_words(encoded[masked]).argmax(-1)
                right[name] += int((predicted == batch["masked_words"][masked]).sum())
    return {name: right[name] / right["words"] for name in ("image", "gray", "other")} | {"n": right["words"]}


def as_pixels(file: Path) -> torch.Tensor:
    return torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)


def bag_of_words(folder: Path, describe: Callable[[Path], np.ndarray]) -> dict[str, float]:
    """Return recalls of a search by the words of the training images whose descriptions (D,) are closest."""
    (train_files, train_texts), (files, texts) = (read(folder / "retrieval" / split) for split in ("train", "test"))
    known, described = (np.stack([describe(file) for file in each]) for each in (train_files, files))
    vocabulary = sorted({word for text in (*train_texts, *texts) for word in words_of(text)})
    train_words, own_words = (np.stack([bag(text, vocabulary) for text in each]) for each in (train_texts, texts))
    frequency = np.log(len(train_words) / (1 + (train_words > 0).sum(axis=0)))
    distances = (np.abs(known - each).sum(axis=1) for each in described)
    nearest = np.stack([np.argsort(each, kind="stable")[:_NEIGHBORS] for each in distances])
    images = normalized(train_words[nearest].mean(axis=1) * frequency)
    # ties, as of images without any word of a text, are broken at random instead of in favor of the own text
    noise = 1e-6 * np.random.RandomState(0).standard_normal((len(texts), 2 * len(texts)))
    labels = np.unique(texts, return_inverse=True)[1]
    own = normalized(own_words * frequency)
    return retrieval_metrics(
        np.hstack([images, noise[:, : len(texts)], np.eye(len(texts))]),
        np.hstack([own, np.eye(len(texts)), noise[:, len(texts) :]]),
        labels,
    )


def histogram(file: Path) -> np.ndarray:
    bins = np.array(Image.open(file).convert("RGB")) // (256 // _HISTOGRAM_BINS)
    numbers = bins.reshape(-1, 3) @ np.array([_HISTOGRAM_BINS**2, _HISTOGRAM_BINS, 1])
    counts = np.bincount(numbers, minlength=_HISTOGRAM_BINS**3)
    return counts / counts.sum()


class Features:
    """The mean of an encoder's patches, of unit length."""

    def __init__(self, folder: Path) -> None:
        model: Any = AutoModel.from_pretrained(folder)
        self.encoder, self.processor = FrozenEncoder(model, model.config), AutoImageProcessor.from_pretrained(folder)

    def __call__(self, file: Path) -> np.ndarray:
        pixels = self.processor(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
        return normalized(self.encoder(pixels).mean.numpy())[0]


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def bag(text: str, vocabulary: list[str]) -> np.ndarray:
    counts = Counter(words_of(text))
    return np.array([counts[word] for word in vocabulary], float)


def normalized(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-9))


def read_metrics(file: Path) -> dict[str, float]:
    return {entry["metric"]: entry["value"] for entry in json.loads(file.read_text())["results"]}


# ---- report ----


def report(
    options: argparse.Namespace, counts: Any, results: list[dict[str, Any]], baselines: dict[str, dict[str, float]]
) -> None:
    _, texts = read(options.output_dir / "stamps" / "test")
    chance = {"text_recall_at_5": 5 / len(set(texts)), "image_recall_at_5": chance_of_images(texts)}
    rows = "\n".join(
        f"| {each['seed']} | {each['words']['image']:.1%} | {each['words']['gray']:.1%} | "
        f"{each['words']['other']:.1%} | {each['retrieval']['text_recall_at_5']:.1%} | "
        f"{each['retrieval']['image_recall_at_5']:.1%} |"
        for each in results
    )
    others = "\n".join(
        f"| {name} | | | | {each['text_recall_at_5']:.1%} | {each['image_recall_at_5']:.1%} |"
        for name, each in {**baselines, "chance": chance}.items()
    )
    pairs = "; ".join(
        f"{split}: " + ", ".join(f"{number:,} {name}" for name, number in of_split.items())
        for split, of_split in counts.items()
    )
    text = f"""# Images with texts: {TODAY}

`{command("pairs")}`

{hardware()}; {versions("torch", "transformers", "tokenizers")}

Pairs, {pairs}. Masked words: {results[0]["words"]["n"]:,} of held-out pairs, half of each text. Retrieval: views of
{len(set(texts))} held-out stamps; a text counts as found among the different captions, an image if it has the caption.

| seed | masked words, with the image | with a gray one | with that of another pair | text recall@5 | image recall@5 |
|---|---|---|---|---|---|
{rows}
{others}
"""
    stem = ROOT / "benchmarks" / f"pairs_{hardware_slug()}_{TODAY}"
    write_report(stem, {"counts": counts, "results": results, "baselines": baselines, "chance": chance}, text)
    print(text)


def chance_of_images(texts: list[str]) -> float:
    """Return the mean probability that 5 of the images hold one of a text."""
    total = len(texts)
    misses = [math.comb(total - number, 5) / math.comb(total, 5) for number in Counter(texts).values()]
    return 1 - sum(misses) / len(misses)


if __name__ == "__main__":
    main()

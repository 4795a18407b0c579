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
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForPreTraining, AutoTokenizer

import modeling  # noqa: F401  # registers the methods
from benchmarks.pair_sets import SIZE, read, write_pairs
from benchmarks.provenance import TODAY, command, hardware, hardware_slug, versions, write_report
from data.collators import MaskingCollator
from data.text_batches import MixedCollator
from data.text_tokens import TextTokens
from evaluation.features import FrozenEncoder
from evaluation.retrieval import retrieval_metrics

ROOT = Path(__file__).resolve().parent.parent
PATCH = 8
# Shares of --minutes for the tokenizer, BEiT-3 and retrieval; steps per minute on two cores, measured while they run.
_SHARES = {"tokenizer": 0.1, "beit3": 0.6, "retrieval": 0.3}
_WRITTEN_LAST = {"tokenizer": "config.json", "beit3": "pretraining/config.json", "retrieval": "config.json"}
_WORDS_DRAWS = 8  # masks for each held-out pair
_HISTOGRAM_BINS, _NEIGHBORS = 4, 10


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

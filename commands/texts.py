"""Open the texts and pairs of a pre-training run, and the tokenizer that turns them into words."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from accelerate import PartialState
from transformers import AutoTokenizer

from commands.flags import flags_of
from commands.launch import first_on_main
from commands.output_folder import interrupted_run
from commands.pretraining_settings import PretrainingSettings
from commands.text_flags import TRAINED, TextFlags
from data.bad_images import BadImages
from data.images import ImageDataset, Samples
from data.text_batches import MixedDataset, PairDataset, TextDataset, derived_seed
from data.text_tokens import TextTokens, train_text_tokenizer
from data.texts import Pairs, Texts, open_pairs, open_texts, too_long
from modeling import CONFIGS

D = TypeVar("D", Texts, Pairs)
TEXT_FOLDER = "text"  # of the output folder: the text encoder and the tokenizer


@dataclass(frozen=True)
class TextSplits:
    """The texts and pairs of a run, training and validation, and their tokenizer.

    Without texts of their own, the captions of the pairs serve as texts too: language experts of blocks with a fusion
    expert would not be trained otherwise.
    """

    tokens: TextTokens
    texts: tuple[Texts, Texts]
    pairs: tuple[Pairs, Pairs] | None
    bad: BadImages
    lines: tuple[str, ...]

    def mixed_with(
        self, images: ImageDataset, of_images: Callable[[Samples], ImageDataset], seed: int, train: bool
    ) -> MixedDataset:
        """Return the images with texts and pairs of the same split, or of the training split if that is empty.

        Args:
            of_images: Makes the data set of the images of pairs.
        """
        part = int(not train and len(self.texts[1]) > 0)
        texts = TextDataset(self.texts[part], derived_seed(seed, "texts"), train)
        if self.pairs is None:
            return MixedDataset(images, texts, None)
        pairs = self.pairs[int(not train and len(self.pairs[1]) > 0)]
        return MixedDataset(images, texts, PairDataset(of_images(pairs.images), pairs.captions))

    def save_tokenizer(self, output_dir: Path) -> None:
        """Write the tokenizer, which a continued run opens."""
        self.tokens.tokenizer.save_pretrained(output_dir / TEXT_FOLDER)


def open_text_splits(settings: PretrainingSettings, state: PartialState) -> TextSplits | None:
    """Open what --text_dataset and --pair_dataset name on the main process; None if nothing is given.

    Raises:
        ValueError: If a dataset or the tokenizer cannot be used, or the method takes no texts.
    """
    of_pairs = ("num_fusion_layers", "pair_text_mask_ratio")
    given = [name for name in (*flags_of(TextFlags), "text_mask_ratio", *of_pairs) if name in settings.values]
    given = [name for name in given if settings.is_users(name)]
    if settings.text_dataset is None and settings.pair_dataset is None:
        if given:
            raise ValueError(f"--{given[0]} has no effect without --text_dataset or --pair_dataset")
        return None
    if settings.pair_dataset is None and (useless := [name for name in given if name in of_pairs]):
        raise ValueError(f"--{useless[0]} has no effect without --pair_dataset")
    if not CONFIGS[settings.method].takes_texts:
        able = ", ".join(name for name, config in CONFIGS.items() if config.takes_texts)
        raise ValueError(f"--{given[0]}: --method {settings.method} learns from images only; use {able}")
    if settings.text_tokenizer is None:
        raise ValueError(
            "--text_tokenizer is missing, and none is chosen for you: give the folder or Hub id of a tokenizer of "
            f"transformers, such as google-bert/bert-base-uncased, or '{TRAINED}' for one that is trained on the texts"
        )
    splits: TextSplits = first_on_main(state, partial(_open, settings))
    return splits


def _open(settings: PretrainingSettings) -> TextSplits:
    fraction, checks = settings.max_bad_fraction, settings.check_images
    bad, lines = BadImages(), []
    pairs: tuple[Pairs, Pairs] | None = None
    if settings.pair_dataset is not None:
        found, bad_pairs = open_pairs(settings.pair_dataset, fraction, checks)
        bad |= bad_pairs
        pairs = _split(found, settings, "pairs")
        lines.append(f"pairs: {len(pairs[0]):,} for training, {len(pairs[1]):,} for validation")
    if settings.text_dataset is not None:
        opened, bad_texts = open_texts(settings.text_dataset, fraction)
        bad |= bad_texts
        texts = _split(opened, settings, "texts")
    else:
        assert pairs is not None
        texts = (pairs[0].captions, pairs[1].captions)
    captions = "" if settings.text_dataset is not None else ", the captions of the pairs"
    lines.append(f"texts: {len(texts[0]):,} for training, {len(texts[1]):,} for validation{captions}")
    tokens = _open_tokens(settings, texts[0], pairs[0].captions if pairs else None)
    lines.append(f"words: {len(tokens.tokenizer):,} in the tokenizer, at most {tokens.max_length} of a text")
    seen = {"texts": texts[0], **({"pairs": pairs[0].captions} if pairs and settings.text_dataset else {})}
    lines += [
        f"note: of the {name}, {note}" for name, part in seen.items() if (note := too_long(part, tokens.max_length))
    ]
    if bad:
        lines.append(f"note: {len(bad):,} texts or pairs are left out:\n  " + bad.describe("\n  "))
    return TextSplits(tokens, texts, pairs, bad, tuple(lines))


def _split(data: D, settings: PretrainingSettings, purpose: str) -> tuple[D, D]:
    """Return a part for training and one for validation."""
    texts = data.captions if isinstance(data, Pairs) else data
    parts = texts.split(settings.validation_fraction, derived_seed(settings.seed, purpose))
    return data.select(parts[0]), data.select(parts[1])


def _open_tokens(settings: PretrainingSettings, texts: Texts, captions: Texts | None) -> TextTokens:
    name = settings.text_tokenizer
    saved = interrupted_run(settings)
    if saved is not None and (saved.parent / TEXT_FOLDER / "tokenizer.json").is_file():
        name = str(saved.parent / TEXT_FOLDER)  # the same words, even if the data has changed
    elif name == TRAINED:
        both = [*texts, *(captions if captions is not None and captions is not texts else ())]
        return TextTokens(train_text_tokenizer(both, settings.text_vocab_size), settings.max_text_length)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--text_tokenizer {name} cannot be opened ({reason})") from error
    return TextTokens(tokenizer, settings.max_text_length, f"--text_tokenizer {name}")

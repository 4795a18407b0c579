"""Give every image of a training a text and a pair, and batches of the three kinds their masks.

A step sees as many texts and pairs as images (BEiT-3: 2,048 of each). Texts and pairs have epochs and a seeded order
of their own, which follow from the same counter as the images', so that a resumed run continues with the same ones.
Shapes: B images, texts or pairs, L tokens of the longest text of the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset

from data.collators import MaskingCollator
from data.images import ImageDataset
from data.sampling import EpochOrder
from data.seeds import seeded_generator
from data.text_tokens import TextTokens
from data.texts import Texts

PAIR = "pair_"  # prefix of the keys of a batch that belong to pairs
IGNORED = -100  # in place of a word that is not masked


class TextDataset:
    """Texts by the counter of the images.

    Args:
        train: In another random order in every epoch.
    """

    def __init__(self, texts: Texts, seed: int, train: bool) -> None:
        self.texts, self.train = texts, train
        self._order = EpochOrder(len(texts), seed, 1)

    def __getitem__(self, counter: int) -> dict[str, Any]:
        index, epoch = self._order.locate(counter)[:2] if self.train else (counter % len(self.texts), 0)
        return {"text": self.texts[index], "text_index": index, "epoch": epoch}


class PairDataset:
    """Images with their texts by the counter of the images; `images` are those of the pairs."""

    def __init__(self, images: ImageDataset, texts: Texts) -> None:
        self.images, self.texts = images, texts

    def __getitem__(self, counter: int) -> dict[str, Any]:
        item = self.images[counter if self.images.train else counter % len(self.images)]
        # the index of the image that was read, in case it took the place of another one
        return {**item, "text": self.texts[item["image_index"]], "text_index": item["image_index"]}


class MixedDataset(Dataset[dict[str, Any]]):
    """The items of `images`, each with the next text as "text" and the next pair as "pair"."""

    def __init__(self, images: ImageDataset, texts: TextDataset, pairs: PairDataset | None) -> None:
        self.images, self.texts, self.pairs = images, texts, pairs

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, counter: int) -> dict[str, Any]:
        return self.__getitems__([counter])[0]

    def __getitems__(self, counters: Sequence[int]) -> list[dict[str, Any]]:
        """Return the items of a batch."""
        items = self.images.__getitems__(counters)
        for item, counter in zip(items, counters, strict=True):
            item["text"] = self.texts[counter]
            if self.pairs is not None:
                item["pair"] = self.pairs[counter]
        return items

    def shift_steps(self, shift: int) -> None:
        self.images.shift_steps(shift)

    def item(self, image_index: int, epoch: int) -> dict[str, Any]:
        """Return the image of an item, as a batch of that epoch holds it."""
        return self.images.item(image_index, epoch)

    def name(self, image_index: int) -> str:
        return self.images.name(image_index)


@dataclass
class MixedCollator:
    """Batches of images from `images`, with masked texts and pairs where the items have them.

    Texts become "input_ids" and "attention_mask" (B, L), "masked_words" (B, L), the words where they are masked and
    else `IGNORED`, and "num_masked_words" of the batch; pairs get the same keys and those of images with the prefix
    "pair_". Masks depend on (seed, epoch, index) only.

    Args:
        text_mask_ratio, pair_text_mask_ratio: Share of the words that is masked, rounded, at least one.
    """

    images: MaskingCollator
    tokens: TextTokens
    text_mask_ratio: float
    pair_text_mask_ratio: float

    def __post_init__(self) -> None:
        # Where pairs and images are the same files, they get other masks.
        self._pairs = replace(self.images, seed=derived_seed(self.images.seed, "pairs"), with_image_index=False)

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        own = [{key: value for key, value in item.items() if key not in ("text", "pair")} for item in features]
        batch = self.images(own)
        if all("text" in item for item in features):
            batch |= self.masked_words([item["text"] for item in features], "text_mask", self.text_mask_ratio)
        if all("pair" in item for item in features):
            pairs = [item["pair"] for item in features]
            found = self._pairs(
                [{key: value for key, value in pair.items() if not key.startswith("text")} for pair in pairs]
            )
            found |= self.masked_words(pairs, "pair_text_mask", self.pair_text_mask_ratio)
            batch |= {f"{PAIR}{key}": value for key, value in found.items()}
        return batch

    def with_longest_texts(self, items: Sequence[Mapping[str, Any]], has_pairs: bool) -> list[dict[str, Any]]:
        """Add the longest text to items of images, and pairs of both, to measure what a batch can need."""
        text = {"text": " ".join(["a"] * self.tokens.max_length), "text_index": 0, "epoch": 0}
        pair = {"pair": {**items[0], **text}} if has_pairs else {}
        return [{**item, "text": text, **pair} for item in items]

    def masked_words(self, items: Sequence[Mapping[str, Any]], purpose: str, ratio: float) -> dict[str, Any]:
        """Return a batch of texts in which a share of the words is replaced by the mask token."""
        texts = [torch.tensor(self.tokens(item["text"])) for item in items]
        length = max(map(len, texts))
        ids = torch.full((len(texts), length), self.tokens.pad_id)
        attended, masked = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for row, (text, item) in enumerate(zip(texts, items, strict=True)):
            ids[row, : len(text)], attended[row, : len(text)] = text, 1
            words = torch.tensor([number for number, token in enumerate(text.tolist()) if self._is_word(token)])
            if not len(words):  # nothing but special tokens, as of a text of spaces that the tokenizer drops
                words = torch.tensor([len(text) - 1])
            generator = seeded_generator(self.images.seed, purpose, item["epoch"], item["text_index"])
            chosen = torch.randperm(len(words), generator=generator)[: max(1, round(ratio * len(words)))]
            masked[row, words[chosen]] = True
        return {
            "input_ids": torch.where(masked, self.tokens.mask_id, ids),
            "attention_mask": attended,
            "masked_words": torch.where(masked, ids, IGNORED),
            "num_masked_words": int(masked.sum()),
        }

    def _is_word(self, token: int) -> bool:
        return token not in self.tokens.special_ids


def derived_seed(seed: int, purpose: str) -> int:
    """Return another seed for the same run."""
    return seeded_generator(seed, purpose).initial_seed() % 2**31

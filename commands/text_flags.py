"""Flags of pre-training with texts, and with images that have texts."""

from dataclasses import dataclass
from typing import ClassVar

from commands.flags import COUNT, Range, flag

TRAINED = "trained"  # in place of the name of a tokenizer of texts


@dataclass(frozen=True, kw_only=True)
class TextFlags:
    title: ClassVar = "texts"

    text_dataset: list[str] | None = flag(
        None, "for beit3: text files (a text on each line), jsonl, csv, parquet, folders of these, or Hub ids"
    )
    pair_dataset: list[str] | None = flag(
        None,
        "for beit3: images with texts: folders with captions.jsonl or captions.csv (file_name, text), or tables and "
        "Hub ids with an image and a text column",
    )
    text_tokenizer: str | None = flag(
        None,
        f"folder or Hub id of a tokenizer of transformers with a mask token, or '{TRAINED}' to train one on the texts",
    )
    text_vocab_size: int = flag(8192, f"most words of a tokenizer that is '{TRAINED}', 256 bytes included", COUNT)
    max_text_length: int = flag(
        64, "most tokens of a text; the rest is not seen", Range(lambda x: x >= 3, "3 or more")
    )

"""Turn texts into token ids with any tokenizer of transformers, or one that is trained on the texts."""

import os
from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_SPECIAL = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
# A folder with the config of a language model and no tokenizer opens as one with special tokens and sometimes a space.
_FEWEST_WORDS = 3
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # data workers are forked, with which it does not go


class TextTokens:
    """A tokenizer with a class token in front of each text, and what masking needs to know of it.

    Args:
        max_length: Most tokens of a text, special ones included; the rest of a text is not seen.
        name: What a user calls the tokenizer.

    Raises:
        ValueError: If the tokenizer has no mask token, no padding token or no words, or puts no special token first.
    """

    def __init__(self, tokenizer: Any, max_length: int, name: str = "this tokenizer") -> None:
        for kind, purpose in (("mask", "hides words"), ("pad", "fills up short texts")):
            if getattr(tokenizer, f"{kind}_token_id", None) is None:
                raise ValueError(
                    f"{name} has no {kind} token, which {purpose}; use a tokenizer of a masked language model, such "
                    "as that of BERT or RoBERTa"
                )
        if len(set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)) < _FEWEST_WORDS:
            raise ValueError(f"{name} has no words: are its files missing, such as tokenizer.json or vocab.txt?")
        self.tokenizer, self.max_length = tokenizer, max_length
        tokenizer.model_max_length = max_length  # for who opens it beside the model
        self.pad_id, self.mask_id = int(tokenizer.pad_token_id), int(tokenizer.mask_token_id)
        self.special_ids = frozenset(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
        if self("a")[0] not in self.special_ids:
            raise ValueError(f"{name} puts no class token in front of a text; use one like that of BERT or RoBERTa")

    def __call__(self, text: str) -> list[int]:
        """Return the token ids of a text with its special tokens."""
        ids: list[int] = self.tokenizer(text, truncation=True, max_length=self.max_length)["input_ids"]
        return ids

    @property
    def config(self) -> dict[str, int]:
        """What a model must know of it."""
        return {
            "vocab_size": len(self.tokenizer),
            "pad_token_id": self.pad_id,
            "max_text_length": self.max_length,
            **{
                f"{name}_token_id": int(value)
                for name, kind in (("bos", "cls"), ("eos", "sep"))
                if (value := getattr(self.tokenizer, f"{kind}_token_id", None)) is not None
            },
        }


def train_text_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train RoBERTa's kind of tokenizer, in lower case; the same texts always give the same one (WordPiece's do not).

    It has at least the 256 bytes and the special tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_SPECIAL.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL)

"""A small BEiT-3 that learns from images, texts and pairs, and its trainer."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from conftest import TINY_MODELS, LabeledByTokenizer, tiny_arguments, tiny_collator, tiny_images

from data.text_batches import MixedCollator, MixedDataset, PairDataset, TextDataset
from data.text_tokens import TextTokens, train_text_tokenizer
from data.texts import Texts
from modeling.beit3 import Beit3Config, Beit3ForPreTraining
from training.trainer import MimTrainer

CAPTIONS = ["a red house", "two dogs on green grass", "the sea at night", "a street", "flowers", "a cat in the sea"]
NAME = "beit3-with-texts"


def as_texts(values: Sequence[str]) -> Texts:
    names = [f"text {number}" for number in range(len(values))]
    return Texts(pa.array(values, pa.large_string()), pa.array(names, pa.large_string()))


class LabeledPairs(LabeledByTokenizer):
    """A collator's batch with the `labels` of the images, and those of the pairs."""

    def __call__(self, features: Any) -> dict[str, Any]:
        batch = super().__call__(features)
        pairs = self.image_tokenizer.get_codebook_indices(batch["pair_pixel_values"])
        return batch | {"pair_labels": pairs.flatten(1)}


def mixed_trainer(
    folder: Path, encoder: Mapping[str, Any] | None = None, images_per_step: int = 8, **arguments: Any
) -> MimTrainer:
    """Return a trainer of a model that is always the same; `encoder` overrides settings of the encoder."""
    tokens = TextTokens(train_text_tokenizer(CAPTIONS, 300), 8)
    sizes = {"encoder_config": {**TINY_MODELS["beit3"]["encoder_config"], **(encoder or {})}, "vocab_size": 16}
    torch.manual_seed(0)
    model = Beit3ForPreTraining(Beit3Config(**sizes, num_fusion_layers=1, text_config=tokens.config))
    images, of_pairs = (tiny_images(number, images_per_step, variant="beit3") for number in (48, 12))
    texts, captions = as_texts(CAPTIONS), as_texts([*CAPTIONS, *CAPTIONS])
    collator = tiny_collator("beit3", with_image_index=True).collator
    callbacks = arguments.pop("callbacks", [])
    return MimTrainer(
        model=model,
        args=tiny_arguments(folder, **arguments),
        train_dataset=MixedDataset(images, TextDataset(texts, 1, train=True), PairDataset(of_pairs, captions)),
        data_collator=LabeledPairs(MixedCollator(collator, tokens, 0.15, 0.5)),
        callbacks=callbacks,
    )

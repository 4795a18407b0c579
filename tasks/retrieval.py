"""Image-text retrieval: images and texts are embedded so that those of a pair are close.

Papers: Wang et al. 2022 (BEiT-3), arXiv:2208.10442, Sec. 3.2; Radford et al. 2021 (CLIP), arXiv:2103.00020, Fig. 3.
Code: microsoft/unilm/beit3, BEiT3ForRetrieval: a bias-free Linear on each class token, temperature 1 / 0.07.
Differs: vision and text encoder are native models and train apart, also where pre-training shared their attention;
only images of the same batch and process are compared, and another pair with the same text or image is no wrong
answer.
Shapes: B pairs of a micro-batch, L tokens, E width of an embedding, N pairs of a split, T different texts among them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModel,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from commands.finetune_settings import FinetuneSettings
from commands.flags import COUNT, Range, flag
from commands.settings import SettingsError
from data.augmentations import CenterCrop, random_crop, single_view
from data.bad_images import BadImages
from data.size_schedule import Transform
from data.splits import Splits
from data.tables import VALIDATION_NAMES
from data.text_tokens import TextTokens
from data.texts import Pairs, open_pairs, too_long
from evaluation.pictures import labeled_grid, panel_indices
from evaluation.retrieval import RECALLS, retrieval_metrics
from hub.export.native import replacing, write_image_processor
from hub.model_card import TaskCard
from hub.open_model import open_config, open_model
from modeling.dual_encoder import (
    build_dual_encoder,
    contrastive_loss,
    num_positions,
    pools,
    with_drop_path,
    with_pooler,
)
from modeling.patches import height_and_width

from .base import Task

FIGURE_FILE = "retrieved.png"
_TEXT_FOLDER = "text"  # of a pre-training with texts
_VALIDATION_FRACTION = 0.1
_NUM_SHOWN = 5
_LARGEST_SCALE = 100.0  # of the similarities, as in CLIP
_USAGE = """\
This is a standard transformers model and needs no other code:

```python
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

checkpoint = ""
model = AutoModel.from_pretrained(checkpoint).eval()
images = AutoImageProcessor.from_pretrained(checkpoint)(Image.open("photo.jpg").convert("RGB"), return_tensors="pt")
tokenizer = AutoTokenizer.from_pretrained(checkpoint)
texts = tokenizer(["a dog", "a cat"], padding=True, truncation=True, return_tensors="pt")
texts.pop("token_type_ids", None)
with torch.no_grad():
    print(model(**texts, **images).logits_per_image)
```
"""


@dataclass(frozen=True, kw_only=True)
class RetrievalFlags:
    title: ClassVar = "texts"

    text_model: str | None = flag(
        None, "folder or Hub id of the text encoder and its tokenizer (default: the folder text/ of --model)"
    )
    max_text_length: int = flag(
        64, "most tokens of a text; the rest is not seen", Range(lambda x: x >= 3, "3 or more")
    )
    projection_size: int = flag(None, "width of the embeddings (default: the recipe's)", COUNT)


@dataclass(frozen=True, kw_only=True)
class RetrievalSettings(FinetuneSettings, RetrievalFlags):
    """Settings of the task."""

    mode: Literal["finetune"] = flag("finetune", "what is trained: finetune, everything")
    dataset: list[str] = flag(
        [],
        "images with texts: a folder with captions.jsonl or captions.csv (file_name, text), a table or Hub id with an "
        "image and a text column; a folder may have train/, validation/ and test/",
    )
    metric_for_best_model: str = flag("mean_recall", "mean_recall, text_recall_at_5, image_recall_at_5, ... or loss")

    @classmethod
    def recipe_for(cls, encoder_config: PreTrainedConfig, mode: str) -> str:
        return "finetune_retrieval"

    @classmethod
    def values_for(cls, encoder_config: Any, values: Mapping[str, Any], origins: Mapping[str, Any]) -> dict[str, Any]:
        found = super().values_for(encoder_config, values, origins)
        side = height_and_width(encoder_config.image_size)[0]
        if found["image_size"] != side:
            raise SettingsError(f"--image_size {found['image_size']}: this task keeps that of the encoder, {side}")
        return found

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.dataset) != 1:
            raise SettingsError(f"--dataset names {len(self.dataset)} datasets, expected one")

    @property
    def text_encoder(self) -> str:
        """The folder or Hub id of the text encoder."""
        if self.text_model is not None:
            return self.text_model
        folder = Path(self.model) / _TEXT_FOLDER
        if not folder.is_dir():
            raise ValueError(f"--text_model is missing, and {self.model} has no folder {_TEXT_FOLDER}/")
        return str(folder)


@dataclass(frozen=True)
class NumberedPairs:
    """Pairs whose labels are the numbers of their text among the different texts, `texts`, and of their image."""

    pairs: Pairs
    texts: tuple[str, ...]
    numbers: np.ndarray  # (N, 2)

    @classmethod
    def of(cls, pairs: Pairs) -> "NumberedPairs":
        number = {text: index for index, text in enumerate(dict.fromkeys(pairs.captions))}
        of_texts = [number[text] for text in pairs.captions]
        return cls(pairs, tuple(number), np.stack([of_texts, pairs.captions.numbers_of_names], axis=1))

    def __len__(self) -> int:
        return len(self.pairs)

    def sample(self, index: int) -> dict[str, Any]:
        text = self.pairs.captions[index]
        return {**self.pairs.images.sample(index), "text": text, "labels": self.numbers[index]}

    def name(self, index: int) -> str:
        return self.pairs.images.name(index)


@dataclass(frozen=True)
class PairSplits(Splits):
    """Pairs for training, and for validation and test if there are any."""

    pairs: Mapping[str, NumberedPairs]
    bad: BadImages

    @property
    def by_name(self) -> Mapping[str, NumberedPairs]:
        return self.pairs

    def describe(self) -> tuple[str, str]:
        train = self.pairs["train"]
        return train.pairs.images.source.describe(), f"{len(train.texts):,} different texts"


@dataclass(frozen=True)
class PairViews:
    """The transform: views of the image, and the padded words of its text.

    A pair of a text that no tokenizer splits has the special tokens only.
    """

    image: Any
    tokens: TextTokens

    def __call__(self, sample: Mapping[str, Any], generator: torch.Generator) -> dict[str, Any]:
        ids = self.tokens(sample["text"])
        num_empty = self.tokens.max_length - len(ids)
        return {
            **self.image({"image": sample["image"]}, generator),
            "input_ids": torch.tensor(ids + num_empty * [self.tokens.pad_id]),
            "attention_mask": torch.tensor(len(ids) * [1] + num_empty * [0]),
            "labels": torch.tensor(sample["labels"]),
        }


@dataclass(frozen=True)
class RetrievalTask(Task):
    """Contrastive training of a vision and a text encoder."""

    settings_class = RetrievalSettings

    settings: RetrievalSettings
    splits: PairSplits

    # ---- data ----

    @classmethod
    def open_splits(cls, settings: RetrievalSettings) -> PairSplits:
        root = Path(settings.dataset[0]).expanduser()
        folders = {"train": root}
        if (root / "train").is_dir():
            held_out = [name for name in VALIDATION_NAMES if (root / name).is_dir()]
            folders = {name: root / name for name in ("train", *held_out)}
        bad = BadImages()
        found: dict[str, Pairs] = {}
        for name, folder in folders.items():
            dataset = str(folder) if folder.exists() else settings.dataset[0]
            opened, bad_pairs = open_pairs([dataset], settings.max_bad_fraction, settings.check_images)
            found["validation" if name not in ("train", "test") else name] = opened
            bad |= bad_pairs
        fraction = settings.validation_fraction
        if fraction is None:
            fraction = 0.0 if len(found) > 1 else _VALIDATION_FRACTION
        if fraction and "validation" not in found:
            train, validation = found["train"].captions.split(fraction, settings.seed)
            found |= {"train": found["train"].select(train), "validation": found["train"].select(validation)}
        return PairSplits({name: NumberedPairs.of(pairs) for name, pairs in found.items() if len(pairs)}, bad)

    @cached_property
    def tokens(self) -> TextTokens:
        name = self.settings.text_encoder
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"the tokenizer of {name} cannot be opened ({reason})") from error
        return TextTokens(tokenizer, self.settings.max_text_length, f"the tokenizer of {name}")

    def transform(self, train: bool) -> Transform:
        settings, size = self.settings, (self.settings.image_size, self.settings.image_size)
        resampling = Image.Resampling[settings.interpolation.upper()]
        crop = random_crop(size, settings.crop_scale, resampling) if train else CenterCrop(size, resampling)
        return PairViews(single_view(crop, 3), self.tokens)  # type: ignore[return-value]

    # ---- model ----

    def build_model(self) -> PreTrainedModel:
        settings = self.settings
        vision = with_pooler(with_drop_path(self.open_encoder(), settings.drop_path))
        text_config = open_config(settings.text_encoder, "text_model")
        limit = num_positions(text_config)
        if limit is not None and settings.max_text_length > limit:
            raise ValueError(
                f"max_text_length is {settings.max_text_length}, but {settings.text_encoder} has positions for {limit}"
            )
        if len(self.tokens.tokenizer) > text_config.vocab_size:
            raise ValueError(
                f"the tokenizer of {settings.text_encoder} has {len(self.tokens.tokenizer):,} words, but the encoder "
                f"{text_config.vocab_size:,}: they do not belong together"
            )
        text = AutoModel.from_config(text_config) if settings.from_scratch else open_model(settings.text_encoder).model
        text = with_pooler(text)
        batch = self.black_batch(1)
        for encoder, name, inputs in (
            (vision, settings.model, ("pixel_values",)),
            (text, settings.text_encoder, ("input_ids", "attention_mask")),
        ):
            problem = None
            if not hasattr(encoder.config, "hidden_size"):
                problem = "whose config has no hidden_size"
            elif not pools(encoder, {key: batch[key] for key in inputs}):
                problem = "which gives no output of the class token"
            if problem:
                what = "an encoder such as a ViT or a BEiT, and for texts a BERT or a RoBERTa"
                raise ValueError(f"{name} is a {type(encoder).__name__}, {problem}; expected {what}")
        return build_dual_encoder(vision, text, settings.projection_size)

    def black_batch(self, num_images: int) -> dict[str, Any]:
        ids = torch.full((num_images, self.settings.max_text_length), self.tokens.mask_id)
        texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "return_loss": True}
        return super().black_batch(num_images) | texts

    def loss(
        self, model: Any, batch: dict[str, Any], counters: tuple[int, ...] | None
    ) -> tuple[Tensor, dict[str, Any]]:
        inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
        outputs = model(**inputs)
        images, texts = outputs.image_embeds.float(), outputs.text_embeds.float()  # (B, E), of length 1
        own = getattr(model, "module", model)  # of DDP
        scale = own.logit_scale.float().exp().clamp(max=_LARGEST_SCALE)
        loss = contrastive_loss(scale * images @ texts.T, *batch["labels"].T)
        return loss, {"logits": torch.cat([images, texts], dim=1)}

    # ---- description ----

    def notes(self) -> list[str]:
        note = too_long(self.splits.pairs["train"].pairs.captions, self.settings.max_text_length)
        return [] if note is None else [note]

    def plan_rows(self) -> dict[str, str]:
        size, (low, high) = self.settings.image_size, self.settings.crop_scale
        return {
            "input": f"{size} x {size} pixels, at most {self.settings.max_text_length} tokens",
            "texts": f"{len(self.tokens.tokenizer):,} words, {self.settings.text_encoder}",
            "views": f"crops of {low:g} to {high:g} of the image, flipped half the time",
        }

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        keys = {"eval_text_recall_at_1": "texts of images", "eval_image_recall_at_1": "images of texts"}
        return [f"recall@1 of {name} {logs[key]:.1%}" for key, name in keys.items() if key in logs]

    # ---- results ----

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*(f"{kind}_recall_at_{k}" for kind in ("text", "image") for k in RECALLS), "mean_recall", "loss")

    def compute_metrics(self, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return retrieval_metrics(*_embeddings(predictions), *labels.T)

    def draw(
        self, predictions: np.ndarray, labels: np.ndarray, dataset: Any, folder: Path, title: str, model: Any
    ) -> str:
        images, texts = _embeddings(predictions)
        text_numbers, image_numbers = labels.T
        first, candidates = (np.unique(numbers, return_index=True)[1] for numbers in (text_numbers, image_numbers))
        shown = first[panel_indices(len(first))]
        nearest = np.argsort(-(texts[shown] @ images[candidates].T), axis=1, kind="stable")[:, :_NUM_SHOWN]
        order = candidates[nearest]
        names = self.splits.measured[1].texts  # type: ignore[union-attr]
        rows = "  ".join(f"{row + 1}: {names[text_numbers[index]][:60]}" for row, index in enumerate(shown))
        pairs = set(zip(text_numbers.tolist(), image_numbers.tolist(), strict=True))
        found = [
            [(number, image) in pairs for image in image_numbers[row].tolist()]
            for number, row in zip(text_numbers[shown].tolist(), order, strict=True)
        ]
        columns = zip(order.T, np.array(found).T, strict=True)
        views = {}
        for rank, column in enumerate(columns, start=1):
            cells = [(dataset[int(index)]["pixel_values"] / 255, right) for index, right in zip(*column, strict=True)]
            views[f"image {rank}"] = torch.stack([_framed(*cell) for cell in cells])
        footer = f"{title}, the images closest to each text, framed if they have it  ·  {rows}"
        labeled_grid(views, footer).save(folder / FIGURE_FILE)
        return FIGURE_FILE

    # ---- export ----

    def export(self, model: PreTrainedModel, folder: Path) -> None:
        method, recipe = self.pretraining
        config: Any = model.config
        if method is not None:
            config.mim_method = method
        config.mim_recipe = recipe
        with replacing(folder) as scratch:
            model.save_pretrained(scratch)
            self.tokens.tokenizer.save_pretrained(scratch)
            resample = int(Image.Resampling[self.settings.interpolation.upper()])
            mean, std = self.image_stats["image_mean"], self.image_stats["image_std"]
            write_image_processor(scratch, config.vision_config, mean, std, resample=resample)
            _verify(scratch, model, self.black_batch(2))

    def card(self) -> TaskCard:
        return TaskCard(
            pipeline_tag="zero-shot-image-classification",
            kind="A vision and a text encoder whose embeddings of an image and its text are close",
            usage=_USAGE,
            limitations="Intended for images and texts like those it was fine-tuned on.",
            caption="Images closest to some texts",
        )

    def how_to_open(self, folder: Path) -> str:
        return f'AutoModel.from_pretrained("{folder}") opens it'


def _embeddings(predictions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    images, texts = np.split(predictions, 2, axis=1)
    return images, texts


def _framed(image: Tensor, is_right: bool) -> Tensor:
    """Return the image (C, H, W) in [0, 1] with a green frame if it is right."""
    frame = torch.full(image.shape[1:], bool(is_right))
    frame[3:-3, 3:-3] = False
    return torch.where(frame, image.new_tensor([0.0, 0.62, 0.45])[:, None, None], image)


@torch.no_grad()
def _verify(folder: Path, ours: Any, batch: dict[str, Any]) -> None:
    """Open the folder as a user would; raises RuntimeError if it gives other embeddings."""
    opened, info = AutoModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    device = next(ours.parameters()).device
    expected = ours.eval()(**{n: v.to(device) if torch.is_tensor(v) else v for n, v in batch.items()}).image_embeds
    difference = (opened.eval()(**batch).image_embeds - expected.float().cpu()).abs().max().item()
    leftovers = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if leftovers or not difference <= 1e-4:
        raise RuntimeError(
            f"the exported model differs from the one in memory by {difference:.3g}, mismatched keys "
            f"{json.dumps(leftovers)}; nothing was written"
        )

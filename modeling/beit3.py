"""BEiT-3: predict masked patches and masked words of images, of texts, and of images with their texts.

Paper: Wang et al. 2022, "Image as a Foreign Language: BEiT Pretraining for All Vision and Vision-Language Tasks",
arXiv:2208.10442, Sec. 2 and 3.1. Its pre-training code was never released.
Differs: small and native by default, see `modeling.multiway`; the words are predicted by the transposed table of the
word embeddings, and every masked word becomes the mask token.
Shapes: B images, texts or pairs, C channels, H W pixels, N patches, L tokens of a text, M masked patches and W masked
words of the batch, D width, K codes of an image, V words.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, RobertaPreLayerNormConfig
from transformers import initialization as init

from .base import MimOutput, Paper, mean_metric, summarize_means
from .beit import BeitForPreTraining, BeitMimConfig
from .multiway import MultiwayEncoder
from .patches import masked_indices

IGNORED = -100  # in place of a word that is not masked
_SHARED_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "layer_norm_eps"),
)


@strict
class Beit3Config(BeitMimConfig):
    """Configuration of a BEiT-3.

    `text_config` has the `vocab_size` and the `pad_token_id` of the texts' tokenizer and `max_text_length`, or is a
    whole native config; None for images only.

    Args:
        num_fusion_layers: Last blocks with an expert for images with texts (3 in the paper); without pairs it is 0.
        text_mask_ratio: Share of the words of a text that is masked.
        pair_text_mask_ratio: Share of the words of a text with an image that is masked.
        use_sub_layernorm: A LayerNorm before the last layers of attention and feed-forward networks. The released
            code has it; no native class has, so that only pretraining/ is written.
    """

    model_type = "mim_beit3"
    transformers_model_types = ()
    takes_texts = True
    settings_fixed_by_weights = ("num_fusion_layers", "use_sub_layernorm")
    sub_configs: ClassVar[dict[str, type]] = {"encoder_config": AutoConfig, "text_config": AutoConfig}
    paper = Paper(
        "Image as a Foreign Language: BEiT Pretraining for All Vision and Vision-Language Tasks",
        "Wenhui Wang and Hangbo Bao and Li Dong and Johan Bjorck and Zhiliang Peng and Qiang Liu and Kriti Aggarwal "
        "and Owais Khan Mohammed and Saksham Singhal and Subhojit Som and Furu Wei",
        2022,
        "2208.10442",
    )
    encoder_types = ("beit",)
    encoder_defaults: ClassVar[dict[str, Any]] = {
        "model_type": "beit",
        "layer_norm_eps": 1e-5,
        "use_mask_token": True,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": False,
        "layer_scale_init_value": 0.0,
        "drop_path_rate": 0.1,
    }

    text_config: Any = None
    num_fusion_layers: int = 3
    text_mask_ratio: float = 0.15
    pair_text_mask_ratio: float = 0.5
    use_sub_layernorm: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if not isinstance(self.encoder_config, PreTrainedConfig):
            self.encoder_config = AutoConfig.for_model(**{**self.encoder_defaults, **(self.encoder_config or {})})
        encoder = self.encoder_config
        if isinstance(self.text_config, dict):
            self.text_config = _native_text_config(self.text_config, encoder)
        super().__post_init__(**kwargs)
        if encoder.layer_scale_init_value or not encoder.use_absolute_position_embeddings:
            raise ValueError(
                "the encoder has LayerScale or relative positions, which the native class of the text path has not: "
                "expected absolute positions and no LayerScale, as of a ViT"
            )
        for name in ("text_mask_ratio", "pair_text_mask_ratio"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected above 0 and below 1")
        if self.text_config is not None and not 0 <= self.num_fusion_layers <= encoder.num_hidden_layers:
            raise ValueError(
                f"num_fusion_layers is {self.num_fusion_layers}, expected 0 to {encoder.num_hidden_layers}, the "
                "number of blocks"
            )


def _native_text_config(given: Mapping[str, Any], encoder: Any) -> RobertaPreLayerNormConfig:
    """Complete the config of the text path with the sizes of the image path."""
    settings = {name: value for name, value in given.items() if name not in ("max_text_length", "model_type")}
    if "max_text_length" in given:
        # native positions begin after the number of the padding token
        settings["max_position_embeddings"] = settings["pad_token_id"] + 1 + given["max_text_length"]
    shared = {name: getattr(encoder, name) for name in _SHARED_SIZES}
    return RobertaPreLayerNormConfig(**{"type_vocab_size": 1, **settings, **shared})


class Beit3ForPreTraining(BeitForPreTraining):
    """A multiway encoder, a linear layer that predicts visual tokens, and one that predicts words."""

    config: Beit3Config
    encoder: MultiwayEncoder
    word_bias: nn.Parameter | None
    _no_split_modules = ["MultiwayLayer"]  # noqa: RUF012 - read by transformers as a class attribute

    def build_encoder(self) -> PreTrainedModel:
        config = self.config
        sizes = (config.encoder_config, config.text_config, config.num_fusion_layers)
        return MultiwayEncoder(*sizes, use_sub_layernorm=config.use_sub_layernorm)

    def __init__(self, config: Beit3Config):
        super().__init__(config)
        has_texts = config.text_config is not None
        self.word_bias = nn.Parameter(torch.zeros(config.text_config.vocab_size)) if has_texts else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        bias = getattr(self, "word_bias", None)  # not yet, in the parent's constructor
        if module is self and bias is not None:
            init.zeros_(bias)

    def forward(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_masked_patches: int | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        masked_words: torch.Tensor | None = None,
        num_masked_words: int | None = None,
        return_loss: bool = True,
        **pair: Any,
    ) -> MimOutput:
        """Predict what is masked in images, and in texts and pairs if the batch has them.

        Args:
            pixel_values, bool_masked_pos, labels, num_masked_patches: As for BEiT.
            input_ids: (B, L), with the mask token in place of masked words.
            attention_mask: (B, L), 1 where there is a token.
            masked_words: (B, L), the words that are masked, and `IGNORED` elsewhere.
            num_masked_words: Number of masked words in the batch.
            pair: All of these for images with texts, by the same names with the prefix `pair_`.
        """
        # As keywords of their own, more labels would tell Trainer that a batch without pairs has no loss.
        if unknown := [name for name in pair if not name.startswith("pair_")]:
            raise TypeError(f"forward() got unexpected keyword arguments {', '.join(unknown)}")
        output = super().forward(pixel_values, bool_masked_pos, labels, num_masked_patches, return_loss)
        if not return_loss:
            return output
        losses: dict[str, Any] = {"image": output.loss}
        metrics: dict[str, torch.Tensor] = dict(output.metrics or {})
        if input_ids is not None:
            assert attention_mask is not None
            assert masked_words is not None
            tokens = self.encoder.encode_text(input_ids, attention_mask)
            losses["text"], metrics["text_accuracy"] = self._word_loss(tokens, masked_words, num_masked_words)
        if pair:
            mask, words = pair["pair_bool_masked_pos"], pair["pair_input_ids"]
            images = self.standardize(pair["pair_pixel_values"])
            tokens = self.encoder.encode_pair(images, mask, words, pair["pair_attention_mask"])
            num_patches, num_words = mask.shape[1], words.shape[1]
            patches = tokens[:, -num_words - num_patches : -num_words]  # (B, N, D)
            masked = masked_indices(mask, pair.get("pair_num_masked_patches"))  # (M,)
            losses["pair_image"], metrics["pair_accuracy"] = _loss_and_accuracy(
                self.lm_head(patches.flatten(0, 1)[masked]), pair["pair_labels"].flatten()[masked]
            )
            losses["pair_text"], metrics["pair_text_accuracy"] = self._word_loss(
                tokens[:, -num_words:], pair["pair_masked_words"], pair.get("pair_num_masked_words")
            )
        return MimOutput(loss=self.weighted_sum(losses), losses=losses, logits=output.logits, metrics=metrics)

    def predict_words(self, features: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., V)."""
        assert self.encoder.text_embeddings is not None
        return nn.functional.linear(features, self.encoder.text_embeddings.word_embeddings.weight, self.word_bias)

    def _word_loss(
        self, tokens: torch.Tensor, words: torch.Tensor, num_masked_words: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        masked = masked_indices(words != IGNORED, num_masked_words)  # (W,)
        return _loss_and_accuracy(self.predict_words(tokens.flatten(0, 1)[masked]), words.flatten()[masked])

    def loss_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Return the number of masked patches and words of each kind of batch."""
        keys = {
            "image": "num_masked_patches",
            "text": "num_masked_words",
            "pair_image": "pair_num_masked_patches",
            "pair_text": "pair_num_masked_words",
        }
        return {name: batch[key] for name, key in keys.items() if key in batch}

    def summarize_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return BEiT's metrics, and the accuracies of texts and pairs."""
        others = {name: value for name, value in sums.items() if name.endswith("_accuracy")}
        return {**super().summarize_metrics(sums), **summarize_means(others)}

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        """Return the accuracies of predicted visual tokens and words."""
        names = {"text_accuracy": "words of texts", "pair_text_accuracy": "words of pairs"}
        found = [
            f"{text} {logs[prefix + key]:.1%}"
            for prefix in ("", "eval_")
            for key, text in names.items()
            if prefix + key in logs
        ]
        return [*super().describe_metrics(logs), *found]

    @property
    def companions(self) -> dict[str, PreTrainedModel]:
        """The text path, a native model."""
        if self.config.text_config is None or self.encoder.native_root_problem:
            return {}
        return {"text": self.encoder.text_as_native()}


def _loss_and_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cross entropy and accuracy of predictions (M, K) for labels (M,)."""
    accuracy = (logits.detach().argmax(-1) == labels).float().mean()
    return nn.functional.cross_entropy(logits.float(), labels), mean_metric(accuracy, len(labels))

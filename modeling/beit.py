"""BEiT: predict the visual token that a frozen image tokenizer gives every masked patch.

Paper: Bao et al. 2021, "BEiT: BERT Pre-Training of Image Transformers", arXiv:2106.08254, Sec. 2.2 to 2.5.
Code: microsoft/unilm/beit at 768a3c8.
Differs: `labels` holds the tokens of all patches, so that they can be computed without the mask; only those of masked
patches are used. The tokenizer is not part of the model: `training.targets` runs it, or the batch contains labels.
Shapes: B images, C channels, H W pixels, h w patches per column and row (N = h * w), M masked patches in the batch,
D width, K codes.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from .base import MimConfig, MimOutput, MimPreTrainedModel, Paper, mean_metric, summarize_means
from .encoders import BEIT_DEFAULTS, BeitEncoder, DeitEncoder, trunc_normal_at_one_std_
from .patches import masked_indices, patch_grid
from .reconstruction import checkerboard

ENCODERS = {"beit": BeitEncoder, "deit": DeitEncoder}


@strict
class BeitMimConfig(MimConfig):
    """Configuration of a BEiT.

    Args:
        vocab_size: Number of codes of the tokenizer, which sets it (published: 8192).
    """

    model_type = "mim_beit"
    transformers_model_types: ClassVar[tuple[str, ...]] = ("beit",)  # as BeitForMaskedImageModeling
    settings_of_targets = ("vocab_size",)
    paper = Paper(
        "BEiT: BERT Pre-Training of Image Transformers",
        "Hangbo Bao and Li Dong and Songhao Piao and Furu Wei",
        2021,
        "2106.08254",
    )
    encoder_defaults: ClassVar[dict[str, Any]] = BEIT_DEFAULTS
    encoder_types = tuple(ENCODERS)

    vocab_size: int = 8192

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.encoder_config if isinstance(self.encoder_config, dict) else {}
        if given.get("model_type", "beit") == "beit" and given.get("num_hidden_layers", 12) >= 24:
            # the authors' initial LayerScale is smaller in deep encoders
            self.encoder_config = {"layer_scale_init_value": 1e-5, **given}
        super().__post_init__(**kwargs)


class BeitForPreTraining(MimPreTrainedModel):
    """An encoder of all patches, the masked ones replaced by a mask token, and one linear layer (Fig. 1)."""

    config: BeitMimConfig
    encoder: BeitEncoder | DeitEncoder
    targets = "tokenizer"
    _no_split_modules = ["BeitLayer", "DeiTLayer"]  # noqa: RUF012 - read by transformers as a class attribute

    def __init__(self, config: BeitMimConfig):
        super().__init__(config)
        self.encoder = self.build_encoder()
        self.no_weight_decay = self.encoder.no_weight_decay
        self.lm_head = nn.Linear(config.encoder_config.hidden_size, config.vocab_size)
        self.post_init()

    def build_encoder(self) -> Any:
        """Return an encoder with random weights."""
        return ENCODERS[self.config.encoder_config.model_type](self.config.encoder_config)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_at_one_std_(module.weight, std=0.02)
            init.zeros_(module.bias)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_masked_patches: int | None = None,
        return_loss: bool = True,
    ) -> MimOutput:
        """Predict the tokens of the masked patches.

        Args:
            pixel_values: (B, C, H, W), uint8 or standardized.
            bool_masked_pos: (B, N), True = masked; the number may differ by image.
            labels: (B, N) int64, the tokens of all patches.
            num_masked_patches: Number of masked patches in the batch.

        Raises:
            ValueError: If `labels` are missing for the loss, or nothing is masked.
        """
        features = self.encoder(self.standardize(pixel_values), bool_masked_pos=bool_masked_pos).last_hidden_state
        masked = masked_indices(bool_masked_pos, num_masked_patches)  # (M,)
        patches = features[:, -bool_masked_pos.shape[1] :]  # (B, N, D), without the tokens in front of them
        logits = self.lm_head(patches.flatten(0, 1)[masked])  # (M, K)
        if not return_loss:
            return MimOutput(logits=logits)
        if labels is None:
            raise ValueError("BEiT predicts visual tokens: pass `labels` (B, N), the codes of an image tokenizer")
        labels = labels.flatten()[masked]  # (M,)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        return MimOutput(loss=loss, logits=logits, metrics=self._metrics(logits, labels))

    @torch.no_grad()
    def _metrics(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the accuracy, and in evaluation how often each token occurs, from (M, K) and (M,)."""
        metrics = {"accuracy": mean_metric((logits.argmax(-1) == labels).float().mean(), len(labels))}
        if not self.training:
            metrics["token_counts"] = torch.bincount(labels, minlength=self.config.vocab_size)
        return metrics

    def summarize_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return the accuracy, and what always predicting the most frequent token would have."""
        summary = summarize_means({"accuracy": sums["accuracy"]})
        if "token_counts" in sums:
            summary["most_frequent_share"] = (sums["token_counts"].max() / sums["token_counts"].sum()).item()
        return summary

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        """Return the accuracy of the predicted tokens."""
        phrases = [
            f"{name}token accuracy {logs[key]:.1%}"
            for key, name in (("accuracy", ""), ("eval_accuracy", "validation "))
            if key in logs
        ]
        if "eval_most_frequent_share" in logs:
            phrases.append(f"(most frequent token: {logs['eval_most_frequent_share']:.1%})")
        return phrases

    def panel_problem(self, targets: Any = None) -> str | None:
        """Tokens are drawn by the tokenizer's decoder, which not every tokenizer has."""
        return None if targets is not None and targets.can_decode else "this tokenizer has no decoder"

    def panel(self, batch: Mapping[str, Any], targets: Any = None) -> dict[str, torch.Tensor]:
        """Return what the tokenizer decodes from all true tokens, and from those with the masked ones predicted."""
        config, mask = self.config.encoder_config, batch["bool_masked_pos"]
        grid = patch_grid(config.image_size, config.patch_size)
        pixels, labels = batch[targets.view.name].float().cpu() / 255, targets(batch)["labels"]
        predicted = labels.clone()
        predicted[mask] = self(batch["pixel_values"], mask, return_loss=False).logits.argmax(-1)
        masked_pixels = nn.functional.interpolate(mask.view(-1, 1, *grid).float(), pixels.shape[2:]).bool().cpu()
        return {
            "tokenizer's view": pixels,
            "masked": torch.where(masked_pixels, checkerboard(pixels), pixels),
            "decoded from its own tokens": targets.decode(labels.view(-1, *grid)),
            "decoded, masked tokens predicted": targets.decode(predicted.view(-1, *grid)),
        }

"""BEiT: predict the visual token of every hidden patch, as a frozen image tokenizer names it.

Paper: Bao et al. 2021, "BEiT: BERT Pre-Training of Image Transformers", arXiv:2106.08254, Sec. 2.2 to 2.5.
Code: microsoft/unilm/beit at 768a3c8.
Differs: `labels` holds the token of every patch, so that nobody needs to know the mask to make them; only those of
hidden patches are read. The tokenizer is not part of the model: `training.targets` runs it, or the batch has labels.
Shapes: B images, C channels, H W pixels, N patches, M hidden patches of the whole batch, D width, K codes.
"""

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init

from .base import MimConfig, MimOutput, MimPreTrainedModel
from .encoders import BEIT_DEFAULTS, BeitEncoder, DeitEncoder
from .patches import masked_indices

ENCODERS = {"beit": BeitEncoder, "deit": DeitEncoder}


@strict
class BeitMimConfig(MimConfig):
    """`vocab_size` is the tokenizer's; published: 8192."""

    model_type = "mim_beit"
    encoder_defaults: ClassVar[dict[str, Any]] = BEIT_DEFAULTS
    encoder_types = tuple(ENCODERS)

    vocab_size: int = 8192

    def __post_init__(self, **kwargs):
        given = self.encoder_config if isinstance(self.encoder_config, dict) else {}
        if given.get("model_type", "beit") == "beit" and given.get("num_hidden_layers", 12) >= 24:
            # the authors start LayerScale smaller in deep encoders
            self.encoder_config = {"layer_scale_init_value": 1e-5, **given}
        super().__post_init__(**kwargs)


class BeitForPreTraining(MimPreTrainedModel):
    """An encoder that sees every patch, the hidden ones as a mask token, and one linear layer (Fig. 1)."""

    config: BeitMimConfig
    encoder: BeitEncoder | DeitEncoder
    needs_tokenizer = True
    _no_split_modules = ["BeitLayer", "DeiTLayer"]  # noqa: RUF012 - read by transformers as a class attribute

    def __init__(self, config: BeitMimConfig):
        super().__init__(config)
        self.encoder = ENCODERS[config.encoder_config.model_type](config.encoder_config)
        self.no_weight_decay = self.encoder.no_weight_decay
        self.lm_head = nn.Linear(config.encoder_config.hidden_size, config.vocab_size)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=0.02, a=-0.02, b=0.02)  # cut at one deviation: authors' code
            init.zeros_(module.bias)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_masked_patches: int | None = None,
        return_loss: bool = True,
    ) -> MimOutput:
        """(B, C, H, W) images, uint8 or standardized; (B, N) bool, True = hidden; (B, N) int64 codes of all patches.

        Raises:
            ValueError: a loss is asked for without `labels`, or nothing is hidden.
        """
        features = self.encoder(self.standardize(pixel_values), bool_masked_pos=bool_masked_pos).last_hidden_state
        hidden = masked_indices(bool_masked_pos, num_masked_patches)  # (M,)
        patches = features[:, -bool_masked_pos.shape[1] :]  # (B, N, D), without the tokens that lead them
        logits = self.lm_head(patches.flatten(0, 1)[hidden])  # (M, K)
        if not return_loss:
            return MimOutput(logits=logits)
        if labels is None:
            raise ValueError("BEiT predicts visual tokens: give `labels` (B, N), the codes of an image tokenizer")
        labels = labels.flatten()[hidden]  # (M,)
        loss = nn.functional.cross_entropy(logits.float(), labels)
        return MimOutput(loss=loss, logits=logits, accuracy=(logits.argmax(-1) == labels).float().mean())

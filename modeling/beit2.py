"""BEiT v2: predict the tokens of VQ-KD at masked patches, twice, the second time through the class token.

Paper: Peng et al. 2022, "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers", arXiv:2208.06366,
Sec. 2.3 and 2.4.
Code: microsoft/unilm/beit2 at 768a3c8.
Shapes: as in `beit`; B images, C channels, H W pixels, N patches, M masked patches in the batch, D width, K codes.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.models.beit.modeling_beit import BeitLayer

from .base import FinetuneRecipe, MimOutput, Paper
from .beit import BeitForPreTraining, BeitMimConfig
from .encoders import BEIT_DEFAULTS, BeitEncoder, init_like_pytorch
from .patches import masked_indices

_BLOCKS_ABOVE = 3  # the published ViT-B takes patches after 9 of 12 blocks, ViT-L after 21 of 24


@strict
class Beit2Config(BeitMimConfig):
    """Configuration of a BEiT v2.

    Args:
        num_aggregation_blocks: Extra blocks, which see the last block's class token and patches of an earlier block.
        aggregation_layer: Number of the block whose patches they see; 0 for the fourth from the end.
        drop_path_rate: Drop path of the last block, to which it grows from the first one (published: 0 for 300 epochs,
            0.1 for 1600).
    """

    model_type = "mim_beit2"
    transformers_model_types = ()
    paper = Paper(
        "BEiT v2: Masked Image Modeling with Vector-Quantized Visual Tokenizers",
        "Zhiliang Peng and Li Dong and Hangbo Bao and Qixiang Ye and Furu Wei",
        2022,
        "2208.06366",
    )
    encoder_defaults: ClassVar[dict[str, Any]] = BEIT_DEFAULTS
    encoder_types = ("beit",)
    settings_fixed_by_weights = ("num_aggregation_blocks", "aggregation_layer")

    num_aggregation_blocks: int = 2
    aggregation_layer: int = 0
    drop_path_rate: float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.encoder_config.drop_path_rate = self.drop_path_rate
        num_blocks = self.encoder_config.num_hidden_layers
        self.aggregation_layer = self.aggregation_layer or max(1, num_blocks - _BLOCKS_ABOVE)
        if not 1 <= self.aggregation_layer <= num_blocks:
            raise ValueError(
                f"aggregation_layer is {self.aggregation_layer}, expected 1 to {num_blocks}, the encoder's blocks, or "
                "0 to choose it"
            )
        if self.num_aggregation_blocks < 1:
            raise ValueError(
                f"num_aggregation_blocks is {self.num_aggregation_blocks}, expected 1 or more; without them it is BEiT"
            )

    @classmethod
    def finetune_recipe(cls, encoder_config: Any) -> FinetuneRecipe:
        """Return the settings published for 300 epochs; those for 1600 are recipes of their own."""
        size = "large" if getattr(encoder_config, "hidden_size", 0) >= 1024 else "base"
        return FinetuneRecipe(f"finetune_beit2_vit-{size}", 383)

    @classmethod
    def segmentation_recipe(cls, encoder_config: Any) -> str:
        """Return the authors' settings for ADE20K."""
        return f"finetune_upernet_beit2_vit-{'large' if getattr(encoder_config, 'hidden_size', 0) >= 1024 else 'base'}"


class Beit2ForPreTraining(BeitForPreTraining):
    """A BEiT with blocks that predict the masked patches a second time, from early patches and the class token.

    What the later blocks know of the image can reach the second prediction through the class token only (Fig. 4). The
    extra blocks are not exported.
    """

    config: Beit2Config
    encoder: BeitEncoder
    _no_split_modules = ["BeitLayer"]  # noqa: RUF012 - read by transformers as a class attribute

    def __init__(self, config: Beit2Config):
        super().__init__(config)
        first, depth = config.aggregation_layer, config.encoder_config.num_hidden_layers
        # Each has the drop path of the block whose place in the sequence it takes.
        numbers = range(first, first + config.num_aggregation_blocks)
        last = max(depth, numbers.stop) - 1
        self.aggregation_blocks = nn.ModuleList(
            BeitLayer(self.encoder.config, config.drop_path_rate * number / max(1, last)) for number in numbers
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self.lm_head:
            super()._init_weights(module)
        for number, block in enumerate(getattr(self, "aggregation_blocks", ()), self.config.aggregation_layer + 1):
            if module is block:
                self._init_block(block, number)

    def _init_block(self, block: Any, number: int) -> None:
        """Initialize an extra block like PyTorch, as in the authors' code, which creates it after its initialization.

        Only the last layers of both branches have a smaller start there, as in the encoder.
        """
        for linear in block.modules():
            if isinstance(linear, nn.Linear):
                init_like_pytorch(linear)
        for linear in (block.attention.q_proj, block.attention.v_proj):
            init.zeros_(linear.bias)
        for linear in (block.attention.o_proj, block.mlp.fc2):
            bound = 1 / math.sqrt(linear.in_features * 2 * number)
            init.uniform_(linear.weight, -bound, bound)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        labels: torch.Tensor | None = None,
        num_masked_patches: int | None = None,
        return_loss: bool = True,
    ) -> MimOutput:
        """Predict the tokens of the masked patches in both ways; `logits` are those of the encoder's own patches.

        Args:
            pixel_values: (B, C, H, W), uint8 or standardized.
            bool_masked_pos: (B, N), True = masked; the number may differ by image (published: 75 of 196 in each).
            labels: (B, N) int64, the tokens of all patches.
            num_masked_patches: Number of masked patches in the batch.

        Raises:
            ValueError: If `labels` are missing for the loss, or nothing is masked.
        """
        pixels = self.standardize(pixel_values)
        masked = masked_indices(bool_masked_pos, num_masked_patches)  # (M,)
        early_number, num_blocks = self.config.aggregation_layer, len(self.encoder.layers)
        outputs = self.encoder.block_outputs(pixels, (early_number, num_blocks), bool_masked_pos)
        early, last = outputs[0], outputs[-1]  # (B, 1+N, D) each
        logits = self._predict(last, masked)  # (M, K)
        if not return_loss:
            return MimOutput(logits=logits)
        if labels is None:
            raise ValueError("BEiT v2 predicts visual tokens: pass `labels` (B, N), the codes of an image tokenizer")
        labels = labels.flatten()[masked]  # (M,)

        tokens = torch.cat([last[:, :1], early[:, 1:]], dim=1)
        bias = self.encoder.attention_bias(pixels)
        for block in self.aggregation_blocks:
            tokens = block(tokens, attention_mask=bias, resolution=pixels.shape[2:])
        predictions = {"patch": logits, "class_token": self._predict(tokens, masked)}
        losses = {name: nn.functional.cross_entropy(one.float(), labels) for name, one in predictions.items()}
        metrics = self._metrics(logits, labels)
        metrics["class_token_accuracy"] = self._metrics(predictions["class_token"], labels)["accuracy"]
        return MimOutput(loss=self.weighted_sum(losses), losses=losses, logits=logits, metrics=metrics)

    def _predict(self, tokens: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Return the logits (M, K) of the masked ones among the patches of (B, 1+N, D)."""
        logits: torch.Tensor = self.lm_head(self.encoder.layernorm(tokens[:, 1:].flatten(0, 1)[masked]))
        return logits

    def loss_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Both losses are means over the masked patches."""
        return {name: count for count in super().loss_counts(batch).values() for name in ("patch", "class_token")}

    def summarize_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Return the accuracies of both predictions, and what always predicting the most frequent token would have."""
        total = sums["class_token_accuracy"]
        return {**super().summarize_metrics(sums), "class_token_accuracy": (total[0] / total[1]).item()}

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        """Return the accuracies of the predicted tokens."""
        names = (("class_token_accuracy", ""), ("eval_class_token_accuracy", "validation "))
        phrases = [f"{name}through the class token {logs[key]:.1%}" for key, name in names if key in logs]
        return [*super().describe_metrics(logs), *phrases]

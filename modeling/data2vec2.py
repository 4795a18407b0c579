"""data2vec 2.0 for images: a student that sees visible patches only, and many masks for each pass of the teacher.

Paper: Baevski et al. 2022, "Efficient Self-supervised Learning with Contextualized Target Representations for Vision,
Speech and Language", arXiv:2212.07525, Sec. 3.
Code: facebookresearch/fairseq/examples/data2vec at 26323eb.
Differs: Blocks are pre-norm, as those of a ViTModel; no native class can hold the authors' post-norm blocks, so their
weights cannot be converted. Masked patches are noise in training and zero in evaluation, where the authors have no
loss. As in data2vec, the momentum follows the length of the training unless it is given, and users get the teacher.
Shapes: B images with k masks each (R = B * k; one mask unless said otherwise), C channels, H W pixels, h w patches per
column and row, N = h * w patches = V visible + M masked, of which Q are predicted (all by default), P values of a
patch, D width, E channels of the decoder.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.vit.modeling_vit import ViTAttention

from .base import MimOutput, Paper
from .collapse import row_moments
from .data2vec import FeatureTargetConfig, FeatureTargetModel
from .encoders import init_like_pytorch
from .mae import MaeEncoder
from .patches import patch_grid, patchify, take_tokens, visible_and_predicted_indices


@strict
class Data2Vec2Config(FeatureTargetConfig):
    """Configuration of a data2vec 2.0 around a plain ViT.

    Args:
        decoder_channels: Channels of the decoder's convolutions; 0 for the encoder's width.
        decoder_num_convolutions: Convolutions of the decoder.
        decoder_kernel_size: Side of their kernels in patches.
        decoder_num_groups: Groups of channels of their kernels.
        class_loss_weight: Weight of the loss of the class token, whose target is the mean over the image. The authors'
            0.01 is for a sum over the 16 * 16 masks of a GPU, which is 2.56 for their mean.
        mask_noise_std: Standard deviation of the noise that the decoder gets for masked patches in training.
    """

    model_type = "mim_data2vec2"
    paper = Paper(
        "Efficient Self-supervised Learning with Contextualized Target Representations for Vision, Speech and "
        "Language",
        "Alexei Baevski and Arun Babu and Wei-Ning Hsu and Michael Auli",
        2022,
        "2212.07525",
    )

    published_batch: ClassVar[int] = 256
    learning_rate_follows_width: ClassVar[bool] = False  # measured: docs/small-data.md

    decoder_channels: int = 0
    decoder_num_convolutions: int = 6
    decoder_kernel_size: int = 3
    decoder_num_groups: int = 16
    class_loss_weight: float = 2.56
    mask_noise_std: float = 0.01

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        patch_grid(self.encoder_config.image_size, self.encoder_config.patch_size)
        width = self.encoder_config.hidden_size
        self.decoder_channels = self.decoder_channels or width
        if self.decoder_channels % self.decoder_num_groups or width % self.decoder_num_groups:
            raise ValueError(
                f"decoder_num_groups is {self.decoder_num_groups}, expected a divisor of the encoder's width {width} "
                f"and of decoder_channels {self.decoder_channels}"
            )
        if self.decoder_kernel_size % 2 == 0:
            raise ValueError(f"decoder_kernel_size is {self.decoder_kernel_size}, expected an odd number")

    @property
    def resizes_positions(self) -> bool:
        """Sines and cosines exist for every size."""
        return True

    def published_num_target_layers(self, num_blocks: int) -> int:
        """Return 10 of 12 blocks, 18 of 24 and 24 of 32, and all but two of fewer."""
        return num_blocks - max(2, 0 if num_blocks <= 12 else num_blocks // 4)


class Data2Vec2Encoder(MaeEncoder):
    """MAE's ViTModel with the authors' initialization."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif not isinstance(module, ViTAttention):
            super()._init_weights(module)
            if module is self.embeddings:
                init.normal_(module.cls_token)

    def ffn_outputs(self, patches: torch.Tensor, grid: tuple[int, int]) -> list[torch.Tensor]:
        """Return what the MLP of each block adds to all patches (B, N, P) and the class token, (B, 1+N, D) each.

        Without dropout, which a teacher never has.
        """
        every = torch.arange(patches.shape[1], device=patches.device).expand(len(patches), -1)  # (B, N)
        x, outputs = self.embed(patches, every, grid), []
        layer: Any
        for layer in self.layers:
            x = x + layer.attention(layer.layernorm_before(x), None)[0]
            outputs.append(layer.mlp(layer.layernorm_after(x)))
            x = x + outputs[-1]
        return outputs


class ConvolutionBlock(GradientCheckpointingLayer):
    """A convolution in groups, a LayerNorm without weights and a GELU, around which the input is added if it fits."""

    def __init__(self, num_inputs: int, config: Data2Vec2Config):
        super().__init__()
        kernel, groups = config.decoder_kernel_size, config.decoder_num_groups
        self.conv = nn.Conv2d(num_inputs, config.decoder_channels, kernel, padding=kernel // 2, groups=groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(R, h, w, D or E) -> (R, h, w, E)."""
        y = self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = nn.functional.gelu(nn.functional.layer_norm(y, y.shape[-1:]))
        return y + x if x.shape == y.shape else y


class Data2Vec2ForPreTraining(FeatureTargetModel):
    """A student that sees the visible patches of several masks, and a teacher that sees the image once (Fig. 1)."""

    config: Data2Vec2Config
    encoder: Data2Vec2Encoder
    teacher: Data2Vec2Encoder
    needs_equal_num_masked = True  # the encoder sees a rectangular batch of visible patches
    decodes_masked_patches = True
    frozen_parameters = ("teacher", "encoder.embeddings.position_embeddings")
    opened_blocks = ("ViTLayer",)  # by the teacher
    _no_split_modules = ["ViTLayer", "ConvolutionBlock"]  # noqa: RUF012 - read by transformers as a class attribute

    def __init__(self, config: Data2Vec2Config):
        super().__init__(config)
        self.encoder, self.teacher = (
            Data2Vec2Encoder(config.encoder_config, add_pooling_layer=False) for _ in range(2)
        )
        width, channels = config.encoder_config.hidden_size, config.decoder_channels
        self.decoder_blocks = nn.Sequential(
            *(
                ConvolutionBlock(channels if number else width, config)
                for number in range(config.decoder_num_convolutions)
            )
        )
        self.decoder_pred = nn.Linear(channels, width)
        self.post_init()
        self.after_loading_encoder()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            init_like_pytorch(module)

    def forward(
        self,
        pixel_values: torch.Tensor,
        bool_masked_pos: torch.Tensor,
        num_masked_patches: int | None = None,
        return_loss: bool = True,
        bool_predicted_pos: torch.Tensor | None = None,
        num_predicted_patches: int | None = None,
    ) -> MimOutput:
        """Predict the teacher's representations of the masked patches.

        Args:
            pixel_values: (B, C, H, W), uint8 or standardized.
            bool_masked_pos: (B, N) or (B, k, N), True = masked; equally many in every mask.
            num_masked_patches: Number of masked patches in the batch.
            bool_predicted_pos: Those masked patches that are predicted, equally many in every mask; all if None.
            num_predicted_patches: Number of predicted patches in the batch.
        """
        patch_size = self.config.encoder_config.patch_size
        grid = patch_grid(tuple(pixel_values.shape[-2:]), patch_size)
        visible, predicted = visible_and_predicted_indices(
            bool_masked_pos, bool_predicted_pos, num_masked_patches, num_predicted_patches
        )  # (R, V), (R, Q)
        patches = patchify(self.standardize(pixel_values), patch_size)  # (B, N, P)
        features = self.encoder.encode(_take_for_masks(patches, visible), visible, grid)[-1]  # (R, 1+V, D)
        logits = take_tokens(self.decode(features[:, 1:], visible, grid), predicted)  # (R, Q, D)
        if not return_loss:
            return MimOutput(logits=logits)
        targets = self.teacher_targets(patches, grid)  # (B, N, D)
        losses = {"patch": _scaled_error(logits, _take_for_masks(targets, predicted))}
        if self.config.class_loss_weight:
            mean_targets = targets.mean(1).repeat_interleave(len(visible) // len(targets), 0)  # (R, D)
            losses["class"] = _scaled_error(features[:, 0], mean_targets)
        metrics = {"prediction": row_moments(logits.flatten(0, 1))}
        return MimOutput(loss=self.weighted_sum(losses), losses=losses, logits=logits, metrics=metrics)

    def decode(self, features: torch.Tensor, visible: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Predict all patches (R, N, D) from the visible ones (R, V, D) at indices (R, V)."""
        num_masks, _, width = features.shape
        tokens = features.new_zeros(num_masks, grid[0] * grid[1], width)  # (R, N, D)
        if self.training:
            tokens = torch.randn_like(tokens) * self.config.mask_noise_std
        tokens = tokens.scatter(1, visible.unsqueeze(-1).expand(-1, -1, width), features)
        decoded = self.decoder_blocks(tokens.unflatten(1, grid)).flatten(1, 2)  # (R, N, E)
        predictions: torch.Tensor = self.decoder_pred(decoded)
        return predictions

    @torch.no_grad()
    def teacher_targets(self, patches: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Return the mean of the teacher's last FFN outputs, normalized over the image, then over features.

        As in the authors' code, the teacher computes in the precision of the step; its weights are float32.

        Args:
            patches: (B, N, P), standardized; the teacher sees all of them, once for all masks.
            grid: Rows and columns of patches.

        Returns:
            (B, N, D), float32.
        """
        outputs = self.teacher.ffn_outputs(patches, grid)[-self.config.num_target_layers :]
        over_images = [nn.functional.instance_norm(output[:, 1:].float().mT) for output in outputs]  # (B, D, N) each
        targets = torch.stack(over_images).mean(0).mT
        return nn.functional.layer_norm(targets, targets.shape[-1:])

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        """Return the std of the predictions; targets are normalized over each image, so that theirs says nothing."""
        std = logs.get("prediction_std", logs.get("eval_prediction_std"))
        return [] if std is None else [f"prediction std {std:.3f}"]

    def loss_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """The patch loss is a mean over predicted patches, the class loss over masks."""
        (num_predicted,) = super().loss_counts(batch).values()
        num_masks = math.prod(batch["bool_masked_pos"].shape[:-1])
        return {"patch": num_predicted} | ({"class": num_masks} if self.config.class_loss_weight else {})

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {"class": self.config.class_loss_weight}


def _take_for_masks(tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(B, N, D), (R, K) -> (R, K, D): the tokens of each image for each of its masks."""
    return take_tokens(tokens, indices.reshape(len(tokens), -1)).view(*indices.shape, -1)


def _scaled_error(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the mean over rows (..., D) of the summed squared error divided by sqrt(D), as in the authors' code."""
    return nn.functional.mse_loss(predictions.float(), targets) * math.sqrt(targets.shape[-1])

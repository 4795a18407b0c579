"""Semantic segmentation: UPerNet on a pre-trained encoder, exported as a native model of transformers.

Papers: Xiao et al. 2018 (UPerNet), arXiv:1807.10221; Bao et al. 2021 (BEiT), arXiv:2106.08254, App. H, whose pyramid
MAE and iBOT use too: the outputs of four blocks, at 4, 2, 1 and 1/2 times the resolution of the patches.
Differs from the authors: the BatchNorms of the head have fixed statistics, those of training images before the first
step (`calibrate`), so that a step does not depend on how its images are spread over micro-batches and processes. As
in the authors' code, their scales and shifts are trained. The scores start with the frequencies of the classes.
Differs from transformers: a plain ViT is a BEiT with absolute positions and without LayerScale, which is the same
function. transformers' BeitForSemanticSegmentation cannot read the last block; its UPerNet can.
Shapes: B images, C channels, S pixels of a side, K classes, D width.
"""

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, UperNetConfig, UperNetForSemanticSegmentation
from transformers.utils.generic import ModelOutput

from .encoders import PositionBias
from .image_classification import copy_encoder, encoder_config_for

FAMILIES = ("vit", "vit_mae", "beit", "swin")  # model types of encoders
_AUXILIARY_WEIGHT = 0.4  # of its loss
_SWIN_HEAD_WIDTH = 512
_SMALLEST_SHARE = 1e-4  # of a class that is rarer or does not occur
_SMALLEST_VARIANCE = 0.01  # of a channel, as a fraction of the mean over the layer: a channel that is constant at the
# start is not amplified when it changes


class Segmenter(UperNetForSemanticSegmentation):
    """An UperNetForSemanticSegmentation with the same parameter names, for training."""

    base_model_prefix = "backbone"
    supports_gradient_checkpointing = True

    def __init__(self, config: UperNetConfig):
        super().__init__(config)
        backbone: Any = self.backbone
        encoder_config: Any = config.backbone_config
        if encoder_config.model_type == "beit":
            for layer in backbone.beit.layers:
                if layer.relative_position_bias is not None:
                    layer.relative_position_bias = PositionBias(encoder_config)
        else:
            backbone.swin.layernorm.requires_grad_(False)  # unused: every stage has a norm of its own
        self.post_init()

    @property
    def base_model(self) -> nn.Module:
        """The encoder, without the pyramid."""
        backbone: Any = self.backbone
        encoder: nn.Module = backbone.base_model
        return encoder

    def train(self, mode: bool = True) -> "Segmenter":
        super().train(mode)
        for norm in self._norms():
            norm.eval()
        return self

    def forward(self, pixel_values: torch.Tensor) -> ModelOutput:
        """(B, C, S, S) -> logits (B, K, S, S); in training also `auxiliary_logits`."""
        features = self.backbone(pixel_values).feature_maps
        heads = {"logits": self.decode_head(features)}
        if self.training and self.auxiliary_head is not None:
            heads["auxiliary_logits"] = self.auxiliary_head(features)
        return ModelOutput({name: enlarged(logits, pixel_values) for name, logits in heads.items()})

    def losses(self, outputs: ModelOutput) -> Iterable[tuple[float, torch.Tensor]]:
        """Yield the weight of each loss, and its logits."""
        yield 1.0, outputs["logits"]
        if "auxiliary_logits" in outputs:
            yield _AUXILIARY_WEIGHT, outputs["auxiliary_logits"]

    @property
    def classifiers(self) -> list[Any]:
        """The last layers of all heads."""
        return [head.classifier for head in (self.decode_head, self.auxiliary_head) if head is not None]

    @torch.no_grad()
    def calibrate(self, batches: Iterable[torch.Tensor], shares: torch.Tensor) -> None:
        """Start with the features and the classes of training images.

        Args:
            batches: Standardized images (B, C, S, S), whose statistics all BatchNorms get.
            shares: (K,), the share of each class, which the scores start with.
        """
        start_with_shares(self.classifiers, shares)
        self.train()
        norms = self._norms()
        for module in self.modules():
            if hasattr(module, "drop_prob"):
                module.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
            norm.train()
        for batch in batches:
            # Several values per channel are needed, also after pooling to a single one.
            self(batch if len(batch) > 1 else torch.cat([batch, batch.flip(-1)]))
        for norm in norms:
            assert norm.running_var is not None
            norm.running_var.clamp_(min=max(_SMALLEST_VARIANCE * norm.running_var.mean().item(), 1e-8))
        self.eval()

    def _norms(self) -> list[nn.BatchNorm2d]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]


def start_with_shares(classifiers: Iterable[Any], shares: torch.Tensor) -> None:
    """Set the biases of last layers, so that the first steps need not learn how frequent each class is."""
    for classifier in classifiers:
        classifier.bias.copy_(shares.clamp(min=_SMALLEST_SHARE).log())


def enlarged(logits: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
    """Resize logits (B, K, h, w) to the size of the images."""
    return nn.functional.interpolate(logits.float(), pixel_values.shape[2:], mode="bilinear", align_corners=False)


def build_segmenter(
    encoder: PreTrainedModel,
    labels: Sequence[str],
    *,
    image_size: int,
    drop_path_rate: float,
    head_hidden_size: int | None = None,
) -> Segmenter:
    """Return a UPerNet of square color images with the encoder's weights and a new head.

    Args:
        head_hidden_size: Channels of the head; none: the published number.

    Raises:
        ValueError: If no native backbone computes the encoder's features, or it is too shallow.
    """
    check_family(encoder.config, FAMILIES)
    config: Any = encoder_config_for(encoder.config, image_size, "mean")
    config.drop_path_rate = float(drop_path_rate)
    is_swin = config.model_type == "swin"
    if is_swin:
        config.out_features = config.stage_names[1:]
        width = min(_SWIN_HEAD_WIDTH, config.hidden_size)
    else:
        config.out_indices = taps(config.num_hidden_layers)
        config.add_fpn = True
        width = config.hidden_size
    upernet = UperNetConfig(
        backbone_config=config,
        hidden_size=head_hidden_size or width,
        auxiliary_loss_weight=_AUXILIARY_WEIGHT,
        use_auxiliary_head=not is_swin or len(config.depths) > 2,
        **label_names(labels),
    )
    segmenter = Segmenter(upernet)
    copy_encoder(segmenter.base_model, encoder)
    if is_swin:
        own, its = segmenter.get_submodule(f"backbone.hidden_states_norms.{config.stage_names[-1]}"), encoder.layernorm
        own.load_state_dict(its.state_dict())  # type: ignore[union-attr]
    return segmenter


def label_names(labels: Sequence[str]) -> dict[str, Any]:
    """Return the entries of a config that name the classes."""
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }


def taps(num_blocks: int) -> list[int]:
    """Return the blocks, counted from 1, whose outputs make the pyramid: 4, 6, 8 and 12 of 12, as published.

    Raises:
        ValueError: If there are fewer than four blocks.
    """
    found = [num_blocks // 3, num_blocks // 2, -(-2 * num_blocks // 3), num_blocks]
    if len(set(found)) < 4 or not found[0]:
        raise ValueError(f"`model` has {num_blocks} blocks, but a feature pyramid needs the outputs of at least four")
    return found


def check_family(config: PreTrainedConfig, families: Sequence[str]) -> None:
    """Raise ValueError if the encoder's type is not supported."""
    if config.model_type not in families:
        model = f"`model` {config.name_or_path}".rstrip()
        raise ValueError(f"{model} is a {config.model_type}, expected one of {', '.join(sorted(families))}")


def native_segmenter(segmenter: Segmenter) -> UperNetForSemanticSegmentation:
    """Return the same function as a class of transformers, without the auxiliary head."""
    config = copy.deepcopy(segmenter.config)
    config.use_auxiliary_head = False
    native: UperNetForSemanticSegmentation = UperNetForSemanticSegmentation(config)
    state = {name: tensor for name, tensor in segmenter.state_dict().items() if not name.startswith("auxiliary_head.")}
    native.load_state_dict(state, strict=True)
    native.eval()
    return native

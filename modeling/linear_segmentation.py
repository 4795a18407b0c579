"""Linear segmentation: one linear layer on frozen, standardized patch features, exported as a native UPerNet.

Papers: Oquab et al. 2023 (DINOv2), arXiv:2304.07193, Sec. 7.4; Darcet et al. 2025 (CAPI), arXiv:2502.08769, App. C.
The features are those after the encoder's last LayerNorm: a plain ViT is opened as a Dinov2Backbone with LayerScale 1,
which applies it. A BEiT with relative position biases has no such class, and its features are those before the norm.
Differs from the authors: the features are standardized by the statistics of training images, not of the batch.
transformers has no class for a linear layer on patches. A UPerNet whose layers pass on max(x, 0) and max(-x, 0) of the
scores x computes the same function (`native_linear_segmenter`).
Shapes: B images, C channels, S pixels of a side, h w patches per column and row, K classes, D width.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoBackbone,
    Dinov2Config,
    PreTrainedConfig,
    PreTrainedModel,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)
from transformers import initialization as init
from transformers.models.upernet.modeling_upernet import UperNetPreTrainedModel
from transformers.utils.generic import ModelOutput

from .image_classification import copy_encoder, encoder_config_for, is_plain_vit
from .segmentation import check_family, enlarged, label_names, start_with_shares

FAMILIES = ("vit", "vit_mae", "beit", "swin", "dinov2", "dinov2_with_registers")
_EPS = 1e-6
_INIT_STD = 0.01
_FROM_VIT = ((r"^layers\.", "encoder.layer."), (".layernorm_before.", ".norm1."), (".layernorm_after.", ".norm2."))
# Names of transformers 5.17.
_OLD_NAMES = (
    *((rf"\.attention\.{name[0]}_proj\.", f".attention.attention.{name}.") for name in ("query", "key", "value")),
    (r"\.attention\.o_proj\.", ".attention.output.dense."),
)


class LinearSegmenter(UperNetPreTrainedModel):
    """A frozen backbone, and a linear layer on its standardized patch features.

    Its config is that of the native model which computes the same.
    """

    base_model_prefix = "backbone"
    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, config: UperNetConfig):
        super().__init__(config)
        self.backbone = AutoBackbone.from_config(config.backbone_config)
        (width,) = self.backbone.channels
        self.register_buffer("mean", torch.zeros(1, width, 1, 1))
        self.register_buffer("scale", torch.ones(1, width, 1, 1))
        num_classes: Any = config.num_labels
        self.classifier = nn.Conv2d(width, num_classes, 1)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[no-untyped-call]
        if module is self.classifier:
            init.normal_(self.classifier.weight, std=_INIT_STD)
            init.zeros_(self.classifier.bias)  # type: ignore[arg-type]

    @property
    def base_model(self) -> nn.Module:
        """The encoder."""
        encoder: nn.Module = self.backbone.base_model
        return encoder

    def forward(self, pixel_values: torch.Tensor) -> ModelOutput:
        """(B, C, S, S) -> logits (B, K, S, S)."""
        (features,) = self.backbone(pixel_values).feature_maps  # (B, D, h, w)
        logits = self.classifier((features - self.mean) * self.scale)
        return ModelOutput({"logits": enlarged(logits, pixel_values)})

    def losses(self, outputs: ModelOutput) -> Iterable[tuple[float, torch.Tensor]]:
        """Yield the weight of each loss, and its logits."""
        yield 1.0, outputs["logits"]

    @torch.no_grad()
    def calibrate(self, batches: Iterable[torch.Tensor], shares: torch.Tensor) -> None:
        """Start with the features and the classes of training images.

        Args:
            batches: Standardized images (B, C, S, S), by whose statistics the features are standardized.
            shares: (K,), the share of each class, which the scores start with.
        """
        start_with_shares([self.classifier], shares)
        self.eval()
        features = torch.cat([self.backbone(batch).feature_maps[0].transpose(0, 1).flatten(1) for batch in batches], 1)
        variance, mean = torch.var_mean(features.float(), 1, correction=0)
        self.mean.copy_(mean[:, None, None])
        self.scale.copy_((variance + _EPS).rsqrt()[:, None, None])


def build_linear_segmenter(encoder: PreTrainedModel, labels: Sequence[str], *, image_size: int) -> LinearSegmenter:
    """Return a linear layer on the patch features of an encoder, for square color images.

    Raises:
        ValueError: If no native backbone computes the encoder's features.
    """
    check_family(encoder.config, FAMILIES)
    config: Any = _backbone_config(encoder, image_size)
    config.out_features = config.stage_names[-1:]
    upernet = UperNetConfig(
        backbone_config=config,
        hidden_size=2 * len(labels),
        pool_scales=[1],
        use_auxiliary_head=False,
        **label_names(labels),
    )
    segmenter = LinearSegmenter(upernet)
    if config.model_type == "dinov2" != encoder.config.model_type:
        segmenter.base_model.load_state_dict(_as_dinov2(encoder, segmenter.base_model.state_dict(), image_size))
    else:
        copy_encoder(segmenter.base_model, encoder)
    if config.model_type == "swin":
        own, its = segmenter.get_submodule(f"backbone.hidden_states_norms.{config.stage_names[-1]}"), encoder.layernorm
        own.load_state_dict(its.state_dict())  # type: ignore[union-attr]
    return segmenter


def _backbone_config(encoder: PreTrainedModel, image_size: int) -> PreTrainedConfig:
    encoder_config = encoder.config
    if encoder_config.model_type in ("dinov2", "dinov2_with_registers"):
        return encoder_config_for(encoder_config, image_size, "class and mean")
    config: Any = encoder_config_for(encoder_config, image_size, "mean")
    ratio, rest = divmod(getattr(config, "intermediate_size", 0), config.hidden_size)
    has_norm = isinstance(getattr(encoder, "layernorm", None), nn.LayerNorm)
    if config.model_type == "beit" and is_plain_vit(config) and has_norm and not rest:
        shared = ("hidden_size", "num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps")
        more = ("initializer_range", "image_size", "patch_size", "num_channels")
        values = {name: getattr(config, name) for name in (*shared, *more)}
        return Dinov2Config(**values, mlp_ratio=ratio, layerscale_value=1.0, use_mask_token=False)
    config.drop_path_rate = 0.0
    return config  # type: ignore[no-any-return]


def _as_dinov2(encoder: PreTrainedModel, target: dict[str, torch.Tensor], image_size: int) -> dict[str, torch.Tensor]:
    """Return the weights of a plain ViT under the names of `target`, a Dinov2Backbone with LayerScale 1."""
    holder = AutoBackbone.from_config(encoder_config_for(encoder.config, image_size, "mean")).base_model
    copy_encoder(holder, encoder)  # resizes its positions, and extends a grayscale encoder
    state = {**encoder.state_dict(), **holder.state_dict()}
    found = {name: torch.ones_like(tensor) for name, tensor in target.items() if "layer_scale" in name}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in _FROM_VIT:
            name = re.sub(pattern, replacement, name)
        if name not in target:
            for pattern, replacement in _OLD_NAMES:
                name = re.sub(pattern, replacement, name)
        if name in target:
            found[name] = tensor
    for name in target:  # a BEiT's keys have no bias
        if name not in found and name.endswith(("k_proj.bias", "key.bias")):
            found[name] = torch.zeros_like(target[name])
    return found


@torch.no_grad()
def native_linear_segmenter(segmenter: LinearSegmenter) -> UperNetForSemanticSegmentation:
    """Return the same function as a class of transformers."""
    native = UperNetForSemanticSegmentation(segmenter.config)
    native.backbone.load_state_dict(segmenter.backbone.state_dict(), strict=True)
    head: Any = native.decode_head
    weight = segmenter.classifier.weight[:, :, 0, 0] * segmenter.scale[0, :, 0, 0]  # (K, D)
    old_bias: Any = segmenter.classifier.bias
    bias = old_bias - weight @ segmenter.mean[0, :, 0, 0]
    num_classes, width = weight.shape
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.zero_()
        elif isinstance(module, nn.BatchNorm2d):  # the identity
            module.weight.fill_((1 + module.eps) ** 0.5)
    # A middle of 1 in a kernel of 3 x 3 passes on each pixel.
    head.bottleneck.conv.weight[:, :width, 1, 1] = torch.cat([weight, -weight])
    head.fpn_bottleneck.conv.weight[:, :, 1, 1] = torch.eye(2 * num_classes)
    identity = torch.eye(num_classes)
    head.classifier.weight[:, :, 0, 0] = torch.cat([identity, -identity], 1)
    head.classifier.bias.copy_(bias)
    native.eval()
    return native

"""Image classifiers on pre-trained encoders, exported as native models of transformers.

Papers: He et al. 2021 (MAE), arXiv:2111.06377, App. A.1; Bao et al. 2021 (BEiT), arXiv:2106.08254, Sec. 3.1; Xie et
al. 2021 (SimMIM), arXiv:2111.09886, Sec. 4.1.
Differs from transformers: a plain ViT is trained as a BEiT with absolute positions and without LayerScale. That is the
same function (a ViT's key bias cancels in the softmax), and supports drop path and mean pooling.
Shapes: D width, L labels.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    BeitConfig,
    BeitForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
)

from .encoders import BeitEncoder, PositionBias, SwinEncoder, SwinStages
from .mae import MaeEncoder
from .patches import gray_to_rgb, height_and_width, patch_grid
from .positions import resize_positions, resize_relative_bias

# The supported model types of encoders, and the pooling that their classifiers offer; the first one is the default.
POOLINGS: dict[str, tuple[str, ...]] = {
    "vit": ("mean", "class"),
    "vit_mae": ("mean", "class"),
    "beit": ("mean", "class"),
    "data2vec-vision": ("mean", "class"),
    "swin": ("mean",),
    "deit": ("class",),
    "dinov2": ("class and mean",),
    "dinov2_with_registers": ("class and mean",),
}
_SHARED_BY_VIT_AND_BEIT = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"),
    *("image_size", "patch_size", "num_channels"),
)
_BATCH_NORM_EPS = 1e-6


class BeitClassifier(BeitForImageClassification):
    """A BeitForImageClassification with the same parameter names that does not interpolate its position biases."""

    def __init__(self, config: BeitConfig):
        super().__init__(config)
        for layer in self.beit.layers:
            if layer.relative_position_bias is not None:
                layer.relative_position_bias = PositionBias(config)
        self.post_init()


class SwinClassifier(SwinForImageClassification):
    """A SwinForImageClassification with the same parameter names and drop path on both branches of a block.

    Raises:
        ValueError: If the window is larger than the feature map of a stage.
    """

    def __init__(self, config: SwinConfig):
        super().__init__(config)
        self.swin.encoder = SwinStages(config, self.swin.embeddings.patch_grid)
        if problem := self.swin.encoder.native_problem:
            raise ValueError(f"{problem}; use a larger image_size")
        self.post_init()


def random_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """Return an encoder with the weights that pre-training starts from (sine-cosine positions for a ViT)."""
    check_family(config)
    config = copy.deepcopy(config)
    if config.model_type in ("vit", "vit_mae"):
        return MaeEncoder(ViTConfig(**_shared(config)), add_pooling_layer=False)
    if isinstance(config, BeitConfig):
        config.use_mask_token = True
        return BeitEncoder(config)
    if isinstance(config, SwinConfig):
        return SwinEncoder(config)
    encoder: PreTrainedModel = AutoModel.from_config(config)
    return encoder


def build_classifier(
    encoder: PreTrainedModel, labels: Sequence[str], *, image_size: int, pooling: str, drop_path_rate: float
) -> PreTrainedModel:
    """Return a classifier of square color images with the encoder's weights and a new classification head.

    Args:
        pooling: What the head reads: "mean" of the patches, "class" token, or "class and mean"; see `POOLINGS`.
        drop_path_rate: Probability of dropping the residual path of the last block; it grows linearly from 0.

    Raises:
        ValueError: If this type of classifier does not support the pooling, the image size or drop path.
    """
    config = encoder_config_for(encoder.config, image_size, pooling)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    if hasattr(config, "drop_path_rate"):
        config.drop_path_rate = float(drop_path_rate)
    elif drop_path_rate:
        raise ValueError(f"drop_path_rate is {drop_path_rate}, but transformers' {config.model_type} has no drop path")
    classes: dict[str, Any] = {"beit": BeitClassifier, "swin": SwinClassifier}
    build = classes.get(config.model_type, AutoModelForImageClassification.from_config)
    classifier: PreTrainedModel = build(config)
    copy_encoder(classifier.base_model, encoder)
    head: Any = classifier.classifier
    # 2e-5 is MAE's, and 0.02 times BEiT's factor of 0.001.
    nn.init.trunc_normal_(head.weight, std=0.02 if config.model_type == "swin" else 2e-5)
    nn.init.zeros_(head.bias)
    return classifier


def add_batch_norm(classifier: Any) -> None:
    """Standardize the features before the head, for a linear probe; `native_classifier` folds the two into one."""
    head = classifier.classifier
    nn.init.trunc_normal_(head.weight, std=0.01)
    norm = nn.BatchNorm1d(head.in_features, eps=_BATCH_NORM_EPS, affine=False)
    classifier.classifier = nn.Sequential(norm, head)


@torch.no_grad()
def native_classifier(classifier: PreTrainedModel) -> PreTrainedModel:
    """Return the same function as a class of transformers, a ViTForImageClassification if it is a plain ViT."""
    config = copy.deepcopy(classifier.config)
    state = {name: tensor.detach().float().cpu() for name, tensor in classifier.state_dict().items()}
    if isinstance(classifier.classifier, nn.Sequential):
        mean, var = state.pop("classifier.0.running_mean"), state.pop("classifier.0.running_var")
        del state["classifier.0.num_batches_tracked"]
        weight = state.pop("classifier.1.weight") / (var + _BATCH_NORM_EPS).sqrt()
        state |= {"classifier.weight": weight, "classifier.bias": state.pop("classifier.1.bias") - weight @ mean}
    if is_plain_vit(config) and not config.use_mean_pooling:
        names = ("id2label", "label2id", "problem_type")
        config = ViTConfig(**_shared(config), **{name: getattr(config, name) for name in names})
        state = {name.replace("beit.", "vit.", 1): tensor for name, tensor in state.items()}
        for number in range(config.num_hidden_layers):
            state[f"vit.layers.{number}.attention.k_proj.bias"] = torch.zeros(config.hidden_size)
    native: PreTrainedModel = AutoModelForImageClassification.from_config(config)
    native.load_state_dict(state, strict=True)
    _check_same_logits(classifier, native.eval())
    return native


def is_plain_vit(config: PreTrainedConfig) -> bool:
    """Return whether this BEiT is a ViT: absolute positions only, no LayerScale."""
    has_bias = getattr(config, "use_relative_position_bias", True) or config.use_shared_relative_position_bias
    return not has_bias and config.use_absolute_position_embeddings and config.layer_scale_init_value == 0


def _check_same_logits(classifier: PreTrainedModel, native: PreTrainedModel) -> None:
    shape = (2, native.config.num_channels, native.config.image_size, native.config.image_size)
    probe = torch.linspace(-2, 2, 2 * shape[1] * shape[2] * shape[3]).reshape(shape)
    was_training = classifier.training
    ours = classifier.eval()(probe.to(classifier.device)).logits.float().cpu()
    classifier.train(was_training)
    difference, size = (native(probe).logits - ours).abs().max().item(), ours.abs().max().item()
    assert difference <= 1e-4 * max(size, 1.0), f"the native classifier's logits differ by {difference:.3g}"


def check_family(config: PreTrainedConfig) -> None:
    """Raise ValueError if the encoder's type is not supported."""
    if config.model_type not in POOLINGS:
        model = f"`model` {config.name_or_path}".rstrip()
        raise ValueError(f"{model} is a {config.model_type}, expected one of {', '.join(sorted(POOLINGS))}")


def _shared(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _SHARED_BY_VIT_AND_BEIT}


def encoder_config_for(encoder_config: PreTrainedConfig, image_size: int, pooling: str) -> PreTrainedConfig:
    """Return the config of the class that the encoder becomes for fine-tuning, for square color images."""
    possible = POOLINGS[encoder_config.model_type]
    if pooling not in possible:
        expected = " or ".join(map(repr, possible))
        raise ValueError(f"`pooling` is {pooling!r}, expected {expected} for a {encoder_config.model_type} encoder")
    patch_grid(image_size, encoder_config.patch_size)
    config = copy.deepcopy(encoder_config)
    if config.model_type in ("vit", "vit_mae"):
        config = BeitConfig(**_shared(config), use_absolute_position_embeddings=True, layer_scale_init_value=0.0)
    if config.model_type == "beit":
        # As in the authors' fine-tuning, every block has its own table.
        config.use_relative_position_bias |= config.use_shared_relative_position_bias
        config.use_shared_relative_position_bias = False
        config.use_mask_token = False
    if config.model_type in ("beit", "data2vec-vision"):
        config.use_mean_pooling = pooling == "mean"
    if config.model_type == "swin":
        config.window_size = _window_size(config, image_size)
    config.image_size = image_size
    if config.num_channels == 1 and getattr(encoder_config, "mim_value_range", None) is None:
        config.num_channels = 3  # photographs in gray are shown in color
    config.architectures = []
    for name in ("auto_map", "mim_method", "mim_recipe", "mim_value_range"):  # they describe the encoder's folder
        vars(config).pop(name, None)
    return config


def _window_size(config: PreTrainedConfig, image_size: int) -> int:
    """Scale the window with the image if that gives a whole number, for example from 6 at 192 pixels to 7 at 224."""
    old_size, _ = height_and_width(config.image_size)
    window, rest = divmod(config.window_size * image_size, old_size)
    return int(config.window_size if rest else window)


def copy_encoder(model: Any, encoder: PreTrainedModel) -> None:
    """Copy the encoder's weights: resize position tables, copy a shared table to every block, and extend the patch
    projection of a grayscale encoder to RGB so that it sees the grayscale version of an image.
    """
    target = model.state_dict()
    state = dict(encoder.state_dict())
    shared = state.pop("shared_position_bias.relative_position_bias_table", None)
    for name, wanted in target.items():
        if name.endswith("relative_position_bias_table"):
            table = state.get(name, shared)
            assert table is not None, name
            state[name] = _resized_bias(table, wanted, num_extra=0 if model.config.model_type == "swin" else 3)
        elif name.endswith("position_embeddings"):
            grids = [patch_grid(config.image_size, config.patch_size) for config in (encoder.config, model.config)]
            state[name] = resize_positions(state[name], *grids)
        elif name.endswith("patch_embeddings.projection.weight") and state[name].shape[1] == 1 != wanted.shape[1]:
            state[name] = gray_to_rgb(state[name])
    missing, unexpected = model.load_state_dict(state, strict=False)
    dropped = ("embeddings.mask_token", "pooler.", "layernorm.")  # unused by some models
    added = ("pooler.layernorm.", "layernorm.")  # the norm before the head is new if the encoder ends without one
    left = [name for name in unexpected if not name.startswith(dropped) and not name.endswith(".k_proj.bias")]
    new = [name for name in missing if not name.startswith(added) and "position_index" not in name]
    assert not left, f"the model has no parameters for these weights: {left}"
    assert not new, f"the encoder lacks these weights: {new}"


def _resized_bias(table: torch.Tensor, wanted: torch.Tensor, num_extra: int) -> torch.Tensor:
    old, new = ((math.isqrt(len(rows) - num_extra) + 1) // 2 for rows in (table, wanted))
    return resize_relative_bias(table, (old, old), (new, new))

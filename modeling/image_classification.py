"""Classifiers on pre-trained encoders, of a kind that leaves as a native model of transformers.

Papers: He et al. 2021 (MAE), arXiv:2111.06377, App. A.1; Bao et al. 2021 (BEiT), arXiv:2106.08254, Sec. 3.1; Xie et
al. 2021 (SimMIM), arXiv:2111.09886, Sec. 4.1.
Differs from transformers: a plain ViT is trained as a BEiT with absolute positions and without LayerScale, which is
the same function (a ViT's key bias drops out of the softmax), and which can drop paths and pool the mean of patches.
Shapes: D width, L labels.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
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
    ViTForImageClassification,
    ViTModel,
)

from .encoders import BeitEncoder, PositionBias, SwinEncoder, SwinStages
from .mae import MaeEncoder
from .patches import patch_grid
from .positions import resize_positions, resize_relative_bias

# Families of encoders, and what their classifiers can read; the first one where nothing is said.
POOLINGS: dict[str, tuple[str, ...]] = {
    "vit": ("mean", "class"),
    "vit_mae": ("mean", "class"),
    "beit": ("mean", "class"),
    "data2vec-vision": ("mean", "class"),
    "swin": ("mean",),
    "deit": ("class",),
    "dinov2": ("class and mean",),
}
_SHARED_BY_VIT_AND_BEIT = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range"),
    *("image_size", "patch_size", "num_channels"),
)
_LUMA = (0.299, 0.587, 0.114)  # Pillow's weights of red, green and blue in a gray image
_HEAD_STD = {"swin": 0.02}
_DEFAULT_HEAD_STD = 2e-5  # MAE's, and .02 times BEiT's factor of .001
_BATCH_NORM_EPS = 1e-6


class BeitClassifier(BeitForImageClassification):
    """A BeitForImageClassification, name for name, whose position biases are looked up without interpolation."""

    def __init__(self, config: BeitConfig):
        super().__init__(config)
        for layer in self.beit.layers:
            if layer.relative_position_bias is not None:
                layer.relative_position_bias = PositionBias(config)
        self.post_init()


class SwinClassifier(SwinForImageClassification):
    """A SwinForImageClassification, name for name, with drop path on both branches of a block."""

    def __init__(self, config: SwinConfig):
        super().__init__(config)
        self.swin.encoder = SwinStages(config, self.swin.embeddings.patch_grid)
        if stages := self.swin.encoder.clamped_stages:
            sizes = ", ".join(f"{h} x {w}" for h, w in stages)
            raise ValueError(
                f"a window of {config.window_size} is larger than the map of stages with {sizes} tokens, which "
                "transformers' Swin cannot run; use a larger --image_size"
            )
        self.post_init()


def open_encoder(name: str, config: PreTrainedConfig) -> PreTrainedModel:
    """The weights of a folder or of the Hub, without a pooler or a head that they may come with.

    Raises:
        ValueError: not of one of the families above, or not whole.
    """
    check_family(name, config)
    # A ViTMAEModel would hide patches at random, even in evaluation.
    opener: Any = ViTModel if config.model_type == "vit_mae" else AutoModel
    plain = {"add_pooling_layer": False} if config.model_type in ("vit", "vit_mae", "deit") else {}
    try:
        encoder, info = opener.from_pretrained(name, dtype=torch.float32, output_loading_info=True, **plain)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"--model {name} cannot be opened: {str(error).partition(chr(10))[0]}") from None
    missing = [key for key in info["missing_keys"] if not key.startswith("pooler.")]
    if missing:
        raise ValueError(f"--model {name} lacks weights of a {config.model_type} encoder: {', '.join(missing[:5])}")
    positions = getattr(encoder.embeddings, "position_embeddings", None)
    if positions is not None and not positions.any():
        raise ValueError(
            f"--model {name}: all position embeddings are zero, so it cannot tell where a patch lies; transformers "
            "makes a ViTMAEForPreTraining that way from its config, and training does not change it"
        )
    return encoder


def random_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """The same architecture as pre-training would start it: sine-cosine positions for a ViT, and so on."""
    check_family("--model", config)
    own: Any = copy.deepcopy(config)
    if own.model_type in ("vit", "vit_mae"):
        return MaeEncoder(ViTConfig(**_shared(own)), add_pooling_layer=False)
    if own.model_type == "beit":
        own.use_mask_token = True
        return BeitEncoder(own)
    return SwinEncoder(own) if own.model_type == "swin" else AutoModel.from_config(own)


def build_classifier(
    encoder: PreTrainedModel, labels: Sequence[str], *, image_size: int, pooling: str, drop_path_rate: float
) -> PreTrainedModel:
    """A classifier with the encoder's weights, for color images of `image_size` pixels; only the head is new.

    Raises:
        ValueError: this family's classifier cannot read that, or not at this size.
    """
    config = _classifier_config(encoder.config, image_size, pooling)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    config.problem_type = "single_label_classification"
    if hasattr(config, "drop_path_rate"):
        config.drop_path_rate = float(drop_path_rate)
    elif drop_path_rate:
        raise ValueError(f"--drop_path {drop_path_rate}: transformers' {config.model_type} cannot drop paths; use 0")
    classes: dict[str, Any] = {"beit": BeitClassifier, "swin": SwinClassifier}
    build = classes.get(config.model_type, AutoModelForImageClassification.from_config)
    classifier: Any = build(config)
    _give_weights(classifier, encoder)
    nn.init.trunc_normal_(classifier.classifier.weight, std=_HEAD_STD.get(config.model_type, _DEFAULT_HEAD_STD))
    nn.init.zeros_(classifier.classifier.bias)
    return classifier


def add_batch_norm(classifier: Any) -> None:
    """For a linear probe: features are standardized before the head. `native_classifier` folds the two into one."""
    head = classifier.classifier
    nn.init.trunc_normal_(head.weight, std=0.01)
    norm = nn.BatchNorm1d(head.in_features, eps=_BATCH_NORM_EPS, affine=False)
    classifier.classifier = nn.Sequential(norm, head)


@torch.no_grad()
def native_classifier(classifier: PreTrainedModel) -> PreTrainedModel:
    """The same function as a class of transformers; a ViT read by its class token is a ViTForImageClassification."""
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
    native: Any = (
        ViTForImageClassification if config.model_type == "vit" else AutoModelForImageClassification.from_config
    )
    model: PreTrainedModel = native(config)
    model.load_state_dict(state, strict=True)
    _compare(classifier, model.eval())
    return model


def is_plain_vit(config: PreTrainedConfig) -> bool:
    """Whether this BEiT is a ViT: positions only absolute, no LayerScale."""
    has_bias = getattr(config, "use_relative_position_bias", True) or config.use_shared_relative_position_bias
    return not has_bias and config.use_absolute_position_embeddings and config.layer_scale_init_value == 0


def _compare(classifier: PreTrainedModel, native: PreTrainedModel) -> None:
    shape = (2, 3, native.config.image_size, native.config.image_size)
    probe = torch.linspace(-2, 2, 2 * shape[1] * shape[2] * shape[3]).reshape(shape)
    was_training = classifier.training
    ours = classifier.eval()(probe.to(classifier.device)).logits.float().cpu()
    classifier.train(was_training)
    difference, size = (native(probe).logits - ours).abs().max().item(), ours.abs().max().item()
    assert difference <= 1e-4 * max(size, 1.0), f"the native classifier's logits differ by {difference:.3g}"


def check_family(name: str, config: PreTrainedConfig) -> None:
    if config.model_type not in POOLINGS:
        raise ValueError(
            f"--model {name} is a {config.model_type}, expected an encoder of these: {', '.join(sorted(POOLINGS))}"
        )


def _shared(config: PreTrainedConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _SHARED_BY_VIT_AND_BEIT}


def _classifier_config(encoder_config: PreTrainedConfig, image_size: int, pooling: str) -> PreTrainedConfig:
    possible = POOLINGS[encoder_config.model_type]
    if pooling not in possible:
        raise ValueError(f"--pooling {pooling}: the classifier of a {encoder_config.model_type} reads {possible[0]}")
    patch_grid(image_size, encoder_config.patch_size)
    config = copy.deepcopy(encoder_config)
    if config.model_type in ("vit", "vit_mae"):
        config = BeitConfig(**_shared(config), use_absolute_position_embeddings=True, layer_scale_init_value=0.0)
    if config.model_type == "beit":
        # Every block gets a table of its own, as in the authors' fine-tuning.
        config.use_relative_position_bias |= config.use_shared_relative_position_bias
        config.use_shared_relative_position_bias = False
        config.use_mask_token = False
    if config.model_type in ("beit", "data2vec-vision"):
        config.use_mean_pooling = pooling == "mean"
    if config.model_type == "swin":
        config.window_size = _window_size(config, image_size)
    config.image_size, config.num_channels = image_size, 3
    config.architectures = []
    for name in ("auto_map", "mim_method", "mim_recipe"):  # facts about the encoder's folder
        vars(config).pop(name, None)
    return config


def _window_size(config: PreTrainedConfig, image_size: int) -> int:
    """Grows or shrinks with the image where that gives a whole number, as from 192 pixels and 6 to 224 and 7."""
    old_size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    window, rest = divmod(config.window_size * image_size, old_size)
    return config.window_size if rest else window


def _give_weights(classifier: PreTrainedModel, encoder: PreTrainedModel) -> None:
    """Tables are resized, a shared table goes to every block, and a gray encoder learns to see colors as gray."""
    target = classifier.base_model.state_dict()
    state = dict(encoder.state_dict())
    shared = state.pop("shared_position_bias.relative_position_bias_table", None)
    for name, wanted in target.items():
        if name.endswith("relative_position_bias_table"):
            table = state.get(name, shared)
            assert table is not None, name
            state[name] = _resized_bias(table, wanted, num_extra=0 if classifier.config.model_type == "swin" else 3)
        elif name.endswith("position_embeddings"):
            grids = [
                patch_grid(config.image_size, config.patch_size) for config in (encoder.config, classifier.config)
            ]
            state[name] = resize_positions(state[name], *grids)
        elif name.endswith("patch_embeddings.projection.weight") and state[name].shape[1] == 1:
            state[name] = state[name] * state[name].new_tensor(_LUMA).view(1, 3, 1, 1)
    missing, unexpected = classifier.base_model.load_state_dict(state, strict=False)
    dropped = ("embeddings.mask_token", "pooler.", "layernorm.")  # what a classifier may have no use for
    added = ("pooler.layernorm.", "layernorm.")  # the norm before the head is new where the encoder ends without it
    left = [name for name in unexpected if not name.startswith(dropped) and not name.endswith(".k_proj.bias")]
    new = [name for name in missing if not name.startswith(added) and "position_index" not in name]
    assert not left, f"weights without a place in the classifier: {left}"
    assert not new, f"weights that the encoder does not have: {new}"


def _resized_bias(table: torch.Tensor, wanted: torch.Tensor, num_extra: int) -> torch.Tensor:
    old, new = ((math.isqrt(len(rows) - num_extra) + 1) // 2 for rows in (table, wanted))
    return resize_relative_bias(table, (old, old), (new, new))

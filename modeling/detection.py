"""An object detector on a pre-trained ViT, exported as LwDetrForObjectDetection of transformers.

Papers: Chen et al. 2024 (LW-DETR), arXiv:2406.03459; Li et al. 2022 (ViTDet), arXiv:2203.16527, Sec. 3: a plain ViT
with windows and a few global blocks; Chen et al. 2022 (Group DETR), arXiv:2207.13085.
Code: Atten4Vis/LW-DETR at d5e6e6c, scripts/ (sizes of the detector); facebookresearch/detectron2/projects/ViTDet at
02b5c4e (global blocks).
Why this class: it contains a windowed pre-norm ViT, so that the blocks of the encoder are carried over exactly, its
image processor needs no torchvision, and its attention no compiled code. With one window it takes any patch size and
any image of whole patches, so that small images need no other class.
Differs: The ViT has no class token and no final norm: features equal those of the encoder's patches without its class
token (ViTDet leaves it out too). There is no drop path. BatchNorm keeps statistics that are measured once, before
training: those of a batch would depend on gradient accumulation and on the number of processes. The first boxes are as
large as the median box of the training images, there a twentieth of the image.
Shapes: B images, Q queries, G groups of them in training, L layers, K classes, C channels, H W pixels.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LwDetrConfig, LwDetrForObjectDetection, LwDetrViTConfig, PreTrainedConfig
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss

from .patches import gray_to_rgb, patch_grid
from .positions import resize_positions

MODEL_TYPES = ("vit", "vit_mae", "deit", "beit", "data2vec-vision", "dinov2")
NUM_BEST = 100  # boxes that are kept of an image, as by the image processor

_NUM_TAPS = 4  # quarters of the encoder; the last block of each is global, and the detector reads its output
_SIDES = (4, 2)  # windows per side of an image that transformers allows
_BIAS = -math.log(99)  # of the classifiers: a probability of 1%
_SIDE_OF_PROPOSALS = 0.05  # of the image, before it is refined; LwDetrModel.gen_encoder_output_proposals
_MOMENTUM = 0.1  # PyTorch's
_LARGEST_LOGIT = 15.0  # in the loss: a float32 sigmoid of more than 16 is 1, whose loss would be infinite
_SMALLEST_VARIANCE = (
    0.01  # of a channel, as a fraction of the mean: one that is constant at the start is not amplified
)
_NAMES = (  # of transformers' ViT, BEiT and DINOv2, and of the ViT in the detector
    (r"^embeddings\.patch_embeddings\.projection\.", "embeddings.projection."),
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attention\.attention\.(\w)\w+\.", r".attention.\1_proj."),  # of DINOv2 before 5.23
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
    (r"\.mlp\.", ".intermediate."),
    (r"\.(?:lambda_|layer_scale)(\d)(?:\.lambda1)?$", r".gamma_\1"),
)


class Detector(LwDetrForObjectDetection):
    """A LwDetrForObjectDetection with the same parameter names, whose loss does not depend on how images are batched.

    Its `base_model` is the ViT. Differs from transformers, whose loss is a sum that is divided by the number of boxes
    of a micro-batch: it is divided by that of a step, where an image without boxes counts as one. In evaluation it is
    the mean over the images.
    """

    base_model_prefix = "model.backbone.backbone"

    @property
    def base_model(self) -> nn.Module:
        """The encoder, without the layers between it and the decoder."""
        model: Any = self.model
        encoder: nn.Module = model.backbone.backbone
        return encoder

    def train(self, mode: bool = True) -> "Detector":
        super().train(mode)
        for norm in self._norms():
            norm.eval()
        return self

    @torch.no_grad()
    def calibrate(self, batches: Iterable[Tensor]) -> None:
        """Set the statistics of all BatchNorms to those of standardized training images (B, C, H, W)."""
        self.eval()
        norms = self._norms()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the mean over the batches
            norm.training = True
        for pixel_values in batches:
            self(pixel_values)
        for norm in norms:
            norm.momentum = _MOMENTUM
            norm.eval()
            variance: Any = norm.running_var
            variance.clamp_(min=_SMALLEST_VARIANCE * variance.mean().item())

    def _norms(self) -> list[nn.BatchNorm2d]:
        return [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]

    def loss_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Return by what the sum over the boxes of a batch is divided."""
        return {"loss": _count(batch["targets"])}

    def loss_function(self, *outputs: Any, **kwargs: Any) -> tuple[Tensor, None, None]:
        """Return the loss, as called by the parent; its auxiliary losses are always used."""
        _, labels, _, _, _, classes, boxes, proposed_classes, proposed_boxes = outputs
        found = [*zip(classes, boxes, strict=True), (proposed_classes, proposed_boxes)]  # (B, GQ, K), (B, GQ, 4)
        if self.training:
            return self._loss(found, labels), None, None
        each = [
            self._loss([(classes[[i]], boxes[[i]]) for classes, boxes in found], [target])
            for i, target in enumerate(labels)
        ]
        return torch.stack(each).mean(), None, None

    def _loss(self, found: Sequence[tuple[Tensor, Tensor]], targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Return the loss of predicted classes (B, GQ, K) and boxes (B, GQ, 4), summed over the layers."""
        config = self.config
        matcher = LwDetrHungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
        num_groups = config.group_detr if self.training else 1
        losses = LwDetrImageLoss(matcher, config.num_labels, config.focal_alpha, [], num_groups)
        total = torch.zeros((), device=found[0][0].device)
        for logits, boxes in found:
            if not boxes.isfinite().all():  # stops the training with the reason; the matching would fail before
                return sum((logits.sum() + boxes.sum() for logits, boxes in found), total)
            bounded = logits.float().clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)
            outputs = {"logits": bounded, "pred_boxes": boxes.float()}
            indices = matcher(outputs, targets, num_groups)
            parts = losses.loss_labels(outputs, targets, indices, 1) | losses.loss_boxes(outputs, targets, indices, 1)
            total = (
                total
                + config.class_loss_coefficient * parts["loss_ce"]
                + config.bbox_loss_coefficient * parts["loss_bbox"]
                + config.giou_loss_coefficient * parts["loss_giou"]
            )
        return total / (num_groups * _count(targets))


def _count(targets: Sequence[Mapping[str, Tensor]]) -> int:
    return sum(max(1, len(target["class_labels"])) for target in targets)


def build_detector(
    encoder: Any, labels: Sequence[str], *, image_size: int, num_queries: int, box_size: tuple[float, float]
) -> Detector:
    """Return a detector for square color images with the encoder's weights and everything else new.

    Args:
        num_queries: The largest number of objects that can be found in an image; at most the number of places.
        box_size: Width and height of the boxes before any training, as fractions of the image.

    Raises:
        ValueError: If the ViT of transformers' detector cannot hold the encoder, or the image size does not fit.
    """
    check_encoder(encoder.config)
    config = _config(encoder.config, image_size, num_queries)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    detector = Detector(config)
    for head in (detector.class_embed, *detector.model.enc_out_class_embed):
        nn.init.constant_(head.bias, _BIAS)
    for mlp in (detector.bbox_embed, *detector.model.enc_out_bbox_embed):  # boxes start as the proposals
        nn.init.zeros_(mlp.layers[-1].weight)
        nn.init.zeros_(mlp.layers[-1].bias)
    # Boxes that have to grow from a twentieth of the image to half of it overshoot to several times the image.
    for mlp in detector.model.enc_out_bbox_embed:
        with torch.no_grad():
            mlp.layers[-1].bias[2:] = torch.log(torch.tensor(box_size) / _proposal_side(config))
    nn.init.zeros_(detector.model.reference_point_embed.weight)
    _copy_weights(detector.base_model, encoder)
    return detector


def check_encoder(config: PreTrainedConfig) -> None:
    """Raise ValueError if the ViT of transformers' detector cannot hold an encoder with this config."""
    problem = None
    if config.model_type not in MODEL_TYPES:
        problem = f"is a {config.model_type}, expected one of {', '.join(MODEL_TYPES)}"
    elif getattr(config, "use_relative_position_bias", False) or getattr(
        config, "use_shared_relative_position_bias", False
    ):
        problem = "has relative position biases, which the detector's ViT has not: use one with absolute positions"
    elif getattr(config, "use_swiglu_ffn", False):
        problem = "has gated layers (SwiGLU), which the detector's ViT has not"
    elif _mlp_ratio(config) % 1:
        problem = f"has an MLP {_mlp_ratio(config):g} times as wide as the blocks; expected a whole number"
    if problem:
        raise ValueError(f"`model` {config.name_or_path} {problem}")


def native_detector(detector: Detector) -> LwDetrForObjectDetection:
    """Return the same function as a class of transformers."""
    native: LwDetrForObjectDetection = LwDetrForObjectDetection(detector.config)
    native.load_state_dict({name: tensor.float().cpu() for name, tensor in detector.state_dict().items()}, strict=True)
    native.eval()
    return native


def best_boxes(logits: Tensor, boxes: Tensor) -> Tensor:
    """Return left, top, right, bottom, score and class of the best boxes, (B, at most NUM_BEST, 6).

    Args:
        logits: (B, Q, K).
        boxes: (B, Q, 4), center, width and height as fractions of the image.
    """
    num_classes = logits.shape[2]
    scores = logits.float().sigmoid().flatten(1)
    best, places = scores.topk(min(NUM_BEST, scores.shape[1]), dim=1)
    centers, halves = boxes.float()[..., :2], boxes.float()[..., 2:] / 2
    corners = torch.cat([centers - halves, centers + halves], dim=2)
    chosen = corners.gather(1, (places // num_classes)[..., None].expand(-1, -1, 4))
    return torch.cat([chosen, best[..., None], (places % num_classes)[..., None].float()], dim=2)


def num_windows_per_side(image_size: int, encoder_config: Any) -> int:
    """Return into how many windows a side of an image is cut; windows are no smaller than the encoder's own images."""
    side = patch_grid(image_size, encoder_config.patch_size)[0]
    own = max(patch_grid(encoder_config.image_size, encoder_config.patch_size))
    fits = (n for n in _SIDES if side % n == 0 and side // n >= own and image_size % n**3 == 0)
    return next(fits, 1)


def _config(encoder_config: Any, image_size: int, num_queries: int) -> LwDetrConfig:
    width, num_blocks = encoder_config.hidden_size, encoder_config.num_hidden_layers
    side = patch_grid(image_size, encoder_config.patch_size)[0]
    num_sides = num_windows_per_side(image_size, encoder_config)
    taps = sorted({math.ceil(num_blocks * quarter / _NUM_TAPS) for quarter in range(1, _NUM_TAPS + 1)})  # from 1
    backbone = LwDetrViTConfig(  # type: ignore[call-arg]
        hidden_size=width,
        num_hidden_layers=num_blocks,
        num_attention_heads=encoder_config.num_attention_heads,
        mlp_ratio=int(_mlp_ratio(encoder_config)),
        hidden_act=encoder_config.hidden_act,
        layer_norm_eps=encoder_config.layer_norm_eps,
        initializer_range=encoder_config.initializer_range,
        image_size=image_size,
        pretrain_image_size=image_size,  # the position table is resized once
        patch_size=encoder_config.patch_size,
        num_channels=3,
        qkv_bias=getattr(encoder_config, "qkv_bias", True),
        window_block_indices=[n for n in range(num_blocks) if num_sides > 1 and n + 1 not in taps],
        num_windows=num_sides**2,
        out_indices=taps,
    )
    # The sizes of LW-DETR xlarge, of tiny to medium, and for narrower encoders half of these.
    wide, usual, narrow = (384, 12, 24, 2048), (256, 8, 16, 2048), (128, 4, 8, 512)
    d_model, num_heads, num_cross_heads, ffn_dim = wide if width >= 768 else usual if width >= 384 else narrow
    scales, num_points = ([2.0, 0.5], 4) if width >= 768 else ([1.0 if side >= 32 else 2.0], 2)
    num_places = sum(int(side * scale) ** 2 for scale in scales)
    return LwDetrConfig(
        backbone_config=backbone,
        projector_scale_factors=scales,
        d_model=d_model,
        decoder_self_attention_heads=num_heads,
        decoder_cross_attention_heads=num_cross_heads,
        decoder_ffn_dim=ffn_dim,
        decoder_n_points=num_points,
        num_queries=min(num_queries, num_places),
    )


def _proposal_side(config: LwDetrConfig) -> float:
    """Return the side of a proposal of transformers, doubled from each scale to the next: the middle of them."""
    return float(_SIDE_OF_PROPOSALS * 2 ** ((len(config.projector_scale_factors) - 1) / 2))


def _mlp_ratio(config: Any) -> float:
    return float(config.mlp_ratio if config.model_type == "dinov2" else config.intermediate_size / config.hidden_size)


def _copy_weights(vit: Any, encoder: Any) -> None:
    """Copy the encoder's weights; a bias of the keys cancels in the softmax, and the detector has none."""
    state: dict[str, Tensor] = {}
    dropped = ("embeddings.cls_token", "embeddings.mask_token", "embeddings.distillation_token")
    for name, tensor in encoder.state_dict().items():
        for pattern, replacement in _NAMES:
            name = re.sub(pattern, replacement, name)
        if not name.startswith((*dropped, "layernorm.", "pooler.")) and not name.endswith(".k_proj.bias"):
            state[name] = tensor
    old, new = (patch_grid(config.image_size, config.patch_size) for config in (encoder.config, vit.config))
    table = state["embeddings.position_embeddings"]
    if (num_extra := table.shape[1] - old[0] * old[1]) > 1:  # of a DeiT; the detector expects and ignores one
        table = table[:, num_extra - 1 :]
    elif not num_extra:
        table = torch.cat([torch.zeros_like(table[:, :1]), table], dim=1)
    state["embeddings.position_embeddings"] = resize_positions(table, old, new)
    if state["embeddings.projection.weight"].shape[1] == 1:
        state["embeddings.projection.weight"] = gray_to_rgb(state["embeddings.projection.weight"])
    missing, unexpected = vit.load_state_dict(state, strict=False)
    assert not unexpected, f"the detector's ViT has no parameters for these weights: {unexpected}"
    scales = [name for name in missing if re.search(r"\.gamma_[12]$", name)]
    assert scales == missing, f"the encoder lacks these weights: {missing}"
    for name in scales:  # without LayerScale
        nn.init.ones_(vit.get_parameter(name))

"""An object detector on a pre-trained ViT, exported as RfDetrForObjectDetection of transformers.

Papers: Robinson et al. 2025 (RF-DETR), arXiv:2511.09554: the detector of LW-DETR on a DINOv2; Chen et al. 2024
(LW-DETR), arXiv:2406.03459; Li et al. 2022 (ViTDet), arXiv:2203.16527, Sec. 3: a plain ViT with windows and a few
global blocks; Chen et al. 2022 (Group DETR), arXiv:2207.13085.
Code: roboflow/rf-detr at 35ac6ab, rfdetr/config.py (sizes of the detector, windows, outputs of four blocks).
Why this class: it contains a pre-norm ViT with its class token and final norm, so that the encoder is carried over
exactly. The ViT of LW-DETR has neither, and learned no classes from a DINOv2
(benchmarks/dense_detection-dinov2_x86_64-cpu2_2026-11-27.md). Its attention needs no compiled code. With one window it
takes any patch size and any image of whole patches, so that small images need no other class.
Differs: Nothing is dropped in training (dropout 0.1 in transformers' defaults, no drop path). The first boxes are as
large as the median box of the training images, there a twentieth of the image.
Shapes: B images, Q queries, G groups of them in training, L layers, K classes, C channels, H W pixels.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, RfDetrConfig, RfDetrForObjectDetection
from transformers.loss.loss_lw_detr import LwDetrHungarianMatcher, LwDetrImageLoss
from transformers.models.rf_detr.configuration_rf_detr import RfDetrDinov2Config

from .patches import gray_to_rgb, patch_grid
from .positions import resize_positions

MODEL_TYPES = ("vit", "vit_mae", "beit", "data2vec-vision", "dinov2")
NUM_BEST = 100  # boxes that are kept of an image, as by the image processor

_NUM_TAPS = 4  # quarters of the encoder; the detector reads the output of the last block of each
_SIDES = (4, 2)  # windows per side of an image: RF-DETR base and those after it
_BIAS = -math.log(99)  # of the classifiers: a probability of 1%
_SIDE_OF_PROPOSALS = 0.05  # of the image, before it is refined; RfDetrModel.gen_encoder_output_proposals
_LARGEST_LOGIT = 15.0  # in the loss: a float32 sigmoid of more than 16 is 1, whose loss would be infinite
_NAMES = (  # those of transformers' ViT, BEiT and DINOv2, and of RF-DETR before 5.23, as RF-DETR has them today
    (r"^(?:encoder\.)?layers?\.(\d+)\.", r"encoder.layer.\1."),
    (r"\.attention\.attention\.(\w)\w+\.", r".attention.\1_proj."),
    (r"\.attention\.output\.dense\.", ".attention.o_proj."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"\.output\.dense\.", ".mlp.fc2."),
    (r"\.lambda_(\d)$", r".layer_scale\1.lambda1"),
)


class Detector(RfDetrForObjectDetection):
    """A RfDetrForObjectDetection with the same parameter names, whose loss does not depend on how images are batched.

    Its `base_model` is the ViT. Differs from transformers, whose loss is a sum that is divided by the number of boxes
    of a micro-batch: it is divided by that of a step, where an image without boxes counts as one. In evaluation it is
    the mean over the images.
    """

    base_model_prefix = "model.backbone.backbone"
    supports_gradient_checkpointing = True

    def __init__(self, config: RfDetrConfig):
        super().__init__(config)
        if not self.base_model.config.apply_layernorm:  # every trained parameter needs a gradient on many processes
            self.base_model.layernorm.requires_grad_(False)

    @property
    def base_model(self) -> Any:
        """The encoder, without the layers between it and the decoder."""
        return self.model.backbone.backbone

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
        num_queries: The largest number of objects that can be found in an image; at most the number of patches.
        box_size: Width and height of the boxes before any training, as fractions of the image.

    Raises:
        ValueError: If the ViT of transformers' detector cannot hold the encoder, or the image size does not fit.
    """
    check_encoder(encoder.config)
    config = _config(encoder, image_size, num_queries)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: number for number, label in enumerate(labels)}
    detector = Detector(config)
    # As the authors': transformers 5.17 draws the heads of the proposals at random, and 5.23 the reference points too.
    for head in (detector.class_embed, *detector.model.enc_out_class_embed):
        nn.init.constant_(head.bias, _BIAS)
    for mlp in (detector.bbox_embed, *detector.model.enc_out_bbox_embed):  # boxes start as the proposals
        nn.init.zeros_(mlp.layers[-1].weight)
        nn.init.zeros_(mlp.layers[-1].bias)
    # Boxes that have to grow from a twentieth of the image to half of it overshoot to several times the image.
    for mlp in detector.model.enc_out_bbox_embed:
        with torch.no_grad():
            mlp.layers[-1].bias[2:] = torch.log(torch.tensor(box_size) / _SIDE_OF_PROPOSALS)
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
    elif _mlp_ratio(config) % 1:
        problem = f"has an MLP {_mlp_ratio(config):g} times as wide as the blocks; expected a whole number"
    if problem:
        raise ValueError(f"`model` {config.name_or_path} {problem}")


def native_detector(detector: Detector) -> RfDetrForObjectDetection:
    """Return the same function as a class of transformers."""
    native: RfDetrForObjectDetection = RfDetrForObjectDetection(detector.config)
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
    return next((n for n in _SIDES if side % n == 0 and side // n >= own), 1)


def num_windowed_blocks(encoder_config: Any) -> int:
    """Return how many blocks see windows, where an image has several: all but those that follow an output."""
    num_blocks: int = encoder_config.num_hidden_layers
    return num_blocks - len(_taps(num_blocks)) + 1


def _taps(num_blocks: int) -> list[int]:
    """Return the blocks, counted from 1, whose outputs the detector reads: the last one of each quarter."""
    return sorted({math.ceil(num_blocks * quarter / _NUM_TAPS) for quarter in range(1, _NUM_TAPS + 1)})


def _config(encoder: Any, image_size: int, num_queries: int) -> RfDetrConfig:
    encoder_config = encoder.config
    width, num_blocks = encoder_config.hidden_size, encoder_config.num_hidden_layers
    backbone = RfDetrDinov2Config(  # type: ignore[call-arg]
        hidden_size=width,
        num_hidden_layers=num_blocks,
        num_attention_heads=encoder_config.num_attention_heads,
        mlp_ratio=int(_mlp_ratio(encoder_config)),
        use_swiglu_ffn=getattr(encoder_config, "use_swiglu_ffn", False),
        hidden_act=encoder_config.hidden_act,
        layer_norm_eps=encoder_config.layer_norm_eps,
        initializer_range=encoder_config.initializer_range,
        image_size=image_size,  # the position table is resized once
        patch_size=encoder_config.patch_size,
        num_channels=3,
        qkv_bias=getattr(encoder_config, "qkv_bias", True),
        use_mask_token=False,
        apply_layernorm=isinstance(encoder.layernorm, nn.LayerNorm),
        num_windows=num_windows_per_side(image_size, encoder_config),
        out_indices=_taps(num_blocks),
    )
    # The sizes of RF-DETR on a ViT-B, on a ViT-S, and for narrower encoders half of these, with a quarter of the MLP.
    wide, usual, narrow = (384, 12, 24, 2048), (256, 8, 16, 2048), (128, 4, 8, 512)
    d_model, num_heads, num_cross_heads, ffn_dim = wide if width >= 768 else usual if width >= 384 else narrow
    return RfDetrConfig(
        backbone_config=backbone,
        d_model=d_model,
        decoder_self_attention_heads=num_heads,
        decoder_cross_attention_heads=num_cross_heads,
        decoder_ffn_dim=ffn_dim,
        decoder_n_points=4 if width >= 768 else 2,
        dropout=0.0,
        num_queries=num_queries,
    )


def _mlp_ratio(config: Any) -> float:
    return float(config.mlp_ratio if config.model_type == "dinov2" else config.intermediate_size / config.hidden_size)


def _copy_weights(vit: Any, encoder: Any) -> None:
    """Copy the encoder's weights."""
    own = {_canonical(name): tensor for name, tensor in vit.state_dict().items()}
    state = {_canonical(name): tensor for name, tensor in encoder.state_dict().items()}
    old, new = (patch_grid(config.image_size, config.patch_size) for config in (encoder.config, vit.config))
    table = "embeddings.position_embeddings"
    state[table] = resize_positions(state[table], old, new)
    kernel = "embeddings.patch_embeddings.projection.weight"
    if state[kernel].shape[1] == 1:
        state[kernel] = gray_to_rgb(state[kernel])
    for name, tensor in own.items():
        if name in state:
            tensor.copy_(state[name])
        elif name.endswith(".k_proj.bias"):  # it cancels in the softmax, and BEiT has none
            tensor.zero_()
        elif name.endswith(".lambda1"):  # without LayerScale
            tensor.fill_(1)
        else:
            assert name.startswith("layernorm."), f"the encoder lacks {name}"
    unused = set(state) - set(own) - {"embeddings.mask_token"}
    unused = {name for name in unused if not name.startswith("pooler.")}
    assert not unused, f"the detector's ViT has no parameters for these weights: {sorted(unused)}"


def _canonical(name: str) -> str:
    for pattern, replacement in _NAMES:
        name = re.sub(pattern, replacement, name)
    return name

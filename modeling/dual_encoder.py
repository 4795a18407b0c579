"""An encoder of images and one of texts, whose class tokens two Linear layers embed in one space, and their loss.

Papers: Wang et al. 2022 (BEiT-3), arXiv:2208.10442, Sec. 3.2; Radford et al. 2021 (CLIP), arXiv:2103.00020, Fig. 3.
Shapes: B pairs.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, VisionTextDualEncoderConfig, VisionTextDualEncoderModel

from .multiway import POOLER_SCALE

_POSITIONS_AFTER_PADDING = ("roberta", "camembert", "mpnet")  # begin after the number of the padding token


def build_dual_encoder(vision: Any, text: Any, projection_size: int) -> VisionTextDualEncoderModel:
    """Return transformers' model of both encoders, with new projections."""
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision.config, text.config, projection_dim=projection_size
    )
    model = VisionTextDualEncoderModel(config=config, vision_model=vision, text_model=text)
    # The head is a Linear on each class token; a pooler of a text encoder would be a second one.
    if getattr(model.text_model, "pooler", None) is not None:
        model.text_model.pooler.requires_grad_(False)
    return model


def contrastive_loss(similarities: Tensor, labels: Tensor, image_numbers: Tensor | None = None) -> Tensor:
    """Return the mean cross entropy of finding the text of each image, and the image of each text, in (B, B).

    Args:
        labels: (B,), the number of each text.
        image_numbers: (B,), the number of each image; None if all images differ.
    """
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    is_same = labels[:, None] == labels
    if image_numbers is not None:
        is_same |= image_numbers[:, None] == image_numbers
    scores = similarities.masked_fill(is_same & ~own, float("-inf"))
    targets = torch.arange(len(labels), device=labels.device)
    both = [torch.nn.functional.cross_entropy(each, targets) for each in (scores, scores.T)]
    return torch.stack(both).mean()


def num_positions(config: Any) -> int | None:
    """Return how many tokens a text encoder has positions for; None if any number."""
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is None or getattr(config, "relative_attention", False):
        return None
    if any(kind in config.model_type for kind in _POSITIONS_AFTER_PADDING):
        return limit - (getattr(config, "pad_token_id", None) or 0) - 1
    return limit


def with_drop_path(encoder: Any, rate: float) -> Any:
    """Return the encoder with drop path, as far as its class has it."""
    if not hasattr(encoder.config, "drop_path_rate"):
        return encoder
    config = copy.deepcopy(encoder.config)
    config.drop_path_rate = rate
    fresh = AutoModel.from_config(config, dtype=torch.float32)
    fresh.load_state_dict(encoder.state_dict(), strict=True)
    return fresh


@torch.no_grad()
def with_pooler(encoder: Any) -> Any:
    """Return the encoder; if its file has no pooler, with one that passes the class token on, times `POOLER_SCALE`."""
    if getattr(encoder, "pooler", encoder) is not None:
        return encoder
    encoder.pooler = getattr(AutoModel.from_config(encoder.config, dtype=torch.float32), "pooler", None)
    dense = getattr(encoder.pooler, "dense", None)
    if isinstance(dense, torch.nn.Linear):  # followed by tanh
        dense.weight.copy_(POOLER_SCALE * torch.eye(*dense.weight.shape))
        torch.nn.init.zeros_(dense.bias)
        encoder.pooler.requires_grad_(False)
    return encoder


@torch.no_grad()
def pools(encoder: Any, inputs: dict[str, Any]) -> bool:
    """Return whether the encoder has an output for a whole image or text."""
    return getattr(encoder.eval()(**inputs), "pooler_output", None) is not None

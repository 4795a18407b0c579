"""Initialize a tokenizer from images, for runs that are too short to recover from a collapsed codebook.

Pixels are all positive, so with DALL-E's initialization one direction, the mean image, dominates the differences
between patches; one code wins everywhere, and it takes thousands of steps until others are used. Here the outputs of
each convolution of the encoder are first scaled to zero mean and unit std on real images (Salimans & Kingma 2016,
arXiv:1602.07868, Sec. 3). Then each code gets the features at one position, so that the logits are negative squared
distances, as in k-means.

Shapes: B images, K codes, D features, n positions.
"""

from typing import Any

import torch
from torch import nn

NUM_IMAGES = 256  # from which the codes are chosen
_NUM_IMAGES_FOR_SCALES = 64
# How much less likely a position is to choose the second-nearest code than its own, in nats, at temperature 1.
_LOGIT_GAP = 4.0


@torch.no_grad()
def start_from_images(tokenizer: Any, pixels: torch.Tensor, generator: torch.Generator) -> None:
    """Initialize `encoder` and `to_logits` from mapped pixels (B, C, H, W).

    Raises:
        ValueError: If the images have fewer positions than there are codes.
    """
    convolutions = [module for module in tokenizer.encoder.modules() if isinstance(module, nn.Conv2d)]
    _standardize_outputs(convolutions, lambda: tokenizer.encoder(pixels[:_NUM_IMAGES_FOR_SCALES]))
    maps = [tokenizer.encoder(part) for part in pixels.split(32)]  # (32, D, h, w) each
    features = torch.cat([part.movedim(1, -1).flatten(0, 2) for part in maps])  # (n, D)
    num_codes = tokenizer.vocab_size
    if len(features) < num_codes:
        raise ValueError(
            f"{len(pixels)} images have only {len(features):,} positions to initialize {num_codes:,} codes from: give "
            "more images, lower vocab_size, or set start_from_images to false"
        )
    mean, std = features.mean(0), features.std(0) + 1e-6  # (D,)
    features = (features - mean) / std
    order = torch.randperm(len(features), generator=generator)
    codes, others = features[order[:num_codes]], features[order[-num_codes:]]  # (K, D)
    nearest = torch.cdist(others, codes).square().topk(2, largest=False).values.mean()
    scale = nearest / _LOGIT_GAP
    weight = codes / scale / std  # -|f - code|^2 / (2 scale), up to a term that all codes share
    tokenizer.to_logits.weight.copy_(weight[:, :, None, None])
    tokenizer.to_logits.bias.copy_(-codes.square().sum(1) / (2 * scale) - weight @ mean)


def _standardize_outputs(convolutions: list[nn.Conv2d], run: Any) -> None:
    """Standardize the convolutions in the order in which `run` calls them, each on standardized inputs."""

    def standardize(module: nn.Conv2d, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        mean, std = output.mean((0, 2, 3)), output.std((0, 2, 3)) + 1e-6
        assert module.bias is not None
        module.weight.div_(std[:, None, None, None])
        module.bias.copy_((module.bias - mean) / std)
        return (output - mean[:, None, None]) / std[:, None, None]

    hooks = [convolution.register_forward_hook(standardize) for convolution in convolutions]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()

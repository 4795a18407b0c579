"""Feature maps of an encoder: the attention of its class token, and the principal components of its patches.

Shapes: B images, C channels, H, W height and width in pixels, h, w rows and columns of patches.
"""

import functools
from collections.abc import Sequence

import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor

from evaluation.features import FrozenEncoder
from evaluation.pictures import labeled_grid, shown
from evaluation.preprocessing import Preprocessor
from modeling.feature_panel import ATTENTION, COMPONENTS, enlarged, principal_colors
from modeling.feature_panel import class_attention as attention_to_patches


def feature_maps(
    encoder: FrozenEncoder, preprocessor: Preprocessor, pixel_values: Tensor, channels: Sequence[int] = (0, 1, 2)
) -> tuple[Image.Image, str]:
    """Draw input, attention and components of images (B, C, H, W) in columns, and describe these columns.

    Args:
        channels: One or three that are shown of images of any number of channels.
    """
    size = (pixel_values.shape[2], pixel_values.shape[3])
    views = {"input": shown(preprocessor.unnormalize(pixel_values), channels).expand(-1, 3, -1, -1)}
    attention = class_attention(encoder, pixel_values)
    if attention is not None:
        colors = torch.from_numpy(colormaps["viridis"](attention.numpy())[..., :3]).float()  # (B, h, w, 3)
        views[ATTENTION] = enlarged(colors.permute(0, 3, 1, 2), size)
    views[COMPONENTS] = enlarged(principal_colors(encoder(pixel_values).patches), size)
    footer = f"{len(pixel_values)} test images; similar colors: similar features"
    if attention is not None:
        footer += "; brighter: more attention"
    return labeled_grid(views, footer), f"From left to right: {'; '.join(views)}. {footer}."


def class_attention(encoder: FrozenEncoder, pixel_values: Tensor) -> Tensor | None:
    """Return the class token's attention (B, h, w) in the last block; None without a class token."""
    tokens = encoder(pixel_values)
    if tokens.class_token is None:
        return None
    rows, columns = tokens.patches.shape[1:3]
    run = functools.partial(encoder.outputs, pixel_values, output_attentions=True)
    return attention_to_patches(encoder.model, run, (rows, columns))

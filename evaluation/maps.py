"""Feature maps of an encoder: the attention of its class token, and the principal components of its patches.

Paper: Oquab et al. 2023 (DINOv2), arXiv:2304.07193, Fig. 1, for the components; backgrounds are kept here.
Shapes: B images, C channels, H, W height and width in pixels, h, w rows and columns of patches, D feature dimension,
T tokens, A heads.
"""

import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from evaluation.features import FrozenEncoder
from evaluation.pictures import labeled_grid
from evaluation.preprocessing import Preprocessor

ATTENTION = "attention of the class token, last block"
COMPONENTS = "first three principal components of the patches, as colors"


def feature_maps(encoder: FrozenEncoder, preprocessor: Preprocessor, pixel_values: Tensor) -> tuple[Image.Image, str]:
    """Draw input, attention and components of images (B, C, H, W) in columns, and describe these columns."""
    size = (pixel_values.shape[2], pixel_values.shape[3])
    views = {"input": preprocessor.unnormalize(pixel_values).expand(-1, 3, -1, -1)}
    attention = class_attention(encoder, pixel_values)
    if attention is not None:
        colors = torch.from_numpy(colormaps["viridis"](attention.numpy())[..., :3]).float()  # (B, h, w, 3)
        views[ATTENTION] = _enlarged(colors.permute(0, 3, 1, 2), size)
    views[COMPONENTS] = _enlarged(principal_colors(encoder(pixel_values).patches), size)
    footer = f"{len(pixel_values)} test images; similar colors: similar features"
    if attention is not None:
        footer += "; brighter: more attention"
    return labeled_grid(views, footer), f"From left to right: {'; '.join(views)}. {footer}."


def class_attention(encoder: FrozenEncoder, pixel_values: Tensor) -> Tensor | None:
    """Return the class token's attention (B, h, w) in the last block, averaged over heads, with maximum 1."""
    tokens = encoder(pixel_values)
    if tokens.class_token is None:
        return None
    implementation = encoder.config._attn_implementation
    encoder.model.set_attn_implementation("eager")  # other implementations do not return attentions
    try:
        attention = encoder.outputs(pixel_values, output_attentions=True).attentions[-1]  # (B, A, T, T)
    finally:
        encoder.model.set_attn_implementation(implementation)
    rows, columns = tokens.patches.shape[1:3]
    to_patches = attention[:, :, 0, -rows * columns :].mean(1).float().cpu()  # (B, h*w)
    return (to_patches / to_patches.amax(1, keepdim=True)).unflatten(1, (rows, columns))


def principal_colors(patches: Tensor) -> Tensor:
    """Return the first three principal components of patches (B, h, w, D) as colors (B, 3, h, w) in [0, 1]."""
    flat = patches.flatten(0, 2).double().cpu()
    flat = flat - flat.mean(0)
    directions = torch.linalg.svd(flat, full_matrices=False).Vh[:3]  # (3, D)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    values = flat @ (directions * largest.sign()).T  # (B*h*w, 3); signs are arbitrary, so fix them
    low, high = values.quantile(0.01, dim=0), values.quantile(0.99, dim=0)
    colors = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float()
    colors = F.pad(colors, (0, 3 - colors.shape[1]), value=0.5)  # if there are fewer than three
    return colors.unflatten(0, patches.shape[:3]).permute(0, 3, 1, 2)


def _enlarged(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="nearest")

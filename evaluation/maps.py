"""Pictures of what an encoder looks at: where its class token attends, and the main components of its patches.

The second is the picture of Oquab et al. 2023 (DINOv2), arXiv:2304.07193, Fig. 1, but keeps the backgrounds.
Shapes: B images, C channels, H W pixels, h w patches, D width, T tokens, A heads.
"""

import torch
from matplotlib import colormaps
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from evaluation.features import FrozenEncoder
from evaluation.pictures import labeled_grid
from evaluation.preprocessing import Preprocessor

ATTENTION = "class token's attention, last block"
COMPONENTS = "main three components of the patches, as colors"


def feature_maps(encoder: FrozenEncoder, preprocessor: Preprocessor, pixel_values: Tensor) -> tuple[Image.Image, str]:
    """A row for each of a few images (B, C, H, W), and what its columns are, in words.

    The image, what the class token attends to where there is one, and the components.
    """
    size = (pixel_values.shape[2], pixel_values.shape[3])
    views = {"input": preprocessor.colors(pixel_values).expand(-1, 3, -1, -1)}
    attention = class_attention(encoder, pixel_values)
    if attention is not None:
        views[ATTENTION] = _enlarged(_colored(attention), size)
    views[COMPONENTS] = _enlarged(principal_colors(encoder(pixel_values).patches), size)
    footer = f"{len(pixel_values)} test images; like colors: like features"
    if attention is not None:
        footer += "; bright: more attention"
    return labeled_grid(views, footer), f"From left to right: {'; '.join(views)}. {footer}."


def class_attention(encoder: FrozenEncoder, pixel_values: Tensor) -> Tensor | None:
    """(B, h, w): how much the class token attends to each patch in the last block, mean of the heads, largest 1."""
    tokens = encoder(pixel_values)
    if tokens.class_token is None:
        return None
    implementation = encoder.config._attn_implementation
    encoder.model.set_attn_implementation("eager")  # the others never hold the attention as numbers
    try:
        attention = encoder.outputs(pixel_values, output_attentions=True).attentions[-1]  # (B, A, T, T)
    finally:
        encoder.model.set_attn_implementation(implementation)
    rows, columns = tokens.patches.shape[1:3]
    to_patches = attention[:, :, 0, -rows * columns :].mean(1).float().cpu()  # (B, h*w)
    return (to_patches / to_patches.amax(1, keepdim=True)).unflatten(1, (rows, columns))


def principal_colors(patches: Tensor) -> Tensor:
    """(B, h, w, D) -> (B, 3, h, w) in [0, 1]: three directions in which the patches of these images differ most."""
    flat = patches.flatten(0, 2).double().cpu()
    flat = flat - flat.mean(0)
    directions = torch.linalg.svd(flat, full_matrices=False).Vh[:3]  # (3, D)
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    values = flat @ (directions * largest.sign()).T  # (B*h*w, 3); a direction's sign is arbitrary, so fix it
    low, high = values.quantile(0.01, dim=0), values.quantile(0.99, dim=0)
    colors = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1).float()
    colors = F.pad(colors, (0, 3 - colors.shape[1]), value=0.5)  # fewer patches or channels than three
    return colors.unflatten(0, patches.shape[:3]).permute(0, 3, 1, 2)


def _colored(values: Tensor) -> Tensor:
    """(B, h, w) in [0, 1] -> (B, 3, h, w)."""
    return torch.from_numpy(colormaps["viridis"](values.numpy())[..., :3]).permute(0, 3, 1, 2).float()


def _enlarged(images: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(images, size, mode="nearest")

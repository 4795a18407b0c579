"""Images of what an encoder represents: the attention of its class token, the principal components of its patches.

Paper: Oquab et al. 2023 (DINOv2), arXiv:2304.07193, Fig. 1, for the components; backgrounds are kept here.
Shapes: B images, C channels, H W pixels, h w rows and columns of patches, D width, T tokens, A heads.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .patches import in_unit_range, patch_grid

ATTENTION = "attention of the class token, last block"
COMPONENTS = "first three principal components of the patches, as colors"
_BUILT_SDPA = "SdpaSelfAttention"


@torch.no_grad()
def feature_panel(
    model: Any, pixel_values: Tensor, encoders: Mapping[str, Any], attends: str = ""
) -> dict[str, Tensor]:
    """Return the columns of a panel: images, and what encoders represent of them, all patches visible.

    Args:
        model: Has the settings of the encoders.
        pixel_values: (B, C, H, W), as stored.
        encoders: By name; the colors of all of them have the same meaning.
        attends: Name of the encoder whose attention is drawn.

    Raises:
        ValueError: If features are NaN or infinite.
    """
    size = (pixel_values.shape[2], pixel_values.shape[3])
    grid = patch_grid(size, model.config.encoder_config.patch_size)
    pixels = model.standardize(pixel_values)
    views = {"input": in_unit_range(pixel_values.cpu(), model.config.value_range)}
    if attends:
        encoder = encoders[attends]
        attention = class_attention(encoder, lambda: encoder(pixels, output_attentions=True), grid)
        views[f"{attends}: {ATTENTION}"] = enlarged(attention[:, None], size)
    patches = torch.cat([encoder(pixels).last_hidden_state[:, -grid[0] * grid[1] :] for encoder in encoders.values()])
    if not patches.isfinite().all():
        raise ValueError("the features contain NaN or infinity and cannot be drawn; check the loss of this step")
    colors = principal_colors(patches.unflatten(1, grid)).chunk(len(encoders))
    return views | {f"{name}: {COMPONENTS}": enlarged(part, size) for name, part in zip(encoders, colors, strict=True)}


def class_attention(encoder: Any, run: Callable[[], Any], grid: tuple[int, int]) -> Tensor:
    """Return the class token's attention (B, h, w) in the last block, averaged over heads, with maximum 1.

    Args:
        run: Runs the encoder and returns its outputs with `attentions`.
    """
    with _eager_attention(encoder):
        attention = run().attentions[-1]  # (B, A, T, T)
    to_patches = attention[:, :, 0, -grid[0] * grid[1] :].mean(1).float().cpu()  # (B, h*w)
    maps: Tensor = (to_patches / to_patches.amax(1, keepdim=True)).unflatten(1, grid)
    return maps


@contextmanager
def _eager_attention(encoder: Any) -> Iterator[None]:
    """Let an encoder return attentions, which no other implementation does."""
    implementation = encoder.config._attn_implementation
    # Some encoders, as Data2VecVisionModel, choose the class of their attention when they are built: for "sdpa" a
    # subclass of the eager one, with the same weights.
    built = [(module, type(module)) for module in encoder.modules() if type(module).__name__.endswith(_BUILT_SDPA)]
    encoder.set_attn_implementation("eager")
    for module, kind in built:
        module.__class__ = kind.__base__
    try:
        yield
    finally:
        encoder.set_attn_implementation(implementation)
        for module, kind in built:
            module.__class__ = kind


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
    images: Tensor = colors.unflatten(0, patches.shape[:3]).permute(0, 3, 1, 2)
    return images


def enlarged(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Enlarge images (B, C, h, w) to a size in pixels without smoothing."""
    return F.interpolate(images, size, mode="nearest")

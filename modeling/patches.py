"""Images to patches and back, picking tokens, fixed positions, and the MAE initialization.

Shapes: B images, C channels, H W pixels, h w patches per column and row (N = h * w), p patch side, D width,
V visible and M hidden patches (V + M = N).
"""

import math

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.vit.modeling_vit import ViTAttention


def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, p*p*C); inside a patch: row, column, channel, the channel fastest (authors' order)."""
    batch, channels, height, width = pixel_values.shape
    h, w = height // patch_size, width // patch_size
    x = pixel_values.reshape(batch, channels, h, patch_size, w, patch_size)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, h * w, patch_size**2 * channels)


def unpatchify(patches: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """(B, N, p*p*C) -> (B, C, H, W), the exact inverse of `patchify` for a grid of (h, w) patches."""
    batch, _, dim = patches.shape
    h, w = grid
    channels = dim // patch_size**2
    x = patches.reshape(batch, h, w, patch_size, patch_size, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, h * patch_size, w * patch_size)


def patch_grid(image_size: int | tuple[int, int] | list[int], patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches. ValueError when the patch size does not divide the image size."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height % patch_size or width % patch_size or min(height, width) < patch_size:
        down, up = (
            tuple(max(f(s / patch_size), 1) * patch_size for s in (height, width)) for f in (math.floor, math.ceil)
        )
        raise ValueError(
            f"image size {height} x {width} is not a multiple of patch size {patch_size}; "
            f"nearest that are: {down[0]} x {down[1]} and {up[0]} x {up[1]}"
        )
    return height // patch_size, width // patch_size


def visible_and_masked_indices(
    bool_masked_pos: torch.Tensor, num_masked_patches: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, N) mask -> indices of the visible (B, V) and of the hidden (B, M) patches, each in row-major order.

    `num_masked_patches`, of the whole batch, comes from the collator; without it the mask is counted, which on an
    accelerator waits for the device.

    Raises:
        ValueError: the images hide unequal numbers of patches, or none.
    """
    num_patches = bool_masked_pos.shape[1]
    if num_masked_patches is None:
        counts = bool_masked_pos.sum(dim=1)
        fewest, most = counts.aminmax()
        if fewest != most or most == 0:
            raise ValueError(
                f"every image of a batch must hide the same number of patches, at least one; got {counts.tolist()}: "
                "use a mask strategy with exact counts"
            )
        num_masked_patches = int(most) * len(bool_masked_pos)
    num_hidden = num_masked_patches // len(bool_masked_pos)
    order = bool_masked_pos.to(torch.uint8).argsort(dim=1, stable=True)  # (B, N): False sorts before True
    return order.split([num_patches - num_hidden, num_hidden], dim=1)


def masked_indices(bool_masked_pos: torch.Tensor, num_masked_patches: int | None = None) -> torch.Tensor:
    """(B, N) mask -> places of the hidden patches in the flattened batch, row-major; counts may differ.

    `num_masked_patches` as in `visible_then_hidden`. ValueError if nothing is hidden: there would be no loss.
    """
    if num_masked_patches is None:
        num_masked_patches = int(bool_masked_pos.sum())
    if num_masked_patches == 0:
        raise ValueError("no image of the batch hides a patch, so there is nothing to predict: raise --mask_ratio")
    shown_last = (~bool_masked_pos).flatten().to(torch.uint8)
    return shown_last.argsort(stable=True)[:num_masked_patches]


def coarsen_mask(bool_masked_pos: torch.Tensor, grid: tuple[int, int], step: int) -> torch.Tensor:
    """(B, h*w) -> (B, h*w / step**2): the mask on cells of step x step patches, each wholly hidden or wholly visible.

    Raises:
        ValueError: a cell is hidden in part; looked at on the CPU only, an accelerator would have to wait.
    """
    h, w = grid
    cells = bool_masked_pos.reshape(-1, h // step, step, w // step, step)
    first = cells[:, :, :1, :, :1]
    if bool_masked_pos.device.type == "cpu" and not torch.compiler.is_compiling() and (cells != first).any():
        raise ValueError(
            f"the encoder merges {step} x {step} patches into one token, and a mask hides such a cell in part: draw "
            f"masks with the strategy random-unit and cells of {step} x {step} patches, or a multiple"
        )
    return first.flatten(1)


def take_tokens(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(B, N, D), (B, K) -> (B, K, D)."""
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def put_tokens(x: torch.Tensor, indices: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """(B, N, D) with `tokens` (B, K, D) in the places `indices` (B, K); `x` itself is not changed."""
    return x.scatter(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]), tokens.to(x.dtype))


def normalize_patches(patches: torch.Tensor) -> torch.Tensor:
    """(B, N, P) -> the same with each patch's mean 0 and deviation 1; unbiased, as in the MAE authors' code."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


def sincos_positions(grid: tuple[int, int], dim: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine table (1, 1+N, D); row 0, the class token's, is zero.

    The first half of D encodes the column and the second half the row: the authors' code builds its mesh width first
    and released weights depend on it (transformers' `build_2d_sinusoidal_position_embedding` has the halves swapped).

    Raises:
        ValueError: D is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, got {dim}")
    rows, columns = (torch.arange(n, dtype=torch.float64) for n in grid)
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = [torch.outer(coordinate, frequencies) for coordinate in (columns, rows)]
    by_column, by_row = (torch.cat([a.sin(), a.cos()], dim=1) for a in angles)  # (w, D/2), (h, D/2)
    table = torch.cat(
        [by_column.repeat(grid[0], 1), by_row.repeat_interleave(grid[1], dim=0)], dim=1
    )  # (N, D), row-major
    return torch.cat([torch.zeros(1, dim, dtype=torch.float64), table]).float().unsqueeze(0)


def init_like_mae(module: nn.Module) -> None:
    """Initialize one module as MAE's authors do: Xavier-uniform Linear, zero bias, LayerNorm 1 and 0.

    Tensors that were loaded from a checkpoint are left alone (`transformers.initialization`).
    """
    if isinstance(module, nn.Linear):
        init.xavier_uniform_(module.weight)
        if module.bias is not None:
            init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        init.ones_(module.weight)
        init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):  # the patch projection: weight as a Linear, bias as PyTorch leaves it
        assert module.bias is not None
        fan_in = module.weight[0].numel()
        _uniform(module.weight, math.sqrt(6 / (fan_in + module.out_channels)))
        _uniform(module.bias, 1 / math.sqrt(fan_in))
    elif isinstance(
        module, ViTAttention
    ):  # authors: one fused (3D, D) matrix, so a smaller bound than three (D, D) ones
        for projection in (module.q_proj, module.k_proj, module.v_proj):
            _uniform(projection.weight, math.sqrt(6 / (4 * projection.in_features)))


def _uniform(tensor: torch.Tensor, bound: float) -> None:
    init.uniform_(tensor, -bound, bound)

"""Standardized images, patches and back, masks and their indices, fixed positions, and the initialization of MAE.

Leaf mathematics: every folder may import it.
Shapes: B images, C channels, H W pixels, h w patches per column and row (N = h * w), p side of a patch, P values of a
patch, D width, V visible and M masked patches (V + M = N).
"""

import math
from collections.abc import Sequence

import torch
from torch import nn
from transformers import initialization as init
from transformers.models.vit.modeling_vit import ViTAttention

_MAX_EXTRA_TOKENS = 16  # class, distillation and register tokens before the patches
PATCH_PROJECTION = ("patch_embeddings.projection.weight", "patch_embeddings.weight")  # the second of a DINOv3
_LUMA = (0.299, 0.587, 0.114)  # Pillow's weights of red, green and blue in a gray image

PatchSize = int | tuple[int, int]  # one side, or height and width


STORED_DTYPES = (torch.uint8, torch.uint16, torch.int32)  # of pixels in a batch that are not standardized
ValueRange = Sequence[Sequence[float]]  # of each channel the values, low and high, that count as 0 and 1


def standardize(
    pixel_values: torch.Tensor,
    mean: Sequence[float] | torch.Tensor,
    std: Sequence[float] | torch.Tensor,
    value_range: ValueRange | None = None,
) -> torch.Tensor:
    """Standardize stored images (..., C, H, W) to float32, with the mean and std of each channel in [0, 1].

    Args:
        value_range: Of measurements; values outside are cut off. None for uint8 images, whose range is 0 to 255.
    """
    if value_range is None:
        low, scale = (_per_channel(values, pixel_values.device) * 255 for values in (mean, std))
        return (pixel_values - low) / scale
    lows, highs = (_per_channel(ends, pixel_values.device) for ends in zip(*value_range, strict=True))
    offsets, scales = in_units(mean, std, value_range)
    values = stored_values(pixel_values).clamp(lows, highs)
    return (values - _per_channel(offsets, values.device)) / _per_channel(scales, values.device)


def in_units(
    mean: Sequence[float] | torch.Tensor, std: Sequence[float] | torch.Tensor, value_range: ValueRange
) -> tuple[list[float], list[float]]:
    """Return mean and std in [0, 1] of each channel in the units of its values."""
    means = [low + float(one) * (high - low) for (low, high), one in zip(value_range, mean, strict=True)]
    return means, [float(one) * (high - low) for (low, high), one in zip(value_range, std, strict=True)]


def stored_values(pixel_values: torch.Tensor) -> torch.Tensor:
    """Return stored pixels as float32: batches hold uint8, uint16, or float32 as the int32 with the same bits."""
    return pixel_values.view(torch.float32) if pixel_values.dtype == torch.int32 else pixel_values.float()


def in_unit_range(pixel_values: torch.Tensor, value_range: ValueRange | None) -> torch.Tensor:
    """Map stored images (..., C, H, W) to float32 in [0, 1]."""
    if value_range is None:
        return pixel_values / 255
    return standardize(pixel_values, [0.0] * len(value_range), [1.0] * len(value_range), value_range)


def _per_channel(values: Sequence[float] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return one number per channel as (C, 1, 1), without a copy to the device, which would wait for it."""
    if isinstance(values, torch.Tensor):
        return values.to(device, torch.float32).view(-1, 1, 1)
    return torch.stack([torch.full((1, 1), value, dtype=torch.float32, device=device) for value in values])


def patchify(pixel_values: torch.Tensor, patch_size: PatchSize) -> torch.Tensor:
    """(B, C, H, W) -> (B, N, P); inside a patch: row, column, channel, the channel fastest (authors' order)."""
    ph, pw = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    batch, channels, height, width = pixel_values.shape
    if height % ph or width % pw:
        raise ValueError(f"images of {height} x {width} pixels cannot be divided into patches of {ph} x {pw}")
    x = pixel_values.reshape(batch, channels, height // ph, ph, width // pw, pw)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(batch, (height // ph) * (width // pw), ph * pw * channels)


def unpatchify(patches: torch.Tensor, patch_size: PatchSize, grid: tuple[int, int]) -> torch.Tensor:
    """(B, N, P) -> (B, C, H, W), the exact inverse of `patchify` for a grid of (h, w) patches."""
    ph, pw = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    batch, _, dim = patches.shape
    h, w = grid
    channels = dim // (ph * pw)
    x = patches.reshape(batch, h, w, ph, pw, channels)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(batch, channels, h * ph, w * pw)


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Return the sides of an image, of which a config names one or both."""
    return (image_size, image_size) if isinstance(image_size, int) else (image_size[0], image_size[1])


def patch_grid(image_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Return the rows and columns of patches.

    Raises:
        ValueError: If the patch size does not divide the image size.
    """
    height, width = height_and_width(image_size)
    if height % patch_size or width % patch_size or min(height, width) < patch_size:
        down, up = (
            tuple(max(f(s / patch_size), 1) * patch_size for s in (height, width)) for f in (math.floor, math.ceil)
        )
        raise ValueError(
            f"image size {height} x {width} is not a multiple of patch size {patch_size}; "
            f"nearest that are: {down[0]} x {down[1]} and {up[0]} x {up[1]}"
        )
    return height // patch_size, width // patch_size


def token_layout(
    num_tokens: int, image_size: int | Sequence[int], patch_size: int | Sequence[int]
) -> tuple[int, tuple[int, int]] | None:
    """Return the number of tokens before the patches and the grid of an encoder's output; None if it has no grid.

    Stages may have merged 2 x 2 patches; encoders that do so have no other tokens.
    """
    (height, width), (patch_height, patch_width) = height_and_width(image_size), height_and_width(patch_size)
    for times in (1, 2, 4, 8, 16, 32):
        grid = math.ceil(height / (patch_height * times)), math.ceil(width / (patch_width * times))
        num_extra = num_tokens - math.prod(grid)
        if 0 <= num_extra <= (_MAX_EXTRA_TOKENS if times == 1 else 0):
            return num_extra, grid
    return None


def visible_and_masked_indices(
    bool_masked_pos: torch.Tensor, num_masked_patches: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the visible (B, V) and of the masked (B, M) patches of masks (B, N), in row-major order.

    Args:
        num_masked_patches: Number of masked patches in the batch, from the collator; counting them here would wait for
            the device.

    Raises:
        ValueError: If the images have unequal numbers of masked patches, or none.
    """
    return visible_and_predicted_indices(bool_masked_pos, None, num_masked_patches)


def visible_and_predicted_indices(
    bool_masked_pos: torch.Tensor,
    bool_predicted_pos: torch.Tensor | None = None,
    num_masked_patches: int | None = None,
    num_predicted_patches: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the visible (R, V) and of the predicted (R, Q) patches of all masks (..., N), R in number.

    Args:
        bool_predicted_pos: The predicted ones among the masked patches; None for all of them.
        num_masked_patches, num_predicted_patches: As in `visible_and_masked_indices`.

    Raises:
        ValueError: If the masks have unequal numbers of masked or predicted patches, or none.
    """
    masks = bool_masked_pos.flatten(0, -2)  # (R, N)
    num_masked = _number_in_each(masks, num_masked_patches, "masked")
    ranks = masks.to(torch.uint8)  # in the order of ranks: visible, masked, predicted
    num_predicted = num_masked
    if bool_predicted_pos is not None:
        predicted = bool_predicted_pos.flatten(0, -2)
        num_predicted = _number_in_each(predicted, num_predicted_patches, "predicted")
        ranks = ranks + predicted.to(torch.uint8)
    order = ranks.argsort(dim=1, stable=True)  # (R, N)
    return order[:, : masks.shape[1] - num_masked], order[:, masks.shape[1] - num_predicted :]


def _number_in_each(masks: torch.Tensor, num_in_batch: int | None, what: str) -> int:
    if num_in_batch is not None:
        return num_in_batch // len(masks)
    counts = masks.sum(dim=1)
    fewest, most = counts.aminmax()
    if fewest != most or most == 0:
        raise ValueError(
            f"every image of a batch must have the same number of {what} patches, at least one; got "
            f"{counts.tolist()}: use a mask strategy with exact counts"
        )
    return int(most)


def masked_indices(bool_masked_pos: torch.Tensor, num_masked_patches: int | None = None) -> torch.Tensor:
    """Return the indices of the masked patches of masks (B, N) in the flattened batch; counts may differ by image.

    Args:
        num_masked_patches: As in `visible_and_masked_indices`.

    Raises:
        ValueError: If no patch is masked, so that there would be no loss.
    """
    if num_masked_patches is None:
        num_masked_patches = int(bool_masked_pos.sum())
    if num_masked_patches == 0:
        raise ValueError("no patch of the batch is masked, so there is nothing to predict: raise mask_ratio")
    visible_last = (~bool_masked_pos).flatten().to(torch.uint8)
    return visible_last.argsort(stable=True)[:num_masked_patches]


def coarsen_mask(bool_masked_pos: torch.Tensor, grid: tuple[int, int], step: int) -> torch.Tensor:
    """(B, h*w) -> (B, h*w / step**2): the mask on units of step x step patches, masked or visible as a whole.

    Raises:
        ValueError: If a unit is masked in part; checked on the CPU only, an accelerator would have to wait.
    """
    h, w = grid
    units = bool_masked_pos.reshape(-1, h // step, step, w // step, step)
    first = units[:, :, :1, :, :1]
    if bool_masked_pos.device.type == "cpu" and not torch.compiler.is_compiling() and (units != first).any():
        raise ValueError(
            f"the encoder merges {step} x {step} patches into one token, and a mask covers such a unit in part: draw "
            f"masks with the strategy random-unit and units of {step} x {step} patches, or a multiple"
        )
    return first.flatten(1)


def gray_to_rgb(weight: torch.Tensor) -> torch.Tensor:
    """Extend a patch projection (D, 1, p, p) to colors, of which it sees the gray version, (D, 3, p, p)."""
    return weight * weight.new_tensor(_LUMA).view(1, 3, 1, 1)


def adapt_channels(weight: torch.Tensor, num_channels: int, further: str) -> torch.Tensor:
    """Adapt a patch projection (D, C, p, p) to another number of channels.

    The first C channels keep their weights, so that images whose further channels are at their mean (0 when
    standardized) keep their features. Fewer channels than C share the sum of the weights, so that equal channels keep
    theirs.

    Args:
        further: Weights of further channels: the "mean" of the others, or these in turn ("repeat").
    """
    old = weight.shape[1]
    if num_channels < old:
        return (weight.sum(1, keepdim=True) / num_channels).repeat(1, num_channels, 1, 1)
    if further == "repeat":
        return weight[:, torch.arange(num_channels) % old]
    return torch.cat([weight, weight.mean(1, keepdim=True).repeat(1, num_channels - old, 1, 1)], 1)


def take_tokens(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """(B, N, D), (B, K) -> (B, K, D)."""
    if x.dtype == torch.uint16:  # which torch cannot gather
        return take_tokens(x.view(torch.int16), indices).view(torch.uint16)
    return x.gather(1, indices.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def normalize_patches(patches: torch.Tensor) -> torch.Tensor:
    """Normalize each patch of (B, N, P) to mean 0 and standard deviation 1; unbiased, as in the MAE authors' code."""
    var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (var + 1e-6).sqrt()


def sincos_positions(grid: tuple[int, int], dim: int) -> torch.Tensor:
    """Return the fixed 2-D sine-cosine table (1, 1+N, D); row 0, the class token's, is zero.

    The first half of D encodes the column and the second half the row: the authors' code builds its mesh width first,
    and released weights depend on it (transformers' `build_2d_sinusoidal_position_embedding` has the halves swapped).

    Raises:
        ValueError: If D is not a multiple of 4.
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

    Tensors that were loaded from a checkpoint are kept (`transformers.initialization`).
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

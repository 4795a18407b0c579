"""Frozen features of any encoder that `AutoModel` loads: its class token, the mean of its patches, or both.

Shapes: B batch size, N images, C channels, H, W height and width in pixels, h, w rows and columns of patches,
P = h * w patches, D feature dimension, T tokens.
"""

import copy
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.seeds import seeded_generator
from evaluation.preprocessing import Batch, Preprocessor
from modeling.patches import height_and_width, token_layout

CLASS_TOKEN, MEAN, BOTH = "class token", "mean of patches", "class token and mean"
_THUMBNAIL_SIZE = 32


@dataclass(frozen=True)
class Tokens:
    """Encoder outputs for a batch."""

    class_token: Tensor | None  # (B, D); None if the encoder has none
    patches: Tensor  # (B, h, w, D)

    @property
    def mean(self) -> Tensor:
        return self.patches.flatten(1, 2).mean(1)  # (B, D)

    @property
    def by_kind(self) -> dict[str, Tensor]:
        """The features (B, D) of each kind."""
        if self.class_token is None:
            return {MEAN: self.mean}
        both = torch.cat([self.class_token, self.mean], 1)
        return {CLASS_TOKEN: self.class_token, MEAN: self.mean, BOTH: both}


class FrozenEncoder:
    """An encoder that maps pixels (B, C, H, W) to `Tokens`, without gradients and always in evaluation mode."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model: Any = model
        self.config = config
        self.device = next(model.parameters()).device
        self._interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters

    def __call__(self, pixel_values: Tensor) -> Tokens:
        return self.split(self.outputs(pixel_values).last_hidden_state, pixel_values.shape[2:])

    @torch.no_grad()
    def outputs(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Return the model's own outputs; `kwargs` go to its forward method."""
        if self._interpolates and tuple(pixel_values.shape[2:]) != height_and_width(
            getattr(self.config, "image_size", 0)
        ):
            kwargs["interpolate_pos_encoding"] = True
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        try:
            return self.model(pixel_values=pixel_values.to(self.device), **kwargs)
        finally:  # each module as it was: some may always be in evaluation mode
            for module in training:
                module.training = True

    def split(self, hidden: Tensor, image_size: Iterable[int]) -> Tokens:
        """Split hidden states, (B, T, D) of a transformer or (B, D, h, w) of a convolutional network."""
        if hidden.ndim == 4:
            return Tokens(None, hidden.permute(0, 2, 3, 1).float())
        num_extra, (rows, columns) = self._layout(hidden.shape[1], *image_size)
        patches = hidden[:, num_extra:].unflatten(1, (rows, columns)).float()  # (B, h, w, D)
        return Tokens(hidden[:, 0].float() if num_extra else None, patches)

    def _layout(self, num_tokens: int, height: int, width: int) -> tuple[int, tuple[int, int]]:
        """Return the number of tokens before the patches and the patch grid."""
        patch_height, patch_width = height_and_width(getattr(self.config, "patch_size", 1))
        layout = token_layout(num_tokens, (height, width), (patch_height, patch_width))
        if layout is None:
            raise ValueError(
                f"{self.config.model_type} returns {num_tokens} tokens for an image of {height} x {width} pixels, "
                f"which are not a grid of {patch_height} x {patch_width} patches; expected an encoder with a grid of "
                "features"
            )
        return layout


def untrained(encoder: FrozenEncoder, seed: int) -> FrozenEncoder:
    """Return the same architecture with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded_generator(seed, "untrained").initial_seed())
        model = type(encoder.model)(copy.deepcopy(encoder.config))
    return FrozenEncoder(model.to(encoder.device), encoder.config)


@dataclass(frozen=True)
class Features:
    """Features of N images."""

    by_kind: dict[str, Tensor]  # (N, D) for each kind of features that the encoder has
    patches: Tensor | None  # (N, P, D), half precision, if requested


def thumbnails(images: Tensor) -> Tensor:
    """Downsample images (B, C, H, W) to at most 32 x 32 pixels."""
    height, width = images.shape[2:]
    factor = max(1.0, max(height, width) / _THUMBNAIL_SIZE)
    size = max(1, round(height / factor)), max(1, round(width / factor))
    return F.adaptive_avg_pool2d(images, size) if factor > 1 else images


def check_finite(features: Tensor) -> None:
    """Raise ValueError if features are NaN or infinite, which no classifier can use."""
    if not torch.isfinite(features).all():
        raise ValueError(
            "the features of the encoder are NaN or infinite; expected finite ones: check that its "
            "preprocessor_config.json has an image_std above 0"
        )


def collect(
    encoders: Mapping[str, FrozenEncoder],
    images: Iterable[Batch],
    preprocessor: Preprocessor,
    patches_of: str | None = None,
) -> tuple[list[int], dict[str, Features], Tensor]:
    """Compute the features of each encoder in one pass over the images, with the patches of the encoder `patches_of`.

    Returns the positions of the readable images, the features by encoder, and thumbnails (N, C, h, w).
    """
    positions: list[int] = []
    batches: dict[str, list[dict[str, Tensor]]] = {name: [] for name in encoders}
    patches, small = [], []
    for batch in images:
        positions += batch.positions
        small.append(thumbnails(preprocessor.unnormalize(batch.pixel_values)))
        for name, encoder in encoders.items():
            tokens = encoder(batch.pixel_values)
            check_finite(tokens.mean)
            batches[name].append({kind: value.cpu() for kind, value in tokens.by_kind.items()})
            if name == patches_of:
                patches.append(tokens.patches.flatten(1, 2).half().cpu())
    if not positions:
        raise ValueError("none of the images can be read")
    features = {
        name: Features(
            {kind: torch.cat([one[kind] for one in of_encoder]) for kind in of_encoder[0]},
            torch.cat(patches) if name == patches_of else None,
        )
        for name, of_encoder in batches.items()
    }
    return positions, features, torch.cat(small)

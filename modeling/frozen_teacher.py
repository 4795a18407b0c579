"""Patch features of a frozen encoder, as targets for another model.

Papers: Wei et al. 2022 (MVP), arXiv:2203.05175; Hou et al. 2022 (MILAN), arXiv:2208.06049; Fang et al. 2022 (EVA),
arXiv:2211.07636.
Shapes: B images, C channels, H W pixels, h w rows and columns of the teacher's grid, D width, N patches of a student.
"""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .patches import height_and_width, standardize, token_layout

COLOR = 3


class TeacherFeatures(NamedTuple):
    """What a teacher represents of a batch.

    Args:
        patches: (B, D, h, w), on the teacher's own grid, without class, distillation and register tokens.
        class_token: (B, D); None if the teacher has none.
    """

    patches: Tensor
    class_token: Tensor | None


class FrozenTeacher(nn.Module):
    """An encoder that is always in evaluation mode and never trains, in float32 or under the caller's autocast.

    A pre-training model must not own it: it would be saved with the model.

    Args:
        model: An encoder of images that returns tokens of a grid (ViT, CLIP, BEiT, DINOv2 and DINOv3 with registers,
            Swin) or a map (a convolutional network, whose last map is taken).
        image_mean, image_std: The statistics in [0, 1] by which the teacher's images are standardized.
        image_size: Height and width in pixels to which images are resized for the teacher.
        name: What messages call it.

    Attributes:
        grid: h and w.
        feature_size: D.
        has_class_token: Whether `TeacherFeatures.class_token` exists.
        is_convolutional: Whether the model returns a map, as convolutional networks do, which take images of any size.

    Raises:
        ValueError: If the model does not read images, or not those of this size, or its output has no grid.
    """

    def __init__(
        self,
        model: nn.Module,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        image_size: int | tuple[int, int],
        name: str = "the teacher",
    ) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False)
        self.image_mean, self.image_std, self.name = tuple(image_mean), tuple(image_std), name
        self.image_size = height_and_width(image_size)
        self.config = self.model.config
        self.num_channels = int(getattr(self.config, "num_channels", COLOR))
        self._interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
        self.eval()
        if (reads := getattr(model, "main_input_name", "pixel_values")) != "pixel_values":
            raise ValueError(f"{name} is a {type(model).__name__}, which reads {reads}; expected an encoder of images")
        if len(self.image_mean) != self.num_channels or len(self.image_std) != self.num_channels:
            raise ValueError(
                f"{name} has image_mean {self.image_mean} and image_std {self.image_std}, expected one value for each "
                f"of its {self.num_channels} channels"
            )
        self.is_convolutional = False
        features = self._try()
        self.grid = (features.patches.shape[2], features.patches.shape[3])
        self.feature_size, self.has_class_token = features.patches.shape[1], features.class_token is not None

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.model.parameters()).device
        return device

    def train(self, mode: bool = True) -> "FrozenTeacher":
        return super().train(False)

    @torch.no_grad()
    def forward(
        self, pixel_values: Tensor, image_mean: Sequence[float] = (), image_std: Sequence[float] = ()
    ) -> TeacherFeatures:
        """Return the features of images.

        Args:
            pixel_values: (B, C, H, W), uint8, or floats standardized by `image_mean` and `image_std`. Gray images are
                shown to a teacher of colors with three equal ones.

        Raises:
            ValueError: If the teacher cannot read images of C channels.
        """
        num_channels = pixel_values.shape[1]
        if num_channels != self.num_channels and (num_channels, self.num_channels) != (1, COLOR):
            raise ValueError(
                f"{self.name} reads images of {self.num_channels} channels, but these have {num_channels}; choose a "
                "teacher with as many channels"
            )
        mean, std = self.image_mean, self.image_std
        if pixel_values.dtype != torch.uint8:
            mean, std = _of_standardized(mean, std, image_mean, image_std)
        pixels = standardize(pixel_values.expand(-1, self.num_channels, -1, -1), mean, std)
        if pixels.shape[2:] != self.image_size:
            pixels = F.interpolate(pixels, self.image_size, mode="bicubic", antialias=True)
        return self._features(pixels)

    def _features(self, pixels: Tensor) -> TeacherFeatures:
        own_size = height_and_width(getattr(self.config, "image_size", self.image_size))
        options = {"interpolate_pos_encoding": True} if self._interpolates and own_size != self.image_size else {}
        output = self.model(pixel_values=pixels, **options)
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None or hidden.ndim not in (3, 4):
            raise ValueError("it returns no last_hidden_state of tokens (B, T, D) or of a map (B, D, h, w)")
        if hidden.ndim == 4:
            self.is_convolutional = True
            width = getattr(getattr(self.model, "timm_model", None), "num_features", hidden.shape[1])
            return TeacherFeatures(hidden.permute(0, 3, 1, 2) if hidden.shape[1] != width else hidden, None)
        layout = token_layout(hidden.shape[1], self.image_size, getattr(self.config, "patch_size", 1))
        if layout is None:
            raise ValueError(f"its {hidden.shape[1]} tokens are not a grid of patches")
        num_extra, grid = layout
        patches = hidden[:, num_extra:].transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
        return TeacherFeatures(patches, hidden[:, 0] if num_extra else None)

    @torch.no_grad()
    def _try(self) -> TeacherFeatures:
        """Return the features of a black image."""
        height, width = self.image_size
        try:
            return self._features(torch.zeros(1, self.num_channels, height, width, device=self.device))
        except Exception as error:  # an unfit model raises anything
            reason = str(error).split("\n")[0]
            raise ValueError(
                f"{self.name} is a {type(self.model).__name__} that gives no grid of features for images of "
                f"{height} x {width} pixels: {reason}; expected an encoder of images, at a size that it can divide "
                "into patches"
            ) from error


def match_grid(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Interpolate features (B, D, h, w) to a student's grid; returns (B, N, D) in row-major order, float32."""
    if tuple(features.shape[2:]) != tuple(grid):
        features = F.interpolate(features.float(), grid, mode="bilinear", antialias=True)
    return features.float().flatten(2).transpose(1, 2)


def _of_standardized(
    mean: Sequence[float], std: Sequence[float], old_mean: Sequence[float], old_std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the statistics with which `standardize` replaces the old ones of standardized images."""
    old = [(m, s) for m, s in zip(old_mean, old_std, strict=True)] * (len(mean) // len(old_mean))
    means = tuple((m - old_m) / old_s / 255 for m, (old_m, old_s) in zip(mean, old, strict=True))
    return means, tuple(s / old_s / 255 for s, (_, old_s) in zip(std, old, strict=True))

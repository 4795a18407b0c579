"""Targets that a frozen model computes from the images, on the device inside the step.

`Targets` is what the trainer, the data and the panels know of them. The first kind is the tokens of an image
tokenizer: any model with `get_codebook_indices(pixel_values) -> (B, h, w)`, such as ours (`run_tokenizer.py`) or the
public DALL-E encoder (transformers' `FlavaImageCodebook`). The second is the features of a `FrozenTeacher`.
Shapes: B images, C channels, H W pixels of the view of the tokenizer or teacher, h w its tokens or features, D their
width, N = h * w patches.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import FlavaImageCodebook, PreTrainedModel

from modeling.patches import height_and_width

# Pixels in [0, 1] are mapped into [0.1, 0.9] for the DALL-E encoder: logit-Laplace needs them away from 0 and 1.
_DALLE_EPSILON = 0.1
_DALLE_IMAGE_SIZE = 112  # BEiT's view for the DALL-E encoder, whose config names no size


class ExtraView(NamedTuple):
    """A second size at which the crop of `pixel_values` is shown, under a name of its own in the batch."""

    name: str
    image_size: tuple[int, int]
    interpolation: Image.Resampling


class Targets:
    """Adds targets to a batch.

    Attributes:
        model: The frozen model that computes them, whose weights identify a cache.
        view: The view that they are computed from beside `pixel_values`, if any.
        output: Key of the targets in the batch. A batch that already has it, from a cache, is returned as it is.
        cached: Keys in the batch of what can be computed once for a fixed crop, with the types of it in files.
        cache_key: What the values in a cache depend on beside the model's weights and the crop.
        config_settings: Settings of the method's config that follow from the source of the targets.
        can_decode: Whether `decode` turns targets into images.
    """

    model: Any
    view: ExtraView | None = None
    output = "labels"
    config_settings: Mapping[str, Any] = {}
    cached: Mapping[str, type[np.number[Any]]] = {}
    cache_key = ""
    can_decode = False

    def to(self, device: torch.device) -> "Targets":
        self.model.to(device)
        return self

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return the batch with its targets and without the views that only they needed."""
        raise NotImplementedError

    def decode(self, targets: torch.Tensor) -> torch.Tensor:
        """Decode targets (B, h, w) to images (B, C, H, W) in [0, 1] on the CPU."""
        raise NotImplementedError


class TokenizerTargets(Targets):
    """Visual tokens: `tokenizer_pixel_values` uint8 (B, C, H, W) become int64 `labels` (B, N), row-major, in float32.

    Raises:
        ValueError: If the model is not an image tokenizer, or its image size gives another grid than the patches.
    """

    cached = {"labels": np.int32}  # noqa: RUF012 - as in the base class

    def __init__(self, tokenizer: PreTrainedModel, grid: tuple[int, int], name: str = "this model") -> None:
        if not hasattr(tokenizer, "get_codebook_indices"):
            raise ValueError(
                f"{name} is a {type(tokenizer).__name__} without get_codebook_indices: not an image tokenizer"
            )
        self.model = tokenizer.eval().requires_grad_(False)
        self.can_decode = hasattr(tokenizer, "decode")
        size = getattr(tokenizer.config, "image_size", _DALLE_IMAGE_SIZE)
        height, width = height_and_width(size)
        self._check_grid(height, width, grid, name)
        filter_name = getattr(tokenizer, "view_interpolation", "lanczos").upper()  # that of BEiT, or the tokenizer's
        self.view = ExtraView("tokenizer_pixel_values", (height, width), Image.Resampling[filter_name])
        vocab_size = getattr(tokenizer, "vocab_size", None) or self.model.config.vocab_size
        self.config_settings = {"vocab_size": int(vocab_size)}

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        assert self.view is not None
        name = self.view.name  # also with a prefix, of other images in the same batch
        prefixes = [key.removesuffix(name) for key in batch if key.endswith(name)]
        missing = [prefix for prefix in prefixes if f"{prefix}{self.output}" not in batch]
        if not missing:
            return batch
        rest = {key: value for key, value in batch.items() if not key.endswith(name)}
        return rest | {f"{prefix}{self.output}": self._tokens(batch[f"{prefix}{name}"]) for prefix in missing}

    def _tokens(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pixel_values.device.type, enabled=False):  # half precision flips the closest codes
            pixels = pixel_values.float() / 255 if pixel_values.dtype == torch.uint8 else pixel_values
            if isinstance(self.model, FlavaImageCodebook):
                pixels = (1 - 2 * _DALLE_EPSILON) * pixels + _DALLE_EPSILON
            tokens: torch.Tensor = self.model.get_codebook_indices(pixels)
            return tokens.flatten(1)

    def decode(self, targets: torch.Tensor) -> torch.Tensor:
        return self.model.decode(targets).float().clamp(0, 1).cpu()

    def _check_grid(self, height: int, width: int, grid: tuple[int, int], name: str) -> None:
        channels = getattr(self.model.config, "num_channels", 3)
        tokens = self.model.get_codebook_indices(torch.zeros(1, channels, height, width)).shape[1:]
        if tuple(tokens) != tuple(grid):
            raise ValueError(
                f"{name} turns {height} x {width} pixels into {tokens[0]} x {tokens[1]} tokens, but the encoder has "
                f"{grid[0]} x {grid[1]} patches: choose image_size and patch_size with as many patches as tokens, or "
                f"a tokenizer trained with image_size {height * grid[0] // tokens[0]} {width * grid[1] // tokens[1]}"
            )


class TeacherTargets(Targets):
    """A teacher's features: `teacher_pixel_values` uint8 (B, C, H, W) become `teacher_features` (B, D, h, w).

    `teacher_class_token` (B, D) is added if the teacher has one. Runs under the caller's autocast.

    Args:
        teacher: A `FrozenTeacher`; images of the student's size are not cropped a second time for it.
        image_size: Height and width of the student's images.

    Raises:
        ValueError: If the teacher cannot read images of so many channels, or has a single feature for the whole image.
    """

    output = "teacher_features"

    def __init__(self, teacher: Any, image_size: tuple[int, int], num_channels: int) -> None:
        self.model = teacher
        self.cached = {self.output: np.float16}
        if teacher.has_class_token:
            self.cached["teacher_class_token"] = np.float16
        self.cache_key = repr((teacher.image_size, teacher.image_mean, teacher.image_std))
        if min(teacher.grid) < 2:
            height, width = teacher.image_size
            raise ValueError(
                f"{teacher.name} has a grid of {teacher.grid[0]} x {teacher.grid[1]} for images of {height} x {width} "
                "pixels, so that patches would have the same target; choose a larger image_size for the teacher"
            )
        if tuple(image_size) != teacher.image_size:
            self.view = ExtraView("teacher_pixel_values", teacher.image_size, Image.Resampling.BICUBIC)
        self.config_settings = {
            "feature_size": teacher.feature_size,
            "teacher_has_class_token": teacher.has_class_token,
        }
        teacher(torch.zeros(1, num_channels, *teacher.image_size, dtype=torch.uint8))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        if self.output in batch:
            return batch
        pixel_values = batch["pixel_values" if self.view is None else self.view.name]
        rest = {key: value for key, value in batch.items() if self.view is None or key != self.view.name}
        features = self.model(pixel_values)
        rest[self.output] = features.patches.float()
        return rest if features.class_token is None else rest | {"teacher_class_token": features.class_token.float()}


class AnchorTargets(Targets):
    """A `FrozenTeacher`'s features of whole crops, T of each image: `anchor_features` (B * T, N, D), in float32."""

    output = "anchor_features"

    def __init__(self, encoder: Any) -> None:
        self.model = encoder

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        crops = batch["pixel_values"].flatten(0, -4)
        with torch.autocast(crops.device.type, enabled=False):
            return batch | {self.output: self.model(crops).patches.flatten(2).mT}

"""Frozen features of any encoder that `AutoModel` opens: its class token, the mean of its patches, or both.

Shapes: B images of a batch, N of a part, C channels, H W pixels, h w patches, D width, T tokens.
"""

import copy
import inspect
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, PreTrainedConfig, ViTModel

from data.seeds import seeded_generator
from evaluation.preprocessing import Batch, Preprocessor, open_preprocessor

CLASS_TOKEN, MEAN, BOTH = "class token", "mean of patches", "class token and mean"
_MAX_EXTRA_TOKENS = 16  # class, distillation and register tokens in front of the patches
_MAX_PIXEL_SIDE = 32  # of the pictures whose raw pixels are compared
_OF_A_POOLER = "pooler."


@dataclass(frozen=True)
class Tokens:
    """What an encoder says of a batch. `class_token` (B, D) is None for encoders that have none."""

    class_token: Tensor | None
    patches: Tensor  # (B, h, w, D)

    @property
    def mean(self) -> Tensor:
        return self.patches.flatten(1, 2).mean(1)  # (B, D)


class FrozenEncoder:
    """(B, C, H, W) -> Tokens, without gradients, and as in evaluation whatever state the model is in."""

    model: Any

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model, self.config = model, config
        self.device = next(model.parameters()).device
        self._interpolates = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters

    def __call__(self, pixel_values: Tensor) -> Tokens:
        return self.split(self.outputs(pixel_values).last_hidden_state, pixel_values.shape[2:])

    @torch.no_grad()
    def outputs(self, pixel_values: Tensor, **wanted: Any) -> Any:
        size = getattr(self.config, "image_size", None)
        expected = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        if self._interpolates and tuple(pixel_values.shape[2:]) != expected:
            wanted["interpolate_pos_encoding"] = True
        with evaluating(self.model):
            return self.model(pixel_values=pixel_values.to(self.device), **wanted)

    def split(self, hidden: Tensor, image_size: Iterable[int]) -> Tokens:
        """(B, T, D) of a transformer or (B, D, h, w) of a convolutional network."""
        if hidden.ndim == 4:
            return Tokens(None, hidden.permute(0, 2, 3, 1).float())
        num_extra, (rows, columns) = self._layout(hidden.shape[1], *image_size)
        patches = hidden[:, num_extra:].unflatten(1, (rows, columns)).float()  # (B, h, w, D)
        return Tokens(hidden[:, 0].float() if num_extra else None, patches)

    def _layout(self, num_tokens: int, height: int, width: int) -> tuple[int, tuple[int, int]]:
        """Tokens in front of the patches, and rows and columns of patches; stages may have merged patches by twos."""
        patch = getattr(self.config, "patch_size", 1)
        patch_height, patch_width = patch if isinstance(patch, (list, tuple)) else (patch, patch)
        for times in (1, 2, 4, 8, 16, 32):
            grid = math.ceil(height / (patch_height * times)), math.ceil(width / (patch_width * times))
            num_extra = num_tokens - math.prod(grid)
            if 0 <= num_extra <= (_MAX_EXTRA_TOKENS if times == 1 else 0):
                return num_extra, grid
        raise ValueError(
            f"a {self.config.model_type} gives {num_tokens} tokens for an image of {height} x {width} pixels, which "
            f"is no grid of patches of {patch_height} x {patch_width}; expected an encoder with a grid of features"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and drop path off, and afterwards each module as it was."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def open_encoder(name: str, device: torch.device | str = "cpu") -> tuple[FrozenEncoder, Preprocessor]:
    """The encoder that a folder or a Hub id holds, and its image processor.

    A stock ViTMAE is opened as a ViT: its own class hides random patches in evaluation too. Of a whole model of ours
    the encoder is taken; its class must be registered.

    Raises:
        ValueError: nothing there can be opened as an encoder of images, or weights are missing.
    """
    config = _open_config(name)
    if hasattr(config, "vision_config") or hasattr(config, "text_config"):
        raise ValueError(f"model {name!r} is a {config.model_type}, which is not an encoder of images alone")
    try:
        model, missing = _load(name, config.model_type)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"model {name!r} cannot be opened: {str(error).partition(chr(10))[0]}") from None
    if lacking := sorted(key for key in missing if not key.startswith(_OF_A_POOLER)):
        raise ValueError(
            f"model {name!r} lacks {len(lacking)} of its weights ({', '.join(lacking[:3])}...), which would be random"
        )
    preprocessor = open_preprocessor(name, getattr(model.config, "num_channels", 3))
    return FrozenEncoder(model.to(device), model.config), preprocessor


def untrained(encoder: FrozenEncoder, seed: int) -> FrozenEncoder:
    """The same architecture with weights as transformers draws them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded_generator(seed, "untrained").initial_seed())
        model = type(encoder.model)(copy.deepcopy(encoder.config))
    return FrozenEncoder(model.to(encoder.device), encoder.config)


@dataclass(frozen=True)
class Features:
    """Of N images: `by_kind` has (N, D) for each kind that the encoder gives, `patches` (N, P, D) if asked for."""

    by_kind: dict[str, Tensor]
    patches: Tensor | None


def small_pictures(batch: Tensor) -> Tensor:
    """(B, C, H, W) -> the same, or averaged to at most 32 x 32 pixels."""
    height, width = batch.shape[2:]
    shrink = max(1.0, max(height, width) / _MAX_PIXEL_SIDE)
    size = max(1, round(height / shrink)), max(1, round(width / shrink))
    return F.adaptive_avg_pool2d(batch, size) if shrink > 1 else batch


def collect(
    encoders: Mapping[str, FrozenEncoder],
    images: Iterable[Batch],
    preprocessor: Preprocessor,
    patches_of: str | None = None,
) -> tuple[list[int], dict[str, Features], Tensor]:
    """One pass over the images: their positions, the features of each encoder, and small pictures (N, C, h, w).

    `patches_of`: name of the encoder whose patches are kept too, in half precision.
    """
    positions: list[int] = []
    parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in encoders}
    patches: list[Tensor] = []
    pictures: list[Tensor] = []
    for batch in images:
        positions += batch.positions
        pictures.append(small_pictures(preprocessor.colors(batch.pixel_values)))
        for name, encoder in encoders.items():
            tokens = encoder(batch.pixel_values)
            parts[name].append({kind: value.cpu() for kind, value in kinds_of(tokens).items()})
            if name == patches_of:
                patches.append(tokens.patches.flatten(1, 2).half().cpu())
    if not positions:
        raise ValueError("none of the images can be read")
    features = {
        name: Features(
            {kind: torch.cat([part[kind] for part in of_one]) for kind in of_one[0]},
            torch.cat(patches) if name == patches_of else None,
        )
        for name, of_one in parts.items()
    }
    return positions, features, torch.cat(pictures)


def kinds_of(tokens: Tokens) -> dict[str, Tensor]:
    """(B, D) of each kind."""
    mean = tokens.mean
    if tokens.class_token is None:
        return {MEAN: mean}
    return {CLASS_TOKEN: tokens.class_token, MEAN: mean, BOTH: torch.cat([tokens.class_token, mean], 1)}


def _load(name: str, model_type: str) -> tuple[Any, set[str]]:
    """The encoder, and the names of weights that the file lacks."""
    opener: Any = AutoModel
    settings: dict[str, Any] = {"output_loading_info": True, "dtype": torch.float32}
    if model_type == "vit_mae":
        opener, settings["add_pooling_layer"] = ViTModel, False
    elif model_type.startswith("mim_"):
        opener = AutoModelForPreTraining
    model, info = opener.from_pretrained(name, **settings)
    return model.encoder if opener is AutoModelForPreTraining else model, info["missing_keys"]


def _open_config(name: str) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model {name!r} is neither a folder with an encoder nor a model of the Hub: expected the output folder "
            f"of a finished run, or a Hub id ({str(error).partition(chr(10))[0]})"
        ) from None

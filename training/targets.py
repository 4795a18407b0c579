"""What BEiT learns to predict: the tokens that a frozen image tokenizer gives, made on the device inside the step.

A tokenizer is any model with `get_codebook_indices(pixel_values) -> (B, h, w)`: ours (`run_tokenizer.py`), the public
DALL-E encoder as transformers' `FlavaImageCodebook`, or another one by folder or Hub id.
Shapes: B images, C channels, H W pixels of the tokenizer's view, h w tokens, N = h * w patches.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, FlavaImageCodebook, PreTrainedConfig, PreTrainedModel

CHOICES = """BEiT needs an image tokenizer, and none is chosen for you. Give --tokenizer one of
  1. your own, trained on your images:
       python run_tokenizer.py --dataset {dataset} --output_dir tokenizer
       accelerate launch run_pretraining.py --method beit --tokenizer tokenizer ...
  2. the public DALL-E encoder (8,192 tokens of 8 x 8 pixels), from the Hub or a folder:
       --tokenizer facebook/flava-image-codebook
  3. any model with get_codebook_indices(pixel_values) -> (B, h, w) by folder or Hub id
"""
# Pixels in [0, 1] are mapped into [0.1, 0.9] for the DALL-E encoder: logit-Laplace needs them away from 0 and 1.
_DALLE_EPSILON = 0.1


class TokenizerLabels:
    """Frozen tokenizer on a device: uint8 views (B, C, H, W) -> int64 labels (B, N), row-major, all in float32."""

    def __init__(self, tokenizer: PreTrainedModel, device: torch.device) -> None:
        self.tokenizer = tokenizer.eval().requires_grad_(False).to(device)
        self._maps_pixels = isinstance(tokenizer, FlavaImageCodebook)

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.autocast(pixel_values.device.type, enabled=False):  # half precision flips the closest codes
            pixels = pixel_values.float() / 255 if pixel_values.dtype == torch.uint8 else pixel_values
            if self._maps_pixels:
                pixels = (1 - 2 * _DALLE_EPSILON) * pixels + _DALLE_EPSILON
            return self.tokenizer.get_codebook_indices(pixels).flatten(1)


def load_tokenizer(name: str) -> PreTrainedModel:
    """From a folder or the Hub.

    Raises:
        ValueError: nothing is there, or it is not an image tokenizer.
    """
    if not Path(name).exists() and (Path(name).is_absolute() or name.count("/") != 1 or name.startswith(".")):
        raise ValueError(f"--tokenizer {name}: there is no such folder, and no Hub model is called so (org/name)")
    if Path(name).is_dir() and not (Path(name) / "config.json").is_file():
        raise ValueError(f"--tokenizer {name}: this folder has no config.json, so it is no saved model")
    try:
        config, _ = PreTrainedConfig.get_config_dict(name)
        # Not asked of AutoConfig: its own config of this class was saved without a model type before 5.23.
        is_dalle = FlavaImageCodebook.__name__ in (config.get("architectures") or ())
        loader: Any = FlavaImageCodebook if is_dalle else AutoModel
        tokenizer = loader.from_pretrained(name, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"--tokenizer {name} cannot be opened as a model: {reason}") from error
    if not hasattr(tokenizer, "get_codebook_indices"):
        raise ValueError(
            f"--tokenizer {name} is a {type(tokenizer).__name__} without get_codebook_indices: no image tokenizer"
        )
    return tokenizer


def tokenizer_view(tokenizer: PreTrainedModel, name: str, grid: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Height and width of the view that gives one token per patch, and the number of codes; tried on one view.

    Raises:
        ValueError: the tokenizer's own image size gives another grid than the encoder's patches.
    """
    size = getattr(tokenizer.config, "image_size", 112)  # the DALL-E encoder's config names no size; BEiT gives it 112
    height, width = (size, size) if isinstance(size, int) else size
    channels = getattr(tokenizer.config, "num_channels", 3)
    labels = TokenizerLabels(tokenizer, torch.device("cpu"))
    tokens = labels.tokenizer.get_codebook_indices(torch.zeros(1, channels, height, width)).shape[1:]
    if tuple(tokens) != tuple(grid):
        raise ValueError(
            f"--tokenizer {name} turns {height} x {width} pixels into {tokens[0]} x {tokens[1]} tokens, the encoder "
            f"has {grid[0]} x {grid[1]} patches: choose --image_size and --patch_size with as many patches as tokens, "
            f"or a tokenizer trained with --image_size {height * grid[0] // tokens[0]} {width * grid[1] // tokens[1]}"
        )
    return (height, width), int(getattr(tokenizer, "vocab_size", None) or tokenizer.config.vocab_size)

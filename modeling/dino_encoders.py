"""Native encoders of DINOv2 and DINOv3, which every method that takes them trains as they are.

Papers: Oquab et al. 2023 (DINOv2), arXiv:2304.07193; Darcet et al. 2023, "Vision Transformers Need Registers",
arXiv:2309.16588; Siméoni et al. 2025, "DINOv3", arXiv:2508.10104.
Code: facebookresearch/dinov2 at e1277af.
Differs from transformers: images of any size, as multiples of the patch, and the authors' initialization of DINOv2.
Parameters keep their names.
Shapes: as in `block_by_block.py`; A attention heads.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel
from transformers import initialization as init
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersEmbeddings

from .base import InitializesEveryModule
from .block_by_block import BlockByBlock
from .encoders import ResizedPositions, VitEncoder, init_like_pytorch


class _Dinov2Blocks(InitializesEveryModule, BlockByBlock):
    no_weight_decay: ClassVar[tuple[str, ...]] = ()
    encoder: Any

    @property
    def blocks(self) -> Iterable[Any]:
        """The transformer blocks."""
        blocks: Iterable[Any] = self.encoder.layer
        return blocks

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]
        if isinstance(module, nn.Conv2d):
            init_like_pytorch(module)
        elif isinstance(module, (Dinov2Embeddings, Dinov2WithRegistersEmbeddings)):
            init.normal_(module.cls_token, std=1e-6)
            if isinstance(module, Dinov2WithRegistersEmbeddings):
                init.normal_(module.register_tokens, std=1e-6)


class AnySizeEmbeddings(ResizedPositions, Dinov2Embeddings):
    """Dinov2Embeddings for crops of any size."""


class AnySizeRegisterEmbeddings(ResizedPositions, Dinov2WithRegistersEmbeddings):
    """Dinov2WithRegistersEmbeddings for crops of any size."""

    antialias: ClassVar[bool] = True


class Dinov2Encoder(_Dinov2Blocks, Dinov2Model):
    """A Dinov2Model that takes crops of any size."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.embeddings = AnySizeEmbeddings(config)
        self.post_init()


class Dinov2RegistersEncoder(_Dinov2Blocks, Dinov2WithRegistersModel):
    """A Dinov2WithRegistersModel that takes crops of any size."""

    antialias: ClassVar[bool] = True

    def __init__(self, config: Any):
        super().__init__(config)
        self.embeddings = AnySizeRegisterEmbeddings(config)
        self.post_init()


class Dinov3Encoder(InitializesEveryModule, BlockByBlock, DINOv3ViTModel):
    """A DINOv3ViTModel; its positions are rotations, which training shifts and scales as the config says."""

    no_weight_decay: ClassVar[tuple[str, ...]] = ()

    @property
    def blocks(self) -> Iterable[Any]:
        """The transformer blocks."""
        blocks: Iterable[Any] = self.model.layer
        return blocks

    @property
    def projection(self) -> nn.Conv2d:
        """The layer that projects patches."""
        projection: nn.Conv2d = self.embeddings.patch_embeddings
        return projection

    def normalize(self, tokens: torch.Tensor) -> torch.Tensor:
        """Apply the norm after the last block."""
        normalized: torch.Tensor = self.norm(tokens)
        return normalized

    def positions(self, grid: tuple[int, int] | None = None) -> torch.Tensor | None:
        """Nothing is added to tokens."""
        return None

    def block_options(
        self, like: torch.Tensor, grid: tuple[int, int], indices: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """Return cosines and sines of the rotations, (N, D / A) or (R, 1, V, D / A)."""
        size = (side * int(self.config.patch_size) for side in grid)
        rotations = self.rope_embeddings(like.new_empty(1).expand(1, 1, *size))
        if indices is not None:
            rotations = tuple(table[indices].unsqueeze(1) for table in rotations)
        return {"position_embeddings": rotations}


# Model types that most methods train as they are.
NATIVE_TYPES = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")
DINO_ENCODERS: dict[str, Any] = {
    "dinov2": Dinov2Encoder,
    "dinov2_with_registers": Dinov2RegistersEncoder,
    "dinov3_vit": Dinov3Encoder,
}


def build_native_encoder(config: Any, drop_path_rate: float = 0.0, use_mask_token: bool = True) -> Any:
    """Return an encoder of one of the `NATIVE_TYPES`; only a ViT's config lacks the drop path, and a mask token."""
    if config.model_type == "vit":
        return VitEncoder(config, drop_path_rate, use_mask_token)
    return DINO_ENCODERS[config.model_type](config)

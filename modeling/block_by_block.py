"""A mix-in that runs the blocks of a native encoder one by one, on all patches or on those that are visible.

Shapes: B images, R masks (of one or several per image), C channels, H W pixels, N patches, V visible ones, P values of
a patch, E extra tokens before the patches (class token and registers), D width.
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import nn

from .patches import patch_grid
from .positions import positions_of_grid


class BlockByBlock:
    """Mix-in of a native encoder; the defaults are those of a ViTModel.

    `antialias`: Whether positions of a smaller grid are resized as by the native class with registers.
    """

    antialias: ClassVar[bool] = False
    config: Any
    embeddings: Any
    layers: Any
    layernorm: Any

    @property
    def blocks(self) -> Iterable[Any]:
        """The transformer blocks."""
        blocks: Iterable[Any] = self.layers
        return blocks

    @property
    def projection(self) -> nn.Conv2d:
        """The layer that projects patches."""
        projection: nn.Conv2d = self.embeddings.patch_embeddings.projection
        return projection

    def normalize(self, tokens: torch.Tensor) -> torch.Tensor:
        """Apply the norm after the last block."""
        normalized: torch.Tensor = self.layernorm(tokens)
        return normalized

    def embed_images(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the input of the first block (B, E+N, D)."""
        tokens: torch.Tensor = self.embeddings(pixels)
        return tokens

    def block_options(
        self, like: torch.Tensor, grid: tuple[int, int], indices: torch.Tensor | None = None
    ) -> dict[str, Any]:
        """Return further arguments of each block, for all patches of a grid or for those at indices (R, V)."""
        return {}

    def tokens(self, pixels: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Return the normalized output (B, E+N, D), the class token first."""
        model: Any = self
        tokens: torch.Tensor = model(pixels, bool_masked_pos=bool_masked_pos).last_hidden_state
        return tokens

    def last_blocks(self, pixels: torch.Tensor, num_blocks: int) -> list[torch.Tensor]:
        """Return the outputs of the last blocks, (B, E+N, D) each, before the final norm."""
        options = self.block_options(pixels, patch_grid(tuple(pixels.shape[-2:]), self.config.patch_size))
        tokens, outputs = self.embed_images(pixels), []
        for block in self.blocks:
            tokens = block(tokens, **options)
            outputs.append(tokens)
        return outputs[-num_blocks:]

    def encode(
        self, patches: torch.Tensor, visible: torch.Tensor, grid: tuple[int, int] | None = None
    ) -> list[torch.Tensor]:
        """Encode visible patches (R, V, P) with indices (R, V) in a grid of patches, by default the config's.

        Returns the input of the first block and the output of each, (R, E+V, D), the class token first; the last one
        is normalized and the encoder's output.
        """
        options = self.block_options(patches, grid or self.grid, visible)
        states = [self.embed(patches, visible, grid)]
        for block in self.blocks:
            states.append(block(states[-1], **options))
        return [*states[:-1], self.normalize(states[-1])]

    def embed(self, patches: torch.Tensor, visible: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """Return the input of the first block (R, E+V, D) for the arguments of `encode`."""
        weight = self.projection.weight.permute(0, 2, 3, 1).flatten(1)  # (D, P): the order in a patch is `patchify`'s
        x = nn.functional.linear(patches, weight, self.projection.bias)  # (R, V, D)
        cls = self.embeddings.cls_token
        positions = self.positions(grid)
        if positions is not None:
            x, cls = x + positions[visible + 1], cls + positions[0]
        extra = [cls, self.embeddings.register_tokens] if hasattr(self.embeddings, "register_tokens") else [cls]
        return torch.cat([*(token.expand(len(x), -1, -1).to(x.dtype) for token in extra), x], dim=1)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of an image of the config's size."""
        return patch_grid(self.config.image_size, self.config.patch_size)

    def positions(self, grid: tuple[int, int] | None = None) -> torch.Tensor | None:
        """Return the positions (1+N, D) of a grid, fixed: sines and cosines, or another model's table, resized.

        None if they are no table.
        """
        module: Any = self
        table = self.embeddings.position_embeddings
        return fixed_positions(module, table, self.grid, grid, antialias=self.antialias)


def fixed_positions(
    module: nn.Module,
    table: torch.Tensor,
    own_grid: tuple[int, int],
    grid: tuple[int, int] | None,
    *,
    antialias: bool = False,
) -> torch.Tensor:
    """Return the rows of a module's fixed table (1, 1+N, D) for a grid; tables of other grids are made once."""
    if grid is None or grid == own_grid:
        return table[0]
    tables: dict[Any, torch.Tensor] = module.__dict__.setdefault("_tables", {})
    if (grid, table.device) not in tables:
        tables[grid, table.device] = positions_of_grid(table, own_grid, grid, antialias=antialias)
    return tables[grid, table.device][0]

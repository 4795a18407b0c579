"""Reconstruction panels of a head: run it on a fixed batch, and draw what it predicts where patches were hidden.

A head is asked for `config.prediction_side`, `masked_cells` and `predicted_cells`, and not imported.
Shapes: B images, C channels, H W pixels, h w patches.
"""

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image

from evaluation.pictures import labeled_grid, reconstruction_panel

Drawer = Callable[[Any, dict[str, Any], int, float | None], Image.Image]


def pixel_panel_drawer(method: str) -> Drawer:
    """Input, masked, predicted and pasted, for heads that predict pixels."""

    def draw(head: Any, batch: dict[str, Any], step: int, eval_loss: float | None) -> Image.Image:
        mask = batch["bool_masked_pos"]
        logits = head(batch["pixel_values"], mask, return_loss=False).logits
        cells, side = head.masked_units(mask), head.config.prediction_side
        return reconstruction_panel(
            batch["pixel_values"] / 255,
            cells,
            head.predicted_units(logits, cells),
            patch_size=(side, side),
            norm_pix_loss=getattr(head.config, "norm_pix_loss", False),
            image_mean=head.config.image_mean,
            image_std=head.config.image_std,
            method=method,
            step=step,
            eval_loss=eval_loss,
        )

    return draw


def token_panel_drawer(method: str, make_labels: Any, grid: tuple[int, int]) -> Drawer:
    """What the tokenizer's decoder makes of all true tokens, and of true ones with the hidden ones predicted.

    `make_labels`: the tokenizer's views (B, C, H, W) -> labels (B, h*w); its `tokenizer` has `decode`.
    """

    def draw(head: Any, batch: dict[str, Any], step: int, eval_loss: float | None) -> Image.Image:
        mask = batch["bool_masked_pos"]
        labels = make_labels(batch["tokenizer_pixel_values"])
        predicted = labels.clone()
        predicted[mask] = head(batch["pixel_values"], mask, return_loss=False).logits.argmax(-1)
        views = batch["tokenizer_pixel_values"].float().cpu() / 255
        hidden = torch.nn.functional.interpolate(mask.view(-1, 1, *grid).float(), views.shape[2:]).bool().cpu()

        def decoded(tokens: torch.Tensor) -> torch.Tensor:
            return make_labels.tokenizer.decode(tokens.view(-1, *grid)).float().clamp(0, 1).cpu()

        footer = f"{method}  ·  step {step:,}" + (f"  ·  eval loss {eval_loss:.4g}" if eval_loss is not None else "")
        return labeled_grid(
            {
                "tokenizer's view": views,
                "masked": views.masked_fill(hidden, 0.5),
                "decoded from its own tokens": decoded(labels),
                "decoded, hidden tokens predicted": decoded(predicted),
            },
            footer,
        )

    return draw

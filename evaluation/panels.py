"""Panels: what a model predicts on a fixed batch, drawn as labeled images with a line about the run."""

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image

from evaluation.pictures import MAX_ROWS, labeled_grid

Drawer = Callable[[Any, dict[str, Any], int, float | None], Image.Image]


def panel_drawer(name: str, views_of: Callable[[Any, dict[str, Any]], Mapping[str, Any]]) -> Drawer:
    """Return `draw(model, batch, step, eval_loss)`; `views_of(model, batch)` gives the columns, `name` the footer."""

    def draw(model: Any, batch: dict[str, Any], step: int, eval_loss: float | None) -> Image.Image:
        facts = [name, f"step {step:,}"]
        if eval_loss is not None:
            facts.append(f"validation loss {eval_loss:.4g}")
        if "bool_masked_pos" in batch:
            facts.append(f"mask ratio {batch['bool_masked_pos'].float().mean().item():.2f}")
        views = {label: images[:MAX_ROWS] for label, images in views_of(model, batch).items()}
        return labeled_grid(views, footer="  ·  ".join(facts))

    return draw

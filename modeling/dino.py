"""DINO: predict the prototypes that a teacher sees in other crops of an image; iBOT without masks.

Paper: Caron et al. 2021, "Emerging Properties in Self-Supervised Vision Transformers", arXiv:2104.14294, Sec. 3.
Code: facebookresearch/dino at 7c446df.
Differs: as `ibot.py`.
"""

from typing import ClassVar

from huggingface_hub.dataclasses import strict

from .base import Paper
from .ibot import IbotConfig, IbotForPreTraining


@strict
class DinoConfig(IbotConfig):
    """Configuration of DINO, with the settings of `IbotConfig` and no patch loss."""

    model_type = "mim_dino"
    paper: ClassVar[Paper | None] = Paper(
        "Emerging Properties in Self-Supervised Vision Transformers",
        "Mathilde Caron and Hugo Touvron and Ishan Misra and Herv{\\'e} J{\\'e}gou and Julien Mairal and "
        "Piotr Bojanowski and Armand Joulin",
        2021,
        "2104.14294",
    )
    max_prototypes: ClassVar[int] = 65_536

    patch_loss_weight: float = 0.0
    mask_probability: float = 0.0  # type: ignore[misc]


class DinoForPreTraining(IbotForPreTraining):
    """A student that sees global and local crops, and a teacher that sees the global ones (Fig. 2)."""

    config: DinoConfig
    predicts_patches = False

"""DINOv2: iBOT with separate heads, Sinkhorn-Knopp centering, KoLeo, spread mask ratios, LayerScale and registers.

Papers: Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision", arXiv:2304.07193, Sec. 4;
Darcet et al. 2023, "Vision Transformers Need Registers", arXiv:2309.16588.
Code: facebookresearch/dinov2 at e1277af.
Differs: as `ibot.py`; with centering by a running mean, the patches' mean is over all patches, there over masked ones.
The drop path draws for each image; there a part of the batch is left out, which is faster.
Shapes: B images, C channels, H W pixels, N patches, R registers, D width.
"""

from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel
from transformers import initialization as init
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersEmbeddings

from .base import InitializesEveryModule, Paper
from .encoders import ResizedPositions, init_like_pytorch
from .ibot import IbotConfig, IbotForPreTraining


@strict
class Dinov2Config(IbotConfig):
    """Configuration of DINOv2, with the settings of `IbotConfig`.

    `num_register_tokens` tokens, which belong to no patch, are added to those of the encoder; 0 for the paper's model.
    `drop_path_rate` is that of all blocks.
    """

    model_type = "mim_dinov2"
    paper: ClassVar[Paper | None] = Paper(
        "DINOv2: Learning Robust Visual Features without Supervision",
        "Maxime Oquab and Timoth{\\'e}e Darcet and Th{\\'e}o Moutakanni and Huy V. Vo and others",
        2023,
        "2304.07193",
    )
    encoder_defaults: ClassVar[dict[str, Any]] = {
        "model_type": "dinov2_with_registers",
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1e-5,
    }
    encoder_types = ("dinov2_with_registers",)
    max_prototypes: ClassVar[int] = 131_072
    spreads_mask_ratios: ClassVar[bool] = True

    shares_heads: bool = False
    centering: str = "sinkhorn"
    koleo_loss_weight: float = 0.1
    num_local_crops: int = 8
    max_local_crop_scale: float = 0.32
    drop_path_rate: float = 0.3
    num_register_tokens: int = 4

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.encoder_config, dict) or self.encoder_config is None:
            given = dict(self.encoder_config or {})
            if "intermediate_size" in given:  # the native config has a ratio
                given["mlp_ratio"] = given.pop("intermediate_size") // given.get("hidden_size", 768)
            self.encoder_config = {"num_register_tokens": self.num_register_tokens, **given}
        super().__post_init__(**kwargs)
        self.num_register_tokens = self.encoder_config.num_register_tokens
        self.encoder_config.drop_path_rate = self.drop_path_rate


class Dinov2Encoder(InitializesEveryModule, Dinov2WithRegistersModel):
    """A Dinov2WithRegistersModel that takes crops of any size, initialized as by the authors."""

    no_weight_decay: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Dinov2WithRegistersConfig):
        super().__init__(config)
        self.embeddings = AnySizeEmbeddings(config)
        self.post_init()

    def tokens(self, pixels: torch.Tensor, bool_masked_pos: torch.Tensor | None = None) -> torch.Tensor:
        """Return the normalized output (B, 1+R+N, D), the class token first."""
        tokens: torch.Tensor = self(pixels, bool_masked_pos=bool_masked_pos).last_hidden_state
        return tokens

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv2d):
            init_like_pytorch(module)
        elif isinstance(module, Dinov2WithRegistersEmbeddings):
            init.normal_(module.cls_token, std=1e-6)
            init.normal_(module.register_tokens, std=1e-6)


class AnySizeEmbeddings(ResizedPositions, Dinov2WithRegistersEmbeddings):
    """Dinov2WithRegistersEmbeddings for crops of any size."""

    antialias: ClassVar[bool] = True


class Dinov2ForPreTraining(IbotForPreTraining):
    """iBOT's student and teacher around a `Dinov2Encoder`."""

    config: Dinov2Config
    _no_split_modules = ["Dinov2WithRegistersLayer"]  # noqa: RUF012 - read by transformers as a class attribute

    def build_encoder(self) -> Dinov2Encoder:
        """Return an encoder, whose config has the drop path."""
        return Dinov2Encoder(self.config.encoder_config)

    def freeze(self) -> None:
        """Freeze the mask token as well if nothing is masked: native encoders always have one."""
        super().freeze()
        if not self.config.patch_loss_weight:
            self.encoder.embeddings.mask_token.requires_grad_(False)

"""DINOv2: iBOT with separate heads, Sinkhorn-Knopp centering, KoLeo, spread mask ratios, LayerScale and registers.

Papers: Oquab et al. 2023, "DINOv2: Learning Robust Visual Features without Supervision", arXiv:2304.07193, Sec. 4;
Darcet et al. 2023, "Vision Transformers Need Registers", arXiv:2309.16588.
Code: facebookresearch/dinov2 at e1277af.
Differs: as `ibot.py`; with centering by a running mean, the patches' mean is over all patches, there over masked ones.
The drop path draws for each image; there a part of the batch is left out, which is faster.
"""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .base import Paper
from .ibot import IbotConfig, IbotForPreTraining


@strict
class Dinov2Config(IbotConfig):
    """Configuration of DINOv2, with the settings of `IbotConfig`.

    `drop_path_rate` is that of all blocks. From scratch, the encoder is a Dinov2WithRegistersModel.

    Args:
        num_register_tokens: Tokens of the encoder that belong to no patch; 0 for the paper's model.
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
    encoder_types = ("dinov2_with_registers", "dinov2", "dinov3_vit", "vit")
    max_prototypes: ClassVar[int] = 131_072
    published_width: ClassVar[int] = 1024
    learning_rate_is_linear: ClassVar[bool] = False  # `scaling_rule` sqrt_wrt_1024 of the authors' code
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
            if given.get("model_type", "dinov2_with_registers") == "dinov2_with_registers":
                if "intermediate_size" in given:  # the native config has a ratio
                    given["mlp_ratio"] = given.pop("intermediate_size") // given.get("hidden_size", 768)
                given.setdefault("num_register_tokens", self.num_register_tokens)
            self.encoder_config = given
        super().__post_init__(**kwargs)
        self.num_register_tokens = getattr(self.encoder_config, "num_register_tokens", 0)


class Dinov2ForPreTraining(IbotForPreTraining):
    """iBOT's student and teacher, from scratch around a Dinov2WithRegistersModel."""

    config: Dinov2Config
    _no_split_modules = ["Dinov2WithRegistersLayer"]  # noqa: RUF012 - read by transformers as a class attribute

"""What every pre-training head shares: a strict config, one output class, and the cures for the library's traps.

Shapes: B images, C channels, H W pixels, N patches, M of them hidden, K numbers predicted for a patch.
"""

import difflib
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .patches import coarsen_mask, masked_indices, patch_grid

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Arguments that transformers itself passes through a config's constructor without declaring them as fields.
_LIBRARY_ARGUMENTS = {
    *("attn_implementation", "experts_implementation", "output_attentions", "torch_dtype", "name_or_path"),
    *(
        "num_labels",
        "per_layer_config",
        "auto_map",
        "transformers_version",
        "model_type",
        "use_cache",
        "tie_word_embeddings",
    ),
}


@strict
class MimConfig(PreTrainedConfig):
    """Settings of a pre-training head; `encoder_config` is native and outlives it, the rest goes with the head.

    `image_mean` and `image_std` (in [0, 1], one per channel) standardize uint8 images on the device.

    Raises:
        ValueError: on a setting that does not exist; transformers would store a mistyped name and ignore it.
    """

    sub_configs: ClassVar[dict[str, type]] = {"encoder_config": AutoConfig}
    # What an encoder_config that leaves something out gets. LayerNorm eps is transformers' 1e-12 otherwise, with which
    # the first LayerNorm turns a small token into an exploding gradient.
    encoder_defaults: ClassVar[dict[str, Any]] = {"model_type": "vit", "layer_norm_eps": 1e-6}

    # Encoders that a method can train: by the first part of the name of a preset, and by model type, in the order in
    # which they are tried for a model that somebody else trained (`hub.init_from`).
    encoder_families: ClassVar[tuple[str, ...]] = ("vit",)
    encoder_types: ClassVar[tuple[str, ...]] = ("vit",)

    encoder_config: Any = None  # a native config, or its settings as a dict
    image_mean: list[float] | tuple[float, ...] = IMAGENET_MEAN
    image_std: list[float] | tuple[float, ...] = IMAGENET_STD
    # Trainer would gather every prediction of the whole evaluation set; it wants a list.
    keys_to_ignore_at_inference = ["logits", "accuracy"]  # noqa: RUF012

    @property
    def prediction_side(self) -> int:
        """Pixels along the side of the square that one prediction fills; a mask must hide such squares whole."""
        return self.encoder_config.patch_size

    def __post_init__(self, **kwargs: Any):
        known = {field.name for field in fields(self)}
        for name in kwargs:
            if name not in known | _LIBRARY_ARGUMENTS and not name.startswith("_"):
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise ValueError(f"{type(self).__name__} has no setting {name!r}{hint}")
        if not isinstance(self.encoder_config, PreTrainedConfig):
            given, defaults = self.encoder_config or {}, self.encoder_defaults
            if given.get("model_type", defaults["model_type"]) != defaults["model_type"]:
                defaults = {}  # they are of another kind of encoder
            self.encoder_config = AutoConfig.for_model(**{**defaults, **given})
        super().__post_init__(**kwargs)
        if self.encoder_config.model_type not in self.encoder_types:
            raise ValueError(
                f"{type(self).__name__} trains {' or '.join(self.encoder_types)}, "
                f"not a {self.encoder_config.model_type}"
            )
        if len(self.image_mean) != len(self.image_std) or len(self.image_mean) != self.encoder_config.num_channels:
            raise ValueError(
                f"image_mean {tuple(self.image_mean)} and image_std {tuple(self.image_std)} need one number for each "
                f"of the encoder's {self.encoder_config.num_channels} channels"
            )


@dataclass
class MimOutput(ModelOutput):
    """What a head returns.

    `loss`: scalar, float32. `logits` (B, M, K): predictions at the M hidden patches of each image, row-major, or (sum
    of M, K) where images may hide unequal numbers. `accuracy`: share of hidden patches whose token was predicted.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    accuracy: torch.Tensor | None = None


class InitializesEveryModule:
    """Mix-in for our models: `_init_weights` is called for every module, blocks included.

    In code that is not its own, transformers passes over modules that own no tensor directly, lest loaded weights be
    drawn anew; a block could not redraw its projections. `transformers.initialization` spares loaded weights anyway.
    """

    def _initialize_weights(self, module: torch.nn.Module, is_custom_code: bool = False) -> None:
        super()._initialize_weights(module)  # type: ignore[misc]


class MimPreTrainedModel(InitializesEveryModule, PreTrainedModel):
    """Base of the heads. A head is `encoder` plus what goes away after pre-training, and never draws a mask itself.

    `frozen_parameters` are names (of this model) that must never train. With `needs_equal_num_masked`
    all images of a batch must hide equally many patches; with `needs_tokenizer` it predicts `labels`, visual tokens.
    """

    config: MimConfig
    encoder: PreTrainedModel
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    # Without it, Trainer takes a head with `labels` for one that divides by num_items_in_batch, and accumulates sums.
    accepts_loss_kwargs = False
    needs_equal_num_masked: ClassVar[bool] = False
    needs_tokenizer: ClassVar[bool] = False
    frozen_parameters: ClassVar[tuple[str, ...]] = ()

    def post_init(self) -> None:
        super().post_init()
        self.freeze()

    def freeze(self) -> None:
        for name in self.frozen_parameters:
            self.get_parameter(name).requires_grad_(False)

    def standardize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, H, W) uint8 -> float32, zero mean and unit deviation; float images are taken as standardized."""
        if pixel_values.dtype != torch.uint8:
            return pixel_values
        mean = pixel_values.new_tensor(self.config.image_mean, dtype=torch.float32).view(-1, 1, 1) * 255
        std = pixel_values.new_tensor(self.config.image_std, dtype=torch.float32).view(-1, 1, 1) * 255
        return (pixel_values - mean) / std

    def masked_units(self, bool_masked_pos: torch.Tensor) -> torch.Tensor:
        """(B, N) -> (B, cells): the mask on the squares that single predictions fill, usually the patches."""
        encoder_config = self.config.encoder_config
        step = self.config.prediction_side // encoder_config.patch_size
        if step == 1:
            return bool_masked_pos
        return coarsen_mask(bool_masked_pos, patch_grid(encoder_config.image_size, encoder_config.patch_size), step)

    def predicted_units(self, logits: torch.Tensor, masked_units: torch.Tensor) -> torch.Tensor:
        """Predictions at hidden cells -> (B, cells, K) in target space, zero at visible ones: what pictures show."""
        predicted = logits.new_zeros(masked_units.numel(), logits.shape[-1])
        predicted[masked_indices(masked_units)] = logits.flatten(0, -2)
        return predicted.view(*masked_units.shape, -1)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any):
        """As in transformers, which makes every float parameter trainable; fixed tables are frozen again here."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any):
        """As in transformers, but with today's key names.

        The default writes the v4 names of the native encoder inside, which `Trainer` reads back with
        `load_state_dict(strict=False)`: a resumed run would silently lose every transformer block.
        """
        return super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

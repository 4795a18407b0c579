"""Base classes of the pre-training models: what a method says about itself, and cures for traps of the library.

A method is one config and one model class. The rest of the project asks them and knows no method by name, so all that
differs between methods is declared here, with a default: the paper, views and losses, schedules and hooks, metrics and
panel, the encoder that is exported, and the fine-tuning recipe that fits it.

Shapes: B images, C channels, H W pixels, N patches, M masked patches per image, K values predicted for a patch.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from .patches import STORED_DTYPES, coarsen_mask, masked_indices, patch_grid, standardize
from .schedules import Progress, Schedule
from .views import View

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Arguments that transformers itself passes through a config's constructor without declaring them as fields.
_LIBRARY_ARGUMENTS = {
    *("attn_implementation", "experts_implementation", "output_attentions", "torch_dtype", "name_or_path"),
    *("num_labels", "per_layer_config", "auto_map", "transformers_version", "model_type", "use_cache"),
    "tie_word_embeddings",
}


class Paper(NamedTuple):
    """The publication that a model card cites."""

    title: str
    authors: str
    year: int
    arxiv: str

    def bibtex(self, key: str) -> str:
        """Return the BibTeX entry."""
        return (
            f"@article{{{key}{self.year},\n  title   = {{{{{self.title}}}}},\n  author  = {{{self.authors}}},\n"
            f"  journal = {{arXiv preprint arXiv:{self.arxiv}}},\n  year    = {{{self.year}}}\n}}"
        )


class FinetuneRecipe(NamedTuple):
    """Published fine-tuning settings: the name of a file in `recipes/`, and how it evaluates.

    Images of up to `largest_cropped_size` pixels are evaluated on 224/256 of the resized short side, others whole.
    """

    name: str
    largest_cropped_size: float


@strict
class MimConfig(PreTrainedConfig):
    """Configuration of a pre-training model: the native `encoder_config`, which leaves with the encoder, and the rest.

    `image_mean` and `image_std` (in [0, 1], one value per channel) standardize stored images on the device: uint8, or
    measurements, of which `value_range` gives the lowest and highest value of each channel.

    Raises:
        ValueError: If a setting does not exist. Transformers would store a misspelled name and ignore it.
    """

    sub_configs: ClassVar[dict[str, type]] = {"encoder_config": AutoConfig}
    # Defaults of an encoder_config. Transformers' LayerNorm eps is 1e-12, with which the first LayerNorm turns a small
    # token into an exploding gradient.
    encoder_defaults: ClassVar[dict[str, Any]] = {"model_type": "vit", "layer_norm_eps": 1e-6}
    # Encoders that the method can train: by the first part of a preset's name, and by model type, in the order in
    # which they are tried for weights that somebody else trained.
    encoder_families: ClassVar[tuple[str, ...]] = ("vit",)
    encoder_types: ClassVar[tuple[str, ...]] = ("vit",)
    # Model types of transformers whose whole pre-training model this method continues, prediction head included.
    transformers_model_types: ClassVar[tuple[str, ...]] = ()
    # Settings that follow from the source of the targets, and those that fix shapes of weights (by prefix).
    settings_of_targets: ClassVar[tuple[str, ...]] = ()
    settings_fixed_by_weights: ClassVar[tuple[str, ...]] = ("decoder",)
    paper: ClassVar[Paper | None] = None
    # Images per step, and width of the encoder, for which the learning rate of the recipe was published.
    published_batch: ClassVar[int] = 2048
    published_width: ClassVar[int] = 768
    # Whether the learning rate of a smaller batch is in proportion to it, and not to its root.
    learning_rate_is_linear: ClassVar[bool] = False
    # Whether a narrower encoder trained from scratch has a higher learning rate.
    learning_rate_follows_width: ClassVar[bool] = True
    # Share of the masks that mask anything, and whether the ratios of a batch are spread evenly over their range.
    mask_probability: ClassVar[float] = 1.0
    spreads_mask_ratios: ClassVar[bool] = False
    chooses_masks: ClassVar[bool] = False  # whether the model moves masks in training, by "mask_noise" of the collator
    takes_texts: ClassVar[bool] = False  # whether it has the settings of modeling/beit3.py for batches of texts
    needs_trained_encoder: ClassVar[bool] = False  # whether there is little sense in random initial weights

    encoder_config: Any = None  # a native config, or its settings as a dict
    image_mean: list[float] | tuple[float, ...] = IMAGENET_MEAN
    image_std: list[float] | tuple[float, ...] = IMAGENET_STD
    value_range: list[list[float]] | None = None
    # Trainer would gather all predictions of the evaluation set; it wants a list.
    keys_to_ignore_at_inference = ["losses", "logits", "metrics"]  # noqa: RUF012

    @property
    def prediction_side(self) -> int:
        """Side in pixels of the square that one prediction covers; a mask must hide such squares as a whole."""
        return int(self.encoder_config.patch_size)

    @property
    def resizes_positions(self) -> bool:
        """Whether the model takes images of other sizes than the encoder's."""
        return False

    @property
    def views(self) -> tuple[View, ...]:
        """The crops of an image that the model sees; a mask is drawn for each crop of the first view."""
        return (View(),)

    @classmethod
    def settings_for(cls, num_images: int) -> dict[str, Any]:
        """Return the values of settings that follow from the number of training images where they are 0."""
        return {}

    @classmethod
    def finetune_recipe(cls, encoder_config: Any) -> FinetuneRecipe:
        """Return the published fine-tuning settings that fit an encoder best, by default those for its family."""
        # A ViT that was fine-tuned before may have become a BEiT; its method tells what it was.
        family = encoder_config.model_type if cls is MimConfig else cls.encoder_types[0]
        width = getattr(encoder_config, "hidden_size", 0)
        if encoder_config.model_type == "swin":  # `hidden_size` is the width of the last stage
            return FinetuneRecipe(f"finetune_simmim_swin-{'large' if width >= 1536 else 'base'}", float("inf"))
        size = "large" if width >= 1024 else "base"
        if family in ("beit", "data2vec-vision"):
            return FinetuneRecipe(f"finetune_beit_vit-{size}", 383)
        return FinetuneRecipe(f"finetune_mae_vit-{'huge' if width >= 1280 else size}", 224)

    @classmethod
    def segmentation_recipe(cls, encoder_config: Any) -> str:
        """Return the file in `recipes/` with the published UPerNet settings that fit an encoder best."""
        size = "large" if getattr(encoder_config, "hidden_size", 0) >= 1024 else "base"
        if encoder_config.model_type == "swin":
            return "finetune_upernet_swin-base"
        family = encoder_config.model_type if cls is MimConfig else cls.encoder_types[0]
        if family == "beit":
            return f"finetune_upernet_beit_vit-{size}"
        return "finetune_upernet_mae_vit-base"

    def __post_init__(self, **kwargs: Any) -> None:
        known = {field.name for field in fields(self)}
        for name in kwargs:
            if name not in known | _LIBRARY_ARGUMENTS and not name.startswith("_"):
                nearest = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
                raise ValueError(f"{type(self).__name__} has no setting {name!r}{hint}")
        if not isinstance(self.encoder_config, PreTrainedConfig):
            given, defaults = self.encoder_config or {}, self.encoder_defaults
            if given.get("model_type", defaults["model_type"]) != defaults["model_type"]:
                defaults = {}  # they are for another type of encoder
            self.encoder_config = AutoConfig.for_model(**{**defaults, **given})
        super().__post_init__(**kwargs)  # type: ignore[no-untyped-call]
        if self.encoder_config.model_type not in self.encoder_types:
            raise ValueError(
                f"{type(self).__name__} trains {' or '.join(self.encoder_types)}, "
                f"not a {self.encoder_config.model_type}"
            )
        if len(self.image_mean) != len(self.image_std) or len(self.image_mean) != self.encoder_config.num_channels:
            raise ValueError(
                f"image_mean {tuple(self.image_mean)} and image_std {tuple(self.image_std)} need one value for each "
                f"of the encoder's {self.encoder_config.num_channels} channels"
            )
        ends = self.value_range or ()
        if self.value_range and (len(ends) != len(self.image_mean) or not all(low < high for low, high in ends)):
            raise ValueError(f"value_range is {ends}, expected a lower and a higher value for each channel")


@dataclass
class MimOutput(ModelOutput):
    """Output of a pre-training model.

    Args:
        loss: Scalar, float32: the weighted sum of `losses`.
        losses: By name, where there is more than one: the mean of each loss over its items (`loss_counts`), a scalar.
        logits: Predictions at the masked patches, row-major: (B, M, K), or (sum of M, K) where M differs by image.
        metrics: Tensors that are summed over micro-batches and processes and then read by `summarize_metrics`.
    """

    loss: torch.Tensor | None = None
    losses: dict[str, torch.Tensor] | None = None
    logits: torch.Tensor | None = None
    metrics: dict[str, torch.Tensor] | None = None


def mean_metric(value: torch.Tensor, count: int) -> torch.Tensor:
    """Return a metric (2,), sum and count, from a mean over `count` items."""
    value = value.detach().float()
    return torch.stack([value * count, torch.full_like(value, count)])


def summarize_means(sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Turn metrics (2,), sum and count, into means."""
    return {name: (total[0] / total[1]).item() for name, total in sums.items()}


class InitializesEveryModule:
    """Mix-in that calls `_init_weights` for every module, blocks included.

    For code that is not its own, transformers skips modules that own no tensor directly, so that a block could not
    initialize its projections. `transformers.initialization` spares loaded weights anyway.
    """

    def _initialize_weights(self, module: torch.nn.Module, is_custom_code: bool = False) -> None:
        super()._initialize_weights(module)  # type: ignore[misc]


class MimPreTrainedModel(InitializesEveryModule, PreTrainedModel):
    """Base class of the pre-training models: an `encoder` and what is dropped after pre-training.

    A model never draws a mask itself, but may change one in training (`MimConfig.chooses_masks`). Class attributes:

    - `frozen_parameters`: prefixes of parameter names that never train.
    - `no_weight_decay`: suffixes of parameter names without weight decay, beside biases and one-dimensional tensors.
    - `needs_equal_num_masked`: all images of a batch must have equally many masked patches.
    - `targets`: kind of targets that the batch must hold, see `training.targets`; None if the images are enough.
    - `predicts_patches`: False if nothing is masked, so that there are no `logits`.
    - `exported`: name of the submodule that leaves as the native encoder.
    - `can_collapse`: the targets follow the model itself, so that they may become equal; see `collapse_signs`.
    - `panel_caption`: what `panel` shows, for the model card.
    - `opened_blocks`: names of block classes whose parts are called one by one, so that FSDP2 cannot shard by them.
    - `decodes_masked_patches`: masked patches exist in the decoder only, so that `forward` takes several masks
      (B, k, N) of an image, and in `bool_predicted_pos` the masked patches to decode.
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
    # Otherwise Trainer assumes that a model with `labels` divides by num_items_in_batch, and accumulates sums.
    accepts_loss_kwargs = False
    needs_equal_num_masked: ClassVar[bool] = False
    predicts_patches: ClassVar[bool] = True
    targets: ClassVar[str | None] = None
    frozen_parameters: ClassVar[tuple[str, ...]] = ()
    exported: str = "encoder"
    can_collapse: ClassVar[bool] = False
    decodes_masked_patches: ClassVar[bool] = False
    opened_blocks: ClassVar[tuple[str, ...]] = ()
    panel_caption: ClassVar[str] = "Reconstructions of images: input, masked, predicted"

    # ---- training ----

    def loss_counts(self, batch: Mapping[str, Any]) -> dict[str, int]:
        """Return the number of items that each loss is a mean over, by name.

        The trainer weighs the losses with it, so that every item of an optimizer step counts alike however the items
        are spread over micro-batches and processes. Runs on the collator's batch: nothing may wait for the device.
        """
        count = batch.get("num_predicted_patches", batch.get("num_masked_patches"))
        return {} if count is None else {"loss": count}

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The weight of each of the named losses; 1 where there is none."""
        return {}

    @property
    def training_loss_label(self) -> str:
        """What plots call the training loss, beside that of evaluations, which may have other parts."""
        return "training loss"

    @property
    def compares_images(self) -> bool:
        """Whether a loss compares the images of a batch: small batches then do not add up to a large one."""
        return False

    def weighted_sum(self, losses: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Return the scalar loss of the named ones."""
        terms = [self.loss_weights.get(name, 1.0) * loss for name, loss in losses.items()]
        return torch.stack(terms).sum()

    def schedules(self, num_steps: int, steps_per_epoch: int) -> dict[str, Schedule]:
        """Return the numbers that change during training, by name.

        A value whose name is an argument of `forward` is passed to it in training; `weight_decay` sets the
        optimizer's; the hooks find all of them in `Progress.values`, and the log shows them.
        """
        return {}

    def before_step(self, progress: Progress) -> None:
        """Run before the first micro-batch of each optimizer step."""

    def before_update(self, progress: Progress) -> None:
        """Run when the gradients of a step are complete, before the optimizer uses them."""

    def after_step(self, progress: Progress) -> None:
        """Run after the optimizer has updated the weights, as for a teacher that follows its student."""

    def after_loading_encoder(self) -> None:
        """Run when weights of another model were loaded into `encoder`."""

    # ---- what people see ----

    def summarize_metrics(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Turn the summed `MimOutput.metrics` into numbers for the log."""
        return summarize_means(sums)

    def describe_metrics(self, logs: Mapping[str, float]) -> list[str]:
        """Return phrases about this model's metrics for one line of the log; evaluation prefixes names by `eval_`."""
        return []

    def collapse_signs(self, logs: Mapping[str, float]) -> str | None:
        """Return a sentence about a sign of collapse, with its number and what to change; None if there is none.

        Args:
            logs: Metrics of an evaluation after warm-up, without the prefix `eval_`: those of `summarize_metrics`, the
                loss, and `rankme` and `feature_std` of the exported encoder. Before the first step only the last two,
                and any of them may be missing.
        """
        return None

    def panel_problem(self, targets: Any = None) -> str | None:
        """Return why there is nothing to draw, or None if `panel` draws."""
        return f"{type(self).__name__} draws no predictions" if type(self).panel is MimPreTrainedModel.panel else None

    def panel(self, batch: Mapping[str, Any], targets: Any = None) -> dict[str, torch.Tensor]:
        """Return labeled images (B, C, H, W) in [0, 1], the columns of the panel that shows what the model predicts.

        Args:
            batch: A batch of the collator on the model's device.
            targets: What makes the targets of the run, if the method has such.
        """
        raise NotImplementedError

    # ---- weights ----

    @property
    def exported_encoder(self) -> PreTrainedModel:
        """The encoder that users keep."""
        return self.get_submodule(self.exported)  # type: ignore[return-value]

    def post_init(self) -> None:
        super().post_init()  # type: ignore[no-untyped-call]
        self.freeze()

    def freeze(self) -> None:
        """Exclude `frozen_parameters` from training."""
        prefixes = tuple(f"{prefix}." for prefix in self.frozen_parameters)
        for name, parameter in self.named_parameters():
            if f"{name}.".startswith(prefixes):
                parameter.requires_grad_(False)

    def get_input_embeddings(self) -> Any:
        """Return None: FSDP2 would shard the embeddings apart, but some methods use their weights themselves."""
        return None

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, which makes every float parameter trainable; frozen ones are frozen again."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded).freeze()
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers, but with today's key names.

        The default writes v4 names of the native encoder inside, which `Trainer` reads back with
        `load_state_dict(strict=False)`: a resumed run would silently lose every transformer block.
        """
        super().save_pretrained(save_directory, *args, **{"save_original_format": False, **kwargs})

    # ---- pixels and masks ----

    def standardize(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Standardize stored images (B, C, H, W) to float32; float images are taken as standardized."""
        if pixel_values.dtype not in STORED_DTYPES:
            return pixel_values
        return standardize(pixel_values, self.config.image_mean, self.config.image_std, self.config.value_range)

    def masked_units(self, bool_masked_pos: torch.Tensor) -> torch.Tensor:
        """(B, N) -> (B, units): the mask on the squares that single predictions cover, usually the patches."""
        encoder_config = self.config.encoder_config
        step = self.config.prediction_side // encoder_config.patch_size
        if step == 1:
            return bool_masked_pos
        return coarsen_mask(bool_masked_pos, patch_grid(encoder_config.image_size, encoder_config.patch_size), step)

    def predicted_units(self, logits: torch.Tensor, masked_units: torch.Tensor) -> torch.Tensor:
        """Scatter predictions at masked units to (B, units, K), with zeros at visible ones."""
        predicted = logits.new_zeros(masked_units.numel(), logits.shape[-1])
        predicted[masked_indices(masked_units)] = logits.flatten(0, -2)
        return predicted.view(*masked_units.shape, -1)

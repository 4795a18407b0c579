"""The batches of a pre-training run: views of images, and the masks of their patches."""

from PIL import Image

from commands.pretraining_settings import PretrainingSettings
from commands.texts import TextSplits
from data.augmentations import OtherSize, Views, build_views
from data.collators import MaskingCollator
from data.text_batches import MixedCollator
from modeling import MODELS, MimConfig
from modeling.patches import patch_grid
from training.targets import Targets


def build_collator(
    settings: PretrainingSettings, config: MimConfig, texts: TextSplits | None = None
) -> MaskingCollator | MixedCollator:
    """Return the collator that draws masks; raises ValueError if they could cover a part of an encoder's token."""
    side = config.prediction_side
    for name in ("prediction_ratio", "num_masks"):
        if settings.values[name] != 1 and not MODELS[settings.method].decodes_masked_patches:
            raise ValueError(
                f"--{name} {settings.values[name]}: the encoder of {settings.method} sees masked patches; possible "
                f"with {', '.join(name for name, model in MODELS.items() if model.decodes_masked_patches)}"
            )
    if settings.num_masks > 1 and config.views[0].num_crops:
        raise ValueError(f"--num_masks {settings.num_masks}: {settings.method} has a mask for each of its crops")
    if settings.image_size_schedule and not config.resizes_positions:
        raise ValueError(
            f"--image_size_schedule: {settings.method} with {settings.model} has positions, windows or targets of one "
            "size; leave it out, or use a method with fixed positions, such as mae"
        )
    if settings.mask_unit * settings.patch_size % side:
        raise ValueError(
            f"--model {settings.model} makes one token of {side} x {side} pixels, which must be masked as a whole: "
            f"use --mask_strategy random-unit with a --mask_unit of {side} or a multiple"
        )
    images = MaskingCollator(
        grid=patch_grid(config.encoder_config.image_size, config.encoder_config.patch_size),
        mask_ratio=settings.mask_ratio,
        strategy=settings.mask_strategy,
        seed=settings.seed,
        mask_unit=settings.mask_unit,
        equal_num_masked=MODELS[settings.method].needs_equal_num_masked,
        num_masks=config.views[0].num_crops or (settings.num_masks if settings.num_masks > 1 else None),
        with_image_index=True,
        prediction_ratio=settings.prediction_ratio,
        image_size=settings.image_size if settings.image_size_schedule else None,
        mask_probability=config.mask_probability,
        spreads_ratios=config.spreads_mask_ratios,
        with_noise=config.chooses_masks,
    )
    if texts is None:
        return images
    ratios = (settings.values[name] for name in ("text_mask_ratio", "pair_text_mask_ratio"))
    return MixedCollator(images, texts.tokens, *ratios)


def transform_of(
    settings: PretrainingSettings,
    config: MimConfig,
    targets: Targets | None,
    train: bool,
    image_size: tuple[int, int] | None = None,
) -> Views:
    """Return the transform to the method's views, and to the one that the targets need."""
    if settings.is_users("color_jitter") and any(view.photometric for view in config.views):
        raise ValueError(
            f"--color_jitter has no effect with {settings.method}, whose crops have the color changes of its paper; "
            "leave it out"
        )
    other_size = None if targets is None or targets.view is None else OtherSize(*targets.view)
    return build_views(
        config.views,
        image_size=image_size or settings.image_size,
        crop_scale=settings.crop_scale,
        num_channels=settings.num_channels,
        train=train,
        interpolation=Image.Resampling[settings.interpolation.upper()],
        color_jitter=settings.color_jitter,
        other_size=other_size,
        has_colors=config.value_range is None,
    )

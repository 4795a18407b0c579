"""Read the config of the model that a training starts from, and check that the method can continue from it.

The method's encoder must be able to compute exactly what the model computes (`hub.encoder_states`), so that training
starts from its features and not from similar ones. `hub.init_weights` reads the weights.
"""

from dataclasses import dataclass, fields
from typing import Any

from transformers import PreTrainedConfig

from hub.encoder_states import FAMILIES, FAMILIES_OF, encoder_settings, obstacle
from hub.image_stats import processor_stats
from hub.open_model import open_whole_config
from modeling import CONFIGS, MimConfig
from modeling.patches import height_and_width


@dataclass(frozen=True)
class StartingModel:
    """The model that a training starts from.

    Args:
        own_method: The method that it was trained with, if it is a pre-training model of ours.
        keeps_head: Whether the method continues all of its weights and not only the encoder's.
        grid: Rows and columns of patches.
        encoder: Keyword arguments of the encoder's native config.
        fixed: Settings that follow from the weights, by name.
        defaults: Settings that may be changed, by name.
        image_stats: Mean and standard deviation of the images, if the model has them, and their range of values.
        sizes_only: Whether this is the run's own checkpoint, whose weights `Trainer` loads.
    """

    name: str
    method: str
    config: PreTrainedConfig
    subfolder: str
    own_method: str | None
    keeps_head: bool
    family: str
    grid: tuple[int, int]
    encoder: dict[str, Any]
    fixed: dict[str, Any]
    defaults: dict[str, Any]
    image_stats: dict[str, Any]
    sizes_only: bool


def open_starting_model(name: str, method: str, sizes_only: bool = False) -> StartingModel:
    """Open the config of a folder or Hub id.

    Raises:
        ValueError: If there is no model, or the method cannot continue from it; the message lists methods that can.
    """
    config, subfolder = open_whole_config(name, "init_from")
    encoder_config: Any = config.encoder_config if isinstance(config, MimConfig) else config
    if encoder_config.model_type not in FAMILIES:
        raise ValueError(
            f"`init_from` {name} is a model of type {encoder_config.model_type}; training can begin from what this "
            f"program wrote, and from {', '.join(FAMILIES.values())}"
        )
    own_method = next((own for own, kind in CONFIGS.items() if config.model_type == kind.model_type), None)
    is_own = own_method == method
    keeps_head = is_own or config.model_type in CONFIGS[method].transformers_model_types
    host = encoder_config.model_type if is_own else _host(name, encoder_config, method)
    patch_height, patch_size = height_and_width(encoder_config.patch_size)
    if patch_height != patch_size:
        raise ValueError(f"`init_from` {name} has patches of {encoder_config.patch_size} pixels, expected square ones")
    rows, columns = grid_of(encoder_config)
    fixed: dict[str, Any] = {"patch_size": patch_size, "num_channels": encoder_config.num_channels}
    defaults: dict[str, Any] = {
        "image_size": rows * patch_size if rows == columns else [rows * patch_size, columns * patch_size]
    }
    if isinstance(config, MimConfig):
        image_stats: dict[str, Any] = {"image_mean": list(config.image_mean), "image_std": list(config.image_std)}
        if config.value_range is not None:
            image_stats["value_range"] = config.value_range
    else:  # the plan shows what is used if there are none
        image_stats = processor_stats(name, encoder_config.num_channels, subfolder)
    if image_stats:
        defaults["image_stats"] = "source"
    for flag, value in (_head_settings(config, method) if keeps_head else {}).items():
        is_fixed = flag.startswith(CONFIGS[method].settings_fixed_by_weights)
        (fixed if is_fixed else defaults)[flag] = value
    return StartingModel(
        name=name,
        method=method,
        config=config,
        subfolder=subfolder,
        own_method=own_method,
        keeps_head=keeps_head,
        family=FAMILIES[encoder_config.model_type],
        grid=(rows, columns),
        encoder=encoder_settings(encoder_config, host, is_own),
        fixed=fixed,
        defaults=defaults,
        image_stats=image_stats,
        sizes_only=sizes_only,
    )


def grid_of(config: Any) -> tuple[int, int]:
    """Return the rows and columns of whole patches; transformers ignores the rest of an image."""
    (height, width), (patch_height, patch_width) = map(height_and_width, (config.image_size, config.patch_size))
    return height // patch_height, width // patch_width


def _head_settings(config: PreTrainedConfig, method: str) -> dict[str, Any]:
    """Return the method's settings of a model that is continued; transformers' ViTMAE uses the same names.

    It lacks settings whose default is the published method.
    """
    own: Any = CONFIGS[method]
    names = {setting.name for setting in fields(own)} - {setting.name for setting in fields(MimConfig)}
    names -= {*own.settings_of_targets}
    return {name: getattr(config, name, getattr(own, name, None)) for name in sorted(names)}


def _host(name: str, config: PreTrainedConfig, method: str) -> str:
    """Return the type of the method's encoder that can compute the same function."""
    types = CONFIGS[method].encoder_types
    for host in (*(own for own in types if own == config.model_type), *types):
        if obstacle(config, host) is None:
            return host
    others = [other for other, kind in CONFIGS.items() if any(obstacle(config, h) is None for h in kind.encoder_types)]
    taken = dict.fromkeys(family for host in types for family in FAMILIES_OF[host])
    raise ValueError(
        f"`method` {method} cannot continue from {name} ({FAMILIES[config.model_type]}): "
        f"{obstacle(config, types[0])}. Methods that can: {', '.join(others) or 'none'}. "
        f"{method} continues from: {', '.join(taken)}"
    )

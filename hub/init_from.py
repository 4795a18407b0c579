"""Read the config of the model that a training starts from, and check that the method can continue from it.

The method's encoder must be able to compute exactly what the model computes (`hub.encoder_states`), so that training
starts from its features and not from similar ones. `hub.init_weights` reads the weights.
"""

from dataclasses import dataclass, field, fields
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
        encoder: Keyword arguments of the encoder's native config.
        fixed: Settings that follow from the weights, by name.
        defaults: Settings that may be changed, by name.
        image_stats: Mean and standard deviation of the images, if the model has them.
        sizes_only: Whether this is the run's own checkpoint, whose weights `Trainer` loads.
    """

    name: str
    method: str
    config: PreTrainedConfig
    subfolder: str
    encoder: dict[str, Any]
    fixed: dict[str, Any]
    defaults: dict[str, Any]
    image_stats: dict[str, list[float]] = field(default_factory=dict)
    sizes_only: bool = False

    @property
    def own_method(self) -> str | None:
        """The method that it was trained with, if it is a pre-training model of ours."""
        return _own_method(self.config)

    @property
    def keeps_head(self) -> bool:
        return _keeps_head(self.config, self.method)

    @property
    def grid(self) -> tuple[int, int]:
        """The number of rows and columns of patches."""
        return grid_of(_encoder_config(self.config))

    @property
    def family(self) -> str:
        return FAMILIES[_encoder_config(self.config).model_type]


def open_starting_model(name: str, method: str, sizes_only: bool = False) -> StartingModel:
    """Open the config of a folder or Hub id.

    Raises:
        ValueError: If there is no model, or the method cannot continue from it; the message lists methods that can.
    """
    config, subfolder = open_whole_config(name, "init_from")
    encoder_config: Any = _encoder_config(config)
    if encoder_config.model_type not in FAMILIES:
        raise ValueError(
            f"`init_from` {name} is a model of type {encoder_config.model_type}; training can begin from what this "
            f"program wrote, and from {', '.join(FAMILIES.values())}"
        )
    keeps_head, is_own = _keeps_head(config, method), _own_method(config) == method
    host = encoder_config.model_type if is_own else _host(name, encoder_config, method)
    head = _head_settings(config, method) if keeps_head else {}
    decoder = {
        flag: value for flag, value in head.items() if flag.startswith(CONFIGS[method].settings_fixed_by_weights)
    }
    patch_size, grid = _single(encoder_config.patch_size, name), grid_of(encoder_config)
    image_size = [length * patch_size for length in grid]
    image_stats = _image_stats(name, config, subfolder)
    return StartingModel(
        name=name,
        method=method,
        config=config,
        subfolder=subfolder,
        encoder=encoder_settings(encoder_config, host, is_own),
        fixed={"patch_size": patch_size, "num_channels": encoder_config.num_channels, **decoder},
        defaults={
            "image_size": image_size[0] if len(set(image_size)) == 1 else image_size,
            **({"image_stats": "source"} if image_stats else {}),
            **{flag: value for flag, value in head.items() if flag not in decoder},
        },
        image_stats=image_stats,
        sizes_only=sizes_only,
    )


def grid_of(config: Any) -> tuple[int, int]:
    """Return the rows and columns of whole patches; transformers ignores the rest of an image."""
    size, patch = config.image_size, config.patch_size
    height, width = height_and_width(size)
    side = patch if isinstance(patch, int) else patch[0]
    return height // side, width // side


def _encoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.encoder_config if isinstance(config, MimConfig) else config


def _own_method(config: PreTrainedConfig) -> str | None:
    return next((method for method, kind in CONFIGS.items() if config.model_type == kind.model_type), None)


def _keeps_head(config: PreTrainedConfig, method: str) -> bool:
    return method == _own_method(config) or config.model_type in CONFIGS[method].transformers_model_types


def _head_settings(config: PreTrainedConfig, method: str) -> dict[str, Any]:
    """Return the method's settings of a model that is continued; transformers' ViTMAE uses the same names."""
    names = {setting.name for setting in fields(CONFIGS[method])} - {setting.name for setting in fields(MimConfig)}
    return {name: getattr(config, name) for name in sorted(names - {*CONFIGS[method].settings_of_targets})}


def _host(name: str, config: PreTrainedConfig, method: str) -> str:
    """Return the type of the method's encoder that can compute the same function."""
    types = CONFIGS[method].encoder_types
    for host in types:
        if obstacle(config, host) is None:
            return host
    others = [other for other, kind in CONFIGS.items() if any(obstacle(config, h) is None for h in kind.encoder_types)]
    taken = dict.fromkeys(family for host in types for family in FAMILIES_OF[host])
    raise ValueError(
        f"`method` {method} cannot continue from {name} ({FAMILIES[config.model_type]}): "
        f"{obstacle(config, types[0])}. Methods that can: {', '.join(others) or 'none'}. "
        f"{method} continues from: {', '.join(taken)}"
    )


def _image_stats(name: str, config: PreTrainedConfig, subfolder: str) -> dict[str, list[float]]:
    if isinstance(config, MimConfig):
        return {"image_mean": list(config.image_mean), "image_std": list(config.image_std)}
    return processor_stats(name, config.num_channels, subfolder)  # the plan shows what is used if there are none


def _single(patch_size: int | list[int], name: str) -> int:
    sides = {patch_size} if isinstance(patch_size, int) else set(patch_size)
    if len(sides) > 1:
        raise ValueError(f"`init_from` {name} has patches of {patch_size} pixels, expected square ones")
    return sides.pop()

"""What `--init_from` names, as far as its configs tell: whether a method can go on from it, and with which sizes.

A model is taken only if the method's encoder can compute exactly what it computes (`hub.encoder_states`), so that
training goes on from its features and not from somewhere near them. `hub.init_weights` reads the weights.
"""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import PreTrainedConfig

from hub.encoder_states import FAMILIES, FAMILIES_OF, encoder_settings, obstacle
from hub.image_stats import processor_stats
from hub.open_model import open_whole_config
from modeling import CONFIGS, MimConfig


@dataclass(frozen=True)
class StartingModel:
    """A model to begin from.

    `encoder`: keyword arguments of our encoder's native config. `fixed` and `defaults`: flags by name; the first
    follow from the weights, the others can be chosen anew. `image_stats`: mean and deviation, if it says them.
    `sizes_only`: an interrupted run's own checkpoint, whose weights `Trainer` reads.
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
        """The method that it was trained with, if it is a head of ours."""
        return _own_method(self.config)

    @property
    def keeps_head(self) -> bool:
        return _keeps_head(self.config, self.method)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return grid_of(_encoder_config(self.config))

    @property
    def family(self) -> str:
        return FAMILIES[_encoder_config(self.config).model_type]


def open_starting_model(name: str, method: str, sizes_only: bool = False) -> StartingModel:
    """What a folder or a Hub id holds.

    Raises:
        ValueError: nothing is there, or the method cannot continue from it; the message says which can.
    """
    config, subfolder = open_whole_config(name, "init_from")
    encoder_config: Any = _encoder_config(config)
    if encoder_config.model_type not in FAMILIES:
        raise ValueError(
            f"--init_from {name} is a model of type {encoder_config.model_type}; training can begin from what this "
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
    """Rows and columns of whole patches; classes of transformers leave the rest of an image out."""
    size, patch = config.image_size, config.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    side = patch if isinstance(patch, int) else patch[0]
    return height // side, width // side


def _encoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    return config.encoder_config if isinstance(config, MimConfig) else config


def _own_method(config: PreTrainedConfig) -> str | None:
    return next((method for method, kind in CONFIGS.items() if config.model_type == kind.model_type), None)


def _keeps_head(config: PreTrainedConfig, method: str) -> bool:
    return method == _own_method(config) or config.model_type in CONFIGS[method].transformers_model_types


def _head_settings(config: PreTrainedConfig, method: str) -> dict[str, Any]:
    """The settings of a head that is kept; transformers' ViTMAE calls them as we do."""
    names = {setting.name for setting in fields(CONFIGS[method])} - {setting.name for setting in fields(MimConfig)}
    return {name: getattr(config, name) for name in sorted(names - {*CONFIGS[method].settings_of_targets})}


def _host(name: str, config: PreTrainedConfig, method: str) -> str:
    """The type of the method's encoder that can compute the same function."""
    types = CONFIGS[method].encoder_types
    for host in types:
        if obstacle(config, host) is None:
            return host
    others = [other for other, kind in CONFIGS.items() if any(obstacle(config, h) is None for h in kind.encoder_types)]
    taken = dict.fromkeys(family for host in types for family in FAMILIES_OF[host])
    raise ValueError(
        f"--method {method} cannot continue from {name} ({FAMILIES[config.model_type]}): "
        f"{obstacle(config, types[0])}. Methods that can: {', '.join(others) or 'none'}. "
        f"{method} continues from: {', '.join(taken)}"
    )


def _image_stats(name: str, config: PreTrainedConfig, subfolder: str) -> dict[str, list[float]]:
    if isinstance(config, MimConfig):
        return {"image_mean": list(config.image_mean), "image_std": list(config.image_std)}
    return processor_stats(name, config.num_channels, subfolder)  # if none, the plan says what is used instead


def _single(patch_size: int | list[int], name: str) -> int:
    sides = {patch_size} if isinstance(patch_size, int) else set(patch_size)
    if len(sides) > 1:
        raise ValueError(f"--init_from {name} has patches of {patch_size} pixels, expected square ones")
    return sides.pop()

"""Layer-wise learning rates: the deeper a weight lies below the head, the smaller its rate.

Papers: Clark et al. 2020 (ELECTRA), arXiv:2003.10555, App. B; Bao et al. 2021 (BEiT), arXiv:2106.08254, Sec. 3.1.
Code: microsoft/unilm/beit/optim_factory.py at 768a3c8; microsoft/SimMIM/optimizer.py at d3e29bc.
"""

import re
from collections.abc import Collection
from itertools import accumulate
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

_STAGED = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.")
_FLAT = re.compile(r"(?:^|\.)layers?\.(\d+)\.")


def layer_decay_groups(
    model: PreTrainedModel, learning_rate: float, weight_decay: float, layer_decay: float, decayed: Collection[str]
) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer: each layer once with weight decay and once without.

    Only what trains is in a group. `decayed`: names of the parameters with weight decay. The first group has the full
    rate, because that is the one that `Trainer` logs.
    """
    ids, scales = layer_ids(model), layer_scales(model, layer_decay)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (ids[name], name in decayed)
            rate = learning_rate * scales[ids[name]]
            empty = {"params": [], "lr": rate, "weight_decay": weight_decay if name in decayed else 0.0}
            groups.setdefault(key, empty)["params"].append(parameter)
    return [groups[key] for key in sorted(groups, reverse=True)]


def layer_scales(model: PreTrainedModel, layer_decay: float) -> list[float]:
    """What the learning rate is multiplied with, by layer id."""
    last = max(layer_ids(model).values())
    return [layer_decay ** (last - number) for number in range(last + 1)]


def layer_ids(model: PreTrainedModel) -> dict[str, int]:
    """Every parameter's layer: 0 what embeds, 1 to N the blocks, N + 1 what follows, or lies outside the encoder."""
    encoder: Any = model.base_model
    depths = depths_of(encoder.config)
    within = {id(parameter): layer_id(name, depths) for name, parameter in encoder.named_parameters()}
    return {name: within.get(id(parameter), sum(depths) + 1) for name, parameter in model.named_parameters()}


def layer_id(name: str, depths: list[int]) -> int:
    """The layer of an encoder's parameter; `depths` are the blocks of each stage, one number for a plain ViT.

    Raises:
        ValueError: a block of a kind that is not known here.
    """
    if len(depths) > 1 and (match := _STAGED.search(name)):
        stage = int(match[1])
        before = [0, *accumulate(depths)]
        # A stage ends with what merges its patches: that has the rate of the stage's last block.
        return before[stage + 1] if match[2] is None else before[stage] + int(match[2]) + 1
    if len(depths) == 1 and (match := _FLAT.search(name)):
        return int(match[1]) + 1
    if name.startswith("embeddings."):
        return 0
    if name.startswith(_AFTER_THE_BLOCKS):
        return sum(depths) + 1
    raise ValueError(f"{name} belongs to no known layer; layer-wise learning rates need a ViT, a BEiT or a Swin")


# Position biases that all blocks share have the full rate in the authors' code.
_AFTER_THE_BLOCKS = ("layernorm.", "pooler.", "shared_position_bias.", "encoder.relative_position_bias.")


def depths_of(config: PreTrainedConfig) -> list[int]:
    """Blocks of each stage, one number for a plain ViT."""
    return list(config.depths) if hasattr(config, "depths") else [config.num_hidden_layers]

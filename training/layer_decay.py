"""Layer-wise learning rates, which decrease from the head down to the embeddings.

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
    """Return an optimizer's parameter groups: for each layer one with weight decay and one without.

    The groups hold trainable parameters only. The first one has the full rate, which is the one that `Trainer` logs.

    Args:
        decayed: Names of the parameters with weight decay.
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
    """Return the factor of the learning rate for each layer id."""
    last = max(layer_ids(model).values())
    return [layer_decay ** (last - number) for number in range(last + 1)]


def layer_ids(model: PreTrainedModel) -> dict[str, int]:
    """Return each parameter's layer: 0 for embeddings, 1 to N for blocks, N + 1 for all that follows them."""
    encoder: Any = model.base_model
    parts = [part for name in ("vision_model", "text_model") if (part := getattr(encoder, name, None)) is not None]
    encoders = parts or [encoder]  # both of a dual encoder, whose last blocks are equally far from the head
    last = max(sum(depths_of(each.config)) for each in encoders) + 1
    within: dict[int, int] = {}
    for each in encoders:
        depths = depths_of(each.config)
        start = last - sum(depths) - 1
        within |= {id(parameter): start + layer_id(name, depths) for name, parameter in each.named_parameters()}
    return {name: within.get(id(parameter), last) for name, parameter in model.named_parameters()}


def layer_id(name: str, depths: list[int]) -> int:
    """Return the layer of an encoder's parameter; `depths` as returned by `depths_of`.

    Raises:
        ValueError: If the parameter belongs to an unknown kind of layer.
    """
    if len(depths) > 1 and (match := _STAGED.search(name)):
        stage = int(match[1])
        before = [0, *accumulate(depths)]
        # Patch merging at the end of a stage has the rate of the stage's last block.
        return before[stage + 1] if match[2] is None else before[stage] + int(match[2]) + 1
    if len(depths) == 1 and (match := _FLAT.search(name)):
        return int(match[1]) + 1
    if name.startswith("embeddings."):
        return 0
    if name.startswith(_AFTER_THE_BLOCKS):
        return sum(depths) + 1
    raise ValueError(f"{name} belongs to no known layer; layer-wise learning rates need a ViT, a BEiT or a Swin")


# Position biases that all blocks share have the full rate in the authors' code.
_AFTER_THE_BLOCKS = (
    *("layernorm.", "LayerNorm.", "norm.", "pooler.", "shared_position_bias.", "encoder.relative_position_bias."),
)


def depths_of(config: PreTrainedConfig) -> list[int]:
    """Return the number of blocks in each stage; a plain ViT has one stage."""
    return list(config.depths) if hasattr(config, "depths") else [config.num_hidden_layers]

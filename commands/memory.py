"""Estimate the memory and the arithmetic of a training step on one device, from the model on the meta device."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_BYTES_PER_TRAINED_PARAMETER = 16  # weight, gradient and Adam's two moments in float32
_BYTES_PER_FROZEN_PARAMETER = 4
# Measured on MAE ViT-B/16 and SimMIM Swin-T: 0.63 and 0.67; the residual stream stays float32.
_SHARE_UNDER_AUTOCAST = 0.64


@dataclass(frozen=True)
class Footprint:
    """Parameters of a model, the bytes that one image keeps in float32 for the backward pass, and its FLOPs.

    `flops_per_image` counts the matrix products of the forward pass, and twice as many for the backward pass, which a
    teacher does not have.
    """

    num_parameters: int
    num_trained_parameters: int
    bytes_per_image: int
    flops_per_image: int

    def bytes_for_weights(self, num_averages: int = 0) -> int:
        """Return the bytes of weights, gradients and Adam, and of averaged weights."""
        num_frozen = self.num_parameters - self.num_trained_parameters
        trained = self.num_trained_parameters * _BYTES_PER_TRAINED_PARAMETER
        return trained + (num_frozen + num_averages * self.num_parameters) * _BYTES_PER_FROZEN_PARAMETER

    def bytes_for_activations(self, batch_size: int, precision: str) -> int:
        share = 1.0 if precision == "float32" else _SHARE_UNDER_AUTOCAST
        return round(batch_size * self.bytes_per_image * share)


def free_bytes(device: torch.device) -> int:
    """Return how much memory a program can still get on a device."""
    free: int = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return free


def in_training(model: nn.Module) -> nn.Module:
    """Set the training mode, in which a detector has more queries, but for BatchNorm: one image has no statistics."""
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    return model


def measure_footprint(model: nn.Module, batch: Mapping[str, Any]) -> Footprint:
    """Run a forward pass on a batch of one image; on the meta device this computes nothing.

    Gradient checkpointing is not considered.
    """
    numbers = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    owned = [tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())]
    kept = dict.fromkeys(owned, 0)
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        alive.append(tensor)  # otherwise an address could be used again
        storage = tensor.untyped_storage()
        kept.setdefault(storage._cdata, storage.nbytes())
        return tensor

    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    flops = FlopCounterMode(display=False, custom_mapping={attention: _attention_flops})
    flops.flop_registry = {operator: _in_training(count) for operator, count in flops.flop_registry.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), flops, _FusedAttention():
        model(**batch)
    num_trained = sum(number for number, is_trained in numbers if is_trained)
    num_parameters = sum(number for number, _ in numbers)
    return Footprint(num_parameters, num_trained, sum(kept.values()), flops.get_total_flops())


def _in_training(count: Callable[..., int]) -> Callable[..., int]:
    """Add the backward pass to a function that returns the FLOPs of an operator."""
    return lambda *args, **kwargs: count(*args, **kwargs) * (3 if torch.is_grad_enabled() else 1)


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs of an attention, given the shapes; PyTorch has no rule for the CPU's."""
    return sdpa_flop_count(query, key, value)


class _FusedAttention(TorchFunctionMode):
    """On the meta device PyTorch would choose the attention that keeps all scores, which a real device does not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and args[0].is_meta and kwargs.get("attn_mask") is None:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return func(*args, **kwargs)

"""Training with FSDP2, which keeps a share of each weight, gradient and optimizer state on each process.

Checkpoints are those of one process: whole weights and the whole optimizer state, so that a run continues with any
number of processes, with FSDP2 or without it.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer


class ShardingTrainer(Trainer):
    """`Trainer` whose checkpoints, best weights and exports do not depend on whether FSDP2 shards the model."""

    model: Any
    optimizer: Any
    lr_scheduler: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unsharded: nn.Module | None = None
        if self.is_fsdp_enabled:
            set_up_plugin(self.accelerator.state.fsdp_plugin, self.model)

    @property
    def is_sharded(self) -> bool:
        """Whether each process has only a share of the weights."""
        return self.is_fsdp_enabled and hasattr(self.model, "reshard")

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """On the main process, give `self.model` all weights inside a block; every process enters it.

        There it is another model of the same class, which the main process can run, export and save alone.
        """
        if not self.is_sharded:
            yield
            return
        state, sharded = full_state(self.model), self.model
        if self._unsharded is not None:
            self._unsharded.load_state_dict(state)
            self.model = self._unsharded.to(self.args.device).train(sharded.training)
        del state
        try:
            yield
        finally:
            self.model = sharded
            if self._unsharded is not None:
                self._unsharded.cpu()

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_fsdp_enabled and self.is_world_process_zero() and not self.is_sharded:
            self._unsharded = copy.deepcopy(self.model).cpu()  # a sharded model cannot be copied
        return super()._prepare_for_training(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            for module in self.model.modules() if self.is_sharded else ():  # without a backward pass some stay whole
                if hasattr(module, "reshard"):
                    module.reshard()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_sharded:
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir, full_state(self.model))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = _map_tensors(self.optimizer.state_dict(), lambda tensor, _: whole(tensor).cpu())
        if self.args.should_save:
            torch.save(state, Path(output_dir) / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / "scheduler.pt")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        _load_full_state(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Several processes without a GPU have a device cpu:0, to which PyTorch 2.11 cannot load.
        is_on_cpus = self.args.world_size > 1 and self.args.device.type == "cpu"
        if checkpoint is None or not (self.is_sharded or is_on_cpus):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.optimizer.load_state_dict(_map_tensors(state, lambda tensor, i: shard_like(tensor, parameters[i])))
        state = torch.load(Path(checkpoint) / "scheduler.pt", map_location="cpu", weights_only=True)
        self.lr_scheduler.load_state_dict(state)

    def _load_best_model(self) -> None:
        if not self.is_sharded:
            super()._load_best_model()
            return
        _load_full_state(self.model, Path(str(self.state.best_model_checkpoint)))


def set_up_plugin(plugin: Any, model: nn.Module) -> None:
    """Let FSDP2 shard the model block by block.

    Raises:
        ValueError: If a setting of FSDP would change results.
    """
    if plugin.fsdp_version != 2:
        raise ValueError(f"fsdp_version is {plugin.fsdp_version}, expected 2: FSDP1 is not supported")
    if plugin.activation_checkpointing:
        raise ValueError(
            "the activation checkpointing of FSDP draws other paths and dropout masks in the second forward pass, so "
            "that gradients are wrong: turn it off, and set gradient_checkpointing to use the model's own"
        )
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading is on, but can load no model with buffers, such as tables of positions: "
            "turn it off"
        )
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy  # most runs need not import it

    blocks = {type(module).__name__ for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    blocks -= set(getattr(model, "opened_blocks", ()))
    plugin.auto_wrap_policy, plugin.transformer_cls_names_to_wrap = transformer_auto_wrap_policy, sorted(blocks)


def full_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return all weights and buffers on the CPU; every process calls it, and the main process gets them."""
    return {name: whole(value).cpu() for name, value in model.state_dict().items()}


def shard_like(value: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Return this process's share of a whole tensor, if a parameter of the same shape is sharded."""
    if not _is_share(parameter) or _is_share(value) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device_mesh.device_type)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def whole(value: torch.Tensor) -> torch.Tensor:
    """Return the tensor of which this one is a share, or itself; every process calls it."""
    result: torch.Tensor = value.full_tensor() if _is_share(value) else value  # type: ignore[attr-defined]
    return result


def _is_share(value: Any) -> bool:
    """Return whether this is a `DTensor`."""
    return hasattr(value, "full_tensor")


def _load_full_state(model: nn.Module, checkpoint: Path) -> None:
    state, own = load_file(checkpoint / "model.safetensors"), model.state_dict()
    model.load_state_dict({name: shard_like(value, own[name]) for name, value in state.items() if name in own})


def _map_tensors(state: dict[str, Any], change: Any) -> dict[str, Any]:
    """Return an optimizer's state dict with other tensors; `change` also gets the number of the parameter."""
    changed = {
        number: {k: change(v, number) if torch.is_tensor(v) else v for k, v in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": changed}

"""Open a checkpoint of anybody's code without executing anything in it, and find the state dicts inside."""

import argparse
import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

# What the authors' files hold beside the weights, read as plain containers and then left aside.
_OTHER_CONTENT: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
# Wrappers of training code, which say nothing about the model.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_ENCODERS = ("backbone.", "encoder.")


class WeightFile(NamedTuple):
    """`states` by the key under which each lies in the file, "" where the file is one; `others` lie beside them."""

    path: Path
    states: dict[str, dict[str, torch.Tensor]]
    others: list[str]

    def state(self, *wanted: str) -> tuple[str, dict[str, torch.Tensor]]:
        """The first of `wanted` that the file has, by its key, without the prefixes of wrappers.

        Raises:
            ValueError: it has none of them, but others.
        """
        for name in wanted or ("", "model", "state_dict", "module", *self.states):
            if name in self.states:
                return name, without_prefixes(self.states[name])
        raise ValueError(f"{self.path} has weights under {', '.join(map(repr, self.states))}, not under {wanted}")


def open_weights(path: str | Path) -> WeightFile:
    """Raises ValueError on a file that is no checkpoint of plain tensors, and says what is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {str(path)!r}")
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _unpickle(path)
    if _is_state(content):
        return WeightFile(path, {"": content}, [])
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    states = {str(key): dict(value) for key, value in content.items() if _is_state(value)}
    # A loss or an optimizer may keep tensors too.
    states = {key: value for key, value in states.items() if any("patch_embed" in name for name in value)} or states
    if not states:
        raise ValueError(f"{path} holds no state dict (a dict of tensors): its keys are {list(content)[:8]}")
    return WeightFile(path, states, [str(key) for key in content if str(key) not in states])


def without_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`module.`, `model.` and the like go; so does `backbone.`, and `encoder.` where every key has it."""
    while prefix := next((wrapper for wrapper in _WRAPPERS if _all_start_with(state, wrapper)), None):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    for prefix in _ENCODERS:
        if _all_start_with(state, prefix) or (prefix == "backbone." and any(key.startswith(prefix) for key in state)):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return state


def suggested_num_heads(state: Mapping[str, torch.Tensor]) -> str:
    """No file says its number of attention heads; the published models of this width have so many."""
    width = state["patch_embed.proj.weight"].shape[0] if "patch_embed.proj.weight" in state else 0
    return {192: "3", 384: "6", 768: "12", 1024: "16", 1280: "16"}.get(width, "NUMBER")


def _all_start_with(state: dict[str, torch.Tensor], prefix: str) -> bool:
    return all(key.startswith(prefix) for key in state)


def _is_state(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and bool(content)
        and all(isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in content.items())
    )


def _load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is cut off or no safetensors file ({error})") from error


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_OTHER_CONTENT):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        if code := re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", str(error)):
            raise ValueError(
                f"{path} is refused: beside tensors it holds `{code[1] or code[2]}`, and to read that would be to "
                "execute what the file says. Nothing was executed. If you trust the file, load it with its own code "
                "and save its state dict alone"
            ) from error
        reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
        raise ValueError(f"{path} cannot be read: it is cut off, or no checkpoint ({reason})") from error

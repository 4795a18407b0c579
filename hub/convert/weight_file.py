"""Open any program's checkpoint without executing code from it, and find the state dicts inside."""

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

State = Mapping[str, torch.Tensor]
# Other classes in the authors' files, read as plain containers and then ignored.
_OTHER_CONTENT: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]
# Wrappers of training code, which are not part of the model.
_WRAPPERS = ("module.", "_orig_mod.", "model.")
_ENCODERS = ("backbone.", "encoder.")
_CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")  # DINOv2 groups its blocks, which keep their numbers


class WeightFile(NamedTuple):
    """State dicts by their key in the file ("" if the file is one), and the `others` keys beside them.

    Of these, `losses` hold tensors too.
    """

    path: Path
    states: dict[str, dict[str, torch.Tensor]]
    others: list[str]
    losses: dict[str, dict[str, torch.Tensor]] = {}  # noqa: RUF012 - a default of a tuple

    def state(self, *wanted: str) -> tuple[str, dict[str, torch.Tensor]]:
        """Return the first of `wanted` in the file, or raise ValueError: its key, and the weights without prefixes."""
        for name in wanted or ("", "model", "state_dict", "module", *self.states):
            if name in self.states:
                return name, without_prefixes(self.states[name])
        raise ValueError(f"{self.path} has weights under {', '.join(map(repr, self.states))}, not under {wanted}")


def open_weights(path: str | Path) -> WeightFile:
    """Read a checkpoint of plain tensors. Raises ValueError, with the reason, for any other file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no file {str(path)!r}")
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _unpickle(path)
    if _is_state(content):
        content = {"": content}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a dict of tensors")
    for key, value in list(content.items()):  # DINOv2 saves both networks and its losses as one
        if _is_state(value) and {"student", "teacher"} <= {name.split(".")[0] for name in value}:
            del content[key]
            content |= _split(value)
    found = {str(key): dict(value) for key, value in content.items() if _is_state(value)}
    # A loss or an optimizer may hold tensors too.
    states = {key: value for key, value in found.items() if any("patch_embed" in name for name in value)} or found
    if not states:
        raise ValueError(f"{path} holds no state dict (a dict of tensors): its keys are {list(content)[:8]}")
    losses = {key: value for key, value in found.items() if key not in states}
    return WeightFile(path, states, [str(key) for key in content if str(key) not in states], losses)


def _split(state: State) -> dict[str, dict[str, torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in state.items():
        part, _, name = key.partition(".")
        parts.setdefault(part, {})[name] = tensor
    return parts


def without_prefixes(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Remove wrappers' prefixes such as `module.`, then `backbone.`, and `encoder.` where every key has it."""
    while prefix := next((wrapper for wrapper in _WRAPPERS if _all_start_with(state, wrapper)), None):
        state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    for prefix in _ENCODERS:
        if _all_start_with(state, prefix) or (prefix == "backbone." and any(key.startswith(prefix) for key in state)):
            state = {key.removeprefix(prefix): tensor for key, tensor in state.items()}
    return {_CHUNK.sub(r"blocks.\1.", key): tensor for key, tensor in state.items()}


def suggested_num_heads(state: State) -> str:
    """Return the number of attention heads of published models of this hidden size; no file stores it."""
    width = state["patch_embed.proj.weight"].shape[0] if "patch_embed.proj.weight" in state else 0
    return {192: "3", 384: "6", 768: "12", 1024: "16", 1280: "16", 1536: "24"}.get(width, "NUMBER")


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
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from error


def _unpickle(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_OTHER_CONTENT):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        if code := re.search(r"GLOBAL (\S+)|Unsupported class (\S+)", str(error)):
            raise ValueError(
                f"{path} is refused: besides tensors it contains `{code[1] or code[2]}`, which would execute "
                "code from the file. Nothing was executed. If you trust the file, load it with its own code and save "
                "only its state dict"
            ) from error
        reason = str(error).strip().split("\n")[0][:160] or type(error).__name__
        raise ValueError(f"{path} cannot be read: it is truncated or not a checkpoint ({reason})") from error

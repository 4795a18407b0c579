"""Open the model that a folder or a Hub id names, by the same rules in every command.

Messages call it by the `role` of the argument that named it.
"""

import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    FlavaImageCodebook,
    FlavaImageCodebookConfig,
    PreTrainedConfig,
    ViTModel,
)
from transformers.utils import has_file

from hub.card_rules import HUB_ID
from hub.export.native import PRETRAINING
from modeling import MimConfig

NO_POSITIONS = (
    "all position embeddings are zero, so the model cannot tell where a patch is; transformers initializes "
    "ViTMAEForPreTraining that way, and training does not change them"
)


class OpenedModel(NamedTuple):
    """A model, and the names of weights that are missing from its file or unused."""

    model: Any
    missing: list[str]
    unused: list[str]


def open_config(
    name: str,
    role: str = "model",
    *,
    subfolder: str = "",
    accepts_whole_model: bool = True,
    trust_remote_code: bool | None = None,
) -> PreTrainedConfig:
    """Return the config of the model that `name` refers to.

    Args:
        accepts_whole_model: Whether a pre-training model of ours is possible.
        trust_remote_code: Whether to run Python files of the repository; None if such models cannot be used here, so
            that the message does not suggest it. transformers would ask in the terminal.

    Raises:
        ValueError: If there is no such model; for a folder, the message says what it holds instead.
    """
    folder = Path(name)
    if not folder.is_dir() and (folder.exists() or not HUB_ID.fullmatch(name)):
        raise ValueError(f"`{role}` {name} is neither a folder nor a Hub id (org/name)")
    if folder.is_dir() and not (folder / subfolder / "config.json").is_file():
        raise ValueError(f"`{role}` {name} is not a saved model: {_explain_folder(folder)}")
    with _explaining(role, name, trust_remote_code):
        # Before 5.23, transformers saved the config of the DALL-E encoder without a model type.
        settings, _ = PreTrainedConfig.get_config_dict(name, subfolder=subfolder)
        is_dalle = FlavaImageCodebook.__name__ in (settings.get("architectures") or ())
        config_class: Any = FlavaImageCodebookConfig if is_dalle else AutoConfig
        config: PreTrainedConfig = config_class.from_pretrained(
            name, subfolder=subfolder, trust_remote_code=bool(trust_remote_code)
        )
    if isinstance(config, MimConfig) and not accepts_whole_model:
        raise ValueError(f"`{role}` {name} is a whole pre-training model; its encoder is in the parent folder")
    return config


def open_whole_config(name: str, role: str = "model") -> tuple[PreTrainedConfig, str]:
    """Return the config of a whole model of ours and its subfolder, or the config at the root of any other model."""
    try:
        config = open_config(name, role)
    except ValueError as error:  # an output without a native encoder has no config at its root
        try:
            return open_config(name, role, subfolder=PRETRAINING), PRETRAINING
        except ValueError:
            raise error from None
    if hasattr(config, "mim_method") and has_file(name, f"{PRETRAINING}/config.json"):
        return open_config(name, role, subfolder=PRETRAINING), PRETRAINING
    return config, ""


def open_model(
    name: str,
    role: str = "model",
    *,
    model_class: Any = None,
    optional: tuple[str, ...] = (),
    keeps_classifier: bool = False,
    trust_remote_code: bool | None = None,
    **options: Any,
) -> OpenedModel:
    """Open a model in float32, on the CPU and without drawing random numbers from the global generator.

    By default this is an encoder: a pre-training model of ours yields the encoder that it exports, a ViTMAE opens as
    a ViT, because ViTMAEModel masks random patches even in evaluation mode, and a pooler that the file does not hold
    is left out.

    Args:
        model_class: Class to open, instead of the encoder's.
        optional: Parts of names of weights that may be missing.
        keeps_classifier: Whether to open a classifier as such instead of its encoder.
        trust_remote_code: As for `open_config`.
        options: Further arguments of `from_pretrained`.

    Raises:
        ValueError: If there is no such model, its files cannot be read, weights are missing, not finite or left over
            in a block, or all position embeddings are zero.
    """
    label, is_encoder = f"`{role}` {name}", model_class is None
    if is_encoder:
        config = open_config(name, role, trust_remote_code=trust_remote_code)
        model_class = _class_of(config, label, keeps_classifier)
    options |= {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": bool(trust_remote_code)}
    with _explaining(role, name, trust_remote_code), torch.random.fork_rng(devices=[]):
        model, info = model_class.from_pretrained(name, **options)
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    if lost := [key for key in missing if not any(part in key for part in ("pooler.", *optional))]:
        raise ValueError(f"{label} lacks {len(lost)} weights of its {type(model).__name__}: {', '.join(lost[:3])} ...")
    if extra := [key for key in unused if _is_in_block(key, model)]:
        raise ValueError(f"{label} has weights that do not fit its config: {', '.join(extra[:3])} ...")
    if bad := [key for key, tensor in model.state_dict().items() if not torch.isfinite(tensor).all()]:
        raise ValueError(f"{label} has NaN or infinite values in {len(bad)} of its weights: {', '.join(bad[:3])} ...")
    if is_encoder:
        model = getattr(model, "exported_encoder", model)
        if any(key.startswith("pooler.") for key in missing):
            model.pooler = None
        positions = getattr(getattr(model, "embeddings", None), "position_embeddings", None)
        if isinstance(positions, torch.Tensor) and not positions.any():
            raise ValueError(f"{label}: {NO_POSITIONS}")
    return OpenedModel(model, missing, unused)


def _class_of(config: PreTrainedConfig, label: str, keeps_classifier: bool) -> Any:
    if hasattr(config, "vision_config") or hasattr(config, "text_config"):
        raise ValueError(f"{label} is a {config.model_type}, expected an encoder for images only")
    if isinstance(config, MimConfig):
        return AutoModelForPreTraining
    if isinstance(config, FlavaImageCodebookConfig):
        return FlavaImageCodebook
    if keeps_classifier and "ImageClassification" in (config.architectures or [""])[0]:
        return AutoModelForImageClassification
    return ViTModel if config.model_type == "vit_mae" else AutoModel


def _is_in_block(key: str, model: Any) -> bool:
    """Whether a weight belongs to the model's blocks, rather than to a head or to buffers of older versions."""
    name = key.removeprefix(f"{model.base_model_prefix}.")
    is_numbered = re.match(r"(\w+\.)?layers?\.\d", name) is not None
    return is_numbered and hasattr(model, name.split(".")[0]) and not name.endswith("_index")


@contextmanager
def _explaining(role: str, name: str, trust_remote_code: bool | None) -> Iterator[None]:
    """Turn the errors of missing, damaged, hostile and foreign files into one ValueError with a reason of one line."""
    try:
        yield
    except Exception as error:  # transformers raises anything for a config that contradicts itself
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError):
            reason = (
                "its weights are damaged, or hold more than tensors, which could run a program; expected a "
                "model.safetensors"
            )
        elif problem := next(filter(None, map(_refusal, Path(name).rglob("*.*"))), ""):
            reason = problem  # the readers of weights report that there is no such file
        elif "`trust_remote_code=True`" in str(error):
            reason = "it needs Python code from its repository, which is not run"
            if trust_remote_code is not None:
                reason += "; read the code, and if you trust it, add `trust_remote_code`"
        raise ValueError(f"`{role}` {name} cannot be opened: {reason}") from error


def _refusal(path: Path) -> str:
    """Return why the user may not read a file of a model; nothing if that is possible."""
    try:
        if path.is_file():
            path.open("rb").close()
    except OSError as error:
        return f"{error.strerror}: {path}"
    return ""


def _explain_folder(folder: Path) -> str:
    if (folder / PRETRAINING / "config.json").is_file():
        return f"it has no native encoder, only the whole model in {PRETRAINING}/ (its README.md explains why)"
    if any(folder.glob("checkpoint-*")):
        return "its training has not finished; run the same command with the same output_dir to continue it"
    if any(folder.glob("*.pth")) or any(folder.glob("*.pt")):
        return "it has weights of another program, which python -m hub.convert may convert"
    return "it has no config.json; expected the output folder of a finished run, or a Hub id"

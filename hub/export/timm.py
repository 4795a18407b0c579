"""Export a model under timm's names, without its mask token.

It is verified against timm's model if timm can be imported, and always against the names and shapes of timm's weights.
"""

import functools
import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from hub.convert.key_names import TABLES, from_native, move_downsampling
from hub.export.timm_shapes import timm_shapes
from hub.open_model import open_model
from modeling.patches import height_and_width

# Module and name of timm's class, by model type.
_CLASSES = {
    "vit": ("timm.models.vision_transformer", "VisionTransformer"),
    "beit": ("timm.models.beit", "Beit"),
    "swin": ("timm.models.swin_transformer", "SwinTransformer"),
}


@torch.no_grad()
def export_timm(folder: str | Path, file: str | Path) -> list[str]:
    """Write `file` (safetensors) from the native model in `folder`; return the report.

    Raises ValueError if timm has no such model, or the outputs of timm's model differ.
    """
    model = open_model(str(folder), keeps_classifier=True).model.eval()
    state, dropped = timm_state(model)
    module, name = _CLASSES[model.config.model_type]
    expected = timm_shapes(model)
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if found != expected:
        wrong = sorted({*found.items()} ^ {*expected.items()})
        raise ValueError(f"weights do not fit timm's {name}: {wrong[:6]}")
    verified = _compare_with_timm(model, state)
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, file, {"format": "pt"})
    return [
        f"{file}: {len(state)} tensors under timm's names",
        *(f"  dropped {key}: timm's model has no such weight" for key in dropped),
        f"  from {module} import {name}",
        f"  model = {name}({', '.join(f'{key}={value!r}' for key, value in timm_arguments(model).items())})",
        f"  {verified}",
    ]


def timm_state(model: PreTrainedModel) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the weights under timm's names, and the keys of `model` that timm does not have."""
    config: Any = model.config
    if config.model_type not in TABLES or config.hidden_act != "gelu":
        raise ValueError(
            f"cannot export a {config.model_type} with {config.hidden_act} under timm's names: expected a ViT, BEiT "
            "or Swin with gelu"
        )
    prefix = model.base_model_prefix + "."
    native = {key.removeprefix(prefix): tensor for key, tensor in model.state_dict().items()}
    # The identity that `hub.export` adds because AutoModel always builds a pooler for a ViT.
    dropped = [key for key in native if key.startswith("pooler.dense.") or key == "embeddings.mask_token"]
    state = from_native({key: t for key, t in native.items() if key not in dropped}, TABLES[config.model_type])
    if config.model_type == "swin":
        state = {re.sub(r"^head\.", "head.fc.", key): t for key, t in move_downsampling(state, 1).items()}
    return state, dropped


def timm_arguments(model: PreTrainedModel) -> dict[str, Any]:
    """Return the keyword arguments that build the same model in timm."""
    config: Any = model.config
    arguments = {"img_size": config.image_size, "patch_size": config.patch_size, "in_chans": config.num_channels}
    if config.model_type == "swin":
        arguments |= {name: getattr(config, name) for name in ("embed_dim", "depths", "num_heads", "window_size")}
        arguments |= {"depths": tuple(config.depths), "num_heads": tuple(config.num_heads)}
        arguments["mlp_ratio"] = config.mlp_ratio
    else:
        arguments |= {"embed_dim": config.hidden_size, "depth": config.num_hidden_layers}
        arguments["num_heads"] = config.num_attention_heads
        arguments["mlp_ratio"] = config.intermediate_size / config.hidden_size
    arguments["qkv_bias"] = config.model_type == "beit" or config.qkv_bias
    if config.model_type == "beit":
        arguments |= {
            "init_values": config.layer_scale_init_value or None,
            "use_abs_pos_emb": config.use_absolute_position_embeddings,
            "use_rel_pos_bias": config.use_relative_position_bias,
            "use_shared_rel_pos_bias": config.use_shared_relative_position_bias,
            "global_pool": "avg" if config.use_mean_pooling else "token",
        }
    arguments["num_classes"] = config.num_labels if hasattr(model, "classifier") else 0
    if config.layer_norm_eps != (1e-5 if config.model_type == "swin" else 1e-6):
        arguments["norm_layer"] = functools.partial(torch.nn.LayerNorm, eps=config.layer_norm_eps)
    return arguments


def _compare_with_timm(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> str:
    """Compare with timm's model, if timm is installed. Raises ValueError if it rejects the weights or differs."""
    if importlib.util.find_spec("timm") is None:
        return "verified by names and shapes of timm 1.0.31 (timm is not installed)"
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # if torchvision does not match torch
        return f"verified by names and shapes of timm 1.0.31 (timm cannot be imported: {error})"
    module, name = _CLASSES[model.config.model_type]
    theirs = getattr(importlib.import_module(module), name)(**timm_arguments(model)).eval()
    try:
        theirs.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"timm {timm.__version__} rejects these weights: {error}") from error
    shape = (1, model.config.num_channels, *height_and_width(model.config.image_size))
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = model(images)[0]
    computed = (theirs(images) if hasattr(model, "classifier") else theirs.forward_features(images)).view_as(expected)
    difference = ((computed - expected).abs().max() / expected.abs().max()).item()
    if not difference < 1e-4:
        raise ValueError(f"outputs of timm {timm.__version__} have a relative error of {difference:.2g}")
    return f"verified with timm {timm.__version__}: relative error {difference:.1g}"

"""The methods in this folder, registered with the Auto classes; a new method is one new file."""

import importlib
import pkgutil
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, PreTrainedModel

from .base import MimConfig, MimOutput, MimPreTrainedModel

MODELS: dict[str, type[MimPreTrainedModel]] = {}  # by method
CONFIGS: dict[str, type[MimConfig]] = {}
TOKENIZERS: dict[str, type[PreTrainedModel]] = {}


def _register(model_class: Any, auto_class: Any) -> None:
    config_class = model_class.config_class
    assert config_class.model_type, f"{model_class.__name__} does not annotate its config"
    AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
    auto_class.register(config_class, model_class, exist_ok=True)
    config_class.register_for_auto_class()  # save_pretrained then copies the code beside the weights
    model_class.register_for_auto_class(auto_class.__name__)
    method = config_class.model_type.removeprefix("mim_").replace("_", "-")
    if auto_class is AutoModelForPreTraining:
        MODELS[method], CONFIGS[method] = model_class, config_class
    else:
        TOKENIZERS[method] = model_class


for _file in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f".{_file.name}", __name__)
    for _class in list(vars(_module).values()):
        if not isinstance(_class, type) or _class.__module__ != _module.__name__:
            continue
        if issubclass(_class, MimPreTrainedModel) and _class.__name__.endswith("ForPreTraining"):
            _register(_class, AutoModelForPreTraining)
        elif issubclass(_class, PreTrainedModel) and hasattr(_class, "get_codebook_indices"):  # an image tokenizer
            _register(_class, AutoModel)

__all__ = ["CONFIGS", "MODELS", "TOKENIZERS", "MimConfig", "MimOutput", "MimPreTrainedModel"]

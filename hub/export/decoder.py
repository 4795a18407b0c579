"""Export what a pre-training model has besides its encoder (decoder, prediction head, teacher) as plain weights."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import AutoModelForPreTraining

from hub.open_model import open_model

_FILE = "decoder.safetensors"
_README = """# {title}

`{file}` holds the {number} tensors of pre-training with {method}, without the encoder.
The code that uses them is `{module}.py` in `pretraining/` of the same model.

| setting | value |
|---|---|
{settings}

| tensor | shape |
|---|---|
{tensors}
"""


def export_decoder(folder: str | Path, target: str | Path) -> list[str]:
    """Write `target/decoder.safetensors` and a README from the whole model in `folder`; return the report.

    Raises ValueError if there is no whole model.
    """
    folder, target = Path(folder), Path(target)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no whole model: an encoder alone has no decoder")
    model: Any = open_model(str(folder), model_class=AutoModelForPreTraining).model
    encoder = f"{model.exported}."
    tensors = {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(encoder)}
    target.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, target / _FILE, {"format": "pt"})
    config: Any = model.config
    own = {key: value for key, value in config.to_diff_dict().items() if key not in ("encoder_config", "auto_map")}
    settings = own | {f"encoder: {key}": value for key, value in config.encoder_config.to_diff_dict().items()}
    text = _README.format(
        title=f"{type(model).__name__} without its encoder",
        file=_FILE,
        number=len(tensors),
        method=config.model_type.removeprefix("mim_").replace("_", "-"),
        module=type(model).__module__.rpartition(".")[2],
        settings="\n".join(f"| {key} | {value} |" for key, value in sorted(settings.items())),
        tensors="\n".join(f"| `{key}` | {' x '.join(map(str, t.shape))} |" for key, t in tensors.items()),
    )
    (target / "README.md").write_text(text, encoding="utf-8")
    return [f"{target / _FILE}: {len(tensors)} tensors of {type(model).__name__}, described in README.md"]

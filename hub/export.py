"""Write a trained head as two artefacts: a native encoder at the root, the whole model in `pretraining/`.

The root opens with plain `AutoModel.from_pretrained`, without this project and without a missing or unexpected key.
Loading code remotely from a subfolder looks the files up at the root, so they lie in both places; only the config in
`pretraining/` points to them.
"""

import copy
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, PreTrainedModel
from transformers.image_utils import PILImageResampling

from modeling import MimPreTrainedModel

PRETRAINING = "pretraining"


def native_encoder(encoder: PreTrainedModel, method: str, recipe: dict[str, Any]) -> PreTrainedModel:
    """The encoder as transformers' own class; the fine-tuner reads `mim_method` and `mim_recipe` from its config."""
    config = copy.deepcopy(encoder.config)
    config.mim_method, config.mim_recipe = method, recipe
    if config.model_type == "vit":
        # AutoModel always builds a pooler. An identity leaves nothing random: pooler_output is the class token.
        config.pooler_act, config.pooler_output_size = "linear", config.hidden_size
    native = AutoModel.from_config(config, dtype=torch.float32)
    state = dict(encoder.state_dict())
    if config.model_type == "vit":
        state["pooler.dense.weight"] = torch.eye(config.hidden_size)
        state["pooler.dense.bias"] = torch.zeros(config.hidden_size)
    if config.model_type == "swin":
        del state["embeddings.mask_token"]  # AutoModel builds a Swin without one; it stays in pretraining/
    native.load_state_dict(state, strict=True)
    return native.eval()


def write_image_processor(folder: Path, head: MimPreTrainedModel) -> None:
    """`preprocessor_config.json` of a native type, so that no code of ours is needed: short side, centre crop, RGB."""
    encoder_config = head.config.encoder_config
    size = encoder_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    square = height == width
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": encoder_config.num_channels == 3,
        "do_resize": True,
        "size": {"shortest_edge": height} if square else {"height": height, "width": width},
        "resample": int(PILImageResampling.BICUBIC),
        "do_center_crop": square,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(head.config.image_mean),
        "image_std": list(head.config.image_std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def native_root_problem(head: MimPreTrainedModel) -> str | None:
    """Why the encoder cannot be opened as transformers' own class, if so; then there is no root."""
    return getattr(head.encoder, "native_root_problem", None)


def export(head: MimPreTrainedModel, output_dir: str | Path, *, method: str, recipe: dict[str, Any]) -> str | None:
    """Write both artefacts into `output_dir`; nothing there changes before the new encoder was opened and compared.

    Returns the `native_root_problem`; if there is one, only `pretraining/` and its code are written.

    Raises:
        RuntimeError: what AutoModel opens differs from the encoder in memory.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".export-") as scratch_name:
        scratch = Path(scratch_name)
        if (problem := native_root_problem(head)) is None:
            native_encoder(head.encoder, method, recipe).save_pretrained(scratch)
            write_image_processor(scratch, head)
        head.save_pretrained(scratch / PRETRAINING)
        write_image_processor(scratch / PRETRAINING, head)
        for code in (scratch / PRETRAINING).glob("*.py"):
            shutil.copy(code, scratch)
        if problem is None:
            _verify(scratch, head)
        shutil.rmtree(output_dir / PRETRAINING, ignore_errors=True)
        for path in scratch.iterdir():
            path.replace(output_dir / path.name)
    return problem


@torch.no_grad()
def _verify(folder: Path, head: MimPreTrainedModel) -> None:
    opened, info = AutoModel.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    leftovers = {key: value for key, value in info.items() if value}
    config = head.config.encoder_config
    size = config.image_size
    shape = (1, config.num_channels, *((size, size) if isinstance(size, int) else size))
    probe = torch.linspace(-2, 2, shape[1] * shape[2] * shape[3]).reshape(shape)
    encoder = head.encoder
    was_training = encoder.training
    parameter = next(encoder.parameters())
    ours = encoder.eval()(probe.to(parameter.device, parameter.dtype)).last_hidden_state.float().cpu()
    encoder.train(was_training)
    difference = (opened.eval()(probe).last_hidden_state - ours).abs().max().item()
    tolerance = 1e-4 * max(ours.abs().max().item(), 1.0)
    if leftovers or not difference <= tolerance:
        raise RuntimeError(
            f"the exported encoder is not the trained one: features differ by {difference:.3g} "
            f"(at most {tolerance:.3g} expected), left-over keys {leftovers}; nothing was written"
        )

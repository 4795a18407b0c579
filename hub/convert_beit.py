"""The authors' BEiT pre-training checkpoints (microsoft/unilm/beit) -> `BeitForPreTraining`; the encoder has the keys
of SimMIM's ViT.
"""

import argparse

from hub.convert_simmim import State, beit_settings, rename_beit
from modeling.beit import BeitForPreTraining, BeitMimConfig


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The shapes of the file say everything."""


def convert(state: State, options: argparse.Namespace) -> BeitForPreTraining:
    """Encoder and token head from the authors' state dict.

    Raises:
        ValueError: the file is no BEiT in pre-training (a fine-tuned one has no lm_head).
    """
    needed = ("patch_embed.proj.weight", "mask_token", "lm_head.weight", "lm_head.bias")
    if missing := [key for key in needed if key not in state]:
        raise ValueError(
            f"no BEiT pre-training checkpoint: it lacks {', '.join(missing)}; it has {list(state)[:5]} ..."
        )
    encoder = {key: tensor for key, tensor in state.items() if not key.startswith("lm_head.")}
    model = BeitForPreTraining(
        BeitMimConfig(encoder_config=beit_settings(encoder), vocab_size=state["lm_head.weight"].shape[0])
    )
    renamed = {f"encoder.{name}": tensor for name, tensor in rename_beit(encoder)}
    renamed |= {key: tensor for key, tensor in state.items() if key.startswith("lm_head.")}
    missing_keys, unexpected = model.load_state_dict(renamed, strict=False)
    if missing_keys or unexpected:
        raise ValueError(f"the file does not fit a BEiT: missing {missing_keys}, not understood {unexpected}")
    return model.eval()

"""Open the frozen model whose outputs a method predicts, as the command line names it."""

import shlex
from collections.abc import Callable

from commands.pretraining_settings import PretrainingSettings
from hub.open_model import open_model
from modeling import MimPreTrainedModel
from training.targets import Targets, TokenizerTargets

CHOICES = """BEiT needs an image tokenizer, and none is chosen for you. Give --tokenizer one of
  1. your own, trained on your images:
       python run_tokenizer.py --dataset {dataset} --output_dir tokenizer
       accelerate launch run_pretraining.py --method beit --tokenizer tokenizer ...
  2. the public DALL-E encoder (8,192 tokens of 8 x 8 pixels), from the Hub or a folder:
       --tokenizer facebook/flava-image-codebook
  3. any model with get_codebook_indices(pixel_values) -> (B, h, w) by folder or Hub id
"""


def open_targets(
    settings: PretrainingSettings, model_class: type[MimPreTrainedModel], grid: tuple[int, int]
) -> Targets | None:
    """Return the targets that the method needs, or None; raises ValueError if their source is missing or unfit."""
    if model_class.targets is None:
        for flag in ("tokenizer", "trust_remote_code", "cache_tokens"):
            if getattr(settings, flag):
                raise ValueError(f"--{flag} has no effect with --method {settings.method}; leave it out")
        return None
    return _OPENERS[model_class.targets](settings, grid)


def _open_tokenizer(settings: PretrainingSettings, grid: tuple[int, int]) -> Targets:
    name = settings.tokenizer
    if not name:
        raise ValueError(CHOICES.format(dataset=shlex.join(settings.dataset)))
    tokenizer = open_model(name, "tokenizer", trust_remote_code=settings.trust_remote_code).model
    return TokenizerTargets(tokenizer, grid, f"--tokenizer {name}")


# By `MimPreTrainedModel.targets`.
_OPENERS: dict[str, Callable[[PretrainingSettings, tuple[int, int]], Targets]] = {"tokenizer": _open_tokenizer}

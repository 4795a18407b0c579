"""The rows of `benchmarks.hour`: the commands of each, with the flags that a user gives."""

from dataclasses import dataclass

PRETRAINING, TOKENIZER, RIVAL = "run_pretraining.py", "run_tokenizer.py", "benchmarks.rivals"


@dataclass(frozen=True)
class Stage:
    """A command that trains, for a share of the time.

    In `flags`, {previous} is the output of the stage before, {tokens} the side of an image with a token per patch, and
    {reference} the folder of the EfficientNet-Lite0.
    """

    flags: tuple[str, ...]
    script: str = PRETRAINING
    share: float = 1.0


def method(*flags: str) -> tuple[Stage, ...]:
    return (Stage(("--method", *flags)),)


def rival(name: str) -> tuple[Stage, ...]:
    return (Stage((name,), RIVAL),)


OURS: dict[str, tuple[Stage, ...]] = {
    "mae": method("mae"),
    "mae-cross": method("mae", "--decoder", "cross"),
    "simmim": method("simmim"),
    "beit": (
        Stage(("--model", "dvae-nano", "--image_size", "{tokens}"), TOKENIZER, 1 / 3),
        Stage(("--method", "beit", "--tokenizer", "{previous}"), share=2 / 3),
    ),
    "data2vec": method("data2vec"),
    "data2vec2": method("data2vec2"),
    "dino": method("dino"),
    "simdino": method("simdino"),
    "ibot": method("ibot"),
    "dinov2": method("dinov2"),
    "feature": method("feature", "--teacher", "{reference}"),
    "feature-cached": method("feature", "--teacher", "{reference}", "--cache_tokens", "true"),
    "feature-hog": method("feature", "--teacher", "hog"),
    "hybrid": method("hybrid"),
    "mae-hard-patches": method("mae", "--hard_patch_share", "0.5"),
    "ibot-attention": method("ibot", "--attention_masks", "true"),
    "refine": (
        Stage(("--method", "mae"), share=2 / 3),
        Stage(("--method", "refine", "--init_from", "{previous}"), share=1 / 3),
    ),
}
RIVALS = ("transformers-mae", "lightly-mae", "lightly-dino", "spt-mae", "spt-dino", "spt-ibot")
TRAINED = OURS | {name: rival(name) for name in RIVALS}
UNTRAINED, SUPERVISED = "random weights", "efficientnet-lite0"
ROWS = (*TRAINED, UNTRAINED, SUPERVISED)

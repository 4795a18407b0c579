"""The pre-training command as the shell calls it, in this process."""

from collections.abc import Sequence

import run_pretraining
from commands.launch import run


def pretrain(argv: Sequence[str]) -> int:
    """Its exit code."""
    return run(list(argv), run_pretraining.main, "run_pretraining.py")

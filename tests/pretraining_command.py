"""The pre-training command as the shell calls it, in this process."""

from collections.abc import Sequence
from functools import partial

import run_pretraining
from commands.launch import run
from commands.parsing import make_parser
from commands.pretraining_settings import PretrainingSettings
from modeling import CONFIGS


def pretrain(argv: Sequence[str]) -> int:
    """Its exit code."""
    return run(list(argv), run_pretraining.main, partial(make_parser, PretrainingSettings, CONFIGS))

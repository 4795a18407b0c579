"""Fine-tune as the command does and be killed at the start of a step; run by test_run_finetune."""

import os
import signal
import sys

from transformers import TrainerCallback

import run_finetune


class Die(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)


build_trainer = run_finetune.build_trainer


def build_trainer_that_dies(*args):
    trainer = build_trainer(*args)
    trainer.add_callback(Die())
    return trainer


run_finetune.build_trainer = build_trainer_that_dies
run_finetune.main(sys.argv[2:])

"""Train on two processes of which one is lost, `lose_process.py FOLDER RANK SIGNAL`; run by test_lost_process."""

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import Any

from conftest import tiny_arguments, tiny_collator, tiny_images, tiny_model
from transformers import TrainerCallback

from commands.launch import run
from training import lost_process
from training.trainer import MimTrainer

FOLDER, RANK, SIGNAL = Path(sys.argv[1]), int(sys.argv[2]), getattr(signal, sys.argv[3])
lost_process._SECONDS_BETWEEN_BEATS, lost_process._BEATS_UNTIL_LOST = 0.2, 15


class Lose(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5 and args.process_index == RANK:
            os.kill(os.getpid(), SIGNAL)


def main(argv: list[str]) -> None:
    MimTrainer(
        model=tiny_model("mae"),
        args=tiny_arguments(FOLDER, save_strategy="steps", save_steps=4),
        train_dataset=tiny_images(),
        data_collator=tiny_collator(with_image_index=True),
        callbacks=[Lose()],
    ).train()


if __name__ == "__main__":
    sys.exit(run([], main, lambda: argparse.ArgumentParser(prog="run_pretraining.py")))

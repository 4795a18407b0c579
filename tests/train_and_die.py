"""Train a tiny head with dropout on augmented photographs and be killed on request; run by test_trainer."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from conftest import tiny_arguments, tiny_collator, tiny_images, tiny_model
from safetensors.torch import save_file
from transformers import TrainerCallback

from training.checkpoints import last_whole_checkpoint
from training.stopping import Stopped
from training.trainer import MimTrainer


class Die(TrainerCallback):
    """At the end of a step, after its checkpoint if it has one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class Signal(TrainerCallback):
    """Before the last micro-batch of a step: to the group of processes, to this one twice, or to rank 1 only.

    Or to this one, after the far end of the terminal that it prints to was closed.
    """

    def __init__(self, step: str, name: str, target: str) -> None:
        self.step, self.number, self.target = int(step), getattr(signal, name), target
        if target == "terminal":
            self.far_end, terminal = os.openpty()
            for stream in (1, 2):
                os.dup2(terminal, stream)
            os.close(terminal)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step != self.step:
            return
        if self.target == "group":
            os.killpg(os.getpgid(0), self.number)
        elif self.target == "terminal":
            os.close(self.far_end)
            os.kill(os.getpid(), self.number)
        elif self.target == "twice" or args.process_index == 1:
            os.kill(os.getpid(), self.number)
        if self.target == "twice":
            time.sleep(0.1)
            os.kill(os.getpid(), self.number)


class DiesWhileSaving(MimTrainer):
    """The weights and the optimizer are written, the rest is not."""

    dies_at = -1

    def _save_rng_state(self, output_dir):
        if self.state.global_step == self.dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--variant", default="mae")
    parser.add_argument("--die_at", default="never 0")
    parser.add_argument("--signal_at")
    parser.add_argument("--nohup", action="store_true", help="ignore SIGHUP, as the program of that name makes it")
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()
    # Whatever the program has set that runs the tests.
    signal.signal(signal.SIGHUP, signal.SIG_IGN if options.nohup else signal.SIG_DFL)
    where, number = options.die_at.split()
    trainer = DiesWhileSaving(
        model=tiny_model(options.variant, hidden_dropout_prob=0.1),
        args=tiny_arguments(
            options.folder,
            max_steps=16,
            save_strategy="steps",
            save_steps=4,
            warmup_steps=4,
            dataloader_num_workers=options.num_workers,
        ),
        train_dataset=tiny_images(variant=options.variant),
        data_collator=tiny_collator(options.variant, with_image_index=True),
        callbacks=[Die(int(number))] if where == "step" else [],
    )
    if options.signal_at:
        trainer.add_callback(Signal(*options.signal_at.split()))
    trainer.dies_at = int(number) if where == "save" else -1
    checkpoint = last_whole_checkpoint(options.folder)[0] if options.resume else None
    try:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    except Stopped as stop:
        print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    save_file(trainer.model.state_dict(), options.folder / "final.safetensors")


if __name__ == "__main__":
    main()

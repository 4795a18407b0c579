"""Train tiny models on two processes with DDP and FSDP2, and continue each from the other; run by test_sharding.

Without a GPU, accelerate trains with DDP whatever is asked for; here it takes the processes for those of GPUs.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from conftest import tiny_arguments, tiny_collator, tiny_images, tiny_model

from training.guard import NonFiniteError
from training.trainer import MimTrainer

NUM_IMAGES, NUM_STEPS, MAX_GRAD_NORM = 8, 4, 0.05
RUNS = ("ddp", "fsdp", "ddp-fsdp", "fsdp-ddp")


class Poisoned(MimTrainer):
    """The loss of the second process is NaN in step 3."""

    factor = 1.0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        is_bad = self.state.global_step == 2 and self.args.process_index == 1
        self.factor = float("nan") if is_bad else 1.0
        loss = super().training_step(*args, **kwargs)
        self.factor = 1.0
        return loss

    def loss_and_outputs(self, *args: Any, **kwargs: Any) -> Any:
        loss, outputs = super().loss_and_outputs(*args, **kwargs)
        return loss * self.factor, outputs


def make_trainer(
    folder: Path, variant: str, sharded: bool, trainer_class: type[MimTrainer] = MimTrainer, **changes: Any
) -> MimTrainer:
    """Return the trainer of a tiny model, with as many images per step whatever the number of processes."""
    settings = {"max_steps": NUM_STEPS, "save_strategy": "steps", "save_steps": 2, "max_grad_norm": MAX_GRAD_NORM}
    # With the usual epsilon, Adam magnifies the last digits of gradients that are zero but for them.
    settings |= {"eval_strategy": "steps", "eval_steps": 2, "adam_epsilon": 1e-3}
    settings["gradient_checkpointing"] = sharded  # the model's own gives the gradients of none
    arguments = tiny_arguments(folder, **settings | changes)
    arguments.per_device_train_batch_size = NUM_IMAGES // arguments.world_size
    os.environ |= {"ACCELERATE_USE_FSDP": str(sharded).lower(), "FSDP_VERSION": "2"}
    if sharded:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model, collator = tiny_model(variant), tiny_collator(variant, with_image_index=True)
    if model.compares_images:  # within a process
        collator.spreads_ratios = False
    trainer = trainer_class(
        model=model,
        args=arguments,
        train_dataset=tiny_images(images_per_step=NUM_IMAGES, variant=variant),
        eval_dataset=tiny_images(num_images=8, train=False, variant=variant),
        data_collator=collator,
        ema_decay=0.5,
        num_head_steps=2,
    )
    assert trainer.is_fsdp_enabled == sharded
    return trainer


def train(folder: Path, variant: str, run: str) -> None:
    """Train with the last part of the name of a run, from the middle of the first part's run, if there are two."""
    first, _, second = run.partition("-")
    kind, output = second or first, folder / variant / run
    trainer = make_trainer(output, variant, kind == "fsdp")
    trainer.train(resume_from_checkpoint=str(folder / variant / first / "checkpoint-2") if second else None)
    assert trainer.is_sharded == (kind == "fsdp")
    with trainer.averaged(), trainer.whole_model():
        average = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with trainer.whole_model():
        if trainer.is_world_process_zero():
            logged = {
                key: [float(entry[key]) for entry in trainer.state.log_history if key in entry]
                for key in ("loss", "grad_norm", "eval_loss")
            }
            state = {"weights": trainer.model.state_dict(), "average": average, **logged}
            torch.save(state, output.with_suffix(".pt"))
            trainer.model.save_pretrained(output / "exported")
    trainer.accelerator.wait_for_everyone()


def meet_a_nan(folder: Path) -> None:
    """Stop both processes at a loss that is not finite on one of them; no weight changes in that step."""
    trainer = make_trainer(folder / "nan", "mae", sharded=True, trainer_class=Poisoned)
    try:
        trainer.train()
    except NonFiniteError as error:
        (folder / f"nan-{trainer.args.process_index}.txt").write_text(str(error))
    with trainer.whole_model():
        if trainer.is_world_process_zero():
            torch.save(trainer.model.state_dict(), folder / "nan.pt")
    trainer.accelerator.wait_for_everyone()


def main(folder: Path, variants: list[str]) -> None:
    for variant in variants:
        for run in RUNS:
            train(folder, variant, run)
    meet_a_nan(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    os._exit(0)  # all is on disk; several trainers leave gloo threads that abort an orderly end now and then

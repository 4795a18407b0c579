"""Train every tiny head for three steps of eight images, in as many processes as launched; run by test_contract."""

import os
import sys
from pathlib import Path

import torch
from conftest import VARIANTS, tiny_arguments, tiny_collator, tiny_images, tiny_model
from mixed import NAME, mixed_trainer

from training.trainer import MimTrainer

NUM_IMAGES = 8


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for variant in VARIANTS:
        arguments = tiny_arguments(folder / variant, max_steps=3, optim="sgd", learning_rate=0.1)
        arguments.per_device_train_batch_size = NUM_IMAGES // arguments.world_size
        model, collator = tiny_model(variant), tiny_collator(variant, with_image_index=True)
        if model.compares_images:  # within a process; Sinkhorn-Knopp compares those of all processes
            model.config.koleo_loss_weight = model.config.coding_rate_weight = 0.0
            collator.spreads_ratios = False
        trainer = MimTrainer(
            model=model,
            args=arguments,
            train_dataset=tiny_images(images_per_step=NUM_IMAGES, variant=variant),
            data_collator=collator,
        )
        train(trainer, folder / f"{variant}.pt")
    if "beit3" in VARIANTS:
        size = NUM_IMAGES // int(os.environ.get("WORLD_SIZE", "1"))
        changes = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": size}
        train(mixed_trainer(folder / NAME, images_per_step=NUM_IMAGES, **changes), folder / f"{NAME}.pt")


def train(trainer: MimTrainer, file: Path) -> None:
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        state = {"weights": trainer.model.state_dict(), "losses": losses, "world_size": trainer.args.world_size}
        torch.save(state, file)
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # all is on disk; several trainers leave gloo threads that abort an orderly end now and then

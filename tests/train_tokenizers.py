"""Train a tiny VQ-KD for three steps of eight images, in as many processes as launched; run by test_vqkd."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from conftest import PATCH, SIZE, tiny_arguments, tiny_images
from transformers import TrainingArguments

from data.collators import stack_items
from data.seeds import seeded_generator
from modeling.patches import patchify
from modeling.vqkd import VqkdConfig, VqkdModel
from training.trainer import MimTrainer

NUM_IMAGES, FEATURES = 8, 6


def tiny_vqkd(**changes: Any) -> VqkdModel:
    """The smallest VQ-KD, the same weights at each call."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    settings = {"vocab_size": 64, "code_size": 8, "feature_size": FEATURES, "decoder_num_hidden_layers": 1}
    encoder = {**sizes, "image_size": SIZE, "patch_size": PATCH}
    torch.manual_seed(0)
    return VqkdModel(VqkdConfig(encoder_config=encoder, **{**settings, **changes}))


def add_features(batch: dict[str, Any]) -> dict[str, Any]:
    """Add mean and standard deviation of the colors of each patch, in place of a teacher's features (B, F, h, w)."""
    colors = patchify(batch["pixel_values"] / 255, PATCH).unflatten(-1, (-1, 3))  # (B, N, pixels, 3)
    features = torch.cat([colors.mean(2) - 0.5, colors.std(2)], dim=-1)
    return batch | {"teacher_features": features.mT.unflatten(2, (SIZE // PATCH, SIZE // PATCH))}


def vqkd_batches(num_images: int = NUM_IMAGES) -> list[dict[str, Any]]:
    images = tiny_images()
    batch = stack_items([images[index] for index in range(num_images)])
    return [add_features({"pixel_values": batch["pixel_values"]})]


def vqkd_trainer(arguments: TrainingArguments, callbacks: Any = (), **changes: Any) -> MimTrainer:
    """A trainer of a VQ-KD whose codebook started from images."""
    images, model = tiny_images(images_per_step=NUM_IMAGES), tiny_vqkd(**changes)
    some = stack_items([images[index] for index in range(16)])
    model.to(arguments.device).start_from_images([add_features(some)], seeded_generator(0))
    return MimTrainer(
        model=model,
        args=arguments,
        train_dataset=images,
        eval_dataset=tiny_images(train=False),
        data_collator=stack_items,
        targets=add_features,
        callbacks=list(callbacks),
    )


def main(output: Path) -> None:
    arguments = tiny_arguments(output, max_steps=3, optim="sgd", learning_rate=0.1)
    arguments.per_device_train_batch_size = NUM_IMAGES // arguments.world_size
    trainer = vqkd_trainer(arguments, restarts_dead_codes=True)
    trainer.train()
    if trainer.is_world_process_zero():
        state = {"weights": trainer.model.state_dict(), "world_size": arguments.world_size}
        torch.save(state, output.with_suffix(".pt"))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # all is on disk; gloo threads abort an orderly end now and then

"""Train tiny classifiers of each kind in as many processes as launched; run by test_finetune_trainer."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import SIZE, TINY_MODELS, tiny_arguments
from transformers import BeitConfig, SwinConfig, ViTConfig

from data.augmentations import single_view
from data.classification import train_view
from data.collators import stack_items
from data.images import ImageDataset
from data.labeled import LabeledSplit, open_labeled
from modeling.image_classification import build_classifier, random_encoder
from tasks.classification import MixedCrossEntropy
from training.finetune_trainer import FinetuneTrainer
from training.mixing import Mixing

NUM_IMAGES, NUM_CLASSES = 8, 10
ENCODERS = {
    "vit": ViTConfig(**TINY_MODELS["mae"]["encoder_config"], layer_norm_eps=1e-6),
    "beit": BeitConfig(
        **TINY_MODELS["mae"]["encoder_config"], layer_norm_eps=1e-6, use_shared_relative_position_bias=True
    ),
    "swin": SwinConfig(**TINY_MODELS["simmim+swin"]["encoder_config"]),
}


def few_clothes() -> LabeledSplit:
    part = open_labeled("sample-fashion").test
    assert part is not None
    return part.select(np.arange(0, 1000, 25))  # 40 images


def tiny_classifier(kind: str, drop_path_rate: float = 0.0) -> Any:
    torch.manual_seed(0)
    names = [str(number) for number in range(NUM_CLASSES)]
    classifier = build_classifier(
        random_encoder(ENCODERS[kind]), names, image_size=SIZE, pooling="mean", drop_path_rate=drop_path_rate
    )
    torch.nn.init.normal_(classifier.classifier.weight, std=0.1)  # near zero, nothing would reach the blocks
    return classifier


def tiny_finetune_trainer(
    kind: str, folder: Path, mixing: Mixing | None = None, layer_decay: float = 1.0, **arguments: Any
) -> FinetuneTrainer:
    part = few_clothes()
    weights = torch.linspace(0.5, 2, NUM_CLASSES)
    off = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "erasing_prob": 0.0}
    return FinetuneTrainer(
        model=tiny_classifier(kind),
        args=tiny_arguments(folder, prediction_loss_only=False, **arguments),
        train_dataset=ImageDataset(part, single_view(train_view((SIZE, SIZE)), 3), train=True),
        data_collator=stack_items,
        loss=MixedCrossEntropy(mixing or Mixing(NUM_CLASSES, label_smoothing=0.1, **off), weights),
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        layer_decay=layer_decay,
    )


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ENCODERS:
        batch_size = NUM_IMAGES // int(os.environ.get("WORLD_SIZE", "1"))
        settings = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": batch_size}
        trainer = tiny_finetune_trainer(kind, folder / kind, **settings)
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if trainer.is_world_process_zero():
            state = {"weights": trainer.model.state_dict(), "losses": losses, "world_size": trainer.args.world_size}
            torch.save(state, folder / f"{kind}.pt")
        trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # all is on disk; several trainers leave gloo threads that abort an orderly end now and then

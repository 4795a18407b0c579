"""Train a tiny detector for a few steps and save its weights: one process, accumulation, or two processes.

python tests/train_detector.py FOLDER one|parts|two
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import RfDetrConfig, TrainingArguments, ViTConfig, ViTModel

from data.box_datasets import open_box_splits
from data.box_views import BoxViews, collate_boxes
from data.images import ImageDataset
from modeling.detection import Detector, build_detector
from training.finetune_trainer import FinetuneTrainer

SIDE, PATCH = 32, 8
NAMES = ["square", "bar"]
BOXES = [[(8, 8, 20, 20)], [(30, 10, 14, 30), (4, 4, 12, 12)], [], [(20, 20, 24, 24)]] * 4  # left, top, width, height


def small_encoder() -> ViTModel:
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=SIDE,
        patch_size=PATCH,
        pooler_act="linear",
        pooler_output_size=32,
    )
    return ViTModel(config).eval()


def tiny_detector(config: RfDetrConfig | None = None) -> Detector:
    torch.manual_seed(0)
    if config is not None:
        return Detector(config)
    return build_detector(small_encoder(), NAMES, image_size=SIDE, num_queries=6, box_size=(0.3, 0.4))


def write_scenes(folder: Path) -> Path:
    """Write images of 64 x 48 pixels with bright boxes on noise as COCO json, to train on and to validate on."""
    for split, seed in (("train", 0), ("val", 1)):
        random = np.random.RandomState(seed)
        (folder / split).mkdir(parents=True)
        content = {
            "images": [],
            "annotations": [],
            "categories": [{"id": n, "name": name} for n, name in enumerate(NAMES)],
        }
        for number, boxes in enumerate(BOXES):
            pixels = random.randint(0, 90, (48, 64, 3)).astype(np.uint8)
            content["images"].append({"id": number, "file_name": f"{number}.png", "width": 64, "height": 48})
            for left, top, width, height in boxes:
                category = int(height > 1.5 * width)
                pixels[top : top + height, left : left + width, category] = 220
                box = {"id": len(content["annotations"]), "image_id": number, "category_id": category}
                content["annotations"].append(box | {"bbox": [left, top, width, height], "area": width * height})
            Image.fromarray(pixels).save(folder / split / f"{number}.png")
        (folder / split / "annotations.json").write_text(json.dumps(content))
    return folder


def main(folder: Path, kind: str) -> None:
    scenes = folder / "scenes"
    if not scenes.exists():  # the first run is of one process
        write_scenes(scenes)
    splits = open_box_splits(str(scenes), validation_fraction=None, max_bad_fraction=0.0, seed=0, checks="all")
    views = BoxViews(SIDE, (0.6, 1.4), (110, 110, 110), Image.Resampling.BILINEAR)
    batch_size, accumulation = {"one": (8, 1), "parts": (1, 8), "two": (4, 1)}[kind]
    trainer = FinetuneTrainer(
        model=tiny_detector(),
        args=TrainingArguments(
            output_dir=str(folder / kind),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            max_steps=3,
            optim="sgd",
            learning_rate=0.05,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            remove_unused_columns=False,
            dataloader_drop_last=True,
            max_grad_norm=0.5,
        ),
        train_dataset=ImageDataset(splits.by_name["train"], views, train=True),
        data_collator=collate_boxes,
        loss=lambda model, batch, counters: (
            model(pixel_values=batch["pixel_values"], labels=batch["targets"]).loss,
            {},
        ),
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        torch.save(
            {
                "weights": trainer.accelerator.unwrap_model(trainer.model).state_dict(),
                "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
                "world_size": trainer.args.world_size,
            },
            folder / f"{kind}.pt",
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

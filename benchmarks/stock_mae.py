"""The stock way to train an MAE on a folder: run_mae.py of transformers (examples/pytorch/image-pretraining).

`load_dataset("imagefolder")` with `set_transform`, `ViTMAEForPreTraining`, and `Trainer` with a collator that stacks.
Its torchvision transforms are written out with Pillow and torch, which is what they call. One thing is repaired: the
tables of positions, which transformers 5 leaves at zero in a model from scratch.
"""

import argparse
import json
import math
import random

import torch
from datasets import load_dataset
from PIL import Image
from transformers import Trainer, TrainerCallback, TrainingArguments, ViTImageProcessor, ViTMAEConfig
from transformers import ViTMAEForPreTraining as ViTMAE

from modeling.patches import sincos_positions

CROP_SCALE = (0.2, 1.0)


def choose_box(width: int, height: int) -> tuple[int, int, int, int]:
    """As torchvision's RandomResizedCrop; returns left, top, right, bottom."""
    for _ in range(10):
        area = width * height * random.uniform(*CROP_SCALE)
        aspect_ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * aspect_ratio)), round(math.sqrt(area / aspect_ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = random.randint(0, width - w), random.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


class Transform:
    """Convert to RGB, RandomResizedCrop (bicubic), RandomHorizontalFlip, ToTensor, Normalize."""

    def __init__(self, size: int) -> None:
        processor = ViTImageProcessor()
        self.size = (size, size)
        self.mean = torch.tensor(processor.image_mean)[:, None, None]
        self.std = torch.tensor(processor.image_std)[:, None, None]

    def __call__(self, examples: dict) -> dict:
        examples["pixel_values"] = [self.transform(image) for image in examples["image"]]
        return examples

    def transform(self, image: Image.Image) -> torch.Tensor:
        image = image.convert("RGB") if image.mode != "RGB" else image
        image = image.crop(choose_box(*image.size)).resize(self.size, Image.Resampling.BICUBIC)
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*self.size, 3)
        return pixels.permute(2, 0, 1).contiguous().float().div(255).sub_(self.mean).div_(self.std)


def collate_fn(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.stack([example["pixel_values"] for example in examples])}


def build_model(encoder: dict) -> ViTMAE:
    """Return the model, whose decoder is the published one, with its tables of positions."""
    model = ViTMAE(ViTMAEConfig(**encoder, mask_ratio=0.75, norm_pix_loss=True))
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        side = math.isqrt(table.shape[1] - 1)
        table.data.copy_(sincos_positions((side, side), table.shape[-1]))
    return model


class PrintSteps(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if logs and "loss" in logs:
            print(f"step {state.global_step} loss {logs['loss']}", flush=True)


def build_trainer(images: list[str], encoder: dict, arguments: dict) -> Trainer:
    files = {"train": [f"{folder}/**" for folder in images]}
    dataset = load_dataset("imagefolder", data_files=files, split="train", drop_labels=True)
    dataset.set_transform(Transform(encoder["image_size"]))
    # The flags of the script's README, with the authors' settings.
    settings = TrainingArguments(
        remove_unused_columns=False,
        label_names=["pixel_values"],
        weight_decay=0.05,
        adam_beta2=0.95,
        lr_scheduler_type="cosine",
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        **arguments,
    )
    settings.learning_rate = 1.5e-4 * settings.train_batch_size / 256
    trainer = Trainer(model=build_model(encoder), args=settings, train_dataset=dataset, data_collator=collate_fn)
    trainer.add_callback(PrintSteps())
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("images", type=lambda folder: [folder], help="folder")
    parser.add_argument("encoder", type=json.loads, help="settings of ViTMAEConfig")
    parser.add_argument("arguments", type=json.loads, help="settings of TrainingArguments")
    options = parser.parse_args()
    build_trainer(options.images, options.encoder, options.arguments).train()


if __name__ == "__main__":
    main()

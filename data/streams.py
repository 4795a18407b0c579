"""Streams: data sets of the Hub, or shards, that are read from beginning to end without an index.

A stream is divided among roles, one for each data worker of each process: a role reads its share of the shards in an
order of its own pass, and shuffles windows of 512 images. What item n of a role is depends on (seed, number of roles,
n) only. Where each window begins is noted in a folder, so that a resumed run goes on without reading all before it.

With another number of roles or images per batch, the shares differ: the run begins a new pass, in which images of the
interrupted pass may come again, and others of it only then.
Shapes: R roles, B images per batch of a process.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset

from data.bad_images import BadImages
from data.decoding import BadImage, read_bytes
from data.image_source import ImageSource
from data.seeds import seeded_generator
from data.shard_files import expand_braces, is_shard_pattern, is_url, retry
from data.size_schedule import Transform
from data.tables import VALIDATION_NAMES, find_image_column

logger = logging.getLogger(__name__)

STREAM_LENGTH = 1 << 40  # of a data set that is longer than any training
NUM_LOOKED_AT = 64  # images of the beginning that are checked before training
NUM_VALIDATED = 256
_WINDOW = 512
_ROWS_PER_READ = 16
_DIVISIONS = "divisions.json"
_NUM_REPLACEMENTS = 10
_BUILDERS = {".tar": "webdataset", ".parquet": "parquet", ".arrow": "arrow"}


class MemorySource(ImageSource):
    """Encoded images in memory."""

    def __init__(self, images: Sequence[bytes], title: str) -> None:
        super().__init__(title)
        self._images, self._title = tuple(images), title

    def __len__(self) -> int:
        return len(self._images)

    def entry(self, index: int) -> bytes:
        if not self._images[index]:
            raise BadImage("no image in this row")
        return self._images[index]

    def name(self, index: int) -> str:
        return f"{self._title}#{index}"


@dataclass(frozen=True)
class Stream:
    """A split of a data set that is read in order; opened anew in each process."""

    dataset: str
    split: str = "train"

    def open(self) -> datasets.IterableDataset:
        """Return the rows, with encoded images only.

        Raises:
            ValueError: If there is no such data set or split, or it has no images.
        """
        return _open(self)

    @property
    def column(self) -> str:
        return next(iter(self.open().features))

    @property
    def num_shards(self) -> int:
        return int(self.open().num_shards)

    def validation(self) -> "Stream | None":
        """Return the validation split, if the data set has one."""
        if is_shard_pattern(self.dataset):
            return None
        names = datasets.get_dataset_split_names(self.dataset)
        name = next((name for name in VALIDATION_NAMES if name in names), None)
        return None if name is None else Stream(self.dataset, name)

    def first(self, number: int) -> list[bytes]:
        """Return the first images of the first shard; raises ValueError as `open`."""
        rows = self.open()  # not tried again: a wrong name stays wrong
        images = retry(lambda: list(rows.take(number)), self.dataset)
        return [_bytes_of(row[self.column]) for row in images]

    def read(self, shard: int, start: int) -> Iterator[bytes]:
        """Yield the images of a shard from number `start` on; goes on after errors of the network."""
        rows: Iterator[Any] | None = None

        def next_cells() -> list[Any]:
            nonlocal rows
            try:
                if rows is None:
                    one = self.open().shard(num_shards=self.num_shards, index=shard)
                    # Not __iter__, which would take its own share of the rows in a data worker.
                    rows = (one.skip(start) if start else one).iter(_ROWS_PER_READ)
                cells: list[Any] = next(rows, {self.column: []})[self.column]
                return cells
            except BaseException:
                rows = None  # begin again, behind what was read
                raise

        while cells := retry(next_cells, f"shard {shard} of {self.dataset}"):
            start += len(cells)
            yield from map(_bytes_of, cells)


@lru_cache(8)
def _open(stream: Stream) -> datasets.IterableDataset:
    name = stream.dataset
    try:
        if is_shard_pattern(name):
            urls = [url if is_url(url) else os.path.expanduser(url) for url in expand_braces(name)]
            builder = _BUILDERS.get(os.path.splitext(urls[0])[1].lower())
            if builder is None:
                raise ValueError(f"expected {', '.join(_BUILDERS)} files")
            rows = datasets.load_dataset(builder, data_files={"train": urls}, split="train", streaming=True)
        else:
            rows = datasets.load_dataset(name, split=stream.split, streaming=True)
        if rows.features is None:
            rows = rows._resolve_features()
    # `datasets` and the clients below it raise a dozen types.
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"dataset {name!r} cannot be streamed: {reason}") from error
    column = find_image_column(rows.features, name)
    return rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))


def _bytes_of(cell: Any) -> bytes:
    """Return the image in a row; nothing if there is none, or its file cannot be read."""
    if cell is None:
        return b""
    if cell["bytes"] is None and cell["path"] and os.path.exists(cell["path"]):
        with suppress(BadImage):  # the stream goes on behind it
            return read_bytes(Path(cell["path"]))
    return bytes(cell["bytes"] or b"")


@dataclass(frozen=True)
class Origin:
    """Where a division of the stream began.

    Args:
        counter: Number of the first image of the training (`EpochSampler`) that is divided so.
        number: Of earlier divisions.
    """

    counter: int
    number: int
    num_processes: int
    num_workers: int
    batch_size: int

    @property
    def num_roles(self) -> int:
        return self.num_processes * max(1, self.num_workers)

    def locate(self, counter: int) -> tuple[int, int]:
        """Return the role that makes an item, and the number of the item among those of the role."""
        batch, place = divmod(counter - self.counter, self.batch_size)
        round_of_process, process = divmod(batch, self.num_processes)
        round_of_worker, worker = divmod(round_of_process, max(1, self.num_workers))
        return process * max(1, self.num_workers) + worker, round_of_worker * self.batch_size + place


class Role:
    """The share of a stream that one data worker reads, as numbered windows of shuffled images."""

    def __init__(self, stream: Stream, seed: int, origin: Origin, number: int, folder: Path) -> None:
        self.stream, self.seed, self.origin, self.number = stream, seed, origin, number
        division = f"{origin.counter}-{origin.num_processes}x{origin.num_workers}x{origin.batch_size}"
        self._notes = folder / f"{division}-{number}.jsonl"
        self._window, self._images, self._names = -1, list[bytes](), list[str]()
        self._place = [0, 0, 0]  # pass, shard among those of the pass, image in the shard
        self._rows: Iterator[bytes] | None = None
        self._order: tuple[int, list[int]] = (-1, [])
        self._found_nothing = False  # in this pass
        self._shares_shards = stream.num_shards < origin.num_roles

    def image(self, number: int) -> tuple[str, bytes]:
        """Return the name and the bytes of an image; numbers that rise are fast."""
        window, place = divmod(number, _WINDOW)
        self._go_to(window)
        order = torch.randperm(_WINDOW, generator=self._generator("window", window))
        row = int(order[place])
        return self._names[row], self._images[row]

    def replacement(self, number: int, attempt: int) -> tuple[str, bytes]:
        """Return another image of the same window, as one cannot be read."""
        self._go_to(number // _WINDOW)
        row = int(torch.randint(_WINDOW, (), generator=self._generator("replace", number, attempt)))
        return self._names[row], self._images[row]

    def _generator(self, *counters: int | str) -> torch.Generator:
        return seeded_generator(self.seed, "stream", self.origin.number, self.number, *counters)

    def _go_to(self, window: int) -> None:
        if window == self._window:
            return
        if window != self._window + 1 or self._window < 0:
            self._window, self._place = self._last_note(window)
            self._rows = None
        while self._window < window:
            self._note(self._window + 1)
            several = [self._next() for _ in range(_WINDOW)]
            self._names, self._images = [name for name, _ in several], [image for _, image in several]
            self._window += 1

    def _next(self) -> tuple[str, bytes]:
        """Return the next image of this role, in this pass or the next one."""
        while True:
            number_of_pass, position, number = self._place
            shards = self._shards_of(number_of_pass)
            if position == len(shards):
                if self._found_nothing:
                    raise ValueError(
                        f"{self.stream.dataset} has no image for data worker {self.number + 1} of "
                        f"{self.origin.num_roles}: use fewer data workers"
                    )
                self._place, self._found_nothing = [number_of_pass + 1, 0, 0], True
                continue
            if self._rows is None:
                self._rows = self.stream.read(shards[position], number)
            image = next(self._rows, None)
            if image is None:
                self._place, self._rows = [number_of_pass, position + 1, 0], None
                continue
            self._place[2] += 1
            if not self._shares_shards or number % self.origin.num_roles == self.number:
                self._found_nothing = False
                return f"{self.stream.dataset} shard {shards[position]}#{number}", image

    def _shards_of(self, number_of_pass: int) -> list[int]:
        """Return the shards of this role in a pass, in order."""
        if self._order[0] != number_of_pass:
            generator = seeded_generator(self.seed, "shards", self.origin.number, number_of_pass)
            order: list[int] = torch.randperm(self.stream.num_shards, generator=generator).tolist()
            own = order if self._shares_shards else order[self.number :: self.origin.num_roles]
            self._order = number_of_pass, own
        return self._order[1]

    def _note(self, window: int) -> None:
        self._notes.parent.mkdir(parents=True, exist_ok=True)
        with self._notes.open("ab", buffering=0) as stream:
            stream.write(json.dumps([window, *self._place]).encode() + b"\n")

    def _last_note(self, window: int) -> tuple[int, list[int]]:
        """Return the last noted window up to this one, minus one, and where it begins; else the beginning."""
        found = (-1, [0, 0, 0])
        lines = self._notes.read_bytes().splitlines(keepends=True) if self._notes.exists() else []
        for line in lines:
            if line.endswith(b"\n"):  # else it was being written when the process was killed
                noted, *place = json.loads(line)
                if found[0] < noted - 1 < window:
                    found = noted - 1, place
        return found


class StreamDataset(Dataset[dict[str, Any]]):
    """Items like those of `ImageDataset`, of a stream: a data worker asks for counters that rise.

    Args:
        folder: Where the windows are noted; copied into each checkpoint.
    """

    def __init__(
        self,
        stream: Stream,
        transform: Transform,
        *,
        seed: int,
        images_per_step: int,
        origin: Origin,
        folder: Path,
        bad_images_file: Path,
    ) -> None:
        self.stream, self.transform, self.seed = stream, transform, seed
        self.images_per_step, self.origin, self.folder = images_per_step, origin, folder
        self.bad_images_file = bad_images_file
        self._roles: dict[int, Role] = {}
        self._reported: set[str] = set()

    def __len__(self) -> int:
        return STREAM_LENGTH

    def __getitem__(self, counter: int) -> dict[str, Any]:
        return self.item(counter, 0)

    def item(self, image_index: int, epoch: int) -> dict[str, Any]:
        step = image_index // self.images_per_step
        return {**self._views(image_index), "image_index": image_index, "epoch": 0, "step": step}

    def name(self, image_index: int) -> str:
        role, number = self._locate(image_index)
        return role.image(number)[0]

    def go_on(self, counter: int, checkpoint: Path | None, is_main_process: bool) -> None:
        """Divide the stream as the interrupted run did; anew from this counter on if that is not possible.

        Args:
            counter: Of the first image.
            checkpoint: That the run goes on from, which has a copy of the folder.
        """
        kept = None if checkpoint is None else checkpoint / self.folder.name / _DIVISIONS
        if kept is not None and not kept.exists():
            kept = None
        divisions = [] if kept is None else json.loads(kept.read_text(encoding="utf-8"))
        divisions = [Origin(**entry) for entry in divisions]
        wanted = self.origin
        same = ("num_processes", "num_workers", "batch_size")
        if not divisions or any(getattr(divisions[-1], name) != getattr(wanted, name) for name in same):
            if divisions and is_main_process:
                logger.warning(
                    f"the stream was divided among {divisions[-1].num_roles} data workers with batches of "
                    f"{divisions[-1].batch_size}, now {wanted.num_roles} with {wanted.batch_size}: a new pass begins, "
                    "in which images of the interrupted one may come again"
                )
            settings = {name: getattr(wanted, name) for name in same}
            divisions.append(Origin(counter, len(divisions), **settings))
        self.origin = divisions[-1]
        if is_main_process:
            if not kept:  # the folder of a run that was killed before its first checkpoint
                shutil.rmtree(self.folder, ignore_errors=True)
            elif not self.folder.exists():  # the checkpoint comes from elsewhere
                shutil.copytree(kept.parent, self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            content = json.dumps([asdict(division) for division in divisions])
            (self.folder / _DIVISIONS).write_text(content, encoding="utf-8")

    def save(self, checkpoint: Path) -> None:
        """Copy the folder into a checkpoint."""
        shutil.copytree(self.folder, checkpoint / self.folder.name, dirs_exist_ok=True)

    def _locate(self, counter: int) -> tuple[Role, int]:
        number, item = self.origin.locate(counter)
        if number not in self._roles:
            self._roles = {number: Role(self.stream, self.seed, self.origin, number, self.folder)}
        return self._roles[number], item

    def _views(self, counter: int) -> dict[str, Any]:
        role, number = self._locate(counter)
        generator = seeded_generator(self.seed, "augment", 0, counter)
        for attempt in range(1 + _NUM_REPLACEMENTS):
            name, image = role.replacement(number, attempt) if attempt else role.image(number)
            try:
                if not image:
                    raise BadImage("no image in this row")
                return self.transform({"image": image}, generator)
            except BadImage as error:
                if name not in self._reported:
                    self._reported.add(name)
                    BadImages({name: str(error)}).append_to(self.bad_images_file)
        raise BadImage(f"{name} cannot be read, nor can any of {_NUM_REPLACEMENTS} others drawn in its place")

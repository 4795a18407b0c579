"""Shards of photographs for tests, and requests that are tried again without long pauses."""

import io
import itertools
import tarfile
from pathlib import Path

import pytest
from conftest import ROOT

from data import shard_files

PHOTOGRAPHS = [path.read_bytes() for path in sorted((ROOT / "data/samples/photographs/train").glob("*.jpg"))[:12]]


@pytest.fixture(autouse=True)
def quick_requests(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shard_files, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(shard_files, "_LONGEST_PAUSE", 0.01)
    monkeypatch.setenv("HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    shard_files.find_shards.cache_clear()


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def write_shards(folder: Path, num_shards: int = 3, num_images: int = 4, first: str = "train") -> list[bytes]:
    """Tars of photographs with classes 0 and 1; returns their images in order."""
    images = list(itertools.islice(itertools.cycle(PHOTOGRAPHS), num_shards * num_images))
    for shard in range(num_shards):
        some = range(shard * num_images, (shard + 1) * num_images)
        members = [
            (f"{i:04}.{kind}", data) for i in some for kind, data in (("jpg", images[i]), ("cls", b"%d" % (i % 2)))
        ]
        write_tar(folder / f"{first}-{shard:03}.tar", members)
    return images


def contents(source: object) -> list[bytes]:
    return [source.read(index) for index in range(len(source))]  # type: ignore[attr-defined]

"""Shards behind a network that fails, and the bounded cache of their blocks."""

import pickle
import queue
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from photograph_shards import contents, quick_requests, write_shards  # noqa: F401 - a fixture for all tests

from benchmarks.range_server import RangeServer
from data import shard_files
from data.shard_blocks import DEFAULT_BYTES, BlockCache, limit_cache
from data.shard_files import ShardError
from data.sources import open_source


def test_server_with_errors__loses_and_repeats_nothing(tmp_path: Path) -> None:
    images = write_shards(tmp_path)
    with RangeServer(tmp_path, errors=0.4, resets=0.25, delays=0.2, seconds=0.01) as server:
        source = open_source(f"{server.url}/train-{{000..002}}.tar")
        source.prefetch(range(12))
        assert contents(source) == images
        assert all(server.counts[kind] for kind in ("errors", "resets", "delays")), server.counts
        num_requests = server.counts.total()
        assert contents(pickle.loads(pickle.dumps(source))) == images  # from the cache
        assert server.counts.total() == num_requests


def test_server_that_fails__is_named_after_some_tries(tmp_path: Path) -> None:
    write_shards(tmp_path, 1)
    with RangeServer(tmp_path) as server:
        source = open_source(f"{server.url}/train-{{000..000}}.tar")
        server.errors = 1.0
        with pytest.raises(ShardError, match=r"train-000\.tar cannot be read after 8 tries: 500"):
            source.read(0)
    with RangeServer(tmp_path, ignores_ranges=True) as server, pytest.raises(ShardError, match="ignores the range"):
        open_source(f"{server.url}/train-{{000..000}}.tar").read(0)
    shard_files.find_shards.cache_clear()
    with RangeServer(tmp_path) as server, pytest.raises(ValueError, match="are missing"):
        open_source(f"{server.url}/train-{{000..001}}.tar")


def test_cache__keeps_no_more_than_its_limit(tmp_path: Path) -> None:
    images = write_shards(tmp_path, 6, 2)
    size = sum(map(len, images))
    with RangeServer(tmp_path) as server:
        pattern = f"{server.url}/train-{{000..005}}.tar"
        limit_cache(size // 2)
        try:
            with pytest.raises(ValueError, match="shard_cache_gb is"):
                open_source(pattern)
            limit_cache(10 * size)
            source = open_source(pattern)
        finally:
            limit_cache(DEFAULT_BYTES)
        source.cache.limit = size // 2
        assert contents(source) == images
        assert sum(path.stat().st_size for path in source.cache.folder.glob("*.block")) <= size // 2
        assert contents(source) == images


def test_blocks__are_fetched_ahead_for_several_threads() -> None:
    interval, fetched = sys.getswitchinterval(), queue.SimpleQueue[int]()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            for attempt in range(3):
                cache = BlockCache()
                blocks = [(f"{attempt}-{number}", partial(_put, fetched, number)) for number in range(8)]
                assert list(pool.map(cache.add_later, [[block] for block in blocks])) == [None] * 8
                assert sorted(fetched.get(timeout=10) for _ in range(8)) == list(range(8))
    finally:
        sys.setswitchinterval(interval)


def _put(fetched: "queue.SimpleQueue[int]", number: int) -> bytes:
    fetched.put(number)
    return b"content"

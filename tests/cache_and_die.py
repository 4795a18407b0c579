"""Cache the images of a folder slowly, and maybe on a full disk; run by test_cache."""

import argparse
import resource
import signal
import time
from pathlib import Path

import numpy as np

from data import cache
from data.cache import CacheFormat, cache_images
from data.images import SourceSamples
from data.sources import open_source


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("images", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds_per_image", type=float, default=0.0)
    parser.add_argument("--bytes_per_table", type=int, default=1 << 30)
    parser.add_argument("--bytes_on_disk", type=int)
    options = parser.parse_args()
    cache._BYTES_PER_TABLE, cache._ROWS_PER_BATCH = options.bytes_per_table, 4
    if options.bytes_on_disk:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond fails like one on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (options.bytes_on_disk,) * 2)
    encode = CacheFormat.encode

    def slow_encode(form: CacheFormat, data: bytes) -> bytes:
        time.sleep(options.seconds_per_image)
        print("encoded", flush=True)
        return encode(form, data)

    CacheFormat.encode = slow_encode  # type: ignore[method-assign]
    source = open_source(str(options.images))
    cache_images([SourceSamples(source, np.arange(len(source)))], options.folder, CacheFormat(64, 3), num_threads=1)


if __name__ == "__main__":
    main()

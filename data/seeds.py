"""Random generators named by what they are for, so that a random choice never depends on who makes it or when.

`seeded_generator(seed, "mask", epoch, image_index)` gives the same numbers on every machine, rank and worker, in any
order of calls and after a resume, because nothing is carried over from one call to the next.
"""

import hashlib
from operator import index

import torch


def seeded_generator(*counters: int | str) -> torch.Generator:
    """CPU generator whose stream is fixed by `counters`; counters that differ in value, order or type give others.

    PyTorch's CPU generator uses only the low 32 bits of a seed. So two given tuples share a stream with a chance of
    2**-32, and among the millions of masks of a long run a few repeat; neighbors never do systematically.
    """
    # repr of plain ints and strs keeps (1, 23) and (12, 3), "1" and 1 apart; index() makes numpy's ints plain ones and
    # refuses floats. Unlike hash(), blake2b does not change with PYTHONHASHSEED.
    key = repr([counter if isinstance(counter, str) else index(counter) for counter in counters])
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

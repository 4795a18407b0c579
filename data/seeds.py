"""Random generators seeded by purpose and counters, so that results do not depend on process or order.

`seeded_generator(seed, "mask", epoch, image_index)` gives the same numbers on every machine, rank and worker, in any
order of calls and after resuming, because no state is carried over from one call to the next.
"""

import hashlib
from operator import index

import torch


def seeded_generator(*counters: int | str) -> torch.Generator:
    """Return a CPU generator that depends on the value, order and type of `counters` only.

    PyTorch's CPU generator uses the low 32 bits of a seed only. Two different tuples therefore share a stream with a
    probability of 2**-32: among the millions of masks of a long run a few repeat, but never systematically.
    """
    # repr of plain ints and strs distinguishes (1, 23) from (12, 3) and "1" from 1; index() converts numpy's ints and
    # rejects floats. Unlike hash(), blake2b does not depend on PYTHONHASHSEED.
    key = repr([counter if isinstance(counter, str) else index(counter) for counter in counters])
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))

"""Export of image features to a Parquet file.

Shapes: B batch size, h, w rows and columns of patches, D feature dimension.
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from data.image_source import ImageSource
from evaluation.features import FrozenEncoder, Tokens, check_finite
from evaluation.preprocessing import Batch


def write_embeddings(
    path: Path,
    encoder: FrozenEncoder,
    images: Iterable[Batch],
    source: ImageSource,
    with_patches: bool,
    may_be_empty: bool = False,
) -> int:
    """Write one row per image: `name`, `class_token` if there is one, `mean`, and `patches` (h * w * D, row-major).

    The patch grid (h, w) is stored in the file's metadata. `path` is replaced once all rows are written; returns their
    number. Raises ValueError if no image can be read, unless that may be.
    """
    tables = (_table(batch, encoder(batch.pixel_values), source, with_patches) for batch in images)
    first = next(tables, None)
    if first is None and may_be_empty:
        return 0
    if first is None:
        raise ValueError(f"no image of {source.describe()} can be read")
    partial, num_rows = path.with_name(path.name + ".part"), 0
    with _replacing(path), pq.ParquetWriter(partial, first.schema, compression="zstd") as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table)
            num_rows += len(table)
    return num_rows


def share_of_images(num_images: int, batch_size: int, rank: int, num_processes: int) -> range:
    """Return the images that a process embeds: whole batches, so that their number does not change the features."""
    num_batches = -(-num_images // batch_size)
    first, last = (num_batches * number // num_processes * batch_size for number in (rank, rank + 1))
    return range(min(first, num_images), min(last, num_images))


def join_embeddings(parts: Sequence[Path], path: Path) -> None:
    """Write the rows of all files to one, in order, which replaces `path`; then delete the files."""
    schema, partial = pq.read_schema(parts[0]), path.with_name(path.name + ".part")
    with _replacing(path), pq.ParquetWriter(partial, schema, compression="zstd") as writer:
        for part in parts:
            with pq.ParquetFile(part) as file:
                for number in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(number))
    for part in parts:
        part.unlink()


@contextmanager
def _replacing(path: Path) -> Iterator[None]:
    """Replace a file by the one that the block writes beside it, with the ending .part."""
    partial = path.with_name(path.name + ".part")
    try:
        yield
    except BaseException as error:
        partial.unlink(missing_ok=True)
        error.add_note(f"{path} was not {'changed' if path.exists() else 'written'}")
        raise
    os.replace(partial, path)


def _table(batch: Batch, tokens: Tokens, source: ImageSource, with_patches: bool) -> pa.Table:
    check_finite(tokens.mean)
    names = [os.fsencode(source.name(position)) for position in batch.positions]  # which need not be Unicode
    columns = {"name": pa.array([name.decode(errors="backslashreplace") for name in names])}
    if tokens.class_token is not None:
        columns["class_token"] = _as_lists(tokens.class_token)
    columns["mean"] = _as_lists(tokens.mean)
    if with_patches:
        columns["patches"] = _as_lists(tokens.patches.flatten(1))
    height, width = tokens.patches.shape[1:3]
    return pa.table(columns).replace_schema_metadata({b"patches": f"{height} x {width}".encode()})


def _as_lists(values: Tensor) -> pa.Array:
    """Return values (B, n) as an array of B lists of n float32."""
    flat = np.ascontiguousarray(values.cpu().numpy(), dtype=np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), values.shape[1])

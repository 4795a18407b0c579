"""Features of many images into a parquet file, a batch at a time.

Shapes: B images, h w patches, D width.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from data.image_source import ImageSource
from evaluation.features import FrozenEncoder, Tokens
from evaluation.preprocessing import Batch


def write_embeddings(
    path: Path, encoder: FrozenEncoder, images: Iterable[Batch], source: ImageSource, with_patches: bool
) -> int:
    """A row for each image: `name`, `class_token` where there is one, `mean`, and `patches` (h * w * D, row-major).

    The grid of patches (rows, columns) is in the file's metadata. Returns the number of rows; there is no file, or the
    old one, until all are written.

    Raises:
        ValueError: not one image can be read.
    """
    scratch = path.with_name(path.name + ".part")
    writer, num_rows = None, 0
    try:
        for batch in images:
            tokens = encoder(batch.pixel_values)
            columns = {"name": pa.array([source.name(position) for position in batch.positions])}
            columns |= {name: _as_lists(value) for name, value in _columns(tokens, with_patches).items()}
            rows, columns_of_patches = tokens.patches.shape[1:3]
            grid = {b"patches": f"{rows} x {columns_of_patches}".encode()}
            table = pa.table(columns).replace_schema_metadata(grid)
            if writer is None:
                writer = pq.ParquetWriter(scratch, table.schema, compression="zstd")
            writer.write_table(table)
            num_rows += len(table)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
    finally:
        if writer is not None:
            writer.close()
    if not num_rows:
        raise ValueError(f"none of the images of {source.describe()} can be read")
    os.replace(scratch, path)
    return num_rows


def _columns(tokens: Tokens, with_patches: bool) -> dict[str, Tensor]:
    columns = {} if tokens.class_token is None else {"class_token": tokens.class_token}
    return columns | {"mean": tokens.mean} | ({"patches": tokens.patches.flatten(1)} if with_patches else {})


def _as_lists(values: Tensor) -> pa.Array:
    """(B, n) -> B lists of n float32."""
    flat = np.ascontiguousarray(values.cpu().numpy(), dtype=np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), values.shape[1])

"""Export of image features to a Parquet file.

Shapes: B batch size, h, w rows and columns of patches, D feature dimension.
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
    """Write one row per image: `name`, `class_token` if there is one, `mean`, and `patches` (h * w * D, row-major).

    The patch grid (h, w) is stored in the file's metadata. `path` is replaced once all rows are written.

    Returns:
        The number of rows.

    Raises:
        ValueError: If no image can be read.
    """
    partial = path.with_name(path.name + ".part")
    writer, num_rows = None, 0
    try:
        for batch in images:
            tokens = encoder(batch.pixel_values)
            columns = {"name": pa.array([source.name(position) for position in batch.positions])}
            columns |= {name: _as_lists(value) for name, value in _columns(tokens, with_patches).items()}
            height, width = tokens.patches.shape[1:3]
            table = pa.table(columns).replace_schema_metadata({b"patches": f"{height} x {width}".encode()})
            if writer is None:
                writer = pq.ParquetWriter(partial, table.schema, compression="zstd")
            writer.write_table(table)
            num_rows += len(table)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    finally:
        if writer is not None:
            writer.close()
    if not num_rows:
        raise ValueError(f"no image of {source.describe()} can be read")
    os.replace(partial, path)
    return num_rows


def _columns(tokens: Tokens, with_patches: bool) -> dict[str, Tensor]:
    columns = {} if tokens.class_token is None else {"class_token": tokens.class_token}
    return columns | {"mean": tokens.mean} | ({"patches": tokens.patches.flatten(1)} if with_patches else {})


def _as_lists(values: Tensor) -> pa.Array:
    """Return values (B, n) as an array of B lists of n float32."""
    flat = np.ascontiguousarray(values.cpu().numpy(), dtype=np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), values.shape[1])

"""Rows of images that stay in their files: tables of paths, or streams of them."""

from collections.abc import Sequence
from typing import Any, Final

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

_ROWS_OF_CHUNK: Final = 100_000
_SHARDS_OF_STREAM: Final = 1024


def path_rows(
    paths: Sequence[str], labels: NDArray[np.int64] | pa.ChunkedArray, features: datasets.Features
) -> datasets.Dataset:
    """Return rows of images that stay in their files.

    Args:
        paths: The files [N].
        labels: Their labels [N].
        features: What the two columns, images and labels, are called and hold.
    """
    tables = []
    for start in range(0, max(1, len(paths)), _ROWS_OF_CHUNK):
        stored = pa.array(paths[start : start + _ROWS_OF_CHUNK], pa.string())
        image = pa.StructArray.from_arrays([pa.nulls(len(stored), pa.binary()), stored], ["bytes", "path"])
        columns = [image, labels[start : start + _ROWS_OF_CHUNK]]
        tables.append(pa.table(columns, names=list(features)).cast(features.arrow_schema))
    table = datasets.table.InMemoryTable(pa.concat_tables(tables))
    # Without a fingerprint, the whole table would be pickled to make one.
    fingerprint = datasets.fingerprint.generate_random_fingerprint()
    return datasets.Dataset(table, datasets.DatasetInfo(features=features), fingerprint=fingerprint)


def as_stream(name: str, rows: datasets.Dataset) -> Any:
    """Return the rows of a split as a stream that knows its length, in parts that loader processes can share."""
    stream = rows.to_iterable_dataset(num_shards=max(1, min(len(rows), _SHARDS_OF_STREAM)))
    stream.info.splits = datasets.SplitDict({name: datasets.SplitInfo(name, num_examples=len(rows))})
    return stream

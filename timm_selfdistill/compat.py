"""Private interfaces of other libraries, each with its reason; checked with torch 2.15, timm 1.0.31, datasets 5.2."""

from typing import Any


def read_remote(path: str) -> bytes | None:
    """Return the bytes at an address that `datasets` streams from, with its credentials; None for a local path.

    `datasets` stores addresses such as `zip://a.png::hf://datasets/...`, which only its own `xopen` opens.
    """
    from datasets.utils.file_utils import is_local_path, xopen

    if is_local_path(path):
        return None
    with xopen(path, "rb") as file:
        return bytes(file.read())


def dataset_of_table(table: Any, features: Any) -> Any:
    """Return a `datasets.Dataset` of a pyarrow table in memory.

    `Dataset(table)` without a fingerprint pickles the whole table to make one.
    """
    import datasets
    from datasets.fingerprint import generate_random_fingerprint
    from datasets.table import InMemoryTable

    info = datasets.DatasetInfo(features=features)
    return datasets.Dataset(InMemoryTable(table), info, fingerprint=generate_random_fingerprint())


def stored_positions(rows: Any, taken: Any) -> Any:
    """Return where rows of a `datasets.Dataset` are stored in its table: `select` and `shuffle` only keep a list."""
    return taken if rows._indices is None else rows._indices.column(0).take(taken)

"""Refuse parquet and arrow files that number the same classes differently."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import datasets
import pyarrow as pa
from pyarrow import ipc, parquet

from timm_selfdistill.data.names import normalized


def stored_label_names(files: Iterable[str], column: str) -> dict[str, list[str]]:
    """Return the names of a `ClassLabel` column that parquet and arrow files store, by file; not all files do.

    Args:
        files: Their paths.
        column: The column of the labels.

    Raises:
        Exception: Of pyarrow, if a file is damaged.
    """
    names = {file: _stored_names(file, column) for file in files}
    return {file: found for file, found in names.items() if found is not None}


def check_same_label_names(names: Mapping[str, list[str]], column: str) -> None:
    """Refuse files that do not store the same names in the same order: `datasets` takes those of the first for all.

    Args:
        names: What `stored_label_names` returned.
        column: The column of the labels.

    Raises:
        ValueError: If two files differ.
    """
    for file, other in names.items():
        first, expected = next(iter(names.items()))
        if other != expected:
            raise ValueError(
                f"{first} and {file} number the classes of {column!r} differently: {expected[:5]} and {other[:5]} "
                f"({len(expected)} and {len(other)} names). Write them again with one list of names."
            )


def _stored_names(file: str, column: str) -> list[str] | None:
    ending = Path(file).suffix
    if ending == ".parquet":
        schema = parquet.read_schema(file)
    elif ending == ".arrow":
        schema = _arrow_schema(file)
    else:
        return None
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = (stored.get("info") or {}).get("features") or {}
    if column not in features:
        return None
    feature = datasets.Features.from_dict({column: features[column]})[column]
    return list(map(normalized, feature.names)) if isinstance(feature, datasets.ClassLabel) else None


def _arrow_schema(file: str) -> pa.Schema:
    with pa.memory_map(file) as source:
        try:
            return ipc.open_stream(source).schema
        except pa.ArrowInvalid:  # the other one of Arrow's two formats
            return ipc.open_file(source).schema

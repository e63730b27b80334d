"""Rows of images that stay in their files, and the check that no image is in two splits."""

import hashlib
import logging
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow as pa

from timm_selfdistill.compat import dataset_of_table
from timm_selfdistill.data.names import Indices, is_first_process
from timm_selfdistill.recipe import DataSection

_logger = logging.getLogger(__name__)

_ROWS_OF_CHUNK = 100_000
_SHARDS_OF_STREAM = 1024
# Of files of one size, this many of the last bytes are compared before whole files are.
_TAIL = 4096
_CHUNK = 512
_NAMED = 3


class Splits(NamedTuple):
    """What a source of data gives.

    Args:
        rows: The rows of each split.
        notes: What the line before training says of their reading.
        unread: Names of splits that there are, but that the recipe does not use.
    """

    rows: Mapping[str, datasets.Dataset | datasets.IterableDataset]
    notes: Sequence[str] = ()
    unread: Sequence[str] = ()


class FileSplit(NamedTuple):
    """The image files [N] of a split and their labels [N]."""

    paths: Sequence[str]
    labels: Indices | pa.ChunkedArray


def files_at(path: Path) -> list[Path]:
    """Return the file of that name or, if there is none, those of a pattern, sorted."""
    return [path] if path.is_file() else [Path(file) for file in sorted(glob(str(path)))]


def rows_of_files(
    splits: Mapping[str, FileSplit], features: datasets.Features, section: DataSection
) -> dict[str, datasets.Dataset | datasets.IterableDataset]:
    """Return the rows of each split or, for streaming, a stream of them that knows its length."""
    found: dict[str, Any] = {}
    for name, files in splits.items():
        found[name] = rows = path_rows(files.paths, files.labels, features)
        if section.streaming:
            # In parts that loader processes can share.
            found[name] = rows.to_iterable_dataset(num_shards=max(1, min(len(rows), _SHARDS_OF_STREAM)))
            found[name].info.splits = datasets.SplitDict({name: datasets.SplitInfo(name, num_examples=len(rows))})
    return found


def path_rows(paths: Sequence[str], labels: Indices | pa.ChunkedArray, features: datasets.Features) -> datasets.Dataset:
    """Return rows of image files [N] and their labels [N], in two columns that are called as in `features`."""
    tables = []
    for start in range(0, max(1, len(paths)), _ROWS_OF_CHUNK):
        stored = pa.array(paths[start : start + _ROWS_OF_CHUNK], pa.string())
        image = pa.StructArray.from_arrays([pa.nulls(len(stored), pa.binary()), stored], ["bytes", "path"])
        columns = [image, labels[start : start + _ROWS_OF_CHUNK]]
        tables.append(pa.table(columns, names=list(features)).cast(features.arrow_schema))
    return dataset_of_table(pa.concat_tables(tables), features)


def check_no_shared_images(splits: Mapping[str, FileSplit], root: str, *, compare_bytes: bool) -> None:
    """Raise ValueError for files that are in two splits; only the first process looks.

    Files are compared by device and inode (which links share) and, with `compare_bytes`, by their content: by size,
    then by their end, and only files that agree in both are read whole. Equal bytes under several classes of one split,
    such as an empty tile, are only warned about: nobody can learn a class from them.
    """
    if len(splits) < 2 or not is_first_process():
        return
    files = _Files(splits, root)
    positions: Sequence[int] = range(len(files.paths))
    status = files.map(_size_and_identity, positions)
    same = files.in_two_splits(positions, [identity for _, identity in status])
    files.refuse(same, "the same file", "")
    if not compare_bytes:
        return
    positions = [position for position in positions if status[position][0]]
    groups = files.in_two_splits(positions, [status[position][0] for position in positions])
    for digest in (_digest_of_end, _digest):
        positions = sorted(chain.from_iterable(groups))
        groups = files.in_two_splits(positions, files.map(digest, positions))
    clear = [group for group in groups if not files.under_several_classes(group)]
    files.refuse(clear, "the same bytes", ", or set data.check_duplicates=false to go on")
    if groups:
        _logger.warning(
            "%d images are in two splits and under several classes of one, so that nothing can be learned from them: "
            "%s, ... have the same bytes.",
            sum(map(len, groups)),
            ", ".join(map(files.name, groups[0][:_NAMED])),
        )


class _Files:
    """The files of all splits in one list, to which all positions refer; `root` shortens paths in messages."""

    def __init__(self, splits: Mapping[str, FileSplit], root: str) -> None:
        self.paths = [path for files in splits.values() for path in files.paths]
        self.labels = [label for files in splits.values() for label in np.asarray(files.labels).tolist()]
        self.split_of = [index for index, files in enumerate(splits.values()) for _ in files.paths]
        self.root = root

    def name(self, position: int) -> str:
        return repr(os.path.relpath(self.paths[position], self.root))

    def map(self, function: Callable[[str], Any], positions: Sequence[int]) -> list[Any]:
        """Call a function on some of the paths, in threads: storage that answers slowly answers many at a time."""
        chunks = [positions[start : start + _CHUNK] for start in range(0, len(positions), _CHUNK)]

        def work(chunk: Sequence[int]) -> list[Any]:
            return [function(self.paths[position]) for position in chunk]

        try:
            with ThreadPoolExecutor(8) as pool:
                return list(chain.from_iterable(pool.map(work, chunks)))
        except OSError as error:
            raise ValueError(f"The image {error.filename!r} cannot be read: {error.strerror or error}.") from error

    def in_two_splits(self, positions: Sequence[int], keys: Sequence[Hashable]) -> list[list[int]]:
        """Return the positions of each key that is found in at least two splits."""
        first: dict[Hashable, int] = {}
        shared: set[Hashable] = set()
        for position, key in zip(positions, keys, strict=True):
            split = self.split_of[position]
            if first.setdefault(key, split) != split:
                shared.add(key)
        groups: dict[Hashable, list[int]] = {}
        for position, key in zip(positions, keys, strict=True):
            if key in shared:
                groups.setdefault(key, []).append(position)
        return list(groups.values())

    def under_several_classes(self, group: list[int]) -> bool:
        """Whether a split holds these files under different classes."""
        held = {(self.split_of[position], self.labels[position]) for position in group}
        return len(held) > len({split for split, _ in held})

    def refuse(self, groups: list[list[int]], what: str, advice: str) -> None:
        """Raise if there is a group, and name two files of each of the first ones."""
        if not groups:
            return
        pairs = []
        for group in groups[:_NAMED]:
            other = next(position for position in group if self.split_of[position] != self.split_of[group[0]])
            pairs.append(f"{self.name(group[0])} and {self.name(other)}")
        raise ValueError(
            f"{len(groups)} image(s) are in two splits, {what}: {'; '.join(pairs)}"
            f"{'; ...' if len(groups) > len(pairs) else ''}. What is evaluated on must not be trained on: leave each "
            f"image in one split{advice}."
        )


def _size_and_identity(path: str) -> tuple[int, tuple[int, int]]:
    status = os.stat(path)
    return status.st_size, (status.st_ino, status.st_dev)


def _digest_of_end(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        return hashlib.blake2b(file.read(_TAIL), digest_size=8, key=str(size).encode()).digest()


def _digest(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)).digest()

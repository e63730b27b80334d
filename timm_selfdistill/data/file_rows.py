"""Rows of images that stay in their files, and the check that no image is in two splits."""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import datasets
import numpy as np
import pyarrow as pa

from timm_selfdistill.compat import dataset_of_table
from timm_selfdistill.data.names import Indices, is_first_process
from timm_selfdistill.recipe import DataSection

_logger = logging.getLogger(__name__)

_ROWS_OF_CHUNK: Final = 100_000
_SHARDS_OF_STREAM: Final = 1024
# Of files of one size, this many of the last bytes are compared before whole files are.
_TAIL: Final = 4096
_CHUNK: Final = 512
_NAMED: Final = 3


@dataclass(frozen=True)
class Splits:
    """What a source of data gives: the rows of each split, and how they were read.

    Args:
        rows: Split name -> `datasets.Dataset` or, for streaming, `datasets.IterableDataset`.
        notes: What the line that is logged before training adds.
    """

    rows: Mapping[str, Any]
    notes: Sequence[str] = ()


@dataclass(frozen=True, eq=False)
class FileSplit:
    """The image files of a split.

    Args:
        paths: Their paths [N].
        labels: Their labels [N].
    """

    paths: Sequence[str]
    labels: Indices | pa.ChunkedArray


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
    """Return rows of image files.

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
    return dataset_of_table(pa.concat_tables(tables), features)


def check_no_shared_images(splits: Mapping[str, FileSplit], root: str, *, compare_bytes: bool) -> None:
    """Refuse files that are in two splits; only the first process looks.

    Files are compared by device and inode (which links share) and by their bytes: by size, then by their end, and only
    files that agree in both are read whole. Equal bytes that stand under several classes of one split, such as an
    empty tile, are only warned about: nobody can learn a class from them.

    Args:
        splits: The splits by name.
        root: What paths in messages are relative to.
        compare_bytes: Whether to look for equal bytes in different files, too.

    Raises:
        ValueError: If an image is in two splits, or a file cannot be read.
    """
    if len(splits) < 2 or not is_first_process():
        return
    files = _Files(splits, root)
    everything = np.arange(len(files.paths))
    # Inodes and devices use all 64 bits on some file systems.
    status = np.array(files.map(_status, everything), np.uint64).reshape(-1, 3)
    sizes, inodes, devices = (np.unique(column, return_inverse=True)[1] for column in status.T)
    identity = inodes * (1 + devices.max(initial=0)) + devices
    same = files.in_two_splits(everything, identity)
    files.refuse(files.groups(same, identity[same]), "the same file", "")
    if not compare_bytes:
        return
    everything = everything[status[:, 0] > 0]
    equal = files.in_two_splits(everything, sizes[everything])
    keys: Indices = sizes
    for digest in (_digest_of_end, _digest):
        keys = np.array(files.map(digest, equal), np.int64)
        kept = files.in_two_splits(equal, keys)
        keys = keys[np.isin(equal, kept)]
        equal = kept
    groups = files.groups(equal, keys)
    files.refuse(
        [group for group in groups if not files.under_several_classes(group)],
        "the same bytes",
        ", or set data.check_duplicates=false to go on",
    )
    if groups:
        _logger.warning(
            "%d images are in two splits and under several classes of one, so that nothing can be learned from them: "
            "%s, ... have the same bytes.",
            sum(map(len, groups)),
            ", ".join(map(files.name, groups[0][:_NAMED])),
        )


class _Files:
    """The files of all splits in one list, to which all positions refer."""

    def __init__(self, splits: Mapping[str, FileSplit], root: str) -> None:
        self.paths = list(chain.from_iterable(files.paths for files in splits.values()))
        self.targets = np.concatenate([_codes(files.labels) for files in splits.values()])
        self.split_of = np.repeat(np.arange(len(splits)), [len(files.paths) for files in splits.values()])
        self.splits, self.root = len(splits), root

    def name(self, position: int) -> str:
        """Return a file's path as messages show it."""
        return repr(os.path.relpath(self.paths[position], self.root))

    def map(self, function: Callable[[str], Any], positions: Indices) -> list[Any]:
        """Call a function on some of the paths, in threads: storage that answers slowly answers many at a time."""
        chunks = [positions[start : start + _CHUNK].tolist() for start in range(0, len(positions), _CHUNK)]

        def work(chunk: list[int]) -> list[Any]:
            return [function(self.paths[index]) for index in chunk]

        try:
            with ThreadPoolExecutor(8) as pool:
                return list(chain.from_iterable(pool.map(work, chunks)))
        except OSError as error:
            raise ValueError(f"The image {error.filename!r} cannot be read: {error.strerror or error}.") from error

    def in_two_splits(self, positions: Indices, keys: Indices) -> Indices:
        """Return the positions whose key is found in at least two splits."""
        found, inverse = np.unique(keys, return_inverse=True)
        pairs = np.unique(inverse * self.splits + self.split_of[positions]) // self.splits
        result: Indices = positions[np.bincount(pairs, minlength=len(found))[inverse] > 1]
        return result

    def groups(self, positions: Indices, keys: Indices) -> list[list[int]]:
        """Return the positions that share a key, in their order."""
        groups: dict[int, list[int]] = {}
        for position, key in zip(positions.tolist(), keys.tolist(), strict=True):
            groups.setdefault(key, []).append(position)
        return list(groups.values())

    def under_several_classes(self, group: list[int]) -> bool:
        """Whether a split holds these files under different classes."""
        held = {(self.split_of[index], self.targets[index]) for index in group}
        return len(held) > len({split for split, _ in held})

    def refuse(self, groups: list[list[int]], what: str, advice: str) -> None:
        """Raise if there is a group, and name two files of each of the first ones."""
        if not groups:
            return
        pairs = []
        for group in groups[:_NAMED]:
            other = next(index for index in group if self.split_of[index] != self.split_of[group[0]])
            pairs.append(f"{self.name(group[0])} and {self.name(other)}")
        raise ValueError(
            f"{len(groups)} image(s) are in two splits, {what}: {'; '.join(pairs)}"
            f"{'; ...' if len(groups) > len(pairs) else ''}. What is evaluated on must not be trained on: leave each "
            f"image in one split{advice}."
        )


def _codes(labels: Indices | pa.ChunkedArray) -> Indices:
    """Return a number for each label, -1 for none."""
    if isinstance(labels, np.ndarray):
        return labels
    return np.asarray(labels.combine_chunks().dictionary_encode().indices.fill_null(-1))


def _status(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_size, status.st_ino, status.st_dev


def _digest_of_end(path: str) -> int:
    with open(path, "rb", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _TAIL))
        return _as_int(hashlib.blake2b(file.read(_TAIL), digest_size=8, key=str(size).encode()))


def _digest(path: str) -> int:
    with open(path, "rb") as file:
        return _as_int(hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8)))


def _as_int(digest: Any) -> int:
    return int.from_bytes(digest.digest(), signed=True)

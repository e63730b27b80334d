"""Refuse images that are in two splits: the same file, or the same bytes."""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

_logger = logging.getLogger(__name__)

# Of files of one size, so many of the last bytes are compared before whole files are.
_TAIL: Final = 4096
_CHUNK: Final = 512
_NAMED: Final = 3

Integers = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class SplitFiles:
    """The image files of a split.

    Args:
        paths: Their paths [N].
        targets: Their class indices [N].
    """

    paths: Sequence[str]
    targets: Integers


def check_no_shared_images(splits: Mapping[str, SplitFiles], root: str, *, compare_bytes: bool) -> None:
    """Refuse files that are in two splits.

    Files are compared by device and inode (which links share) and by their bytes: by size, then by their end, and only
    files that agree in both are read whole. Equal bytes that stand under several classes of one split, such as an
    empty tile, are warned about only: they tell nobody the class.

    Args:
        splits: The splits by name.
        root: What paths in messages are relative to.
        compare_bytes: Whether to look for equal bytes in different files, too.

    Raises:
        ValueError: If an image is in two splits, or a file cannot be read.
    """
    files = _Files(splits)
    everything = np.arange(len(files.paths))
    # Inodes and devices use all 64 bits on some file systems.
    status = np.array(files.map(_status, everything), np.uint64).reshape(-1, 3)
    sizes, inodes, devices = (np.unique(column, return_inverse=True)[1] for column in status.T)
    identity = inodes * (1 + devices.max(initial=0)) + devices
    same = files.in_two_splits(everything, identity)
    files.refuse(root, files.groups(same, identity[same]), "the same file")
    if not compare_bytes:
        return
    everything = everything[status[:, 0] > 0]
    equal = files.in_two_splits(everything, sizes[everything])
    keys: Integers = sizes
    for digest in (_digest_of_end, _digest):
        keys = np.array(files.map(digest, equal), np.int64)
        kept = files.in_two_splits(equal, keys)
        keys = keys[np.isin(equal, kept)]
        equal = kept
    groups = files.groups(equal, keys)
    files.refuse(root, [group for group in groups if not files.under_several_classes(group)], "the same bytes")
    if groups:
        example = ", ".join(repr(os.path.relpath(files.paths[index], root)) for index in groups[0][:_NAMED])
        _logger.warning(
            "%d images are in two splits and under several classes of one, so that nothing can be learned from them: "
            "%s, ... have the same bytes.",
            sum(map(len, groups)),
            example,
        )


class _Files:
    """The files of all splits in one list, to which all positions refer."""

    def __init__(self, splits: Mapping[str, SplitFiles]) -> None:
        self.paths = list(chain.from_iterable(files.paths for files in splits.values()))
        self.targets = np.concatenate([files.targets for files in splits.values()])
        self.split_of = np.repeat(np.arange(len(splits)), [len(files.paths) for files in splits.values()])
        self.names = list(splits)

    def map(self, function: Callable[[str], Any], positions: Integers) -> list[Any]:
        """Call a function on some of the paths, in threads: storage that answers slowly answers many at a time."""
        chunks = [positions[start : start + _CHUNK].tolist() for start in range(0, len(positions), _CHUNK)]

        def work(chunk: list[int]) -> list[Any]:
            return [function(self.paths[index]) for index in chunk]

        try:
            with ThreadPoolExecutor(8) as pool:
                return list(chain.from_iterable(pool.map(work, chunks)))
        except OSError as error:
            raise ValueError(f"The image {error.filename!r} cannot be read: {error.strerror or error}.") from error

    def in_two_splits(self, positions: Integers, keys: Integers) -> Integers:
        """Return the positions whose key is found in at least two splits."""
        found, inverse = np.unique(keys, return_inverse=True)
        pairs = np.unique(inverse * len(self.names) + self.split_of[positions]) // len(self.names)
        result: Integers = positions[np.bincount(pairs, minlength=len(found))[inverse] > 1]
        return result

    def groups(self, positions: Integers, keys: Integers) -> list[list[int]]:
        """Return the positions that share a key, in their order."""
        groups: dict[int, list[int]] = {}
        for position, key in zip(positions.tolist(), keys.tolist(), strict=True):
            groups.setdefault(key, []).append(position)
        return list(groups.values())

    def under_several_classes(self, group: list[int]) -> bool:
        """Whether a split holds these files under different classes."""
        held = {(self.split_of[index], self.targets[index]) for index in group}
        return len(held) > len({split for split, _ in held})

    def refuse(self, root: str, groups: list[list[int]], what: str) -> None:
        """Raise if there is a group, and name two files of each of the first ones."""
        if not groups:
            return
        pairs = []
        for group in groups[:_NAMED]:
            other = next(index for index in group if self.split_of[index] != self.split_of[group[0]])
            one, two = (repr(os.path.relpath(self.paths[index], root)) for index in (group[0], other))
            pairs.append(f"{one} and {two}")
        advice = "" if what == "the same file" else ", or set data.check_duplicates=false to go on"
        raise ValueError(
            f"{len(groups)} image(s) are in two splits, {what}: {'; '.join(pairs)}"
            f"{'; ...' if len(groups) > len(pairs) else ''}. What is evaluated on must not be trained on: leave each "
            f"image in one split{advice}."
        )


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

"""Data sets of image files that a table names: which tables are the splits, which files their rows, all checked."""

import logging
import os
from collections.abc import Mapping, Sequence
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any, Final

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from timm_selfdistill.data.duplicates import SplitFiles, check_no_shared_images
from timm_selfdistill.data.first_process import is_first_process, warn_first
from timm_selfdistill.data.named_files import files_by_split, split_of_file
from timm_selfdistill.data.path_rows import as_stream, path_rows
from timm_selfdistill.data.split_names import find_split, split_name, used_splits
from timm_selfdistill.data.table_files import (
    TABLE_ENDINGS,
    Table,
    column_names,
    has_text_column,
    read_table,
    with_common_labels,
)
from timm_selfdistill.recipe import DataSection

_logger = logging.getLogger(__name__)

# Not .json: beside images, it is rather an annotation of another kind, and large.
_ENDINGS_IN_FOLDER: Final = tuple(ending for ending in TABLE_ENDINGS if ending != ".json")
# What `data.split_column` is by default; a table need not have it.
_SPLIT_COLUMN: Final = "split"


def load_tables(path: Path, section: DataSection) -> dict[str, Any] | None:
    """Read a data set whose images are files that a table names, or return None if `data.path` is something else.

    It is such a data set if it is a CSV, TSV or JSON lines file or a glob of them, a parquet file or a glob of them in
    which `data.image` holds strings, or a folder in which tables with the columns of the recipe are called by splits
    (`train.csv`, `test.csv`). A path in the table is relative to `data.root`, by default the table's folder.

    Args:
        path: `data.path` as a path.
        section: The recipe's `data`.

    Returns:
        Split name -> rows with the columns of the recipe.

    Raises:
        ValueError: If a table cannot be read, lacks a column, or names files that are not there.
    """
    files = _table_files(path, section)
    if files is None:
        if section.root is not None:
            raise ValueError(
                f"data.root {section.root!r} is where the images of a table are, but data.path {section.path!r} is no "
                "table of paths."
            )
        return None
    columns = {"path": section.image, "label": section.target}
    found = {
        split: [_read_with_split(file, columns, section) for file in of_split] for split, of_split in files.items()
    }
    if list(found) == ["train"]:
        found = by_split_column(found["train"])
    for name, tables in found.items():
        for table in tables:
            if "split" in table.rows.column_names and set(map(split_name, _values(table, "split"))) != {name}:
                raise ValueError(
                    f"{table.file} is the split {name!r} by its name, but its column {section.split_column!r} names "
                    f"{', '.join(_values(table, 'split'))}: give one file, or set data.split_column to null."
                )
    root = None if section.root is None else Path(section.root).expanduser()
    if root is not None and not root.is_dir():
        raise ValueError(f"data.root {section.root!r} is no folder.")
    return rows_of_splits(found, section, root)


def describes_images(file: Path, image: str, target: str) -> bool:
    """Whether a table has both columns, and not the images themselves."""
    try:
        names = column_names(file)
        if file.suffix.lower() == ".parquet" and not has_text_column(file, image):
            return False
    except ValueError as error:
        warn_first(_logger, "Left out: %s", error)
        return False
    if image not in names:
        return False
    if target not in names:
        warn_first(
            _logger,
            "%s is not read: it has no column %r, which data.target names, but %s.",
            file,
            target,
            ", ".join(names),
        )
    return target in names


def by_split_column(tables: Sequence[Table]) -> dict[str, list[Table]]:
    """Divide tables by their split column; without one, all is "train"."""
    found: dict[str, list[Table]] = {}
    for table in tables:
        if "split" not in table.rows.column_names:
            found.setdefault("train", []).append(table)
            continue
        for name in _values(table, "split"):
            rows = table.rows.filter(pc.equal(table.rows["split"], name))
            found.setdefault(split_name(name), []).append(Table(table.file, rows, table.label))
    return found


def rows_of_splits(found: Mapping[str, Sequence[Table]], section: DataSection, root: Path | None) -> dict[str, Any]:
    """Return the rows of every split, those that are used with all their files there."""
    used = {find_split(name, found) for name in used_splits(section).values()}
    tables = iter(with_common_labels([table for of_split in found.values() for table in of_split]))
    splits: dict[str, Any] = {}
    files: dict[str, SplitFiles] = {}
    for name, of_split in found.items():
        parts = []
        for table in (next(tables) for _ in of_split):
            folder = os.path.abspath(root or table.file.parent)
            given = table.rows["path"].to_pylist()
            paths = [os.path.join(folder, path) for path in given]
            if name in used:
                _check_files(paths, given, table.file, folder)
            parts.append((paths, table.rows["label"], table.label))
        splits[name] = _rows(name, parts, section)
        if name in used:
            labels = pa.chunked_array([chunk for part in parts for chunk in part[1].chunks], parts[0][1].type)
            codes = labels.combine_chunks().dictionary_encode().indices.fill_null(-1)
            files[name] = SplitFiles(list(chain.from_iterable(paths for paths, *_ in parts)), np.asarray(codes))
    if len(files) > 1 and is_first_process():
        folder = os.path.abspath(root or next(iter(found.values()))[0].file.parent)
        check_no_shared_images(files, folder, compare_bytes=section.check_duplicates)
    return splits


def _table_files(path: Path, section: DataSection) -> dict[str, list[Path]] | None:
    """Return the table files of each split; None if the data set is no table of paths."""
    if path.is_dir():
        files = [
            file
            for file in (path / name for name in sorted(os.listdir(path)) if name.lower().endswith(_ENDINGS_IN_FOLDER))
            if file.is_file() and split_of_file(file, section) and describes_images(file, section.image, section.target)
        ]
        if not files:
            return None
        if len(files) == 1:
            return {str(split_of_file(files[0], section)): files}
        return files_by_split(files, section)
    files = [path] if path.is_file() else [Path(file) for file in sorted(glob(str(path)))]
    if not files or not all(file.suffix.lower() in TABLE_ENDINGS and file.is_file() for file in files):
        return None
    if any(file.suffix.lower() == ".parquet" and not has_text_column(file, section.image) for file in files):
        return None
    return files_by_split(files, section)


def _read_with_split(file: Path, columns: Mapping[str, str], section: DataSection) -> Table:
    """Read a table, with the column that names splits if there is one."""
    name = section.split_column
    if name is not None and (name != _SPLIT_COLUMN or name in column_names(file)):
        columns = {**columns, "split": name}
    return read_table(file, columns)


def _values(table: Table, column: str) -> list[str]:
    values: list[str] = pc.unique(table.rows[column]).to_pylist()
    return values


def _check_files(paths: Sequence[str], given: Sequence[str], table: Path, folder: str) -> None:
    """Refuse a table that names files which are not there; folders are listed, which is faster than asking for each."""
    listings: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        parent, _, name = path.rpartition(os.sep)
        if parent not in listings:
            listings[parent] = _files_in(parent or os.sep)
        if name not in listings[parent]:
            missing.append(path)
    if missing:
        what = "is no file" if os.path.exists(missing[0]) else "is not there"
        raise ValueError(
            f"{len(missing)} of the {len(paths)} images of {table} are missing; the first, {missing[0]}, {what}. Paths "
            f"are relative to {folder}; data.root names another folder."
        )
    climbing = [path for path in given if ".." in path and not os.path.isabs(path)]
    outside = [path for path in climbing if os.path.normpath(path).startswith("..")]
    if outside:
        warn_first(
            _logger,
            "%d of the %d paths of %s lead out of %s, the first is %s.",
            len(outside),
            len(given),
            table,
            folder,
            outside[0],
        )


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def _rows(name: str, parts: Sequence[tuple[list[str], pa.ChunkedArray, Any]], section: DataSection) -> Any:
    """Return the rows of a split: a table of paths, or a stream of it."""
    features = datasets.Features({section.image: datasets.Image(), section.target: parts[0][2]})
    rows = datasets.concatenate_datasets([path_rows(paths, labels, features) for paths, labels, _ in parts])
    return as_stream(name, rows) if section.streaming else rows

"""Data sets of image files that tables name: any CSV, JSON lines or parquet file, or `metadata.csv` of Hugging Face."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from timm_selfdistill.data.file_rows import FileSplit, Splits, check_no_shared_images, files_at, rows_of_files
from timm_selfdistill.data.names import (
    STANDARD_SPLITS,
    files_by_split,
    is_split,
    split_name,
    split_of_file,
    used_of,
    warn_first,
)
from timm_selfdistill.data.table_files import (
    TABLE_ENDINGS,
    Table,
    column_names,
    columns_of,
    ends_as_image,
    read_table,
    with_common_labels,
)
from timm_selfdistill.recipe import DataSection

_METADATA: Final = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Without .json: beside images that is rather an annotation of another kind, and large.
_ENDINGS_IN_FOLDER: Final = tuple(ending for ending in TABLE_ENDINGS if ending != ".json")


def load_tables(path: Path, section: DataSection) -> Splits | None:
    """Read a data set whose images are files that a table names.

    It is a CSV, TSV or JSON lines file; a parquet file in which `data.image` holds strings; a glob of either; or a
    folder in which tables with the columns of the recipe have the names of splits (`train.csv`, `test.csv`).
    Paths are relative to `data.root`, by default the table's folder.
    """
    files = _table_files(path, section)
    if files is None:
        if section.root is not None:
            raise ValueError(
                f"data.root {section.root!r} is where the images of a table are, but data.path {section.path!r} is not "
                "a table of paths."
            )
        return None
    parts: list[tuple[str, Table]] = []
    for name, of_split in files.items():
        for file in of_split:
            columns = columns_of(file, section)
            # A table need not have a column that is called as `data.split_column` is by default.
            if section.split_column is not None and (section.split_column != "split" or "split" in column_names(file)):
                columns["split"] = section.split_column
            table = read_table(file, columns)
            own = _by_split_column(table) if "split" in columns else [(name, table)]
            if list(files) != ["train"] and (named := dict(own)).keys() != {name}:
                raise ValueError(
                    f"{file} is the split {name!r} by its name, but its column {section.split_column!r} names "
                    f"{', '.join(named)}: give one file, or set data.split_column to null."
                )
            parts += own
    root = None if section.root is None else Path(section.root).expanduser()
    if root is not None and not root.is_dir():
        raise ValueError(f"data.root {section.root!r} is not a folder.")
    return _splits_of_tables(parts, section, root)


def load_metadata(path: Path, section: DataSection) -> Splits | None:
    """Read a folder whose images are described by `metadata.csv`, `.jsonl` or `.parquet`, as Hugging Face does.

    The file stands in the folder itself or in those of the splits; its column `file_name` (for another `data.image`
    NAME, `NAME_file_name`) holds paths relative to it. One without that column or `data.target` is left alone.
    """
    if not path.is_dir():
        return None
    image = "file_name" if section.image in ("image", "file_name") else f"{section.image}_file_name"
    columns = {"path": image, "label": section.target}  # nothing is guessed: metadata may well be without classes
    files = [file for file in metadata_files(path) if _describes_images(file, section, columns)]
    folders = [file.parent for file in files]
    if not files:
        return None
    if len(set(folders)) < len(folders) or (path in folders and len(folders) > 1):
        raise ValueError(
            f"{path} has several metadata files where one is allowed: {', '.join(map(str, files))}. Leave one of a "
            "folder, either at the top or in each split."
        )
    tables = [read_table(file, columns) for file in files]
    for table in tables:
        outside = pc.match_substring_regex(table.rows["path"], r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|://")
        if (row := pc.index(outside, True).as_py()) >= 0:
            raise ValueError(
                f"{table.file}, row {row}: {image!r} is {table.rows['path'][row].as_py()!r}, but it has to be relative "
                "to the file and must not leave its folder."
            )
    parts = [("train", table) for table in tables]
    if path in folders:
        # The first folder of each path is its split, if every image is in the folder of one.
        first = pc.list_element(pc.split_pattern(tables[0].rows["path"], "/", max_splits=1), 0)
        if set(map(split_name, pc.unique(first).to_pylist())) <= set(STANDARD_SPLITS.values()):
            parts = _by_split_column(tables[0]._replace(rows=tables[0].rows.append_column("split", first)))
    elif any(is_split(folder.name, section) for folder in folders):
        parts = []
        for folder, table in zip(folders, tables, strict=True):
            if is_split(folder.name, section):
                parts.append((split_name(folder.name), table))
            else:
                warn_first("%s is not read: its folder is called like no split.", table.file)
    splits = _splits_of_tables(parts, section, None)
    _warn_of_unnamed(tables)
    return splits


def metadata_files(folder: Path) -> list[Path]:
    """Return the files with metadata in a folder and in those directly in it, whatever they hold."""
    with os.scandir(folder) as entries:
        folders = [folder, *sorted(Path(entry.path) for entry in entries if entry.is_dir())]
    return [each / name for each in folders for name in _METADATA if (each / name).is_file()]


def _table_files(path: Path, section: DataSection) -> dict[str, list[Path]] | None:
    """Return the table files of each split; None if the data set is not a table of paths."""
    if path.is_dir():
        named = (path / name for name in sorted(os.listdir(path)) if name.lower().endswith(_ENDINGS_IN_FOLDER))
        files = [
            file
            for file in named
            if file.is_file() and split_of_file(file, section) and _describes_images(file, section)
        ]
        if len(files) == 1:
            return {str(split_of_file(files[0], section)): files}
        return files_by_split(files, section) if files else None
    files = files_at(path)
    if not files or not all(file.suffix.lower() in TABLE_ENDINGS and file.is_file() for file in files):
        return None
    tables_of_images = [file for file in files if file.suffix.lower() == ".parquet"]
    if any(columns_of(file, section)["path"] not in column_names(file, of_paths=True) for file in tables_of_images):
        return None
    return files_by_split(files, section)


def _describes_images(file: Path, section: DataSection, columns: Mapping[str, str] | None = None) -> bool:
    """Whether a table has both columns, those given or the recipe's, and not the images themselves."""
    try:
        names, paths = column_names(file), column_names(file, of_paths=True)
        columns = columns or columns_of(file, section)
    except ValueError as error:
        warn_first("Left out: %s", error)
        return False
    if columns["path"] not in paths:
        return False
    if columns["label"] not in names:
        message = "%s is not read: it has no column %r, which data.target names, but %s."
        warn_first(message, file, section.target, ", ".join(names))
    return columns["label"] in names


def _by_split_column(table: Table) -> list[tuple[str, Table]]:
    """Return the part of each split that a table's column names."""
    found = []
    for name in pc.unique(table.rows["split"]).to_pylist():
        rows = table.rows.filter(pc.equal(table.rows["split"], name))
        found.append((split_name(name), table._replace(rows=rows)))
    return found or [("train", table)]


def _splits_of_tables(parts: Sequence[tuple[str, Table]], section: DataSection, root: Path | None) -> Splits:
    """Return the rows of every split, after a look for the files of those that are used."""
    names = [name for name, _ in parts]
    used = used_of(names, section)
    tables = with_common_labels([table for _, table in parts])
    paths: dict[str, list[str]] = {}
    labels: dict[str, list[pa.Array]] = {}
    for name, table in zip(names, tables, strict=True):
        folder = os.path.abspath(root or table.file.parent)
        given = table.rows["path"].to_pylist()
        of_table = [os.path.join(folder, path) for path in given]
        if name in used:
            _check_files(of_table, given, table.file, folder)
        paths.setdefault(name, []).extend(of_table)
        labels.setdefault(name, []).extend(table.rows["label"].chunks)
    kind = tables[0].rows["label"].type
    splits = {name: FileSplit(paths[name], pa.chunked_array(labels[name], kind)) for name in paths}
    checked = {name: files for name, files in splits.items() if name in used}
    top = os.path.abspath(root or tables[0].file.parent)
    check_no_shared_images(checked, top, compare_bytes=section.check_duplicates)
    features = datasets.Features({section.image: datasets.Image(), section.target: tables[0].label})
    return Splits(rows_of_files(splits, features, section))


def _check_files(paths: Sequence[str], given: Sequence[str], table: Path, folder: str) -> None:
    """Refuse a table that names missing files; folders are listed, which is faster than a call for each file."""
    listings: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        parent, _, name = path.rpartition(os.sep)
        if parent not in listings:
            listings[parent] = _files_in(parent or os.sep)
        if name not in listings[parent]:
            missing.append(path)
    if missing:
        what = "is not a file" if os.path.exists(missing[0]) else "is not there"
        raise ValueError(
            f"{len(missing)} of the {len(paths)} images of {table} are missing; the first, {missing[0]}, {what}. Paths "
            f"are relative to {folder}; data.root names another folder."
        )
    climbing = [path for path in given if ".." in path and not os.path.isabs(path)]
    if outside := [path for path in climbing if os.path.normpath(path).startswith("..")]:
        message = "%d of the %d paths of %s lead out of %s, the first is %s."
        warn_first(message, len(outside), len(given), table, folder, outside[0])


def _files_in(folder: str) -> set[str]:
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def _warn_of_unnamed(tables: Sequence[Table]) -> None:
    """Tell of images that stand beside those that the metadata names: they are not read."""
    for table in tables:
        named: dict[str, set[str]] = {}
        for path in table.rows["path"].to_pylist():
            folder, name = os.path.split(path)
            named.setdefault(os.path.normpath(table.file.parent / folder), set()).add(name)
        unnamed = [
            os.path.join(folder, name)
            for folder, names in named.items()
            for name in sorted(_files_in(folder) - names)  # of a split that is not used, the folder need not be there
            if ends_as_image(name)
        ]
        if unnamed:
            message = "%d images are not read because %s does not name them; the first is %s."
            warn_first(message, len(unnamed), table.file, unnamed[0])

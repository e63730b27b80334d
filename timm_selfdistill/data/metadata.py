"""Folders of images that `metadata.csv`, `.jsonl` or `.parquet` describe, as Hugging Face documents them."""

import logging
import mimetypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from timm_selfdistill.data.first_process import warn_first
from timm_selfdistill.data.split_names import STANDARD_SPLITS, split_name, used_splits
from timm_selfdistill.data.table_files import Table, read_table
from timm_selfdistill.data.tables import by_split_column, describes_images, rows_of_splits
from timm_selfdistill.recipe import DataSection

_logger = logging.getLogger(__name__)

_METADATA: Final = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def load_metadata(path: Path, section: DataSection) -> dict[str, Any] | None:
    """Read a folder whose images are described by `metadata.csv`, `.jsonl` or `.parquet`, as Hugging Face does.

    The file stands in the folder itself or in those of the splits; its column `file_name` (for another `data.image`
    NAME, `NAME_file_name`) holds paths relative to it. One without that column or `data.target` is left alone.

    Args:
        path: `data.path` as a path.
        section: The recipe's `data`.

    Returns:
        Split name -> rows with the columns of the recipe; None if there is no such file.

    Raises:
        ValueError: If such a file cannot be read, or names files that are outside its folder or not there.
    """
    if not path.is_dir():
        return None
    image = "file_name" if section.image in ("image", "file_name") else f"{section.image}_file_name"
    files = [file for file in metadata_files(path) if describes_images(file, image, section.target)]
    folders = [file.parent for file in files]
    if not files:
        return None
    if len(set(folders)) < len(folders) or (path in folders and len(folders) > 1):
        raise ValueError(
            f"{path} has several metadata files where one is allowed: {', '.join(map(str, files))}. Leave one of a "
            "folder, either at the top or in each split."
        )
    tables = [read_table(file, {"path": image, "label": section.target}) for file in files]
    for table in tables:
        outside = pc.match_substring_regex(table.rows["path"], r"(^|[/\\])\.\.([/\\]|$)|^[/\\]|://")
        if (row := pc.index(outside, True).as_py()) >= 0:
            raise ValueError(
                f"{table.file}, row {row}: {image!r} is {table.rows['path'][row].as_py()!r}, but it has to be relative "
                "to the file and must not leave its folder."
            )
    found: dict[str, list[Table]] = {}
    if path in folders:
        # A folder of a split, if every image is in one.
        first = pc.list_element(pc.split_pattern(tables[0].rows["path"], "/", max_splits=1), 0)
        if all(split_name(name) in STANDARD_SPLITS.values() for name in pc.unique(first).to_pylist()):
            splits = pa.array([split_name(name) for name in first.to_pylist()])
            tables = [Table(tables[0].file, tables[0].rows.append_column("split", splits), tables[0].label)]
        found = by_split_column(tables)
    else:
        named = {*STANDARD_SPLITS.values(), *map(split_name, used_splits(section).values())}
        names = [split_name(table.file.parent.name) for table in tables]
        some = not named.isdisjoint(names)
        for name, table in zip(names, tables, strict=True):
            if some and name not in named:
                warn_first(_logger, "%s is not read: its folder is called like no split.", table.file)
            else:
                found.setdefault(name if some else "train", []).append(table)
    splits = rows_of_splits(found, section, None)
    _warn_of_unnamed(tables)
    return splits


def metadata_files(folder: Path) -> list[Path]:
    """Return the files with metadata in a folder and in those directly in it, whatever they hold."""
    with os.scandir(folder) as entries:
        folders = [folder, *sorted(Path(entry.path) for entry in entries if entry.is_dir())]
    return [each / name for each in folders for name in _METADATA if (each / name).is_file()]


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
            if os.path.isdir(folder)  # of a split that is not used, it need not be there
            for name in sorted(os.listdir(folder))
            if name not in names and (mimetypes.guess_type(name)[0] or "").startswith("image/")
        ]
        if unnamed:
            warn_first(
                _logger,
                "%d images are not read because %s does not name them; the first is %s.",
                len(unnamed),
                table.file,
                unnamed[0],
            )

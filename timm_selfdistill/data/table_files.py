"""Read a table file that names images and their classes: CSV, JSON lines or parquet, with text left as it is."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet, types

from timm_selfdistill.data.decode import image_endings
from timm_selfdistill.data.names import is_text, only_or_given
from timm_selfdistill.recipe import DataSection

_TABS: Final = (".tsv", ".tab")
_TEXT: Final = (".csv", *_TABS)
_JSON: Final = (".jsonl", ".ndjson", ".json")
TABLE_ENDINGS: Final = (*_TEXT, *_JSON, ".parquet")

# Not 01 or 1.0, which are names.
_INTEGERS = r"^(0|-?[1-9][0-9]{0,17})$"
_FIRST_ROWS: Final = 100
_KEYS = {"path": "data.image", "label": "data.target", "split": "data.split_column"}


class Table(NamedTuple):
    """The columns of a table file that are of use: "path" (strings), "label" and, if it was read, "split" (strings)."""

    file: Path
    rows: pa.Table  # labels as they are stored; strings from CSV
    label: Any  # the type of the labels, as `datasets` calls it


def column_names(file: Path, *, of_paths: bool = False) -> list[str]:
    """Return the names of a table's columns; with `of_paths`, those of a parquet file that hold strings."""
    try:
        if _is_untyped(file):
            with csv.open_csv(file, parse_options=_parse_options(file)) as reader:
                return list(reader.schema.names)
        if file.suffix.lower() in _JSON:
            return list(dict.fromkeys(key for row in _json_rows(file) for key in row))
        return [field.name for field in parquet.read_schema(file) if not of_paths or is_text(field.type)]
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise _unreadable(file, error) from error


def columns_of(file: Path, section: DataSection) -> dict[str, str]:
    """Return what the columns "path" and "label" are called in a table.

    They are those of the recipe; where it leaves them open, the only column of image files, and the only other one
    beside that of the split.
    """
    names = column_names(file)
    paths = _columns_of_image_files(file) if section.image not in names else []
    image = only_or_given("image", section, names, paths)
    # pandas writes an index without a name.
    others = [name for name in names if name not in ("", image, section.split_column)]
    return {"path": image, "label": only_or_given("target", section, names, others)}


def read_table(file: Path, columns: Mapping[str, str]) -> Table:
    """Read a table's columns "path", "label" and, if `columns` tells what it is called in the file, "split".

    Raises:
        ValueError: If the file cannot be read, has no such column, or a row names no image or no split.
    """
    names = column_names(file)
    for use, column in columns.items():
        if names.count(column) != 1:
            what = "has no such column" if column not in names else "has several of that name"
            separator = "tabs" if file.suffix.lower() in _TABS else "commas"
            hint = f", as read with {separator} between them" if _is_untyped(file) else ""
            raise ValueError(f"{_KEYS[use]} is {column!r}, but {file} {what}; it has {', '.join(names)}{hint}.")
    try:
        stored = _read(file, list(columns.values()))
        label = datasets.Features.from_arrow_schema(stored.schema)[columns["label"]]
        found = {use: stored[column] for use, column in columns.items()}
        for use, values in found.items():
            if types.is_dictionary(values.type) or types.is_large_string(values.type):  # strings, stored in another way
                found[use] = values.cast(pa.string())
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise _unreadable(file, error) from error
    for use in columns.keys() & {"path", "split"}:
        if not is_text(found[use].type):
            raise ValueError(f"Column {columns[use]!r} of {file} holds {found[use].type}, not strings.")
        empty = pc.or_kleene(pc.is_null(found[use]), pc.equal(found[use], ""))
        if (row := pc.index(empty, True).as_py()) >= 0:
            raise ValueError(f"{file}, row {row}: {columns[use]!r} is empty.")
    if is_text(found["label"].type):
        # One name may be written with composed and with decomposed characters.
        normal = pc.utf8_normalize(found["label"], "NFC")
        found["label"] = pc.if_else(pc.equal(normal, ""), None, normal)
        label = datasets.Value("string")
    return Table(file, pa.table(found), label)


def with_common_labels(tables: Sequence[Table]) -> list[Table]:
    """Return tables whose labels have one type: CSV holds integers if every label of every table is one."""
    if all(_is_untyped(table.file) and _holds_integers(table.rows["label"]) for table in tables):
        found = []
        for file, rows, _ in tables:
            integers = rows["label"].cast(pa.int64())
            found.append(
                Table(file, rows.drop_columns("label").append_column("label", integers), datasets.Value("int64"))
            )
        return found
    for table in tables[1:]:
        if table.label != tables[0].label:
            raise ValueError(
                f"{tables[0].file} and {table.file} hold labels of two kinds, {tables[0].label} and {table.label}: "
                "write them alike."
            )
    return list(tables)


def _holds_integers(labels: pa.ChunkedArray) -> bool:
    return bool(pc.all(pc.match_substring_regex(labels, _INTEGERS), min_count=0).as_py())


def _columns_of_image_files(file: Path) -> list[str]:
    """Return the columns of which the first rows all end as image files do."""
    names = list(dict.fromkeys(column_names(file, of_paths=True)))
    try:
        if file.suffix.lower() == ".parquet":
            with parquet.ParquetFile(file) as stored:
                batch = next(stored.iter_batches(_FIRST_ROWS, columns=names), None)
            rows = [] if batch is None else batch.to_pylist()
        elif _is_untyped(file):
            rows = _read(file, names).slice(0, _FIRST_ROWS).to_pylist()
        else:
            rows = _json_rows(file)[:_FIRST_ROWS]
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise _unreadable(file, error) from error
    return [name for name in names if rows and all(ends_as_image(row.get(name)) for row in rows)]


def ends_as_image(name: Any) -> bool:
    """Whether this is the name of an image file by its ending."""
    return isinstance(name, str) and Path(name).suffix.lower() in image_endings()


def _read(file: Path, columns: list[str]) -> pa.Table:
    if _is_untyped(file):
        # No type is guessed, so 01 stays 01 and NA stays NA.
        as_text = csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string()))
        return csv.read_csv(file, parse_options=_parse_options(file), convert_options=as_text)
    if file.suffix.lower() in _JSON:
        rows = _json_rows(file)
        return pa.table({column: pa.array([row.get(column) for row in rows]) for column in columns})
    return parquet.read_table(file, columns=columns)


def _parse_options(file: Path) -> csv.ParseOptions:
    return csv.ParseOptions(delimiter="\t" if file.suffix.lower() in _TABS else ",", newlines_in_values=True)


def _json_rows(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file that holds one a line, or a list of them."""
    rows: list[Any] = []
    text = file.read_text("utf-8-sig")
    if file.suffix.lower() == ".json" and text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number} is not JSON: {error}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is not a JSON object but {row!r}")
    if not rows:
        raise ValueError("it is empty")
    return rows


def _is_untyped(file: Path) -> bool:
    """Whether a file does not tell numbers from text itself."""
    return file.suffix.lower() in _TEXT


def _unreadable(file: Path, error: Exception) -> ValueError:
    hint = "" if file.suffix.lower() == ".parquet" else " Tables of text have to be UTF-8."
    return ValueError(f"The table {file} cannot be read: {str(error).rstrip('.') or repr(error)}.{hint}")

"""Read a table file that names images and their classes: CSV, JSON lines or parquet, with text left as it is."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, parquet, types

_TABS: Final = (".tsv", ".tab")
_TEXT: Final = (".csv", *_TABS)
_JSON: Final = (".jsonl", ".ndjson", ".json")
TABLE_ENDINGS: Final = (*_TEXT, *_JSON, ".parquet")

# Not 01 or 1.0, which are names.
_INTEGERS = r"^(0|-?[1-9][0-9]{0,17})$"


@dataclass(frozen=True, eq=False)
class Table:
    """The columns of a table file that are of use.

    Args:
        file: The file.
        rows: "path" (strings), "label" (as it is stored; strings from CSV) and, if asked for, "split" (strings).
        label: What `datasets` calls the type of the labels.
    """

    file: Path
    rows: pa.Table
    label: Any

    @property
    def is_text(self) -> bool:
        """Whether the file itself does not tell numbers from text."""
        return self.file.suffix.lower() in _TEXT


def column_names(file: Path) -> list[str]:
    """Return the names of a table's columns.

    Raises:
        ValueError: If it cannot be read.
    """
    ending = file.suffix.lower()
    try:
        if ending in _TEXT:
            with csv.open_csv(file, parse_options=_parse_options(file)) as reader:
                return list(reader.schema.names)
        if ending in _JSON:
            return list(dict.fromkeys(key for row in _json_rows(file) for key in row))
        return list(parquet.read_schema(file).names)
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors
        raise _unreadable(file, error) from error


def has_text_column(file: Path, column: str) -> bool:
    """Whether a parquet file has such a column, and it holds strings.

    Raises:
        ValueError: If it cannot be read.
    """
    try:
        schema = parquet.read_schema(file)
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error
    return column in schema.names and _is_string(schema.field(column).type)


def read_table(file: Path, columns: Mapping[str, str]) -> Table:
    """Read the columns "path" and "label" of a table and, if it is among them, "split".

    Args:
        file: The table.
        columns: What the columns are called in the file.

    Raises:
        ValueError: If the file cannot be read, has no such column, or a row names no image or no split.
    """
    names = column_names(file)
    for use, column in columns.items():
        if names.count(column) != 1:
            key = {"path": "data.image", "label": "data.target", "split": "data.split_column"}[use]
            what = "has no such column" if column not in names else "has several of that name"
            separator = {"\t": "tabs", ",": "commas"}[_parse_options(file).delimiter]
            hint = f", as read with {separator} between them" if file.suffix.lower() in _TEXT else ""
            raise ValueError(f"{key} is {column!r}, but {file} {what}; it has {', '.join(names)}{hint}.")
    try:
        found = _read(file, list(columns.values()))
        schema = found.schema.remove_metadata() if file.suffix.lower() in _TEXT else found.schema
        label = datasets.Features.from_arrow_schema(schema)[columns["label"]]
        rows = pa.table({use: found[column] for use, column in columns.items()})
        for use in columns:
            if types.is_dictionary(rows[use].type) or types.is_large_string(rows[use].type):
                rows = _replaced(rows, use, rows[use].cast(pa.string()))
    except (OSError, ValueError, TypeError, NotImplementedError) as error:
        raise _unreadable(file, error) from error
    for use in columns.keys() & {"path", "split"}:
        if not _is_string(rows[use].type):
            raise ValueError(f"Column {columns[use]!r} of {file} holds {rows[use].type}, not strings.")
        empty = pc.or_kleene(pc.is_null(rows[use]), pc.equal(rows[use], ""))
        if (row := pc.index(empty, True).as_py()) >= 0:
            raise ValueError(f"{file}, row {row}: {columns[use]!r} is empty.")
    if _is_string(rows["label"].type):
        # One name may be written with composed and with decomposed characters.
        names_of_classes = pc.utf8_normalize(rows["label"], "NFC")
        rows = _replaced(rows, "label", pc.if_else(pc.equal(names_of_classes, ""), None, names_of_classes))
        label = datasets.Value("string")
    return Table(file, rows, label)


def with_common_labels(tables: Sequence[Table]) -> list[Table]:
    """Return tables whose labels have one type: CSV holds integers if every label of every table is one.

    Raises:
        ValueError: If some tables have strings and others integers, or other names of the classes.
    """
    if all(table.is_text and _holds_integers(table.rows["label"]) for table in tables):
        label = datasets.Value("int64")
        return [
            Table(table.file, _replaced(table.rows, "label", table.rows["label"].cast(pa.int64())), label)
            for table in tables
        ]
    for table in tables[1:]:
        if table.label != tables[0].label:
            raise ValueError(
                f"{tables[0].file} and {table.file} hold labels of two kinds, {tables[0].label} and {table.label}: "
                "write them alike."
            )
    return list(tables)


def _read(file: Path, columns: list[str]) -> pa.Table:
    ending = file.suffix.lower()
    if ending in _TEXT:
        # No type is guessed, so 01 stays 01 and NA stays NA.
        as_text = csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string()))
        return csv.read_csv(file, parse_options=_parse_options(file), convert_options=as_text)
    if ending in _JSON:
        rows = _json_rows(file)
        return pa.table({column: pa.array([row.get(column) for row in rows]) for column in columns})
    return parquet.read_table(file, columns=columns)


def _parse_options(file: Path) -> csv.ParseOptions:
    return csv.ParseOptions(
        delimiter="\t" if file.suffix.lower() in _TABS else ",",
        newlines_in_values=True,
    )


def _json_rows(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file that holds one a line, or a list of them."""
    rows: list[Any] = []
    with file.open(encoding="utf-8-sig") as lines:
        if file.suffix.lower() == ".json":
            text = lines.read()
            rows = json.loads(text) if text.lstrip().startswith("[") else []
            lines.seek(0)
        if not rows:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    try:
                        rows.append(json.loads(line))
                    except json.JSONDecodeError as error:
                        raise ValueError(f"line {number} is no JSON: {error}") from error
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number} is no JSON object but {row!r}")
    if not rows:
        raise ValueError("it is empty")
    return rows


def _holds_integers(labels: pa.ChunkedArray) -> bool:
    return bool(pc.all(pc.match_substring_regex(labels, _INTEGERS), min_count=0).as_py())


def _is_string(kind: pa.DataType) -> bool:
    plain = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(plain) or types.is_large_string(plain))


def _replaced(rows: pa.Table, column: str, values: pa.ChunkedArray) -> pa.Table:
    return rows.set_column(rows.column_names.index(column), column, values)


def _unreadable(file: Path, error: Exception) -> ValueError:
    hint = "" if file.suffix.lower() == ".parquet" else " Tables of text have to be UTF-8."
    return ValueError(f"The table {file} cannot be read: {str(error).rstrip('.') or repr(error)}.{hint}")

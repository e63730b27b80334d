"""The kinds of data sets that `data.path` can name, in the order in which they are tried."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from glob import escape, glob
from itertools import chain
from pathlib import Path
from typing import Any, Final

import datasets
import pyarrow as pa
from pyarrow import ipc, parquet

from timm_selfdistill.data.file_rows import Splits, files_at
from timm_selfdistill.data.image_folder import holds_image, load_image_folder
from timm_selfdistill.data.names import normalized, quoted, used_of, warn_first, with_columns
from timm_selfdistill.data.path_tables import load_metadata, load_tables
from timm_selfdistill.data.shards import SHARD_ENDINGS, load_shards
from timm_selfdistill.data.table_files import TABLE_ENDINGS
from timm_selfdistill.recipe import DataSection

DIGITS: Final = Path(__file__).parent.parent / "digits"
_FORMATS: Final = {".parquet": "parquet", ".arrow": "arrow"}
_READ_ENDINGS: Final = tuple(dict.fromkeys((*_FORMATS, *TABLE_ENDINGS, *SHARD_ENDINGS)))
# A path with one of these endings is a file's, never the name of a data set on the Hub.
FILE_ENDINGS: Final = (*_READ_ENDINGS, ".zip")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def load_splits(section: DataSection) -> Splits:
    """Open `data.path` as the first kind of data set that it is; raise ValueError if it is none or unreadable."""
    path = DIGITS if section.path == "digits" else Path(section.path).expanduser()
    try:
        for load in SOURCES:
            if (splits := load(path, section)) is not None:
                return splits
    except PermissionError as error:
        raise ValueError(f"data.path {section.path!r} cannot be read: {error}.") from error
    if not path.is_dir() and (files := files_at(path)):
        endings = sorted({file.suffix for file in files})
        raise ValueError(
            f"data.path {section.path!r} names files ending in {', '.join(endings)}; "
            f"all must end in one of {', '.join(_READ_ENDINGS)}."
        )
    raise ValueError(f"data.path {section.path!r}: there is no such folder or file.")


def is_on_hub(path: str) -> bool:
    """Whether a recipe's `data.path` names a data set on the Hub: neither files here, nor the embedded one."""
    here = path == "digits" or Path(path).expanduser().is_dir() or bool(glob(path))
    is_file = path.startswith((".", "/", "~")) or path.endswith(FILE_ENDINGS)
    return not here and not is_file and _HUB_NAME.fullmatch(path) is not None


def _load_saved(path: Path, section: DataSection) -> Splits | None:
    """Read what `save_to_disk` wrote."""
    if not any((path / marker).exists() for marker in ("dataset_dict.json", "state.json")):
        return None
    if section.streaming:
        raise ValueError(f"{path} was written by save_to_disk, which is memory-mapped: set data.streaming to false.")
    with _readable(section):
        saved = datasets.load_from_disk(str(path)).with_format(None)
    return Splits(saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved})


def _load_arrow_files(path: Path, section: DataSection) -> Splits | None:
    """Read a folder of parquet or arrow files, one of them, or a glob."""
    tables: list[Path] = []
    if path.is_dir():
        folder = path.resolve()
        if not (tables := _tables_of(folder)):
            return None
        arguments: dict[str, Any] = {"path": str(folder)}
        if (escaped := escape(str(folder))) != str(folder):  # which `datasets` would take for a pattern
            arguments = {"path": _FORMATS[tables[0].suffix], "data_dir": escaped}
    else:
        files = files_at(path)
        endings = {file.suffix for file in files}
        if len(endings) != 1 or not endings <= _FORMATS.keys():
            return None
        arguments = {"path": _FORMATS[endings.pop()], "data_files": [escape(str(file)) for file in files]}
    arguments["name"] = section.name
    with _readable(section):
        data_files = datasets.load_dataset_builder(**arguments).config.data_files or {}
        used = used_of(map(str, data_files), section)
        local = [str(file) for split, of_split in data_files.items() if str(split) in used for file in of_split]
        label_names = {file: _stored_label_names(file, section) for file in local}
        read = {str(file) for file in chain(*data_files.values())}
        if section.name is None and (unread := [table.name for table in tables if str(table) not in read]):
            message = "%d files of %s are in no split, as nothing in their names tells which: %s."
            warn_first(message, len(unread), section.path, quoted(unread))
        rows = datasets.load_dataset(**arguments, streaming=section.streaming)
    # `datasets` takes the names of the first file for all.
    stored = [(file, names) for file, names in label_names.items() if names is not None]
    for file, names in stored[1:]:
        first, expected = stored[0]
        if names != expected:
            raise ValueError(
                f"{first} and {file} number the classes of {section.target!r} differently: {expected[:5]} and "
                f"{names[:5]} ({len(expected)} and {len(names)} names). Write them again with one list of names."
            )
    return Splits(rows)


def _load_from_hub(path: Path, section: DataSection) -> Splits | None:
    """Read a data set of the Hugging Face Hub."""
    if not is_on_hub(section.path):
        return None
    with _readable(section):
        return Splits(datasets.load_dataset(section.path, section.name, streaming=section.streaming))


def _tables_of(folder: Path) -> list[Path]:
    """Return the parquet and arrow files of a folder, none of one that holds images."""
    tables = [file for file in sorted(folder.iterdir()) if file.suffix in _FORMATS]
    if not holds_image(str(folder)):
        return tables or [file for file in sorted(folder.rglob("*")) if file.suffix in _FORMATS]
    if tables:
        raise ValueError(
            f"The folder {str(folder)!r} holds images and the file {tables[0].name!r}: to read the images, move the "
            f"file away; to read the file, set data.path to {str(tables[0])!r}."
        )
    return []


def _stored_label_names(file: str, section: DataSection) -> list[str] | None:
    """Return the names of the classes that a parquet or arrow file stores; None if it stores none."""
    if Path(file).suffix not in _FORMATS:
        return None
    if file.endswith(".parquet"):
        schema = parquet.read_schema(file)
    else:
        with pa.memory_map(file) as source:
            try:
                schema = ipc.open_stream(source).schema
            except pa.ArrowInvalid:  # the other one of Arrow's two formats
                schema = ipc.open_file(source).schema
    features = datasets.Features.from_arrow_schema(schema)
    feature = features.get(with_columns(section, features).target)
    return list(map(normalized, feature.names)) if isinstance(feature, datasets.ClassLabel) else None


@contextmanager
def _readable(section: DataSection) -> Iterator[None]:
    """Turn the errors of `datasets` and pyarrow, which have no common base class, into ones that name `data.path`."""
    try:
        yield
    except Exception as error:  # of the file system, the network, or whatever reads the format
        if isinstance(error, FileNotFoundError | ConnectionError) and not Path(section.path).expanduser().exists():
            raise ValueError(
                f"data.path {section.path!r} cannot be opened; it can be 'digits', a folder or file, or a data set on "
                f"the hub. {error}"
            ) from error
        reason = str(error.__cause__ or error).rstrip(".")
        raise ValueError(
            f"data.path {section.path!r} cannot be read: {reason}. If a file of it is damaged or "
            "incomplete, write or download it again."
        ) from error


# Each takes the path and the recipe's `data`. It returns the splits, with the columns of the recipe, or None where the
# path names another kind; it raises ValueError if the data set cannot be read or contradicts the recipe.
SOURCES: Final[tuple[Callable[[Path, DataSection], Splits | None], ...]] = (
    load_shards,
    load_metadata,
    load_tables,
    _load_saved,
    _load_arrow_files,
    load_image_folder,
    _load_from_hub,
)

"""Read a labelled image data set through `datasets`: its splits, columns and labels, checked."""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from glob import escape, glob
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import types

from timm_selfdistill.data.first_process import is_first_process
from timm_selfdistill.data.image_files import holds_image
from timm_selfdistill.data.image_folder import load_image_folder
from timm_selfdistill.data.label_order import check_same_label_names, stored_label_names
from timm_selfdistill.data.metadata import load_metadata
from timm_selfdistill.data.names import normalized, quoted, with_similar
from timm_selfdistill.data.shards import SHARD_ENDINGS, load_shards
from timm_selfdistill.data.split_names import find_split, used_splits
from timm_selfdistill.data.table_files import TABLE_ENDINGS
from timm_selfdistill.data.tables import load_tables
from timm_selfdistill.recipe import DataSection

DIGITS = Path(__file__).parent.parent / "digits"
FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
# A path with one of these endings is a file's, never the name of a data set on the hub.
FILE_ENDINGS = (*FILE_FORMATS, *TABLE_ENDINGS, *SHARD_ENDINGS, ".zip")
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")

Indices = NDArray[np.int64]

_logger = logging.getLogger(__name__)


def load_splits(section: DataSection) -> Mapping[str, Any]:
    """Return split name -> `datasets.Dataset` or, for streaming, `datasets.IterableDataset`.

    Of a folder of images only the splits that the recipe uses are read, and they are a `FolderSplits`.
    """
    path = DIGITS if section.path == "digits" else Path(section.path).expanduser()
    if (listed := _load_listed(path, section)) is not None:
        return listed
    if any((path / marker).exists() for marker in ("dataset_dict.json", "state.json")):
        if section.streaming:
            raise ValueError(
                f"{path} was written by save_to_disk, which is memory-mapped: set data.streaming to false."
            )
        try:
            return _load_saved(path)
        except Exception as error:
            raise _unreadable(section, error) from error
    source, files, folder, tables = section.path, None, None, list[Path]()
    if path.is_dir():
        source = str(path.resolve())
        tables = _tables_of(Path(source))
        if not tables:
            return load_image_folder(os.path.abspath(path), section)
        if (escaped := escape(source)) != source:  # which `datasets` would take for a pattern
            source, folder = FILE_FORMATS[tables[0].suffix], escaped
    elif files := sorted(glob(str(path))) or ([str(path)] if path.is_file() else None):
        endings = {Path(file).suffix for file in files}
        if len(endings) > 1 or not endings <= FILE_FORMATS.keys():
            raise ValueError(
                f"data.path {section.path!r} names files ending in {', '.join(sorted(endings))}; "
                f"all must end in one of {', '.join(dict.fromkeys((*FILE_FORMATS, *TABLE_ENDINGS, *SHARD_ENDINGS)))}."
            )
        source, files = FILE_FORMATS[endings.pop()], list(map(escape, files))
    elif not is_on_hub(source):
        raise ValueError(f"data.path {section.path!r}: there is no such folder or file.")
    try:
        label_names = {}
        if path.is_dir() or files:
            builder = datasets.load_dataset_builder(source, section.name, data_files=files, data_dir=folder)
            label_names = stored_label_names(_local_files(builder, section), section.target)
            _warn_of_unread(tables, builder, section)
        splits: Mapping[str, Any] = datasets.load_dataset(
            source, section.name, data_files=files, data_dir=folder, streaming=section.streaming
        )
    except (FileNotFoundError, ConnectionError) as error:
        raise ValueError(
            f"data.path {section.path!r} cannot be opened; it can be 'digits', a folder or file, or a data set on the "
            f"hub. {error}"
        ) from error
    except Exception as error:
        raise _unreadable(section, error) from error
    check_same_label_names(label_names, section.target)
    return splits


def is_on_hub(path: str) -> bool:
    """Whether a recipe's `data.path` names a data set on the Hub rather than files here, or the embedded one."""
    here = path == "digits" or Path(path).expanduser().is_dir() or bool(glob(path))
    is_file = path.startswith((".", "/", "~")) or path.endswith(FILE_ENDINGS)
    return not here and not is_file and HUB_NAME.fullmatch(path) is not None


def _load_listed(path: Path, section: DataSection) -> Mapping[str, Any] | None:
    """Return the splits of a data set that tar files, metadata or tables list; None if it is none."""
    try:
        found = (load(path, section) for load in (load_shards, load_metadata, load_tables))
        return next((splits for splits in found if splits is not None), None)
    except PermissionError as error:
        raise ValueError(f"data.path {section.path!r} cannot be read: {error}.") from error


def _tables_of(folder: Path) -> list[Path]:
    """Return the parquet and arrow files of a folder that is a data set of such files, none of another one.

    Raises:
        ValueError: If there are images, too.
    """
    with_images = holds_image(str(folder))
    tables = [file for file in sorted(folder.iterdir()) if file.suffix in FILE_FORMATS]
    if not with_images:
        return tables or [file for file in sorted(folder.rglob("*")) if file.suffix in FILE_FORMATS]
    if tables:
        raise ValueError(
            f"The folder {str(folder)!r} holds images and the file {tables[0].name!r}: to read the images, move the "
            f"file away; to read the file, set data.path to {str(tables[0])!r}."
        )
    return []


def _local_files(builder: Any, section: DataSection) -> list[str]:
    """Return the files of the splits that a recipe uses."""
    data_files = builder.config.data_files or {}
    used = {find_split(name, map(str, data_files)) for name in used_splits(section).values()}
    return [str(file) for split, files in data_files.items() if str(split) in used for file in files]


def _warn_of_unread(tables: Iterable[Path], builder: Any, section: DataSection) -> None:
    """Tell which files of a folder are in no split, by their names; of another configuration, that is no wonder."""
    known = {str(file) for files in (builder.config.data_files or {}).values() for file in files}
    unread = [table.name for table in tables if str(table) not in known]
    if unread and section.name is None and is_first_process():
        _logger.warning(
            "%d files of %s are in no split, as nothing in their names tells which: %s.",
            *(len(unread), section.path, quoted(unread)),
        )


def _load_saved(path: Path) -> Mapping[str, Any]:
    saved = datasets.load_from_disk(str(path)).with_format(None)
    return saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}


def _unreadable(section: DataSection, error: Exception) -> ValueError:
    """Return what to say of an error of `datasets` or pyarrow, which for a damaged file have no common base class."""
    reason = str(error.__cause__ or error).rstrip(".")
    return ValueError(
        f"data.path {section.path!r} cannot be read: {reason}. If a file of it is damaged or "
        "incomplete, write or download it again."
    )


def check_columns(features: datasets.Features | None, split: str, section: DataSection) -> None:
    """Raise unless the split has the two columns of the recipe and the first holds images."""
    if features is None:
        raise ValueError(f"The stream {section.path} does not say what its columns hold: set data.streaming to false.")
    for key, column in (("image", section.image), ("target", section.target)):
        if column not in features:
            raise ValueError(f"data.{key} is {column!r}, but split {split!r} has the columns {', '.join(features)}.")
    image = features[section.image]
    bare = image == datasets.Value("binary") or (isinstance(image, dict) and set(image) == {"bytes", "path"})
    if not bare and not isinstance(image, datasets.Image):
        raise ValueError(f"data.image is {section.image!r}, but that column holds no images: {image}.")


def encoded(rows: Any, columns: dict[str, str]) -> Any:
    """Keep and rename these columns, and leave the images encoded."""
    rows = rows.select_columns(list(columns))
    for name in columns:
        if isinstance(rows.features[name], datasets.Image):
            rows = rows.cast_column(name, datasets.Image(decode=False))
    return rows.rename_columns({old: new for old, new in columns.items() if old != new})


def class_names_of(rows: datasets.Dataset, section: DataSection) -> tuple[str, ...]:
    """Return the names by class index: those of the column, the sorted strings, or the indices themselves."""
    feature = rows.features[section.target]
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(map(normalized, feature.names))
        check_classes_of_recipe(names, section)
        return names
    if section.class_names is not None:
        return section.class_names
    labels = _labels(rows, section.train_split, section)
    if labels.dtype.kind == "U":
        return tuple(np.unique(labels).tolist())
    highest = int(labels.max())
    if highest >= len(labels):
        raise ValueError(
            f"data.target {section.target!r} goes up to {highest} in {len(labels)} rows: these are no class indices."
        )
    return tuple(str(index) for index in range(highest + 1))


def check_classes_of_recipe(names: tuple[str, ...], section: DataSection) -> None:
    """Raise unless the names of a data set that has them are those of the recipe, if it tells any."""
    if section.classes not in (None, len(names), names):
        raise ValueError(
            f"data.classes is {section.classes}, but {section.path} names its {len(names)} classes itself: "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}. Leave it out."
        )


def targets_of(rows: datasets.Dataset, split: str, section: DataSection, class_names: tuple[str, ...]) -> Indices:
    """Return the class index of every row."""
    check_same_classes(rows.features[section.target], split, class_names)
    labels = _labels(rows, split, section)
    if labels.dtype.kind == "U":
        index = {name: position for position, name in enumerate(class_names)}
        found, inverse = np.unique(labels, return_inverse=True)
        targets = np.array([index.get(name, -1) for name in found.tolist()])[inverse]
    else:
        targets = labels
    wrong = np.flatnonzero((targets < 0) | (targets >= len(class_names)))
    if len(wrong):
        label = labels[wrong[0]].item()
        shown = with_similar(label, class_names) if isinstance(label, str) else repr(label)
        raise ValueError(
            f"Split {split!r}, row {wrong[0]}: {section.target!r} is {shown}, which is none of the "
            f"{len(class_names)} classes {', '.join(class_names[:5])}{', ...' if len(class_names) > 5 else ''} "
            f"({len(wrong)} such rows)."
        )
    return targets


def stream_classes(feature: Any, section: DataSection) -> tuple[tuple[str, ...], dict[int | str, int]]:
    """Return the names of a stream's classes, and the class index of every label.

    Raises:
        ValueError: If neither the stream nor the recipe tells the classes.
    """
    if isinstance(feature, datasets.ClassLabel) and feature.num_classes > 1:
        names = tuple(map(normalized, feature.names))
        check_classes_of_recipe(names, section)
        return names, {index: index for index in range(feature.num_classes)}
    kind = feature.pa_type if isinstance(feature, datasets.Value) else pa.null()
    is_text = types.is_string(kind) or types.is_large_string(kind)
    given_names = section.class_names
    if given_names is None or (is_text and isinstance(section.classes, int)) or not (is_text or types.is_integer(kind)):
        given = "" if section.classes is None else f", and data.classes is {section.classes}"
        raise ValueError(
            f"data.target {section.target!r} is {feature}{given}, but a stream cannot tell its classes, at least 2, "
            "beforehand: set data.classes to the list of their names or, for integers from 0, to their number, or set "
            "data.streaming to false."
        )
    return given_names, {(name if is_text else index): index for index, name in enumerate(given_names)}


def check_same_classes(feature: Any, split: str, class_names: tuple[str, ...]) -> None:
    if isinstance(feature, datasets.ClassLabel) and tuple(map(normalized, feature.names)) != class_names:
        raise ValueError(
            f"Split {split!r} names other classes than the training split: {feature.names}, not {list(class_names)}."
        )


def _labels(rows: datasets.Dataset, split: str, section: DataSection) -> NDArray[Any]:
    """Return the labels as they are stored: integers or strings."""
    labels = rows.select_columns([section.target]).with_format("arrow")[:][section.target]
    if len(labels) == 0:
        raise ValueError(f"Split {split!r} of {section.path} is empty.")
    if labels.null_count:
        missing = np.flatnonzero(labels.is_null().to_numpy())
        raise ValueError(
            f"Split {split!r}, row {missing[0]}: {section.target!r} has no label ({len(missing)} such rows)."
        )
    if types.is_integer(labels.type) or types.is_boolean(labels.type):
        return np.asarray(labels).astype(np.int64)
    if types.is_string(labels.type) or types.is_large_string(labels.type):
        found, inverse = np.unique(np.asarray(labels).astype(np.str_), return_inverse=True)
        return np.array(list(map(normalized, found.tolist())))[inverse]
    raise ValueError(f"data.target {section.target!r} holds {labels.type}; labels are class indices or strings.")

"""Names in a data set: of its splits, its columns and its classes; how they are compared, checked and shown."""

import difflib
import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import datasets
import numpy as np
import pyarrow as pa
import torch.distributed
from numpy.typing import NDArray
from pyarrow import types

from timm_selfdistill.recipe import DataSection

# Names of split folders in lower case, and the split that each is.
STANDARD_SPLITS: Final = {"train": "train", "test": "test"} | dict.fromkeys(
    ("val", "valid", "validation"), "validation"
)

_NAMED = 5
_COLUMN_KEYS: Final = ("image", "target")
_logger = logging.getLogger(__package__)

Indices = NDArray[np.int64]


def split_name(name: str) -> str:
    """Return the split that a name means: "train", "validation", "test" or the name itself."""
    name = normalized(name)
    return STANDARD_SPLITS.get(name.casefold(), name)


def find_split(wanted: str, available: Iterable[str]) -> str | None:
    """Return the split of that name, or the one that means the same in any case; None if there is none."""
    available = list(available)
    if wanted in available:
        return wanted
    return next((name for name in available if split_name(name).casefold() == split_name(wanted).casefold()), None)


def used_splits(section: DataSection) -> dict[str, str]:
    """Return the splits that a recipe uses, by the key of its data section that names them."""
    used = {"train_split": section.train_split}
    if section.eval_fraction is None:
        used["eval_split"] = section.eval_split
    if isinstance(section.validation, str):
        used["validation"] = section.validation
    return used


def used_of(available: Iterable[str], section: DataSection) -> set[str | None]:
    """Return which of the splits that there are a recipe uses, and None if one is missing."""
    available = list(available)
    return {find_split(name, available) for name in used_splits(section).values()}


def is_split(folder: str, section: DataSection) -> bool:
    """Whether a folder is a split by its name: a usual one or one of the recipe's, in any case."""
    return find_split(folder, (*STANDARD_SPLITS.values(), *used_splits(section).values())) is not None


def resolve_splits(section: DataSection, available: Iterable[str], hint: str = "") -> DataSection:
    """Return the data section with the splits named as in the data set; `hint` ends the message of a missing one."""
    available = list(available)
    found: dict[str, str] = {}
    missing: dict[str, str] = {}
    for key, wanted in used_splits(section).items():
        name = find_split(wanted, available)
        if name is None:
            missing[f"data.{key}"] = with_similar(wanted, available)
            continue
        for other, taken in found.items():
            # `evaluate` names the training split by the same name, as nothing is trained.
            if name == taken and wanted != getattr(section, other):
                raise ValueError(
                    f"data.{other} {getattr(section, other)!r} and data.{key} {wanted!r} are one split of "
                    f"{section.path}, {name!r}: name two."
                )
        found[key] = name
    if missing:
        raise ValueError(
            f"{section.path} has no split {' and no split '.join(missing.values())}; it has {', '.join(available)}. "
            f"{' and '.join(missing)} can name another one; without a split for evaluation, data.eval_fraction holds "
            f"out a share of train.{hint}"
        )
    return section.model_copy(update=found)


def files_by_split(files: Sequence[Path], section: DataSection) -> dict[str, list[Path]]:
    """Return the files of each split: by their names if all are named by splits; otherwise all are "train"."""
    found: dict[str | None, list[Path]] = {}
    for file in files:
        found.setdefault(split_of_file(file, section), []).append(file)
    if len(found) == 1:
        words = {STANDARD_SPLITS.get(word) for file in files for word in re.split(r"[\W\d_]+", file.name.lower())}
        if None in found and len(words - {None}) > 1:
            raise ValueError(
                f"The files {files[0].name}, ..., {files[-1].name} name several splits, but not at the beginning of "
                "their names, where it counts: rename them (train-..., test-...), or give a pattern of one split."
            )
        return {"train": list(files)}
    if None in found:
        raise ValueError(
            f"Of the {len(files)} files of {section.path}, some are named by a split and others are not: "
            f"{', '.join(of_split[0].name for of_split in found.values())}."
        )
    return {name: of_split for name, of_split in found.items() if name is not None}


def split_of_file(file: Path, section: DataSection) -> str | None:
    """Return the split that a file is named by, the letters before the first other sign: train-0001.tar is "train"."""
    found = re.match(r"[^\W\d_]+", file.name)
    name = split_name(found[0]) if found else ""
    if name in STANDARD_SPLITS.values():
        return name
    used = used_splits(section).values()
    return find_split(file.name.split(".")[0], used) or find_split(name, used)


def with_columns(section: DataSection, features: Mapping[str, Any]) -> DataSection:
    """Return the data section with the columns of images and labels as they are called in a data set."""
    image = only_or_given("image", section, features, [name for name in features if _holds_images(features[name])])
    named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    plain = [name for name in features if name != image and _may_hold_labels(features[name])]
    target = only_or_given("target", section, features, named or plain)
    return section.model_copy(update={"image": image, "target": target})


def only_or_given(key: str, section: DataSection, names: Iterable[str], candidates: Sequence[str]) -> str:
    """Return the column that `data.image` or `data.target` (the key) means.

    It is the recipe's; where that is the default and there is no such column, the only candidate, if there is one.
    """
    given: str = getattr(section, key)
    is_left_open = given == DataSection.model_fields[key].default and given not in names
    return candidates[0] if is_left_open and len(candidates) == 1 else given


def check_columns(features: datasets.Features | None, split: str, section: DataSection) -> None:
    """Refuse a split without the two columns of the recipe, or whose first one holds no images."""
    if features is None:
        raise ValueError(f"The stream {section.path} does not say what its columns hold: set data.streaming to false.")
    missing = {key: getattr(section, key) for key in _COLUMN_KEYS if getattr(section, key) not in features}
    if missing:
        wrong = " and ".join(f"data.{key} is {name!r}" for key, name in missing.items())
        close = [other for name in missing.values() for other in difflib.get_close_matches(name, features, 1)]
        hint = f". Did you mean {' and '.join(map(repr, close))}?" if close else "."
        raise ValueError(f"{wrong}, but split {split!r} has the columns {', '.join(features)}{hint}")
    if not _holds_images(image := features[section.image]):
        raise ValueError(f"data.image is {section.image!r}, but that column holds no images: {image}.")


def _holds_images(feature: Any) -> bool:
    stored = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return stored or isinstance(feature, datasets.Image) or bool(feature == datasets.Value("binary"))


def _may_hold_labels(feature: Any) -> bool:
    kind = feature.pa_type if isinstance(feature, datasets.Value) else pa.null()
    return types.is_integer(kind) or types.is_boolean(kind) or is_text(kind)


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is one of strings, stored as they are or numbered."""
    plain = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_string(plain) or types.is_large_string(plain))


def class_names_of(rows: datasets.Dataset, section: DataSection) -> tuple[str, ...]:
    """Return the names by class index: those of the column or the recipe, the sorted strings, or the indices."""
    if (names := _given_names(rows.features[section.target], section)) is not None:
        return names
    labels = _labels(rows, section.train_split, section)
    if labels.dtype.kind == "U":
        return tuple(np.unique(labels).tolist())
    highest = int(labels.max())
    if highest >= len(labels):
        raise ValueError(
            f"data.target {section.target!r} goes up to {highest} in {len(labels)} rows: these are not class indices."
        )
    return tuple(map(str, range(highest + 1)))


def stream_classes(feature: Any, section: DataSection) -> tuple[tuple[str, ...], dict[int | str, int]]:
    """Return the names of a stream's classes, and the class index of every label."""
    names = _given_names(feature, section)
    kind = feature.pa_type if isinstance(feature, datasets.Value | datasets.ClassLabel) else pa.null()
    unnamed = is_text(kind) and isinstance(section.classes, int)
    if names is None or len(names) < 2 or unnamed or not (is_text(kind) or types.is_integer(kind)):
        given = "" if section.classes is None else f", and data.classes is {section.classes}"
        raise ValueError(
            f"data.target {section.target!r} is {feature}{given}, but a stream cannot tell its classes, at least 2, "
            "beforehand: set data.classes to the list of their names or, for integers from 0, to their number, or set "
            "data.streaming to false."
        )
    return names, {(name if is_text(kind) else index): index for index, name in enumerate(names)}


def targets_of(rows: datasets.Dataset, split: str, section: DataSection, class_names: tuple[str, ...]) -> Indices:
    """Return the class index of every row."""
    check_same_classes(rows.features[section.target], split, class_names)
    targets = labels = _labels(rows, split, section)
    if labels.dtype.kind == "U":
        index = {name: position for position, name in enumerate(class_names)}
        found, inverse = np.unique(labels, return_inverse=True)
        targets = np.array([index.get(name, -1) for name in found.tolist()])[inverse]
    wrong = np.flatnonzero((targets < 0) | (targets >= len(class_names)))
    if len(wrong):
        label = labels[wrong[0]].item()
        shown = with_similar(label, class_names) if isinstance(label, str) else repr(label)
        raise ValueError(
            f"Split {split!r}, row {wrong[0]}: {section.target!r} is {shown}, which is none of the "
            f"{len(class_names)} classes {listed(class_names)} ({len(wrong)} such rows)."
        )
    return targets


def check_same_classes(feature: Any, split: str, class_names: tuple[str, ...]) -> None:
    """Raise if a split that names its classes names others than the training split."""
    if isinstance(feature, datasets.ClassLabel) and tuple(map(normalized, feature.names)) != class_names:
        raise ValueError(
            f"Split {split!r} names other classes than the training split: {feature.names}, not {list(class_names)}."
        )


def _given_names(feature: Any, section: DataSection) -> tuple[str, ...] | None:
    """Return the names of the classes that a column or the recipe tells, if any does; both must tell the same."""
    if not isinstance(feature, datasets.ClassLabel):
        return section.class_names
    names = tuple(map(normalized, feature.names))
    if section.classes not in (None, len(names), names):
        raise ValueError(
            f"data.classes is {section.classes}, but {section.path} names its {len(names)} classes itself: "
            f"{listed(names)}. Leave it out."
        )
    return names


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
    if is_text(labels.type):
        found, inverse = np.unique(np.asarray(labels).astype(np.str_), return_inverse=True)
        return np.array(list(map(normalized, found.tolist())))[inverse]
    raise ValueError(f"data.target {section.target!r} holds {labels.type}; labels are class indices or strings.")


def normalized(name: str) -> str:
    """Return a name in Unicode's composed form (NFC): some systems store an `é` as one character, others as two."""
    return unicodedata.normalize("NFC", name)


def quoted(names: Iterable[str]) -> str:
    """Return the first names as Python writes them, so that none can act on a terminal."""
    return listed(map(repr, names))


def listed(names: Iterable[str]) -> str:
    """Return the first names, divided by commas."""
    first = list(islice(names, _NAMED + 1))
    return ", ".join([*first[:_NAMED], *(["..."] if len(first) > _NAMED else [])])


def with_similar(name: str, known: Iterable[str]) -> str:
    """Return a name, quoted, and the known one that is like it, if any: "'Dog' (is it 'dog'?)"."""
    by_lower = {other.casefold(): other for other in known}
    similar = difflib.get_close_matches(name.casefold(), by_lower, 1)
    return f"{name!r} (is it {by_lower[similar[0]]!r}?)" if similar else repr(name)


def warn_first(message: str, *args: object) -> None:
    """Log a warning in the first process only, where all processes see the same."""
    if is_first_process():
        _logger.warning(message, *args)


def is_first_process() -> bool:
    """Whether this is the only process, or the first of those that train together."""
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not joined or torch.distributed.get_rank() == 0

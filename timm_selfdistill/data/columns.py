"""Which columns hold the images and the labels, and the classes that the labels mean."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import datasets
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import types

from timm_selfdistill.data.names import Indices, listed, normalized, with_similar
from timm_selfdistill.recipe import DataSection

_KEYS: Final = ("image", "target")
_DEFAULTS: Final = {key: str(DataSection.model_fields[key].default) for key in _KEYS}


def only_or_given(key: str, section: DataSection, names: Iterable[str], candidates: Sequence[str]) -> str:
    """Return the column that `data.image` or `data.target` (the key) means.

    It is the recipe's; where that is the default and there is no such column, the only candidate, if there is one.
    """
    given: str = getattr(section, key)
    is_left_open = given == _DEFAULTS[key] and given not in names
    return candidates[0] if is_left_open and len(candidates) == 1 else given


def with_columns(section: DataSection, features: Mapping[str, Any]) -> DataSection:
    """Return the data section with the columns of images and labels as they are called in a data set."""
    image = only_or_given("image", section, features, [name for name in features if holds_images(features[name])])
    named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    plain = [name for name in features if name != image and _may_hold_labels(features[name])]
    target = only_or_given("target", section, features, named or plain)
    return section.model_copy(update={"image": image, "target": target})


def check_columns(features: datasets.Features | None, split: str, section: DataSection) -> None:
    """Refuse a split without the two columns of the recipe, or whose first one holds no images."""
    if features is None:
        raise ValueError(f"The stream {section.path} does not say what its columns hold: set data.streaming to false.")
    missing = {key: getattr(section, key) for key in _KEYS if getattr(section, key) not in features}
    if missing:
        wrong = " and ".join(f"data.{key} is {name!r}" for key, name in missing.items())
        close = [other for name in missing.values() for other in difflib.get_close_matches(name, features, 1)]
        hint = f". Did you mean {' and '.join(map(repr, close))}?" if close else ""
        raise ValueError(f"{wrong}, but split {split!r} has the columns {', '.join(features)}{hint or '.'}")
    image = features[section.image]
    if not holds_images(image):
        raise ValueError(f"data.image is {section.image!r}, but that column holds no images: {image}.")


def holds_images(feature: Any) -> bool:
    """Whether a column of this type may hold images."""
    stored = isinstance(feature, dict) and set(feature) == {"bytes", "path"}
    return stored or isinstance(feature, datasets.Image) or bool(feature == datasets.Value("binary"))


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
    is_text = types.is_string(kind) or types.is_large_string(kind)
    unnamed = is_text and isinstance(section.classes, int)
    if names is None or len(names) < 2 or unnamed or not (is_text or types.is_integer(kind)):
        given = "" if section.classes is None else f", and data.classes is {section.classes}"
        raise ValueError(
            f"data.target {section.target!r} is {feature}{given}, but a stream cannot tell its classes, at least 2, "
            "beforehand: set data.classes to the list of their names or, for integers from 0, to their number, or set "
            "data.streaming to false."
        )
    return names, {(name if is_text else index): index for index, name in enumerate(names)}


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
    if types.is_string(labels.type) or types.is_large_string(labels.type):
        found, inverse = np.unique(np.asarray(labels).astype(np.str_), return_inverse=True)
        return np.array(list(map(normalized, found.tolist())))[inverse]
    raise ValueError(f"data.target {section.target!r} holds {labels.type}; labels are class indices or strings.")


def _may_hold_labels(feature: Any) -> bool:
    kind = feature.pa_type if isinstance(feature, datasets.Value) else None
    return kind is not None and any(
        is_kind(kind) for is_kind in (types.is_integer, types.is_boolean, types.is_string, types.is_large_string)
    )

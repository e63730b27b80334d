"""Which column holds the images and which the labels: those of the recipe, or the only ones that there are."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import datasets
from pyarrow import types

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


def _may_hold_labels(feature: Any) -> bool:
    kind = feature.pa_type if isinstance(feature, datasets.Value) else None
    return kind is not None and any(
        is_kind(kind) for is_kind in (types.is_integer, types.is_boolean, types.is_string, types.is_large_string)
    )

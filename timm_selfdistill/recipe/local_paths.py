"""Paths of this machine in a recipe: find them, leave them out, put them back."""

import os
from collections.abc import Mapping
from glob import glob
from typing import Annotated, Any, Final

from pydantic import AfterValidator, Field

# A run's recipe as it may be shared, and the paths of this machine that belong to it.
RECIPE: Final = "recipe.yaml"
LOCAL: Final = "local.yaml"
LOCAL_MODEL: Final = "local-dir:"  # timm's prefix of a model folder
# Names on the Hub, which a folder here may have too.
_NEVER_PATHS: Final = ("push_to_hub", "trackers")


def expand_home(path: str) -> str:
    """Return a path with a leading ~ replaced by the home folder.

    Raises:
        ValueError: If it is the home folder of a user who does not exist.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError("must not begin with ~ unless that is a home folder (./~ is a file of that name)")
    return expanded


LocalPath = Annotated[str, Field(min_length=1), AfterValidator(expand_home)]


def shorten_paths(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe holds with every path of this machine cut down to its last name."""
    return {key: value if key in _NEVER_PATHS else _shorten(value) for key, value in recipe.items()}


def complete_path(path: str) -> str:
    """Return a path from the root of the file system, where there is something; any other text as it is."""
    there = path != "digits" and (os.path.exists(path) or bool(glob(path)))
    return os.path.abspath(path) if there else path


def different(full: Mapping[str, Any], short: Mapping[str, Any]) -> dict[str, Any]:
    """Return those parts of the first mapping that the second has otherwise."""
    found = {key: value for key, value in full.items() if value != short.get(key)}
    for key, value in found.items():
        other = short.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            found[key] = different(value, other)
    return found


def merge(recipe: Mapping[str, Any], paths: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a recipe holds with the parts that `different` returned put back, where it was not edited since."""
    merged = dict(recipe)
    for key, value in paths.items():
        before = merged.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            merged[key] = merge(before, value)
        elif _shorten(value) == before:
            merged[key] = value
    return merged


def _shorten(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _shorten(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_shorten(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith(LOCAL_MODEL):
        return LOCAL_MODEL + _last_name(value.removeprefix(LOCAL_MODEL))
    return _last_name(value) if _is_local_path(value) else value


def _is_local_path(text: str) -> bool:
    if text in (".", "..", "~") or text.startswith(("/", "./", "../", "~/")):
        return True
    # Such as "images/flowers": a path only if it is there, else a name on the Hub.
    return "/" in text and (os.path.exists(text) or bool(glob(text)))


def _last_name(path: str) -> str:
    absolute = os.path.abspath(os.path.expanduser(path))
    # The last name of a home folder is that of its user.
    return "home" if absolute in ("/", os.path.expanduser("~")) else os.path.basename(absolute)

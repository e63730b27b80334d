"""Named classes and functions that a recipe or a third party refers to by a string."""

import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from timm_selfdistill.checks import did_you_mean
from timm_selfdistill.escape import printable

T = TypeVar("T")


class Registry(Generic[T]):
    """A mapping from name to class or function that refuses duplicates and explains unknown names.

    Entries come from `register` and, on the first look-up, from the installed packages' entry-point group.

    Args:
        kind: What is registered, as error messages name it, for example "head".
        group: Entry-point group, for example "timm_selfdistill.heads".
    """

    def __init__(self, kind: str, group: str) -> None:
        self.kind = kind
        self.group = group
        self._entries: dict[str, T] = {}
        self._entry_points_loaded = False
        self._broken: dict[str, str] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers its argument as `name`; a name that is taken is a `ValueError`."""
        return partial(self._add, name)

    def get(self, name: str) -> T:
        """Return the entry called `name`; if there is none, a `ValueError` lists the names there are."""
        self._load_entry_points()
        if name in self._entries:
            return self._entries[name]
        if name in self._broken:
            raise ValueError(f"{self.kind} {name!r} is installed but cannot be loaded: {self._broken[name]}")
        known = self.names()
        hint = did_you_mean(str(name), known) or "."
        raise ValueError(f"Unknown {self.kind} {name!r}; known are {', '.join(known)}{hint}")

    def names(self) -> list[str]:
        """Return all names, sorted."""
        self._load_entry_points()
        return sorted(self._entries)

    def _add(self, name: str, entry: T) -> T:
        if name in self._entries and self._entries[name] is not entry:
            raise ValueError(f"A {self.kind} named {name!r} is already registered: {self._entries[name]!r}.")
        self._entries[name] = entry
        return entry

    def _load_entry_points(self) -> None:
        if self._entry_points_loaded:
            return
        self._entry_points_loaded = True
        for point in entry_points(group=self.group):
            try:
                self._add(point.name, point.load())
            except BaseException as error:  # third-party code may fail in any way, and must not break the others
                # Python's signal handlers raise KeyboardInterrupt, and this package's a BaseException of its own.
                is_ours = type(error).__module__.startswith("timm_selfdistill.")
                if isinstance(error, KeyboardInterrupt) or (is_ours and not isinstance(error, Exception)):
                    raise
                self._broken[point.name] = printable(f"{point.value}: {_reason(error)}")
                warnings.warn(f"{self.kind} {point.name!r} cannot be loaded: {self._broken[point.name]}", stacklevel=2)


def _reason(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return f"it ends the process, by sys.exit({'' if error.code is None else repr(error.code)})"
    return str(error) or repr(error)

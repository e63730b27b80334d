"""Stop building a model that has too many parts."""

import sys
import threading
from types import FrameType, TracebackType
from typing import Self

from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)


class TooLargeError(BaseException):
    """A model has too many parts, of the kind that is the text; no `Exception`, so that no builder catches it."""


class BuildLimit:
    """Raises `TooLargeError` in a `with` block when this thread builds more than a limit; may be entered again.

    Args:
        parameters: Most parameters that are registered with modules.
        modules: Most modules that are registered with others.
        calls: Most calls of functions; not counted by default.
    """

    def __init__(self, parameters: int, modules: int, calls: int | None = None) -> None:
        self._thread = threading.get_ident()
        self._left = {"parameters": parameters, "modules": modules, "work": calls}

    def __enter__(self) -> Self:
        self._handles = (
            register_module_parameter_registration_hook(lambda *args: self._registered("parameters")),
            register_module_module_registration_hook(lambda *args: self._registered("modules")),
        )
        self._profile = sys.getprofile()
        if self._left["work"] is not None:
            sys.setprofile(self._called)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._left["work"] is not None:
            sys.setprofile(self._profile)
        for handle in self._handles:
            handle.remove()

    def _registered(self, part: str) -> None:
        # Hooks on the building of modules are those of all threads.
        if threading.get_ident() == self._thread:
            self._count(part)

    def _called(self, frame: FrameType, event: str, argument: object) -> None:
        self._count("work")

    def _count(self, part: str) -> None:
        left = self._left[part]
        assert left is not None
        if left <= 0:
            raise TooLargeError(part)
        self._left[part] = left - 1

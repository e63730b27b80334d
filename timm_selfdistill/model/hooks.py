"""The hooks by which a model reads its backbone, and what they record in one call.

What is recorded belongs to the call that is under way in the hook's own thread, so that one model may serve many of
them. A hook holds no model but its mark: a copy of a module, such as PEFT makes of a classifier, is read as well.
"""

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from timm_selfdistill.exits import Backbone, ExitPoint

Visit = Callable[[int, tuple[Tensor, ...]], Tensor | None]
_HookDict = dict[int, Callable[..., Any]]


class Reached(Exception):
    """Ends a backbone's forward at an exit: the one that was asked for, or one where no image is left."""


class Call:
    """One forward of a backbone, as the hooks saw it.

    Args:
        mark: Whose hooks record.
        stop_at: Index of the exit at which the forward ends, or None.
        visit: Shown the index and tensors of each tap. It returns the rows of the images that go on [B'], or None for
            all of them; where it returns none, the forward ends.

    Attributes:
        taps: The tapped tensors of each exit that was reached, by its index; no tensors with `visit`.
        features: What entered each module of the backbone's classifier, by its path.
        output: What the backbone returned; None where its forward ended at an exit.
        running: Of each exit, how many of its modules (what is tapped, and containers that end with it) run now.
    """

    def __init__(self, mark: str, stop_at: int | None, visit: Visit | None) -> None:
        self.mark, self.stop_at, self.visit = mark, stop_at, visit
        self.taps: dict[int, tuple[Tensor, ...]] = {}
        self.features: dict[str, Tensor] = {}
        self.output: Any = None
        self.running: dict[int, int] = {}


class _Thread(threading.local):
    """The call that is under way in this thread."""

    call: Call | None = None


_THREAD = _Thread()
_REPAIR = threading.Lock()


@dataclass(frozen=True)
class _Place:
    """Where a hook belongs: before (`pre`) or behind the forward of the module at a path."""

    path: tuple[str, ...]
    pre: bool
    hook: "partial[Any]"


class Hooks:
    """The hooks of one model on its backbone.

    They stand behind all other hooks: so what they record is what the backbone goes on with, and a user's hook also
    fires where the forward ends. When a module was replaced after wrapping, as fusing does, they move to the one that
    took its place.

    Args:
        backbone: The timm model.
        points: The exits.
        classifiers: Paths of the modules of the backbone's classifier, whose input is recorded.

    Raises:
        RuntimeError: If the backbone has no such module.
    """

    def __init__(self, backbone: Backbone, points: Sequence[ExitPoint], classifiers: Sequence[str] = ()) -> None:
        self._mark = uuid.uuid4().hex
        self._points = tuple(points)
        self._classifiers = tuple(classifiers)
        self._places: tuple[_Place, ...] = ()
        self._attach(backbone)

    def read_classifiers(self, backbone: Backbone, classifiers: Sequence[str]) -> None:
        """Record from now on what enters these modules of the backbone's classifier."""
        self._classifiers = tuple(classifiers)
        self._attach(backbone)

    def run(self, backbone: Backbone, x: Tensor, *, stop_at: int | None = None, visit: Visit | None = None) -> Call:
        """Run the backbone and return what was recorded; the arguments are those of `Call`.

        Raises:
            RuntimeError: If a module that is read is gone, or did not run.
        """
        # A compiler could not trace it, and a compiled model sees no later change of its modules anyway.
        if not torch.compiler.is_compiling() and not all(_is_in_place(place, backbone) for place in self._places):
            self._attach(backbone)
        call = Call(self._mark, stop_at, visit)
        # There is an outer call where a user's hook runs the model again.
        outer = _THREAD.call
        try:
            _THREAD.call = call
            call.output = backbone(x)
        except Reached:
            return call
        finally:
            # Recomputation under gradient checkpointing calls the hooks again: by then they record nothing.
            _THREAD.call = outer
        for index, point in enumerate(self._points):
            if index not in call.taps:
                raise _gone(backbone, point.module)
        for name in self._classifiers:
            if name not in call.features:
                raise _gone(backbone, name)
        return call

    def run_unread(self, backbone: Backbone, x: Tensor) -> Any:
        """Return what the backbone returns, and record nothing, even where a hook of an outer call runs the model."""
        outer = _THREAD.call
        if outer is None:
            return backbone(x)
        try:
            _THREAD.call = None
            return backbone(x)
        finally:
            _THREAD.call = outer

    def remove(self, backbone: Backbone) -> None:
        """Remove the hooks from the backbone, or from a copy of it."""
        self._remove_others(backbone, ())

    def _attach(self, backbone: Backbone) -> None:
        """Put every hook behind all others on the module where it belongs now, and remove it from any other."""
        with _REPAIR:
            self._places = tuple(
                _Place(tuple(path.split(".")), pre, _put(hook, backbone.get_submodule(path), pre))
                for path, pre, hook in self._wanted(backbone)
            )
            self._remove_others(backbone, [place.hook for place in self._places])

    def _wanted(self, backbone: Backbone) -> Iterator[tuple[str, bool, "partial[Any]"]]:
        """Yield each hook with the path of the module where it belongs, and whether before its forward."""
        for index, point in enumerate(self._points):
            paths = [path for path in _prefixes(point.module, point.name) if _can_run(backbone, path)]
            if not paths:
                raise _gone(backbone, point.module)
            members = tuple(tap.member for tap in point.taps)
            for path in paths:
                yield path, True, partial(_enter, self._mark, index)
                yield path, False, partial(_leave, self._mark, index, members)
        for name in self._classifiers:
            # Fusing may put one module in the place of a classifier and what holds it: they read the same.
            held = [path for path in _prefixes(name) if _can_run(backbone, path)]
            if not held or (held[-1] != name and list(backbone.get_submodule(held[-1]).children())):
                raise _gone(backbone, name)
            yield held[-1], True, partial(_record_feature, self._mark, name)

    def _remove_others(self, backbone: Backbone, kept: Sequence["partial[Any]"]) -> None:
        """Remove this model's hooks from a backbone, but for those that are kept."""
        for module in backbone.modules():
            for hooks in (_hooks_of(module, True), _hooks_of(module, False)):
                for key, hook in list(hooks.items()):
                    if _is_ours(hook) and hook.args[0] == self._mark and not any(hook is other for other in kept):
                        del hooks[key]


def _enter(mark: str, index: int, module: nn.Module, args: Any) -> None:
    """Note that a module of an exit runs, as a forward pre-hook."""
    call = _THREAD.call
    if call is not None and call.mark == mark:
        call.running[index] = call.running.get(index, 0) + 1


def _leave(mark: str, index: int, members: tuple[int | None, ...], module: nn.Module, args: Any, output: Any) -> Any:
    """Read what the outermost running module of an exit returned, as a forward hook.

    The backbone may run a container or, as under gradient checkpointing, its children.

    Returns:
        What takes the output's place, or None to leave it.
    """
    call = _THREAD.call
    if call is None or call.mark != mark:
        return None
    call.running[index] -= 1
    if call.running[index]:
        return None
    tapped = tuple(output if member is None else output[member] for member in members)
    if call.visit is None:
        call.taps[index] = tapped
        if call.stop_at == index:
            raise Reached
        return None
    call.taps[index] = ()
    rows = call.visit(index, tapped)
    if rows is None:
        return None
    if not len(rows):
        raise Reached
    return _take_rows(output, rows, len(tapped[0]))


def _record_feature(mark: str, name: str, module: nn.Module, args: Any) -> None:
    """Record what enters a module of the classifier, as a forward pre-hook."""
    call = _THREAD.call
    if call is not None and call.mark == mark:
        call.features[name] = args[0]


def _take_rows(value: Any, rows: Tensor, batch_size: int) -> Any:
    """Return a module's output for some images of the batch only.

    A tensor that has several rows an image (as TNT's patches have pixels) keeps all rows of an image together.
    """
    if isinstance(value, tuple | list):
        return type(value)(_take_rows(member, rows, batch_size) for member in value)
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    if len(value) == batch_size:
        return value[rows]
    return value.reshape(batch_size, -1, *value.shape[1:])[rows].flatten(0, 1)


def _is_in_place(place: _Place, backbone: Backbone) -> bool:
    """Whether a hook is on the module at its path, with none but hooks of this file behind it."""
    module: Any = backbone
    for part in place.path:
        # Some wrappers, as torch.compile's, hand on the names of the module inside.
        module = module._modules.get(part) or getattr(module, part, None)
        if module is None:
            return False
    # A copy, as another thread may add a hook meanwhile.
    for hook in reversed(tuple(_hooks_of(module, place.pre).values())):
        if hook is place.hook:
            return True
        if not _is_ours(hook):
            return False
    return False


def _put(hook: "partial[Any]", module: nn.Module, pre: bool) -> "partial[Any]":
    """Put a hook, or its like that is there already, behind the other hooks of a module, and return it."""
    hooks: Any = _hooks_of(module, pre)
    for key, other in list(hooks.items()):
        if _is_ours(other) and (other.func, other.args) == (hook.func, hook.args):
            hooks.move_to_end(key)
            found: partial[Any] = other
            return found
    if pre:
        module.register_forward_pre_hook(hook)
    else:
        module.register_forward_hook(hook)
    return hook


def _is_ours(hook: Callable[..., Any]) -> TypeGuard["partial[Any]"]:
    return isinstance(hook, partial) and hook.func in (_enter, _leave, _record_feature)


def _hooks_of(module: nn.Module, pre: bool) -> _HookDict:
    return module._forward_pre_hooks if pre else module._forward_hooks


def _prefixes(path: str, shortest: str | None = None) -> list[str]:
    """Return the paths of a module and of what holds it, the outermost first."""
    parts = path.split(".")
    start = 1 if shortest is None else len(shortest.split("."))
    return [".".join(parts[:end]) for end in range(start, len(parts) + 1)]


def _can_run(backbone: Backbone, path: str) -> bool:
    """Whether there is a module at a path that has a forward."""
    try:
        return type(backbone.get_submodule(path)).forward is not nn.Module.forward
    except AttributeError:
        return False


def _gone(backbone: Backbone, path: str) -> RuntimeError:
    if torch.compiler.is_compiling():
        return RuntimeError(f"Nothing reads {path!r}: call the model once after it was changed, then compile it.")
    return RuntimeError(
        f"{type(backbone).__name__} no longer runs its module {path!r}, at which an exit or the teacher's feature is "
        "read: it was replaced after wrapping, as fusing does. Fuse or re-parameterise the backbone first, then wrap."
    )

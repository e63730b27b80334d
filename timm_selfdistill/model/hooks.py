"""The hooks by which a model reads its backbone, what they record in one call, and what a forward uses.

What is recorded belongs to the call that is under way in the hook's own thread, so that one model may serve several
threads. A hook holds no model, only its mark: a copy of a module, such as PEFT makes of a classifier, is read as well.
"""

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from operator import is_
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from timm_selfdistill.compat import contents, copy_without_hooks, forward_hooks
from timm_selfdistill.exits import Backbone, ExitPoint

Visit = Callable[[int, tuple[Tensor, ...]], Tensor | None]


class ExitReached(Exception):
    """Ends a backbone's forward at the requested exit, or at one where no image is left."""


class Call:
    """One forward of a backbone, as the hooks with a mark saw it.

    It ends at the exit `stop_at`, or where `visit` returns no rows: that is called with the index and tensors of each
    tap, and returns the rows of the images that go on [B'], or None for all of them.
    """

    def __init__(self, mark: str, stop_at: int | None, visit: Visit | None) -> None:
        self.mark, self.stop_at, self.visit = mark, stop_at, visit
        # The tapped tensors of each exit that was reached, by its index; no tensors with `visit`.
        self.taps: dict[int, tuple[Tensor, ...]] = {}
        # What entered each module of the backbone's classifier, by its path.
        self.features: dict[str, Tensor] = {}
        # What the backbone returned; None where its forward ended at an exit.
        self.output: Any = None
        # Of each exit, how many of its modules (what is tapped, and containers that end with it) run now.
        self.running: dict[int, int] = {}


class _Thread(threading.local):
    def __init__(self) -> None:
        # Set in each thread before the first forward: torch.compile fails where a forward makes the attribute.
        self.call: Call | None = None  # the one that is under way


_THREAD = _Thread()
_REPAIR = threading.Lock()
# A hook, the path of the module where it belongs, and whether it runs before the module's forward.
_Place = tuple["partial[Any]", tuple[str, ...], bool]


class Hooks:
    """The hooks of one model on its backbone.

    They run after all other hooks: so what they record is what the backbone goes on with, and a user's hook also fires
    where the forward ends. When a module was replaced after wrapping, as fusing does, they move to its replacement.
    `classifiers` are the paths of the modules of the backbone's classifier, whose input is recorded.
    """

    def __init__(self, backbone: Backbone, points: Sequence[ExitPoint], classifiers: Sequence[str] = ()) -> None:
        self._mark = uuid.uuid4().hex
        self._points = tuple(points)
        self.read_classifiers(backbone, classifiers)

    def read_classifiers(self, backbone: Backbone, classifiers: Sequence[str]) -> None:
        """Record from now on what enters these modules of the backbone's classifier."""
        self._classifiers = tuple(classifiers)
        self._attach(backbone)

    def run(self, backbone: Backbone, x: Tensor, *, stop_at: int | None = None, visit: Visit | None = None) -> Call:
        """Run the backbone and return what was recorded; raise RuntimeError if a module that is read did not run."""
        # A compiler could not trace it, and a compiled model sees no later change of its modules anyway.
        if not torch.compiler.is_compiling() and not all(_is_in_place(backbone, place) for place in self._places):
            self._attach(backbone)
        call = Call(self._mark, stop_at, visit)
        # There is an outer call where a user's hook runs the model again.
        outer = _THREAD.call
        try:
            _THREAD.call = call
            call.output = backbone(x)
        except ExitReached:
            return call
        finally:
            # Recomputation under gradient checkpointing calls the hooks again: by then they record nothing.
            _THREAD.call = outer
        missing = [point.module for index, point in enumerate(self._points) if index not in call.taps]
        missing += [name for name in self._classifiers if name not in call.features]
        if missing:
            raise _gone(backbone, missing[0])
        return call

    def remove(self, backbone: Backbone, kept: Sequence["partial[Any]"] = ()) -> None:
        """Remove this model's hooks from the backbone, or from a copy of it, except those that are kept."""
        for module in backbone.modules():
            for hooks in (forward_hooks(module, True), forward_hooks(module, False)):
                for key, hook in list(hooks.items()):
                    if _is_ours(hook) and hook.args[0] == self._mark and not any(hook is other for other in kept):
                        del hooks[key]

    def _attach(self, backbone: Backbone) -> None:
        """Put every hook after all others on the module where it belongs now, and remove it from any other."""
        with _REPAIR:
            self._places: tuple[_Place, ...] = tuple(
                (_put(hook, backbone.get_submodule(path), pre), tuple(path.split(".")), pre)
                for path, pre, hook in self._wanted(backbone)
            )
            self.remove(backbone, [hook for hook, _, _ in self._places])

    def _wanted(self, backbone: Backbone) -> Iterator[tuple[str, bool, "partial[Any]"]]:
        """Yield each hook with the path of the module where it belongs, and whether it runs before the forward."""
        for index, point in enumerate(self._points):
            paths = [path for path in _prefixes(point.module, point.name) if _can_run(backbone, path)]
            if not paths:
                raise _gone(backbone, point.module)
            members = tuple(tap.member for tap in point.taps)
            for path in paths:
                yield path, True, partial(_enter, self._mark, index)
                yield path, False, partial(_leave, self._mark, index, members)
        for name in self._classifiers:
            # Fusing may replace a classifier together with the module that holds it: they read the same.
            held = [path for path in _prefixes(name) if _can_run(backbone, path)]
            if not held or (held[-1] != name and list(backbone.get_submodule(held[-1]).children())):
                raise _gone(backbone, name)
            yield held[-1], True, partial(_record_feature, self._mark, name)


def run_unread(backbone: Backbone, x: Tensor) -> Any:
    """Return what the backbone returns, and record nothing, even where a hook of an outer call runs the model."""
    outer = _THREAD.call
    if outer is None:
        return backbone(x)
    try:
        _THREAD.call = None
        return backbone(x)
    finally:
        _THREAD.call = outer


class BareBackbone:
    """Runs a backbone in eval mode past the hooks of exits, which take some per cent of a small network's time.

    The modules with such hooks, and those that hold them, are called through copies without, which share parameters,
    buffers and all other modules with their originals: weights may change and move. Where anything else changed (a
    module was replaced, a user's hook added, an attribute set), the backbone itself runs.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        made: dict[nn.Module, nn.Module] = {}
        self._bare = copy_without_hooks(backbone, _is_ours, made)
        # Views of what the originals hold now, and what they held: compared without a loop in Python.
        self._views = [view for module, copy in made.items() if copy is not module for view in contents(module)]
        self._values = list(chain.from_iterable(self._views))

    def __call__(self, x: Tensor) -> Any:
        """Return what the backbone returns."""
        held = chain.from_iterable(self._views)
        same = sum(map(len, self._views)) == len(self._values) and all(map(is_, held, self._values))
        return run_unread(self._bare if same else self.backbone, x)


def _enter(mark: str, index: int, module: nn.Module, args: Any) -> None:
    """Note that a module of an exit runs, as a forward pre-hook."""
    call = _THREAD.call
    if call is not None and call.mark == mark:
        call.running[index] = call.running.get(index, 0) + 1


def _leave(mark: str, index: int, members: tuple[int | None, ...], module: nn.Module, args: Any, output: Any) -> Any:
    """Read what the outermost running module of an exit returned, as a forward hook; return what replaces it, or None.

    The backbone may run a container or, as under gradient checkpointing, its children.
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
            raise ExitReached
        return None
    call.taps[index] = ()
    rows = call.visit(index, tapped)
    if rows is None:
        return None
    if not len(rows):
        raise ExitReached
    return _take_rows(output, rows, len(tapped[0]))


def _record_feature(mark: str, name: str, module: nn.Module, args: Any) -> None:
    """Record what enters a module of the classifier, as a forward pre-hook."""
    call = _THREAD.call
    if call is not None and call.mark == mark:
        call.features[name] = args[0]


def _take_rows(value: Any, rows: Tensor, batch_size: int) -> Any:
    """Return a module's output for some images of the batch only.

    A tensor that has several rows per image (as TNT's patches have pixels) keeps all rows of an image together.
    """
    if isinstance(value, tuple | list):
        return type(value)(_take_rows(member, rows, batch_size) for member in value)
    if not isinstance(value, Tensor) or not value.ndim:
        return value
    if len(value) == batch_size:
        return value[rows]
    return value.reshape(batch_size, -1, *value.shape[1:])[rows].flatten(0, 1)


def _is_in_place(backbone: Backbone, place: _Place) -> bool:
    """Whether a hook is on the module at its path, with none but hooks of this file after it."""
    hook, path, pre = place
    # A copy, as another thread may add a hook meanwhile.
    for other in reversed(tuple(forward_hooks(backbone, pre, path).values())):
        if other is hook:
            return True
        if not _is_ours(other):
            return False
    return False


def _put(hook: "partial[Any]", module: nn.Module, pre: bool) -> "partial[Any]":
    """Put a hook, or an equal one that is there already, after the other hooks of a module, and return it."""
    hooks: Any = forward_hooks(module, pre)
    for key, other in list(hooks.items()):
        if _is_ours(other) and (other.func, other.args) == (hook.func, hook.args):
            hooks.move_to_end(key)
            return other
    if pre:
        module.register_forward_pre_hook(hook)
    else:
        module.register_forward_hook(hook)
    return hook


def _is_ours(hook: Callable[..., Any]) -> TypeGuard["partial[Any]"]:
    """Whether a hook is one of this file."""
    return isinstance(hook, partial) and hook.func in (_enter, _leave, _record_feature)


def _prefixes(path: str, shortest: str = "") -> list[str]:
    """Return the paths of a module and of what holds it, the outermost first."""
    parts = path.split(".")
    return [".".join(parts[:end]) for end in range(shortest.count(".") + 1, len(parts) + 1)]


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

"""What the hooks on a backbone record in the forward that is under way.

The hooks are functions bound to a tape, not closures: copied with the model, they write to the copy's tape.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

Visit = Callable[[int, tuple[Tensor, ...]], Tensor | None]


class Reached(Exception):
    """Ends a backbone's forward at an exit: the one that was asked for, or one where no image is left."""


class Tape:
    """What the hooks of one model recorded since it was started.

    `taps` holds the tapped tensors of each exit that was reached, by its index; `features`, what entered each module of
    the backbone's classifier, by its path.
    """

    def __init__(self) -> None:
        self.active = False
        self.stop_at: int | None = None
        self.visit: Visit | None = None
        self.taps: dict[int, tuple[Tensor, ...]] = {}
        self.features: dict[str, Tensor] = {}

    def start(self, stop_at: int | None = None, visit: Visit | None = None) -> None:
        """Record from now on; with `stop_at`, end the forward at that tap.

        With `visit`, record nothing but show it each tap: its index and tensors. It returns the rows of the images
        that go on [B'], or None for all of them; where it returns none, the forward ends.
        """
        self.active, self.stop_at, self.visit = True, stop_at, visit

    def stop(self) -> None:
        """Record no more and let go of what was recorded."""
        self.active, self.stop_at, self.visit = False, None, None
        self.taps, self.features = {}, {}


def record_tap(
    tape: Tape, index: int, members: tuple[int | None, ...], module: nn.Module, args: Any, output: Any
) -> Any:
    """Record what an exit's module returned, as a forward hook; end the forward there, or shrink its batch, if asked.

    Returns:
        What takes the output's place, or None to leave it.
    """
    if not tape.active:
        return None
    tapped = tuple(output if member is None else output[member] for member in members)
    if tape.visit is not None:
        rows = tape.visit(index, tapped)
        if rows is None:
            return None
        if not len(rows):
            raise Reached
        return _take_rows(output, rows, len(tapped[0]))
    tape.taps[index] = tapped
    if tape.stop_at == index:
        raise Reached
    return None


def record_feature(tape: Tape, name: str, module: nn.Module, args: Any) -> None:
    """Record what enters a module of the classifier, as a forward pre-hook."""
    if tape.active:
        tape.features[name] = args[0]


def is_bound_to(hook: Callable[..., Any], tape: Tape) -> bool:
    """Whether a hook writes to this tape."""
    return isinstance(hook, partial) and bool(hook.args) and hook.args[0] is tape


def remove_hooks(model: nn.Module, tape: Tape) -> None:
    """Remove from a model all hooks that write to a tape."""
    for module in model.modules():
        kinds: tuple[dict[int, Callable[..., Any]], ...] = (module._forward_hooks, module._forward_pre_hooks)
        for hooks in kinds:
            for key in [key for key, hook in hooks.items() if is_bound_to(hook, tape)]:
                del hooks[key]


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

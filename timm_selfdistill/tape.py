"""What the hooks on a backbone record in the forward that is under way.

The hooks are functions bound to a tape, not closures: copied with the model, they write to the copy's tape.
"""

from typing import Any

from torch import Tensor, nn


class Reached(Exception):
    """Ends a backbone's forward at the exit that was asked for."""


class Tape:
    """What the hooks of one model recorded since it was started.

    `taps` holds the tapped tensors of each exit that was reached, by its index; `features`, what entered each module of
    the backbone's classifier, by its path.
    """

    def __init__(self) -> None:
        self.active = False
        self.stop_at: int | None = None
        self.taps: dict[int, tuple[Tensor, ...]] = {}
        self.features: dict[str, Tensor] = {}

    def start(self, stop_at: int | None = None) -> None:
        """Record from now on; with `stop_at`, end the forward at that tap."""
        self.active, self.stop_at = True, stop_at

    def stop(self) -> None:
        """Record no more and let go of what was recorded."""
        self.active, self.stop_at = False, None
        self.taps, self.features = {}, {}


def record_tap(
    tape: Tape, index: int, members: tuple[int | None, ...], module: nn.Module, args: Any, output: Any
) -> None:
    """Record what an exit's module returned, as a forward hook; end the forward there if that was asked for."""
    if not tape.active:
        return
    tape.taps[index] = tuple(output if member is None else output[member] for member in members)
    if tape.stop_at == index:
        raise Reached


def record_feature(tape: Tape, name: str, module: nn.Module, args: Any) -> None:
    """Record what enters a module of the classifier, as a forward pre-hook."""
    if tape.active:
        tape.features[name] = args[0]

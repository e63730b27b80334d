"""Measure what a run costs, its multiply-accumulates and its time, and limit what it costs to build a model."""

import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.module_tracker import ModuleTracker


class MacCounter(FlopCounterMode):
    """Counts the multiply-accumulates of convolutions, matrix products, attention and LSTMs inside a `with` block.

    Only the sum is counted: torch's counter per module fails on CaiT and PiT, and loses its place when an exception
    ends a forward. LSTMs and the attention of CPUs, for which not every torch has a formula, are added. `macs` may be
    read at any time.
    """

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_FORMULAS)
        self.mod_tracker = _WholeRun()

    @property
    def macs(self) -> int:
        """Multiply-accumulates since the block was entered."""
        return int(self.get_total_flops()) // 2


class Stopwatch:
    """Adds up the seconds of the phases of a run; `str` shows them in the order in which they began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __str__(self) -> str:
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self.seconds.items())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the body's time for a phase."""
        self.seconds.setdefault(name, 0.0)
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - begin


def median_seconds(
    measure: Callable[[], Sequence[float]], *, warm_up: int, rounds: int, seconds: float
) -> tuple[list[float], int]:
    """Return the median seconds of several things, and the number of rounds; `measure` returns the seconds of each.

    They take turns, so that a machine that slows down meanwhile slows all of them: `torch.utils.benchmark.Timer`
    measures one thing at a time. After `warm_up` rounds that do not count, there are at least `rounds`, which take at
    least `seconds` together.
    """
    for _ in range(warm_up):
        measure()
    found: list[Sequence[float]] = []
    deadline = time.perf_counter() + seconds
    while len(found) < rounds or time.perf_counter() < deadline:
        found.append(measure())
    return [statistics.median(taken) for taken in zip(*found, strict=True)], len(found)


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return how long something takes on a device, which is idle before and after."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class TooLargeError(BaseException):
    """A model has too many parts, of the kind that is the text; a `BaseException`, so that no builder catches it."""


class BuildLimit:
    """Raises `TooLargeError` in a `with` block when this thread builds more than a limit; may be entered again.

    Args:
        parameters: Most parameters that are registered with modules.
        modules: Most modules that are registered with others.
        calls: Most calls of functions; not counted by default.
    """

    def __init__(self, parameters: int, modules: int, calls: int | None = None) -> None:
        self._thread = threading.get_ident()
        self._left = {"parameters": parameters, "modules": modules}
        self._counts_calls = calls is not None
        self._calls = calls or 0

    def __enter__(self) -> Self:
        self._handles = (
            register_module_parameter_registration_hook(lambda *args: self._count("parameters")),
            register_module_module_registration_hook(lambda *args: self._count("modules")),
        )
        self._profile: Any = sys.getprofile()
        if self._counts_calls:
            sys.setprofile(self._count_call)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._counts_calls:
            if hasattr(self._profile, "enable"):  # cProfile's, which sys.setprofile does not take
                self._profile.enable()
            else:
                sys.setprofile(self._profile)
        for handle in self._handles:
            handle.remove()

    def _count(self, part: str) -> None:
        # Hooks on the building of modules are those of all threads.
        if threading.get_ident() != self._thread:
            return
        if self._left[part] <= 0:
            raise TooLargeError(part)
        self._left[part] -= 1

    def _count_call(self, frame: FrameType, event: str, arg: object) -> None:
        # Millions of times, so nothing else is done here.
        self._calls -= 1
        if self._calls < 0:
            raise TooLargeError("work")


class _WholeRun(ModuleTracker):
    """Tells the counter that everything belongs to the whole run, and hangs no hooks on any module."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        return None


def _rnn_flops(input: Sequence[int], weights: Sequence[Sequence[int]]) -> int:
    """Count the matrices among the weights, each applied at every step."""
    steps = input[0] * input[1]
    return sum(2 * steps * shape[0] * shape[1] for shape in weights if len(shape) == 2)


# Called with the shapes of an operation's arguments.
_FORMULAS: dict[Any, Callable[..., int]] = {
    # One direction of one layer, with two matrices and two biases.
    torch.ops.aten.mkldnn_rnn_layer: lambda input, *weights, **kwargs: _rnn_flops(input, weights[:4]),
    # All directions and layers.
    torch.ops.aten._cudnn_rnn: lambda input, weights, *_, **kwargs: _rnn_flops(input, weights),
    # The kernel of CPUs, which torch 2.14 runs without gradients and does not count.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **kwargs: sdpa_flop_count(q, k, v),
}

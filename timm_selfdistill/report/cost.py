"""What each exit costs: parameters, multiply-accumulates and time, of what really runs."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_selfdistill.flops import MacCounter
from timm_selfdistill.model import SelfDistillModel

LATENCY_BATCH_SIZE = 16

_WARM_UP_ROUNDS = 2
_MIN_ROUNDS = 5
_SECONDS = 2.0


@dataclass(frozen=True)
class Cost:
    """What one way through the network costs.

    Args:
        params: Parameters that it needs.
        macs: Multiply-accumulates for one image.
        latency_ms: Median milliseconds for one batch.
    """

    params: int
    macs: int
    latency_ms: float


@dataclass(frozen=True)
class Costs:
    """The costs of a model and how they were measured.

    Args:
        exits: K + 1 costs, the last the backbone's own.
        ensemble: The cost of running all of them at once.
        rounds: How often each was timed.
    """

    exits: tuple[Cost, ...]
    ensemble: Cost
    rounds: int


def measure_costs(model: SelfDistillModel, input_size: tuple[int, int, int], batch_size: int) -> Costs:
    """Run the model to each exit and to all of them; parameters, statistics, modes and random numbers stay as they are.

    Args:
        model: The wrapped model.
        input_size: Channels, height and width of one image.
        batch_size: Number of images in a timed batch.

    Returns:
        The costs.
    """
    parameter = next(model.parameters())
    batch = torch.randn(batch_size, *input_size, generator=torch.Generator().manual_seed(0))
    batch = batch.to(device=parameter.device, dtype=parameter.dtype)
    with _evaluating(model):
        # Counted before timed: what a module caches in its first forward is then no inference tensor.
        counts = [_count(model, partial(run, batch[:1])) for run in _runs(model)]
        latencies, rounds = _time([partial(run, batch) for run in _runs(model)], parameter.device)
    costs = [Cost(*count, latency) for count, latency in zip(counts, latencies, strict=True)]
    return Costs(tuple(costs[:-1]), costs[-1], rounds)


def _runs(model: SelfDistillModel) -> list[Callable[[Tensor], Tensor]]:
    """Return what computes the logits of each exit, and last of the ensemble."""

    def run_ensemble(x: Tensor) -> Tensor:
        return torch.stack(model(x, return_exits=True).logits).mean(0)

    return [*(partial(model.forward_exit, exit=index) for index in range(model.num_exits + 1)), run_ensemble]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run the body in eval mode, then restore every module's mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        # The call lets modules drop what they cached; the modes below it may be mixed.
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training


def _count(model: nn.Module, run: Callable[[], Tensor]) -> tuple[int, int]:
    """Return the parameters that `run` needs, each once, and its multiply-accumulates.

    A parameter is needed if its module ran, or if it was read by an operation: some modules apply the weight of
    another one that never runs itself, and some keep in eval mode what they once computed from theirs.
    """
    needed: dict[int, int] = {}

    def note(tensors: Sequence[Any]) -> None:
        needed.update((id(tensor), tensor.numel()) for tensor in tensors if isinstance(tensor, nn.Parameter))

    def note_module(module: nn.Module, args: Any) -> None:
        note(list(module.parameters(recurse=False)))

    handles = [module.register_forward_pre_hook(note_module) for module in model.modules()]
    try:
        with torch.no_grad(), MacCounter() as counter, _OperandWatch(note):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return sum(needed.values()), counter.macs


class _OperandWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls `note` with the operands of every operation."""

    def __init__(self, note: Callable[[Sequence[Any]], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.note = note

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.note(tree_leaves((args, kwargs)))
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def _time(runs: Sequence[Callable[[], Tensor]], device: torch.device) -> tuple[list[float], int]:
    """Return the median milliseconds of each run, and the number of rounds.

    The runs take turns, so that a machine that slows down meanwhile slows all of them.
    """
    for _ in range(_WARM_UP_ROUNDS):
        for run in runs:
            run()
    seconds: list[list[float]] = [[] for _ in runs]
    deadline = time.perf_counter() + _SECONDS
    while len(seconds[-1]) < _MIN_ROUNDS or time.perf_counter() < deadline:
        for run, taken in zip(runs, seconds, strict=True):
            _synchronize(device)
            start = time.perf_counter()
            run()
            _synchronize(device)
            taken.append(time.perf_counter() - start)
    return [1000 * statistics.median(taken) for taken in seconds], len(seconds[-1])


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

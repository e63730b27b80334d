"""What each exit costs: parameters, multiply-accumulates and time, of what really runs."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from timm_selfdistill.measure import MacCounter
from timm_selfdistill.model import SelfDistillModel
from timm_selfdistill.usage import watch_usage

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
    """Return the parameters that `run` needs, each once, and its multiply-accumulates."""
    with torch.no_grad(), MacCounter() as counter, watch_usage(model) as usage:
        run()
    needed = (tensor.numel() for tensor in usage.tensors.values() if isinstance(tensor, nn.Parameter))
    return sum(needed), counter.macs


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
            taken.append(seconds_of(run, device))
    return [1000 * statistics.median(taken) for taken in seconds], len(seconds[-1])


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Return how long something takes on a device, which has done all before at the start and all of it at the end."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)

"""What the way to each exit costs: the part of the backbone that runs, and the heads that are asked."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

import torch
from torch import Tensor

from timm_selfdistill.early_exit import EarlyExitConfig
from timm_selfdistill.exits import untouched
from timm_selfdistill.heads import ExitHead
from timm_selfdistill.measure import MacCounter, synchronize
from timm_selfdistill.model import SelfDistillModel

_WARM_UP_ROUNDS: Final = 3
_MIN_ROUNDS: Final = 7
_SECONDS: Final = 2.0


@dataclass(frozen=True)
class PathCosts:
    """Costs of one image, in multiply-accumulates or in seconds.

    Args:
        backbone: Of the backbone up to each of the K exits, and of all of it: K + 1 numbers, growing.
        heads: Of each exit's head.
    """

    backbone: tuple[float, ...]
    heads: tuple[float, ...]

    @property
    def full(self) -> float:
        """Of the plain backbone."""
        return self.backbone[-1]

    @property
    def every_exit(self) -> float:
        """Of the backbone and all heads, as the ensemble needs them."""
        return self.full + sum(self.heads)

    def exit(self, index: int) -> float:
        """Return what one exit alone costs, K the backbone's own classifier."""
        return self.backbone[index] + (self.heads[index] if index < len(self.heads) else 0)

    def paths(self, asked: Sequence[bool]) -> Tensor:
        """Return what an image costs that leaves at each exit [K + 1], float64.

        Args:
            asked: Whether each of the K exits is asked, if an image comes by.
        """
        heads = [cost if runs else 0.0 for cost, runs in zip(self.heads, asked, strict=True)]
        backbone = torch.tensor(self.backbone, dtype=torch.float64)
        return backbone + torch.tensor([*heads, 0.0], dtype=torch.float64).cumsum(0)

    def mean(self, config: EarlyExitConfig, exit_index: Tensor) -> float:
        """Return the mean over images that leave at these exits [N] under these settings, each as if it came alone."""
        return float(self.paths([config.asks(exit) for exit in range(len(self.heads))])[exit_index].mean())


@torch.no_grad()
def measure_path_macs(model: SelfDistillModel, input_size: tuple[int, int, int]) -> PathCosts:
    """Count the multiply-accumulates of each part of the way, in one forward of one image.

    Args:
        model: The wrapped model; left as it was.
        input_size: Channels, height and width of one image.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    backbone: list[int] = []
    heads: list[int] = []
    with untouched(model), MacCounter() as counter:

        def visit(index: int, taps: tuple[Tensor, ...]) -> None:
            before = counter.macs
            backbone.append(before - sum(heads))
            head = model.heads[index]
            assert isinstance(head, ExitHead)
            head.classify(*taps)
            heads.append(counter.macs - before)

        model.forward_while(image, visit)
        backbone.append(counter.macs - sum(heads))
    return PathCosts(tuple(backbone), tuple(heads))


@torch.no_grad()
def measure_path_seconds(model: SelfDistillModel, input_size: tuple[int, int, int], batch_size: int) -> PathCosts:
    """Time each part of the way, on the model's device, in forwards of whole batches.

    Args:
        model: The wrapped model; left as it was.
        input_size: Channels, height and width of one image.
        batch_size: Images in a batch.

    Returns:
        Seconds of an image, from the median of each part over at least seven forwards and two seconds.
    """
    parameter = next(model.parameters())
    batch = torch.zeros(batch_size, *input_size, device=parameter.device, dtype=parameter.dtype)
    rounds: list[list[float]] = []
    deadline = float("inf")
    with untouched(model):
        while len(rounds) < _WARM_UP_ROUNDS + _MIN_ROUNDS or time.perf_counter() < deadline:
            if len(rounds) == _WARM_UP_ROUNDS:
                deadline = time.perf_counter() + _SECONDS
            rounds.append(_time_parts(model, batch))
    parts = [statistics.median(taken) / batch_size for taken in zip(*rounds[_WARM_UP_ROUNDS:], strict=True)]
    # Backbone, head, backbone, head, ..., backbone.
    return PathCosts(tuple(accumulate(parts[::2])), tuple(parts[1::2]))


def _time_parts(model: SelfDistillModel, batch: Tensor) -> list[float]:
    """Return the seconds of each part of one forward with all heads, in the order in which they run."""
    moments: list[float] = []

    def mark() -> None:
        synchronize(batch.device)
        moments.append(time.perf_counter())

    def visit(index: int, taps: tuple[Tensor, ...]) -> None:
        mark()
        head = model.heads[index]
        assert isinstance(head, ExitHead)
        head.classify(*taps)
        mark()

    mark()
    model.forward_while(batch, visit)
    mark()
    return [later - before for before, later in pairwise(moments)]

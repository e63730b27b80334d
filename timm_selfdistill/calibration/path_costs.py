"""The cost of an image that leaves at an exit: the backbone up to there, and the heads that run on the way."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import Final

import torch
from torch import Tensor

from timm_selfdistill.early_exit import EarlyExit, EarlyExitConfig, StageCosts, measure_stage_costs
from timm_selfdistill.exits import unchanged
from timm_selfdistill.measure import MacCounter, seconds_of
from timm_selfdistill.model import SelfDistillModel

_MIN_IMAGES: Final = 128
_MIN_BATCHES: Final = 4
_SPEEDUP_ROUNDS: Final = 3


@dataclass(frozen=True)
class PathCosts:
    """Costs of one image, in multiply-accumulates or in seconds.

    Args:
        backbone: Of the backbone up to each of the K exits, and of all of it: K + 1 numbers, growing.
        heads: Of each exit's head.
    """

    backbone: tuple[float, ...]
    heads: tuple[float, ...]

    @classmethod
    def of_batch(cls, costs: StageCosts, batch_size: int) -> "PathCosts":
        """Return the seconds of one image of a batch of this size."""
        stages, heads = ([line.at(batch_size) / batch_size for line in part] for part in (costs.stages, costs.heads))
        return cls(tuple(accumulate(stages)), tuple(heads))

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

    def paths(self, heads_run: Sequence[bool]) -> Tensor:
        """Return what an image costs that leaves at each exit [K + 1], float64, if these of the K heads run."""
        heads = [cost if runs else 0.0 for cost, runs in zip(self.heads, heads_run, strict=True)]
        backbone = torch.tensor(self.backbone, dtype=torch.float64)
        return backbone + torch.tensor([*heads, 0.0], dtype=torch.float64).cumsum(0)

    def paths_under(self, config: EarlyExitConfig) -> Tensor:
        """Return what an image costs that leaves at each exit [K + 1] under these settings."""
        return self.paths([config.runs_head(index) for index in range(len(self.heads))])

    def mean(self, config: EarlyExitConfig, exit_index: Tensor) -> float:
        """Return the mean over images that leave at these exits [N] under these settings, each as if it came alone."""
        return float(self.paths_under(config)[exit_index].mean())


@torch.no_grad()
def measure_path_macs(model: SelfDistillModel, input_size: tuple[int, int, int]) -> PathCosts:
    """Count the multiply-accumulates of backbone and heads, in one forward of one image.

    Args:
        model: The wrapped model; left unchanged.
        input_size: Channels, height and width of one image.
    """
    parameter = next(model.parameters())
    image = torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)
    marks = []
    with unchanged(model), MacCounter() as counter:

        def visit(index: int, taps: tuple[Tensor, ...]) -> None:
            marks.append(counter.macs)
            model.head_of(index).classify(*taps)
            marks.append(counter.macs)

        model.forward_while(image, visit)
        parts = [later - before for before, later in pairwise([0, *marks, counter.macs])]
    return PathCosts(tuple(accumulate(parts[::2])), tuple(parts[1::2]))


def measure_path_seconds(model: SelfDistillModel, input_size: tuple[int, int, int], batch_size: int) -> PathCosts:
    """Time backbone and heads, on the model's device, in forwards of whole batches.

    Args:
        model: The wrapped model; left unchanged.
        input_size: Channels, height and width of one image.
        batch_size: Images in a batch.

    Returns:
        Seconds of an image, as `measure_stage_costs` finds them; those of a head with the decision who leaves.
    """
    never = EarlyExitConfig((math.inf,) * model.num_exits)
    return PathCosts.of_batch(measure_stage_costs(model, never, batch_size, input_size), batch_size)


def images_to_time(batch_size: int) -> int:
    """Return how many images `measure_speedup` needs for batches of this size."""
    return max(_MIN_IMAGES, _MIN_BATCHES * batch_size)


@torch.no_grad()
def measure_speedup(model: SelfDistillModel, config: EarlyExitConfig, images: Tensor, batch_size: int) -> float:
    """Return the time of the plain backbone over that with early exit: the median of three rounds over images
    [N, C, H, W], batch by batch in turns.

    Images fewer than a batch are repeated; those that do not fill a batch are left out.
    """
    images = images.repeat(-(-batch_size // len(images)), 1, 1, 1).to(next(model.parameters()))
    batches = [batch for batch in torch.split(images, batch_size) if len(batch) == batch_size]
    ways = (model, EarlyExit.from_config(model, config))
    for way in ways:
        way(batches[0])
    ratios = []
    for _ in range(_SPEEDUP_ROUNDS):
        turns = [[seconds_of(partial(way, batch), batch.device) for way in ways] for batch in batches]
        plain, early = map(sum, zip(*turns, strict=True))
        ratios.append(plain / early)
    return statistics.median(ratios)

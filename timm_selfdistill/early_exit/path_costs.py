"""What images cost by where they leave: the path to each exit, the time of a batch, and which exits pay."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Final

import torch
from torch import Tensor

from timm_selfdistill.early_exit.leaving import exit_answers, exit_confidence, first_confident
from timm_selfdistill.early_exit.rules import EarlyExitConfig
from timm_selfdistill.early_exit.stage_costs import StageCosts, measure_stage_costs
from timm_selfdistill.exits import unchanged
from timm_selfdistill.measure import MacCounter
from timm_selfdistill.model import SelfDistillModel

_MARGIN: Final = 0.02
"""What early exit must save of the plain backbone's time: bookkeeping, and the error of the times, may take as much."""


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
        return self.paths(config.heads_run)

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
    marks = [0]
    with unchanged(model), MacCounter() as counter:

        def visit(index: int, taps: tuple[Tensor, ...]) -> None:
            marks.append(counter.macs)
            model.head_of(index).classify(*taps)
            marks.append(counter.macs)

        model.forward_while(image, visit)
        marks.append(counter.macs)
    parts = [later - before for before, later in pairwise(marks)]
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


@torch.no_grad()
def close_exits(
    model: SelfDistillModel,
    config: EarlyExitConfig,
    costs: StageCosts,
    images: Tensor,
    batch_size: int,
    shrinks: Sequence[bool],
) -> EarlyExitConfig:
    """Return settings in which exits that do not pay let no image leave: their threshold is infinity.

    One exit after the other is closed as long as that makes a batch of `images` [N, C, H, W] faster; where early exit
    then saves less than 2 % of the plain backbone's time, all are.
    """
    parameter = next(model.parameters())
    with unchanged(model):
        parts = [model(part.to(parameter), return_exits=True).logits for part in images.split(batch_size)]
    answers = exit_answers(config, torch.cat([torch.stack(part) for part in parts], 1), model.ensemble)
    confidence = exit_confidence(answers, config).cpu()

    def seconds(settings: EarlyExitConfig) -> float:
        leaving = first_confident(confidence, settings.thresholds).bincount(minlength=len(confidence) + 1)
        reaching = leaving.flip(0).cumsum(0).flip(0) / leaving.sum()
        return expected_seconds(settings, costs, reaching.tolist(), batch_size, shrinks)

    best = config
    while True:
        closed = [_close(best, [exit]) for exit, value in enumerate(best.thresholds) if value < math.inf]
        better = min(closed, key=seconds, default=best)
        if seconds(better) >= seconds(best):
            break
        best = better
    plain = _close(config, range(model.num_exits))
    return best if seconds(best) < (1 - _MARGIN) * seconds(plain) else plain


def expected_seconds(
    config: EarlyExitConfig, costs: StageCosts, reaching: Sequence[float], batch_size: int, shrinks: Sequence[bool]
) -> float:
    """Return what a batch takes, by the share of all images that reaches each of the K exits and the backbone's end."""
    total, rows = 0.0, float(batch_size)
    for exit, (share, stage) in enumerate(zip(reaching, costs.stages, strict=True)):
        # Images leave independently: how likely the stage runs, and how many rows it then has, times that.
        runs = 1 - (1 - share) ** batch_size
        rows = batch_size * share if exit and shrinks[exit - 1] else rows * runs
        lines = [stage]
        if exit < len(costs.heads) and config.heads_run[exit]:
            lines.append(costs.heads[exit])
        if exit and batch_size > 1 and shrinks[exit - 1] and config.thresholds[exit - 1] < math.inf:
            lines.append(costs.takes[exit - 1])
        total += sum(runs * line.fixed + rows * line.per_row for line in lines)
    return total


def _close(config: EarlyExitConfig, exits: Sequence[int]) -> EarlyExitConfig:
    thresholds = [math.inf if exit in exits else value for exit, value in enumerate(config.thresholds)]
    return replace(config, thresholds=tuple(thresholds))

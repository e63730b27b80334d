"""Which exits pay, by what the parts of a network take and by where images leave; the others are closed."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from timm_selfdistill.early_exit.replay import exit_answers, exit_confidence, first_confident
from timm_selfdistill.early_exit.rules import EarlyExitConfig
from timm_selfdistill.early_exit.stage_costs import StageCosts
from timm_selfdistill.exits import unchanged
from timm_selfdistill.model import SelfDistillModel

_MARGIN: Final = 0.02
"""What early exit must save of the plain backbone's time: bookkeeping, and the error of the times, may take as much."""


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

    One exit after the other is closed as long as that makes a batch faster; where early exit then saves less than 2 %
    of the plain backbone's time, all are.

    Args:
        model: The wrapped model; left unchanged.
        config: The settings.
        costs: What the parts of the network take.
        images: Images [N, C, H, W] like those to come.
        batch_size: How many come together.
        shrinks: For each added exit, whether the backbone runs on with a part of the batch after it.
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
        closed = [_close(best, exit) for exit, value in enumerate(best.thresholds) if value < math.inf]
        better = min(closed, key=seconds, default=best)
        if seconds(better) >= seconds(best):
            break
        best = better
    plain = replace(config, thresholds=(math.inf,) * len(config.thresholds))
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
        heads = [costs.heads[exit]] if exit < len(costs.heads) and config.heads_run[exit] else []
        total += sum(runs * line.fixed + rows * line.per_row for line in (stage, *heads))
        if exit and batch_size > 1 and shrinks[exit - 1] and config.thresholds[exit - 1] < math.inf:
            total += runs * costs.takes[exit - 1].fixed + rows * costs.takes[exit - 1].per_row
    return total


def _close(config: EarlyExitConfig, exit: int) -> EarlyExitConfig:
    thresholds = [math.inf if other == exit else value for other, value in enumerate(config.thresholds)]
    return replace(config, thresholds=tuple(thresholds))

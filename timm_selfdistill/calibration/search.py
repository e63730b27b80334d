"""Search for thresholds: how right and how dear early exit is, over all that one threshold could be."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import torch
from torch import Tensor

from timm_selfdistill.calibration.costs import PathCosts
from timm_selfdistill.calibration.logits import ExitLogits, confidences, first_sure
from timm_selfdistill.early_exit import EarlyExitConfig

Score = Callable[[Tensor, Tensor], Tensor]
"""How good outcomes are, the larger the better, -inf for those that are not allowed.

Args:
    good: Images that get a good answer [J].
    costs: What all images together cost [J].
"""

# Of the thresholds of an exit that are tried, each lets at least twice as many images more leave than the one before as
# the square root of their number, the size of chance's part in it: finer steps would learn these images by heart.
_STEP: Final = 2
_MOST_LEVELS: Final = 100
# What a cost is worth, as the share of good answers that a whole backbone may cost.
_PRICES: Final = tuple(10 ** (-4 + step / 5) for step in range(26))
_SHARES: Final = tuple(10 ** (-2 + step / 6) for step in range(25))
_HALVINGS: Final = 40


@dataclass(frozen=True)
class Candidate:
    """Thresholds and what they give on the images of the search.

    Args:
        thresholds: K thresholds.
        good: Images that get a good answer.
        cost: Mean cost of an image.
    """

    thresholds: tuple[float, ...]
    good: int
    cost: float


class Search:
    """Early exit on a split, with thresholds that are still to be found.

    An answer is good if it is right or, with `against_backbone`, if it is not wrong where the backbone's own classifier
    is right.

    Args:
        stored: The logits of the split.
        costs: What the way to each exit costs.
        settings: Rule, temperatures and fallback; its thresholds do not count.
        against_backbone: What good is.
    """

    def __init__(
        self, stored: ExitLogits, costs: PathCosts, settings: EarlyExitConfig, *, against_backbone: bool = False
    ) -> None:
        self.num_exits, self.num_images = stored.num_exits, len(stored)
        self.settings = replace(settings, thresholds=(math.inf,) * self.num_exits)
        # NaN is never sure.
        self.confidence = confidences(stored.logits, settings).nan_to_num(nan=-math.inf)
        correct = stored.correct
        last = stored.ensemble_correct if settings.fallback == "ensemble" else correct[-1]
        self._good = torch.cat([correct[:-1], last.unsqueeze(0)])
        if against_backbone:
            self._good |= ~correct[-1]
        self._costs = costs
        self._order = self.confidence.argsort(-1, descending=True)
        self._levels = [self._thresholds_to_try(exit) for exit in range(self.num_exits)]
        # How many images each of them lets leave, if all came by.
        self._counts = [
            (row >= levels.unsqueeze(1)).sum(1) for row, levels in zip(self.confidence, self._levels, strict=True)
        ]

    def candidate(self, thresholds: Sequence[float]) -> Candidate:
        """Return what thresholds give."""
        index = first_sure(self.confidence, thresholds)
        cost = self._paths(thresholds)[index].sum()
        return Candidate(tuple(thresholds), int(self._goodness(index).sum()), float(cost) / self.num_images)

    def shares(self, base: float) -> Candidate:
        """Return what MSDNet's thresholds give under which a share of base^k leaves at exit k."""
        thresholds = share_thresholds(self.confidence, base)
        if self.settings.rule == "patience":
            thresholds = tuple(value if value == math.inf else math.ceil(value) for value in thresholds)
        return self.candidate(thresholds)

    def shares_within(self, most: float) -> Candidate | None:
        """Return what MSDNet's thresholds give for a budget: the largest base that keeps to it on these images.

        Args:
            most: Mean cost of an image.

        Returns:
            The candidate, or None if not even the first exit keeps to the budget.
        """
        best = self.shares(0.0)
        if best.cost > most:
            return None
        low, high = math.log(1e-6), math.log(1e6)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            candidate = self.shares(math.exp(middle))
            if candidate.cost <= most:
                best, low = candidate, middle
            else:
                high = middle
        return best

    def explore(self) -> list[Candidate]:
        """Return thresholds of many costs: what fixed exits and MSDNet's shares give, and what `climb` makes of these
        for many prices.
        """
        never = (math.inf,) * self.num_exits
        found = [self.candidate(never)]
        found += [self.candidate((*never[:exit], 0.0, *never[exit + 1 :])) for exit in range(self.num_exits)]
        found += [self.shares(base) for base in _SHARES]
        for price in _PRICES:
            score = partial(self._worth, price)
            start = max(found, key=lambda item: float(score(*self._totals(item))))
            found.append(self.climb(start, score))
        return found

    def climb(self, start: Candidate, score: Score) -> Candidate:
        """Change one threshold after the other to the best of those that are tried, until nothing gets better."""
        thresholds = list(start.thresholds)
        best = float(score(*self._totals(start)))
        improved = True
        while improved:
            improved = False
            for exit in reversed(range(self.num_exits)):
                scores = score(*self._scan(thresholds, exit))
                choice = int(scores.argmax())
                if float(scores[choice]) > best:
                    best, improved = float(scores[choice]), True
                    thresholds[exit] = float(self._levels[exit][choice])
        return self.candidate(thresholds)

    def _scan(self, thresholds: Sequence[float], exit: int) -> tuple[Tensor, Tensor]:
        """Return good answers [J] and multiply-accumulates [J] for each threshold that is tried at an exit."""
        passed = [*thresholds[:exit], math.inf, *thresholds[exit + 1 :]]
        index = first_sure(self.confidence, passed)
        come_by = index > exit
        paths = self._paths([*thresholds[:exit], 0.0, *thresholds[exit + 1 :]])
        stay_good, stay_costs = self._goodness(index), paths[index]
        # What changes as one image after the other, the surest first, leaves here.
        order = self._order[exit]
        gained = ((self._good[exit].long() - stay_good.long()) * come_by)[order].cumsum(0)
        saved = ((stay_costs - paths[exit]) * come_by)[order].cumsum(0)
        counts = self._counts[exit]
        good = stay_good.sum() + torch.cat([gained.new_zeros(1), gained])[counts]
        costs = stay_costs.sum() - torch.cat([saved.new_zeros(1), saved])[counts]
        if not self.settings.asks(exit):
            # The first threshold is infinity: nobody leaves, and the head does not run.
            costs[0] -= self._costs.heads[exit] * int(come_by.sum())
        return good.double(), costs

    def _thresholds_to_try(self, exit: int) -> Tensor:
        """Return infinity, thresholds that let about equally many images more leave each, and one that lets all."""
        values = self.confidence[exit][self._order[exit]]
        values, counts = torch.unique_consecutive(values[values > -math.inf], return_counts=True)
        # A threshold can only lie between two different values: how many images are above each of these places.
        above = counts.cumsum(0)[:-1]
        images = int(counts.sum())
        steps = max(2, min(_MOST_LEVELS, math.isqrt(images) // _STEP))
        wanted = torch.arange(1, steps) * (images / steps)
        places = torch.searchsorted(above.double(), wanted.double())
        used = sorted(set(places[places < len(above)].tolist()))
        levels = [self._between(values[place + 1], values[place]) for place in used]
        return torch.tensor([math.inf, *levels, 0.0], dtype=values.dtype)

    def _between(self, lower: Tensor, upper: Tensor) -> float:
        return float(upper) if self.settings.rule == "patience" else between(lower, upper)

    def _paths(self, thresholds: Sequence[float]) -> Tensor:
        config = replace(self.settings, thresholds=tuple(thresholds))
        return self._costs.paths([config.asks(exit) for exit in range(self.num_exits)])

    def _goodness(self, index: Tensor) -> Tensor:
        return self._good[index, torch.arange(self.num_images)]

    def _totals(self, candidate: Candidate) -> tuple[Tensor, Tensor]:
        totals = (candidate.good, candidate.cost * self.num_images)
        return torch.tensor(totals[0]).double(), torch.tensor(totals[1]).double()

    def _worth(self, price: float, good: Tensor, costs: Tensor) -> Tensor:
        return good - price * costs / self._costs.full


def share_thresholds(confidence: Tensor, base: float) -> tuple[float, ...]:
    """Return thresholds under which the share of images that leave at exit k is proportional to base^k.

    As in the code of "Multi-Scale Dense Networks", https://arxiv.org/abs/1703.09844: each exit lets those leave that it
    is surest of among the images that come by, and the last takes all that are left. There, a threshold is the
    confidence of the last image that leaves; here it lies half-way to that of the next one, so that rounding does not
    decide.

    Args:
        confidence: How sure every exit is [K, N], -inf for never.
        base: 0 lets all leave at the first exit; the larger, the more go on.

    Returns:
        K thresholds.
    """
    exits, images = confidence.shape
    # Written with the smaller of base and 1 / base: no power is too large.
    weights = [base**exit if base <= 1 else (1 / base) ** (exits - exit) for exit in range(exits + 1)]
    left = torch.ones(images, dtype=torch.bool)
    thresholds = []
    for row, weight in zip(confidence, weights, strict=False):
        values = row[left & (row > -math.inf)].sort(descending=True).values
        # The shares of ten images are 3.0000000000000004 and the like.
        leaving = min(math.floor(images * weight / sum(weights) + 1e-9), len(values))
        if leaving == 0:
            thresholds.append(math.inf)
            continue
        lower = values[leaving] if leaving < len(values) else values[-1]
        thresholds.append(between(lower, values[leaving - 1]))
        left &= row < torch.tensor(thresholds[-1], dtype=row.dtype)
    return tuple(thresholds)


def between(lower: Tensor, upper: Tensor) -> float:
    """Return a number above `lower`, where it is smaller than `upper`, and at most `upper`, in their own precision."""
    middle = lower + (upper - lower) / 2
    return float(middle if middle > lower else upper)


def frontier(found: Sequence[Candidate]) -> list[Candidate]:
    """Return those that have more good answers than all that are as cheap, from cheap to dear."""
    kept: list[Candidate] = []
    for candidate in sorted(found, key=lambda item: (item.cost, -item.good)):
        if not kept or candidate.good > kept[-1].good:
            kept.append(candidate)
    return kept

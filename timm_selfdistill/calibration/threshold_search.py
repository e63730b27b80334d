"""Search for thresholds: how many answers are right, and what they cost, over all that one threshold could be."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Final, NamedTuple

import torch
from torch import Tensor

from timm_selfdistill.early_exit import EarlyExitConfig, PathCosts, exit_answers, exit_confidence, first_confident
from timm_selfdistill.exit_logits import ExitLogits, is_right
from timm_selfdistill.staged import ROUNDING

# From the images that get a good answer [J], and what all images together cost [J], how good outcomes are: the larger
# the better, -inf for those that are not allowed.
Score = Callable[[Tensor, Tensor], Tensor]

# Of the thresholds of an exit that are tried, each lets at least twice as many images more leave than the one before as
# the square root of their number, the size of chance's part in it: finer steps would overfit these images.
_STEP: Final = 2
_MAX_LEVELS: Final = 100
# What a cost is worth, as the share of good answers that a whole backbone may cost.
_PRICES: Final = tuple(10 ** (-4 + step / 5) for step in range(26))
_BASES: Final = tuple(10 ** (-2 + step / 6) for step in range(25))
# MSDNet's base for a budget lies between 1 / this and this.
_LARGEST_BASE: Final = 1e6
_BASE_STEPS: Final = 2**40


class Candidate(NamedTuple):
    """K thresholds, and what they give on the images of the search: good answers, and the mean cost of an image."""

    thresholds: tuple[float, ...]
    good: int
    cost: float


class Search:
    """Early exit on a split by these settings, with thresholds that are still to be found.

    An answer is good if it is right or, with `against_backbone`, if it is not wrong where the backbone's own classifier
    is right.
    """

    def __init__(
        self, stored: ExitLogits, costs: PathCosts, settings: EarlyExitConfig, *, against_backbone: bool = False
    ) -> None:
        self.num_exits, self.num_images = stored.num_exits, len(stored)
        self.never = (math.inf,) * self.num_exits
        self.settings = replace(settings, thresholds=self.never)
        answers = exit_answers(settings, stored.logits, stored.ensemble)
        confidence = exit_confidence(answers, settings)
        _check_range(confidence, settings)
        # What is not finite reaches no threshold.
        self.confidence = confidence.where(confidence.isfinite(), -math.inf)
        good = is_right(answers, stored.targets)
        self._good = (good | ~stored.correct[-1] if against_backbone else good).double()
        self._costs = costs
        self._levels = [self._thresholds_to_try(row) for row in self.confidence]

    def candidate(self, thresholds: Sequence[float]) -> Candidate:
        """Return what thresholds give."""
        index = first_confident(self.confidence, thresholds)
        cost = self._paths(thresholds)[index].sum()
        return Candidate(tuple(thresholds), int(self._is_good(index).sum()), float(cost) / self.num_images)

    def shares(self, base: float) -> Candidate:
        """Return what MSDNet's thresholds give under which a share of base^k leaves at exit k."""
        return self.candidate(share_thresholds(self.confidence, base, self.settings.rule_object.discrete))

    def shares_within(self, budget: float) -> Candidate | None:
        """Return what MSDNet's thresholds give with the largest base that keeps to a mean cost of an image, if any."""

        def shares(step: int) -> Candidate:
            return self.shares(_LARGEST_BASE ** (2 * step / _BASE_STEPS - 1))

        steps = bisect_right(range(_BASE_STEPS), budget, key=lambda step: shares(step).cost)
        best = shares(steps - 1) if steps else self.shares(0.0)
        return best if best.cost <= budget else None

    def explore(self) -> list[Candidate]:
        """Return thresholds of many costs: those of fixed exits and of MSDNet's shares, and what `climb` makes of these
        for many prices.
        """
        always = self.settings.rule_object.always
        found = [self.candidate(self.never)]
        found += [self.candidate(_with(self.never, exit, always)) for exit in range(self.num_exits)]
        found += [self.shares(base) for base in _BASES]
        for price in _PRICES:
            score = partial(self._worth, price)
            start = max(found, key=lambda item: float(score(*self._totals(item))))
            found.append(self.climb(start, score))
        return found

    def climb(self, start: Candidate, score: Score) -> Candidate:
        """Change one threshold after the other to the best of those that are tried, until nothing gets better."""
        thresholds = start.thresholds
        best = float(score(*self._totals(start)))
        improved = True
        while improved:
            improved = False
            for exit in reversed(range(self.num_exits)):
                scores = score(*self._try_levels(thresholds, exit))
                choice = int(scores.argmax())
                if float(scores[choice]) > best:
                    best, improved = float(scores[choice]), True
                    thresholds = _with(thresholds, exit, float(self._levels[exit][choice]))
        return self.candidate(thresholds)

    def _try_levels(self, thresholds: tuple[float, ...], exit: int) -> tuple[Tensor, Tensor]:
        """Return good answers [J] and costs [J] for each threshold that is tried at an exit."""
        levels = self._levels[exit]
        index = first_confident(self.confidence, _with(thresholds, exit, math.inf))
        paths = self._paths(_with(thresholds, exit, self.settings.rule_object.always))
        stay_good, stay_costs = self._is_good(index), paths[index]
        # What changes as each image that gets here leaves.
        changes = torch.stack([self._good[exit] - stay_good, paths[exit] - stay_costs], 1)
        arrive = index > exit
        leave = self.confidence[exit, arrive] >= levels.unsqueeze(1)
        good, costs = (leave.double() @ changes[arrive]).unbind(1)
        costs += stay_costs.sum()
        if not self.settings.runs_head(exit):
            # The first threshold is infinity: no image leaves, and the head does not run.
            costs[0] -= self._costs.heads[exit] * int(arrive.sum())
        return good + stay_good.sum(), costs

    def _thresholds_to_try(self, confidence: Tensor) -> Tensor:
        """Return infinity, thresholds that let about equally many images more leave each, and one that lets all."""
        rule = self.settings.rule_object
        values, counts = torch.unique(confidence[confidence > -math.inf], return_counts=True)
        values, counts = values.flip(0), counts.flip(0)
        # A threshold can only lie between two different values: how many images are above each of these places.
        above = counts.cumsum(0)[:-1]
        images = int(counts.sum())
        steps = max(2, min(_MAX_LEVELS, math.isqrt(images) // _STEP))
        wanted = torch.arange(1, steps) * (images / steps)
        places = torch.searchsorted(above.double(), wanted.double())
        used = sorted(set(places[places < len(above)].tolist()))
        levels = [_between(values[place + 1], values[place], rule.discrete) for place in used]
        return torch.tensor([math.inf, *levels, rule.always], dtype=values.dtype)

    def _paths(self, thresholds: Sequence[float]) -> Tensor:
        return self._costs.paths_under(replace(self.settings, thresholds=tuple(thresholds)))

    def _is_good(self, index: Tensor) -> Tensor:
        return self._good[index, torch.arange(self.num_images)]

    def _totals(self, candidate: Candidate) -> tuple[Tensor, Tensor]:
        totals = torch.tensor([candidate.good, candidate.cost * self.num_images], dtype=torch.float64)
        return totals[0], totals[1]

    def _worth(self, price: float, good: Tensor, costs: Tensor) -> Tensor:
        return good - price * costs / self._costs.full


def share_thresholds(confidence: Tensor, base: float, discrete: bool = False) -> tuple[float, ...]:
    """Return thresholds under which the share of images that leave at exit k is proportional to base^k.

    As in the code of "Multi-Scale Dense Networks", https://arxiv.org/abs/1703.09844: each exit lets those leave that it
    is most confident of (`confidence` is [K, N], -inf for never) among the images that get there, and the last takes
    all that are left. There, a threshold is the confidence of the last image that leaves; here, unless confidences are
    discrete, it lies half-way to that of the next one, so that rounding does not decide.
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
        thresholds.append(_between(lower, values[leaving - 1], discrete))
        left &= row < torch.tensor(thresholds[-1], dtype=row.dtype)
    return tuple(thresholds)


def frontier(found: Sequence[Candidate]) -> list[Candidate]:
    """Return those that have more good answers than all that are as cheap, in the order of their cost."""
    kept: list[Candidate] = []
    for candidate in sorted(found, key=lambda item: (item.cost, -item.good)):
        if not kept or candidate.good > kept[-1].good:
            kept.append(candidate)
    return kept


def _check_range(confidence: Tensor, settings: EarlyExitConfig) -> None:
    """Refuse a confidence below the threshold that is to let every image leave, or above the rule's range."""
    rule, known = settings.rule_object, confidence[confidence.isfinite()].tolist()
    low, high = min(known, default=rule.always), max(known, default=rule.always)
    if low < rule.always or high > rule.highest + ROUNDING:
        raise ValueError(
            f"The rule {settings.rule} gives confidences from {low:g} to {high:g}; its range is {rule.lowest:g} to "
            f"{rule.highest:g}."
        )


def _with(thresholds: tuple[float, ...], exit: int, threshold: float) -> tuple[float, ...]:
    return (*thresholds[:exit], threshold, *thresholds[exit + 1 :])


def _between(lower: Tensor, upper: Tensor, discrete: bool) -> float:
    """Return a number above `lower`, where it is smaller than `upper`, and at most `upper`, in their own precision."""
    middle = lower + (upper - lower) / 2
    return float(upper if discrete or middle <= lower else middle)

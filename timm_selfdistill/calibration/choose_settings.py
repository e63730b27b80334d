"""Choose temperatures and thresholds of early exit for a goal, by held-out images."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Final

import numpy as np
import torch
from torch import Tensor

from timm_selfdistill.calibration.threshold_search import Candidate, Search, frontier
from timm_selfdistill.early_exit import EarlyExitConfig, PathCosts, exit_answers, replay
from timm_selfdistill.exit_logits import ExitLogits, fit_temperatures

CONFIDENCE: Final = 0.9


@dataclass(frozen=True)
class Goal:
    """What the thresholds are chosen for; one of the first four.

    Args:
        max_accuracy_drop: The cheapest thresholds whose accuracy on the calibration images is at most this many
            percentage points below that of the backbone's own classifier.
        speedup: The most accurate thresholds with which the mean calibration image costs at most what it costs in the
            plain backbone, divided by this.
        macs_budget: The same for a number of multiply-accumulates.
        risk: The cheapest thresholds that pass a test: at most this share of new images is answered wrong that the
            backbone's own classifier gets right.
        confidence: The confidence of the test.

    Raises:
        ValueError: If none or more than one is given, or a number is out of range.
    """

    max_accuracy_drop: float | None = None
    speedup: float | None = None
    macs_budget: float | None = None
    risk: float | None = None
    confidence: float = CONFIDENCE

    def __post_init__(self) -> None:
        names = ("max_accuracy_drop", "speedup", "macs_budget", "risk")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"Give one of {', '.join(names)}; got {', '.join(given) or 'none'}.")
        for name, low, high, meaning in (
            ("max_accuracy_drop", 0, 100, "percentage points, 0 to 100"),
            ("speedup", 1, math.inf, "a factor of 1 or more"),
            ("macs_budget", 1, math.inf, "a number of multiply-accumulates, 1 or more"),
            ("risk", 0, 1, "a probability above 0 and below 1"),
            ("confidence", 0, 1, "a probability above 0 and below 1"),
        ):
            value = getattr(self, name)
            fits = value is None or (low <= value <= high and value < math.inf)
            if not fits or (name in ("risk", "confidence") and value in (0, 1)):
                raise ValueError(f"{name} is {value}; it must be {meaning}.")

    def to_json(self) -> dict[str, float]:
        """Return what was given, for a report."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if self.risk is None:
            del given["confidence"]
        return given


@dataclass(frozen=True)
class Choice:
    """Settings that were chosen.

    Args:
        config: The settings.
        curve: Others with the same rule and temperatures, in the order of their cost.
        tested: How many images the risk was tested on, and how many of them were lost; None for other goals.
    """

    config: EarlyExitConfig
    curve: tuple[EarlyExitConfig, ...]
    tested: tuple[int, int] | None = None


def choose_settings(
    stored: ExitLogits,
    costs: PathCosts,
    goal: Goal,
    *,
    rule: str = "max-softmax",
    fallback: str = "last",
    running_ensemble: bool = False,
) -> Choice:
    """Choose temperatures, then thresholds, by held-out images.

    A search sets one threshold after the other; on these images, its result is at least as good as every fixed exit and
    as MSDNet's budget solver.

    For a risk, one half of the images, drawn at random, chooses the temperatures and an order of settings from safe to
    cheap, and the other half tests them in this order. For images drawn like these, whatever their distribution, the
    guarantee fails with a probability of at most 1 - `goal.confidence`, over the draw of these images.

    Args:
        stored: The logits of images that were not trained on and are not reported on.
        costs: What the path to each exit costs, in multiply-accumulates or in seconds.
        goal: What is to be achieved.
        rule: What confidence is, as in `EarlyExitConfig`.
        fallback: Who answers for images that left at no exit, as there.
        running_ensemble: Whether exits answer with the ensemble of those up to them, as there.

    Returns:
        The settings.

    Raises:
        ValueError: If the goal cannot be reached with these exits and images, and what can; or if the rule is unknown
            or gives confidences out of its range.
    """
    never = (math.inf,) * stored.num_exits
    settings = EarlyExitConfig(never, rule, fallback=fallback, running_ensemble=running_ensemble)
    if goal.risk is not None:
        return _choose_by_risk(stored, costs, settings, goal.risk, goal.confidence)
    search = Search(stored, costs, _with_temperatures(settings, stored))
    found = frontier(search.explore())
    if goal.max_accuracy_drop is not None:
        chosen = _cheapest(search, found, stored, goal.max_accuracy_drop)
    else:
        budget = costs.full / goal.speedup if goal.speedup is not None else goal.macs_budget
        assert budget is not None
        chosen = _most_accurate(search, found, costs, budget)
    return Choice(_apply(search, chosen), tuple(_apply(search, item) for item in found))


def excess_errors(config: EarlyExitConfig, stored: ExitLogits) -> Tensor:
    """Whether each image [N] is answered wrong that the backbone's own classifier gets right."""
    answers = replay(config, stored.logits, stored.ensemble).logits
    return stored.correct[-1] & (answers.argmax(-1) != stored.targets)


def upper_bound(losses: int, count: int, confidence: float) -> float:
    """Return the bound of Clopper and Pearson: with this confidence, the rate of losses is at most this."""
    from scipy.stats import binomtest

    interval = binomtest(losses, count, alternative="less").proportion_ci(confidence, method="exact")
    return float(interval.high)


def certified(losses: Sequence[int], count: int, risk: float, confidence: float) -> int:
    """Return how many settings, from the start of a sequence, lose at most the share `risk`, all with this confidence.

    Fixed-sequence testing, with an exact test of each setting's losses among `count` images, until one fails. No
    correction for their number is needed: the first unsafe setting passes with probability 1 - `confidence` at most,
    and no later one is tested unless it does. The sequence must not have been chosen by these images.

    Paper: "Learn then Test", https://arxiv.org/abs/2110.01052
    """
    from scipy.stats import binom

    failed = binom.cdf(losses, count, risk) > 1 - confidence
    return int(np.argmax(failed)) if failed.any() else len(losses)


def _with_temperatures(settings: EarlyExitConfig, stored: ExitLogits) -> EarlyExitConfig:
    if not settings.rule_object.uses_temperatures:
        return settings
    answers = exit_answers(settings, stored.logits, stored.ensemble)
    return replace(settings, temperatures=fit_temperatures(answers[:-1], stored.targets))


def _apply(search: Search, candidate: Candidate) -> EarlyExitConfig:
    return replace(search.settings, thresholds=candidate.thresholds)


def _cheapest(search: Search, found: Sequence[Candidate], stored: ExitLogits, drop: float) -> Candidate:
    """Return the cheapest thresholds whose accuracy is at most `drop` points below the backbone's."""
    full = int(stored.correct[-1].sum())
    # To a billionth of an image: 0.5 % of 200 images is one.
    needed = math.ceil(full - drop / 100 * len(stored) - 1e-9)
    enough = [item for item in found if item.good >= needed]
    if not enough:
        best = found[-1].good
        raise ValueError(
            f"max_accuracy_drop {drop} cannot be reached: of these {len(stored):,} images the backbone's own "
            f"classifier gets {full:,} right, and early exit {best:,} at best, "
            f"{100 * (full - best) / len(stored):.2f} points less. Allow that drop, or take fallback last."
        )

    def score(good: Tensor, costs: Tensor) -> Tensor:
        return torch.where(good >= needed, -costs, -math.inf)

    return search.climb(min(enough, key=lambda item: item.cost), score)


def _most_accurate(search: Search, found: Sequence[Candidate], costs: PathCosts, budget: float) -> Candidate:
    """Return the most accurate thresholds with which an image costs at most `budget`; of equal ones the cheapest."""
    most = budget * (1 + 1e-9)  # a budget that was divided is not exact
    shares = search.shares_within(most)
    within = [item for item in [*found, *([shares] if shares else [])] if item.cost <= most]
    if not within:
        least = found[0].cost
        raise ValueError(
            f"A budget of {budget:.4g} for an image cannot be kept: the cheapest exit costs {least:.4g}, a "
            f"speedup of {costs.full / least:.4g} over the backbone's {costs.full:.4g}."
        )

    def score(good: Tensor, cost_of_all: Tensor) -> Tensor:
        # Half a right answer for all the cost there can be: a tie goes to the cheapest.
        tie = 0.5 * cost_of_all / (costs.every_exit * search.num_images)
        return torch.where(cost_of_all <= most * search.num_images, good - tie, -math.inf)

    return search.climb(max(within, key=lambda item: (item.good, -item.cost)), score)


def _choose_by_risk(
    stored: ExitLogits, costs: PathCosts, settings: EarlyExitConfig, risk: float, confidence: float
) -> Choice:
    """Return the cheapest settings that a test on other images than those that proposed them finds safe."""
    order = torch.randperm(len(stored), generator=torch.Generator().manual_seed(0))
    if len(stored) < 2:
        raise ValueError(f"A risk needs 2 images or more, to propose thresholds and to test them; got {len(stored)}.")
    proposing, testing = (stored.select(half) for half in order.chunk(2))
    search = Search(proposing, costs, _with_temperatures(settings, proposing), against_backbone=True)
    found = search.explore()
    # From safe to cheap. Thresholds that lose nothing and let few images leave come first, although cheaper ones lose
    # nothing either on the half that proposes: the first that fails ends the test.
    lossless = [item for item in found if item.good == len(proposing)]
    proposed = sorted({*lossless, *frontier(found)}, key=lambda item: (-item.good, -item.cost, item.thresholds))
    configs = [_apply(search, item) for item in proposed]
    losses = [int(excess_errors(config, testing).sum()) for config in configs]
    safe = certified(losses, len(testing), risk, confidence)
    if not safe:
        bound = upper_bound(losses[0], len(testing), confidence)
        raise ValueError(
            f"A risk of {risk} cannot be certified with confidence {confidence}: half of the images tests the "
            f"thresholds, and of these {len(testing):,} the safest thresholds lose {losses[0]:,}. A risk of "
            f"{bound:.4f} can be; a smaller one needs more images."
        )
    chosen = min(range(safe), key=lambda place: proposed[place].cost)
    curve = tuple(_apply(search, item) for item in frontier(found))
    return Choice(configs[chosen], curve, (len(testing), losses[chosen]))

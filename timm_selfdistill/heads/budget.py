"""The rule that keeps heads in proportion: how wide each may be, and which points are worth an exit."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from timm_selfdistill.checks import Share, check
from timm_selfdistill.exits import DEFAULT_EXITS, Backbone, BackboneTaps, ExitPoint, Exits, Exploration, choose
from timm_selfdistill.heads.proportional import body_cost

AUTO: Final = "auto"
"""In place of a head's name: the default head, of the width that the budget allows."""
PROPORTIONAL: Final = "proportional"
DEFAULT_BUDGET: Final = 0.1
# Parameters of all heads, as a multiple of the budget.
_PARAMS: Final = 2.5
# Of what an exit saves, the most that its head may cost.
_OF_SAVED: Final = 0.5
_STEP: Final = 8
_MIN_WIDTH: Final = 16


def resolve_budget(head: str, head_kwargs: object, head_budget: float | None) -> float | None:
    """Return the budget that chooses the widths of heads, or None where the other arguments say how wide they are.

    Raises:
        ValueError: If a budget is given beside those.
    """
    if head == PROPORTIONAL and not head_kwargs:
        return DEFAULT_BUDGET if head_budget is None else head_budget
    if head_budget is not None:
        with_arguments = f" with head_kwargs {head_kwargs!r:.200}" if head_kwargs else ""
        raise ValueError(
            f"head_budget is {head_budget!r} for the head {head!r}{with_arguments}; allowed is None, as a budget "
            f"chooses the width of the heads {AUTO!r} and {PROPORTIONAL!r} where head_kwargs are not given."
        )
    return None


@dataclass(frozen=True)
class HeadBudget:
    """What the heads on a backbone may cost.

    A head may cost `share` of the backbone's multiply-accumulates, but no more than half of what its exit saves; all
    heads together may have 2.5 times `share` of its parameters, each the same part of it.

    Args:
        share: From above 0 to 1.
        found: The backbone's points and costs.
        backbone: The backbone.

    Raises:
        ValueError: If the share is no such number.
    """

    share: float
    found: Exploration
    backbone: Backbone

    def __post_init__(self) -> None:
        check("head_budget", self.share, Share)

    def width(self, point: ExitPoint, num_exits: int) -> int | None:
        """Return the largest width of a head that fits at a point, one of so many; None if none does."""
        return next((width for width in self._widths() if self._fits(point, num_exits, width)), None)

    @property
    def min_width(self) -> int:
        """The smallest width."""
        return min(_MIN_WIDTH, self.found.run.feature_dim)

    def shares(self, point: ExitPoint, width: int) -> tuple[float, float]:
        """Return the shares of the backbone's multiply-accumulates and parameters that a head of a width has."""
        feature_dim, num_classes = self.found.run.feature_dim, int(self.backbone.num_classes)
        bodies = [body_cost(tap, shape, width) for tap, shape in zip(point.taps, self.found.shapes(point), strict=True)]
        adapter = feature_dim if width != feature_dim else 0
        params = sum(body[0] for body in bodies) + (width + 1) * (num_classes + adapter)
        macs = sum(body[1] for body in bodies) + width * (num_classes + adapter)
        # A backbone of which no operation can be counted sets no limit to them.
        return macs / (self.found.run.total_macs or math.inf), params / self._params

    @cached_property
    def _params(self) -> int:
        return sum(parameter.numel() for parameter in self.backbone.parameters())

    def excess(self, fitted: "FittedExits") -> str:
        """Return a sentence on the heads that exceed the budget."""
        widths = dict(zip(fitted.taps.points, fitted.widths, strict=True))
        costs = [(point.name, *self.shares(point, widths[point])) for point in fitted.too_large]
        listed = ", ".join(
            f"{name} ({macs:.1%} of the MACs, {params:.1%} of the parameters)" for name, macs, params in costs
        )
        return (
            f"No head fits head_budget={self.share:g} at {listed}: the smallest, of width {self.min_width}, was built "
            "there. Give a larger head_budget, other exits or fewer."
        )

    def _fits(self, point: ExitPoint, num_exits: int, width: int) -> bool:
        macs, params = self.shares(point, width)
        return macs <= min(self.share, _OF_SAVED * (1 - point.cost)) and params <= _PARAMS * self.share / num_exits

    def _widths(self) -> Iterator[int]:
        """Yield all widths, the teacher's first, then multiples of 8."""
        feature_dim = self.found.run.feature_dim
        yield feature_dim
        yield from range((feature_dim - 1) // _STEP * _STEP, self.min_width - 1, -_STEP)


@dataclass(frozen=True)
class FittedExits:
    """Exit points with the width of each one's head; `too_large` are those where no head fits the budget."""

    taps: BackboneTaps
    widths: tuple[int, ...]
    too_large: tuple[ExitPoint, ...]


def fit_heads(budget: HeadBudget, exits: Exits | None) -> FittedExits:
    """Choose exit points and the widths of their heads.

    Of a number of exits, and by default, only points where a head fits are chosen. By default there are fewer than
    three exits where heads fit at fewer points; points that are asked for are always taken.

    Args:
        budget: What the heads may cost.
        exits: As in `wrap`.

    Raises:
        ValueError: If an exit does not exist, or no head fits anywhere.
    """
    found = budget.found
    if exits is None:
        useful = len(found.useful())
        counts = range(min(DEFAULT_EXITS, useful), 0, -1)
        taps = next(filter(None, (_choose_fitting(budget, count) for count in counts)), None)
        if useful and taps is None:
            raise ValueError(
                f"No head fits head_budget={budget.share:g} at any of this backbone's exit points: give a larger "
                'head_budget, name the exits (exits=[...]), or choose a head, such as "linear".'
            )
        taps = taps or choose(found, None)
    elif isinstance(exits, int):
        taps = _choose_fitting(budget, exits) or choose(found, exits)
    else:
        taps = choose(found, exits)
    widths = [budget.width(point, len(taps.points)) for point in taps.points]
    return FittedExits(
        taps,
        tuple(budget.min_width if width is None else width for width in widths),
        tuple(point for point, width in zip(taps.points, widths, strict=True) if width is None),
    )


def _choose_fitting(budget: HeadBudget, count: int) -> BackboneTaps | None:
    """Choose a number of exits among the points where a head fits, or None if these are fewer."""
    found = budget.found
    fitting = replace(found, points=tuple(p for p in found.useful() if budget.width(p, count) is not None))
    return choose(fitting, count) if 1 <= count <= len(fitting.points) else None

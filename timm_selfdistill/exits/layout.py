"""How a tapped tensor is laid out, read off its shape, the promised channels and the image's aspect."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from timm_selfdistill.exits.candidates import Candidate, Promise
from timm_selfdistill.exits.dry_run import Record

Layout = Literal["NCHW", "NHWC", "NLC", "NCL"]

_MAX_PREFIX_TOKENS = 16
_MAX_REDUCTION = 64


@dataclass(frozen=True)
class Reading:
    """One way to read a tensor's shape; the fields are those of `Tap`, and `reduction` is infinite without a grid."""

    layout: Layout
    channels: int
    grid: tuple[int, int] | None
    num_prefix_tokens: int
    reduction: float
    member: int | None


# The ways to read one tensor, each with how badly it fits, the best first.
Ranks = list[tuple[tuple[float, ...], Reading]]


def read_taps(
    candidates: Sequence[Candidate], records: dict[str, Record], image_size: tuple[int, int]
) -> dict[str, tuple[Reading, ...]]:
    """Return how the tensors at each candidate are to be read, by its name.

    Where `feature_info` promises tensors, those are taken; else every feature map and token list that the module
    returns. A module that returns neither is left out.
    """
    reductions = sorted({promise.reduction for c in candidates for promise in c.promises})
    ranked = {c.name: _rank(c, records[c.module], image_size, reductions) for c in candidates}
    usual = _usual_layout(ranks[0] for taps in ranked.values() for ranks in taps if not _is_tie(ranks))
    return {name: tuple(_settle(ranks, usual) for ranks in taps) for name, taps in ranked.items() if taps}


def _rank(
    candidate: Candidate, record: Record, image_size: tuple[int, int], reductions: Sequence[float]
) -> list[Ranks]:
    """Return, for each tensor to be tapped, its readings with their misfits, the best first."""
    readings = [
        reading
        for index, shape in enumerate(record.shapes)
        for reading in _readings(shape, index if record.is_sequence else None, image_size, reductions)
    ]
    if candidate.promises:
        sought: list[tuple[Promise | None, list[Reading]]] = [(promise, readings) for promise in candidate.promises]
    else:
        members = dict.fromkeys(reading.member for reading in readings)
        sought = [(None, [reading for reading in readings if reading.member == member]) for member in members]
    ranked: list[Ranks] = []
    for promise, allowed in sought:
        ranks = [(_misfit(reading, promise, image_size), _as_promised(reading, promise)) for reading in allowed]
        ranks.sort(key=lambda rank: rank[0])
        if ranks and ranks[0][1].member not in [other[0][1].member for other in ranked]:
            ranked.append(ranks)
    return ranked


def _readings(
    shape: tuple[int, ...], member: int | None, image_size: tuple[int, int], reductions: Sequence[float]
) -> Iterator[Reading]:
    """Yield the ways in which a tensor's shape can be read, the commonest first."""
    if not shape or shape[0] != 1:
        # Not one entry an image, such as the inner tokens of TNT: the dry run has one.
        return
    if len(shape) == 4:
        for layout, channels, grid in (("NCHW", shape[1], shape[2:]), ("NHWC", shape[3], shape[1:3])):
            reduction = math.sqrt(math.prod(image_size) / math.prod(grid)) if all(grid) else math.inf
            yield Reading(layout, channels, (grid[0], grid[1]), 0, reduction, member)  # type: ignore[arg-type]
    elif len(shape) == 3:
        yield _read_tokens("NLC", shape[1], shape[2], _MAX_PREFIX_TOKENS, member, image_size, reductions)
        # Whoever puts channels first has no other tokens in front of the grid's.
        yield _read_tokens("NCL", shape[2], shape[1], 0, member, image_size, reductions)


def _read_tokens(
    layout: Layout,
    length: int,
    channels: int,
    max_prefix: int,
    member: int | None,
    image_size: tuple[int, int],
    reductions: Sequence[float],
) -> Reading:
    """Return the grid that leaves the fewest prefix tokens, at the promised reductions or else at any; or none."""
    for tried in (reductions, range(1, _MAX_REDUCTION + 1)):
        fits = []
        for reduction in tried:
            for rounded in (math.ceil, math.floor):
                grid = (rounded(image_size[0] / reduction), rounded(image_size[1] / reduction))
                extra = length - math.prod(grid)
                if all(grid) and 0 <= extra <= max_prefix:
                    fits.append(Reading(layout, channels, grid, extra, reduction, member))
        if fits:
            return min(fits, key=lambda reading: reading.num_prefix_tokens)
    return Reading(layout, channels, None, 0, math.inf, member)


def _misfit(reading: Reading, promise: Promise | None, image_size: tuple[int, int]) -> tuple[float, ...]:
    """Return how badly a reading disagrees with the promised channels, the image's aspect and the promised grid."""
    wrong_channels = promise is not None and reading.channels != promise.channels
    if reading.grid is None or 0 in reading.grid:
        return (wrong_channels, math.inf, math.inf)
    aspect = abs(math.log(reading.grid[0] / reading.grid[1] * image_size[1] / image_size[0]))
    size = abs(math.log(reading.reduction / promise.reduction)) if promise is not None else 0.0
    return (wrong_channels, round(aspect, 1), round(size, 1))


def _as_promised(reading: Reading, promise: Promise | None) -> Reading:
    """Return a reading with the promised reduction: the last grids of a tiny image cannot tell it."""
    if promise is None or reading.channels != promise.channels:
        return reading
    return replace(reading, reduction=promise.reduction)


def _is_tie(ranks: Ranks) -> bool:
    """Tell whether the shape alone leaves open how a tensor is to be read, as for [1, 64, 64, 64]."""
    return len(ranks) > 1 and ranks[0][0] == ranks[1][0]


def _usual_layout(readings: Iterable[tuple[tuple[float, ...], Reading]]) -> Layout | None:
    counted = Counter(reading.layout for _, reading in readings)
    return counted.most_common(1)[0][0] if counted else None


def _settle(ranks: Ranks, usual: Layout | None) -> Reading:
    """Return the best reading; where several are equally good, the one that is usual in this backbone."""
    best = [reading for misfit, reading in ranks if misfit == ranks[0][0]]
    return next((reading for reading in best if reading.layout == usual), best[0])

"""How a tapped tensor is laid out, read off its shape, the promised channels and the image's aspect."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from timm_selfdistill.exits.candidates import Candidate
from timm_selfdistill.exits.dry_run import Record

Layout = Literal["NCHW", "NHWC", "NLC"]

_MAX_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class Tap:
    """One reading of a tapped tensor; the fields are those of `ExitPoint`."""

    layout: Layout
    channels: int
    grid: tuple[int, int] | None
    num_prefix_tokens: int
    member: int | None


def recognise(
    record: Record, candidate: Candidate, image_size: tuple[int, int], reductions: Sequence[int]
) -> Tap | None:
    """Return the layout of a tapped output, or None where no member of it is a feature map or token list."""
    found: list[tuple[tuple[float, ...], Tap]] = []
    for index, shape in enumerate(record.shapes):
        member = index if record.is_sequence else None
        for tap in _readings(shape, member, image_size, [candidate.reduction] if candidate.reduction else reductions):
            found.append((_misfit(tap, candidate, image_size), tap))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _readings(
    shape: tuple[int, ...], member: int | None, image_size: tuple[int, int], reductions: Sequence[int]
) -> Iterator[Tap]:
    """Yield the ways in which a tensor's shape can be read, the commonest first."""
    if len(shape) == 4:
        yield Tap("NCHW", shape[1], (shape[2], shape[3]), 0, member)
        yield Tap("NHWC", shape[3], (shape[1], shape[2]), 0, member)
    elif len(shape) == 3:
        grids = [(math.ceil(image_size[0] / r), math.ceil(image_size[1] / r)) for r in reductions]
        grids += [(image_size[0] // r, image_size[1] // r) for r in reductions]
        extra = {grid: shape[1] - math.prod(grid) for grid in grids}
        fits = [grid for grid in grids if 0 <= extra[grid] <= _MAX_PREFIX_TOKENS]
        best = min(fits, key=lambda grid: extra[grid]) if fits else None
        yield Tap("NLC", shape[2], best, extra[best] if best else 0, member)


def _misfit(tap: Tap, candidate: Candidate, image_size: tuple[int, int]) -> tuple[float, ...]:
    """Return how badly a reading disagrees with the promised channels, the image's aspect and the promised grid."""
    wrong_channels = candidate.channels is not None and tap.channels != candidate.channels
    if tap.grid is None or 0 in tap.grid:
        return (wrong_channels, math.inf, math.inf)
    aspect = abs(math.log(tap.grid[0] / tap.grid[1] * image_size[1] / image_size[0]))
    expected = image_size[0] / candidate.reduction if candidate.reduction else tap.grid[0]
    return (wrong_channels, round(aspect, 1), abs(math.log(tap.grid[0] / expected)))


def reduction_of(candidate: Candidate, tap: Tap, image_size: tuple[int, int]) -> float:
    """Return the image's size over the grid's, as promised where it is: a tiny image's last grids cannot tell."""
    if candidate.reduction:
        return candidate.reduction
    return math.sqrt(math.prod(image_size) / math.prod(tap.grid)) if tap.grid else 1.0

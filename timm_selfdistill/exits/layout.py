"""Which modules `feature_info` names, and how the tensors that they return are laid out."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from timm_selfdistill.exits.probe import Backbone, Record

Layout = Literal["NCHW", "NHWC", "NLC", "NCL"]

_MAX_PREFIX_TOKENS = 16
_MAX_REDUCTION = 64


# By class, the timm families whose `feature_info` names other modules than can be tapped, with the modules to tap
# instead, shallow to deep; `*` is any one part of a path. Indices into `feature_info` then count these modules.
_TAPPED_INSTEAD = {
    # Names the containers of the first and the last, parallel stage only; the last one's end is that of the network.
    "CoaT": ("serial_blocks*", "parallel_blocks.*"),
    # Names a `stem` and a `stage1` that are not modules, and describes one branch of each of the others.
    "HighResolutionNet": ("layer1", "stage*"),
    # Names `block.0`, `block.1`, ... for what is `stages.0`, `stages.1`, ...
    "MultiScaleVit": ("stages.*",),
    # Names `block.0`, `block.1`, ... for what is `blocks.0`, `blocks.1`, ...
    "Twins": ("blocks.*",),
}
# Families whose tokens do not follow the image row by row, so that they cannot be read as a feature map: Hiera keeps
# them in the order of its mask units until they are pooled.
_UNORDERED_TOKENS = ("Hiera",)


@dataclass(frozen=True)
class FeatureEntry:
    """An entry of `feature_info`: its index, channels, and how many times longer an image's sides are than the grid's.

    It describes the tensor at the module that it names.
    """

    index: int
    channels: int
    reduction: float


@dataclass(frozen=True)
class Candidate:
    """A module that `feature_info` or the caller names.

    Args:
        name: Its path as it was named.
        module: Path of the module to hook: the last child that runs, where `name` is a container.
        indices: The indices by which it may be called.
        entries: What `feature_info` says of it: nothing, or one entry for each tensor that is to be tapped.
    """

    name: str
    module: str
    indices: tuple[int, ...] = ()
    entries: tuple[FeatureEntry, ...] = ()


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


def has_ordered_tokens(backbone: Backbone) -> bool:
    """Whether a backbone's tokens follow the image row by row, so that they can be read as a feature map."""
    return not any(name in _UNORDERED_TOKENS for name in _timm_classes(backbone))


def resolve_feature_info(backbone: Backbone) -> dict[str, Candidate]:
    """Return the candidates that `feature_info` names and that are modules, in its order."""
    modules = dict(backbone.named_modules())
    patterns = [re.escape(pattern).replace(r"\*", "[^.]*") for pattern in _tapped_instead(backbone)]
    instead = [name for pattern in patterns for name in modules if re.fullmatch(pattern, name)]
    if instead:
        return {
            name: Candidate(name, last_running_child(backbone, name, instead), (index,))
            for index, name in enumerate(instead)
        }
    # Where the backbone hands on the `feature_info` of a child, its names are relative to the child.
    sharing = (n for n, child in backbone.named_children() if _has_info(child, backbone.feature_info))
    prefixes = ("", *(f"{name}." for name in sharing))
    entries: dict[str, list[FeatureEntry]] = {}
    for index, entry in enumerate(backbone.feature_info):
        names = (prefix + entry["module"] for prefix in prefixes if entry["module"])
        name = next((name for name in names if name in modules), None)
        if name is not None:
            entries.setdefault(name, []).append(FeatureEntry(index, entry["num_chs"], entry["reduction"]))
    return {
        name: Candidate(
            name, last_running_child(backbone, name, entries), tuple(entry.index for entry in found), tuple(found)
        )
        for name, found in entries.items()
    }


def entries_without_module(backbone: Backbone, candidates: Mapping[str, Candidate]) -> tuple[str, ...]:
    """Return the names in `feature_info` that are not modules, and so no candidates."""
    if _tapped_instead(backbone):
        return ()
    resolved = {index for candidate in candidates.values() for index in candidate.indices}
    return tuple(entry["module"] for index, entry in enumerate(backbone.feature_info) if index not in resolved)


def last_running_child(backbone: Backbone, name: str, known: Iterable[str]) -> str:
    """Return the path of the last module that runs inside the container `name`, or `name` itself."""
    try:
        module = backbone.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{type(backbone).__name__} has no module {name!r} to attach an exit to; feature_info names "
            f"{', '.join(known) or 'none'}, and any module that runs once in a forward is allowed."
        ) from None
    # A plain container may be run child by child, and then a hook on it never fires.
    while isinstance(module, nn.ModuleList) or type(module).forward is nn.Sequential.forward:
        if len(module) == 0:
            break
        child, module = list(module.named_children())[-1]
        name = f"{name}.{child}"
    return name


def read_taps(
    candidates: Sequence[Candidate], records: dict[str, Record], image_size: tuple[int, int]
) -> dict[str, tuple[Reading, ...]]:
    """Return how the tensors at each candidate are laid out, by its name.

    Where `feature_info` describes tensors, those are taken; otherwise every feature map and token list that the module
    returns. A module that returns neither is left out.
    """
    reductions = sorted({entry.reduction for c in candidates for entry in c.entries})
    ranked = {c.name: _rank(c, records[c.module], image_size, reductions) for c in candidates}
    # Where a shape alone leaves the layout open, as [1, 64, 64, 64] does, the backbone's other tensors decide.
    clear = Counter(ranks[0][1].layout for taps in ranked.values() for ranks in taps if not _is_tie(ranks))
    usual = clear.most_common(1)[0][0] if clear else None
    return {name: tuple(_best_reading(ranks, usual) for ranks in taps) for name, taps in ranked.items() if taps}


def _tapped_instead(backbone: Backbone) -> tuple[str, ...]:
    return next((_TAPPED_INSTEAD[name] for name in _timm_classes(backbone) if name in _TAPPED_INSTEAD), ())


def _timm_classes(backbone: Backbone) -> list[str]:
    return [base.__name__ for base in type(backbone).__mro__ if base.__module__.startswith("timm.")]


def _has_info(child: nn.Module, feature_info: object) -> bool:
    return getattr(child, "feature_info", None) is feature_info


def _rank(
    candidate: Candidate, record: Record, image_size: tuple[int, int], reductions: Sequence[float]
) -> list[Ranks]:
    """Return, for each tensor to be tapped, its readings with their misfits, the best first."""
    readings = [
        reading
        for index, shape in enumerate(record.shapes)
        for reading in _readings(shape, index if record.is_sequence else None, image_size, reductions)
    ]
    if candidate.entries:
        sought: list[tuple[FeatureEntry | None, list[Reading]]] = [(entry, readings) for entry in candidate.entries]
    else:
        members = dict.fromkeys(reading.member for reading in readings)
        sought = [(None, [reading for reading in readings if reading.member == member]) for member in members]
    ranked: list[Ranks] = []
    for entry, allowed in sought:
        ranks = [(_misfit(reading, entry, image_size), _as_described(reading, entry)) for reading in allowed]
        ranks.sort(key=lambda rank: rank[0])
        if ranks and ranks[0][1].member not in [other[0][1].member for other in ranked]:
            ranked.append(ranks)
    return ranked


def _readings(
    shape: tuple[int, ...], member: int | None, image_size: tuple[int, int], reductions: Sequence[float]
) -> Iterator[Reading]:
    """Yield the ways in which a tensor's shape can be read, the most common first."""
    if not shape or shape[0] != 1:
        # Several entries for the dry run's one image, such as the inner tokens of TNT.
        return
    if len(shape) == 4:
        _, first, second, third = shape
        maps: tuple[tuple[Layout, int, tuple[int, int]], ...] = (
            ("NCHW", first, (second, third)),
            ("NHWC", third, (first, second)),
        )
        for layout, channels, grid in maps:
            reduction = math.sqrt(math.prod(image_size) / math.prod(grid)) if all(grid) else math.inf
            yield Reading(layout, channels, grid, 0, reduction, member)
    elif len(shape) == 3:
        yield _read_tokens("NLC", shape[1], shape[2], _MAX_PREFIX_TOKENS, member, image_size, reductions)
        # Networks that put channels first have no tokens in front of the grid's.
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
    """Return the grid that leaves the fewest prefix tokens, at the described reductions or else at any; or none."""
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


def _misfit(reading: Reading, entry: FeatureEntry | None, image_size: tuple[int, int]) -> tuple[float, ...]:
    """Return how badly a reading disagrees with the described channels, the image's aspect and the described grid."""
    wrong_channels = entry is not None and reading.channels != entry.channels
    if reading.grid is None or 0 in reading.grid:
        return (wrong_channels, math.inf, math.inf)
    aspect = abs(math.log(reading.grid[0] / reading.grid[1] * image_size[1] / image_size[0]))
    size = abs(math.log(reading.reduction / entry.reduction)) if entry is not None else 0.0
    return (wrong_channels, round(aspect, 1), round(size, 1))


def _as_described(reading: Reading, entry: FeatureEntry | None) -> Reading:
    """Return a reading with the described reduction: the last grids of a tiny image cannot tell it."""
    if entry is None or reading.channels != entry.channels:
        return reading
    return replace(reading, reduction=entry.reduction)


def _is_tie(ranks: Ranks) -> bool:
    return len(ranks) > 1 and ranks[0][0] == ranks[1][0]


def _best_reading(ranks: Ranks, usual: Layout | None) -> Reading:
    """Return the best reading; where several are equally good, the one that is usual in this backbone."""
    best = [reading for misfit, reading in ranks if misfit == ranks[0][0]]
    return next((reading for reading in best if reading.layout == usual), best[0])

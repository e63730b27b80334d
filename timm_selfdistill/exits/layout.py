"""Which modules `feature_info` names, and how the tensors that they return are laid out."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

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


class FeatureEntry(NamedTuple):
    """What `feature_info` says of a tensor: its position there, channels, and the image's sides over the grid's."""

    position: int
    channels: int
    reduction: float


class Candidate(NamedTuple):
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


class Reading(NamedTuple):
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


def resolve_feature_info(backbone: Backbone) -> tuple[dict[str, Candidate], tuple[str, ...]]:
    """Return the candidates that `feature_info` names, in its order, by name; and names in it that are not modules."""
    modules = dict(backbone.named_modules())
    tapped = next((_TAPPED_INSTEAD[name] for name in _timm_classes(backbone) if name in _TAPPED_INSTEAD), ())
    patterns = [re.escape(pattern).replace(r"\*", "[^.]*") for pattern in tapped]
    instead = [name for pattern in patterns for name in modules if re.fullmatch(pattern, name)]
    if instead:
        paths = [last_running_child(backbone, name, instead) for name in instead]
        return {name: Candidate(name, paths[index], (index,)) for index, name in enumerate(instead)}, ()
    info = backbone.feature_info
    # Where the backbone hands on the `feature_info` of a child, its names are relative to the child.
    sharing = [name for name, child in backbone.named_children() if getattr(child, "feature_info", None) is info]
    prefixes = ("", *(f"{name}." for name in sharing))
    entries: dict[str, list[FeatureEntry]] = {}
    without_module = []
    for index, entry in enumerate(info):
        names = (prefix + entry["module"] for prefix in prefixes if entry["module"])
        name = next((name for name in names if name in modules), None)
        if name is None:
            without_module.append(entry["module"])
        else:
            entries.setdefault(name, []).append(FeatureEntry(index, entry["num_chs"], entry["reduction"]))
    candidates = {}
    for name, found in entries.items():
        running = last_running_child(backbone, name, entries)
        candidates[name] = Candidate(name, running, tuple(entry.position for entry in found), tuple(found))
    return candidates, tuple(without_module)


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
    clear = Counter(ranks[0][1].layout for taps in ranked.values() for ranks in taps if len(_best(ranks)) == 1)
    usual = clear.most_common(1)[0][0] if clear else None
    readings = {}
    for name, taps in ranked.items():
        if taps:
            readings[name] = tuple(min(_best(ranks), key=lambda found: found.layout != usual) for ranks in taps)
    return readings


def _timm_classes(backbone: Backbone) -> list[str]:
    return [base.__name__ for base in type(backbone).__mro__ if base.__module__.startswith("timm.")]


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
        ranks = sorted((_judge(reading, entry, image_size) for reading in allowed), key=lambda rank: rank[0])
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
        # Networks that put channels first have no tokens in front of the grid's.
        lists: tuple[tuple[Layout, int, int, int], ...] = (
            ("NLC", shape[1], shape[2], _MAX_PREFIX_TOKENS),
            ("NCL", shape[2], shape[1], 0),
        )
        for layout, length, channels, max_prefix in lists:
            prefix, token_grid, reduction = _find_grid(length, max_prefix, image_size, reductions)
            yield Reading(layout, channels, token_grid, prefix, reduction, member)


def _find_grid(
    length: int, max_prefix: int, image_size: tuple[int, int], reductions: Sequence[float]
) -> tuple[int, tuple[int, int] | None, float]:
    """Return the least number of prefix tokens that leaves a grid, the grid, and its reduction; or that there is none.

    A grid at one of the described reductions goes before any other.
    """
    for tried in (reductions, range(1, _MAX_REDUCTION + 1)):
        fits = []
        for reduction in tried:
            for rounded in (math.ceil, math.floor):
                grid = (rounded(image_size[0] / reduction), rounded(image_size[1] / reduction))
                prefix = length - math.prod(grid)
                if all(grid) and 0 <= prefix <= max_prefix:
                    fits.append((prefix, grid, reduction))
        if fits:
            return min(fits, key=lambda fit: fit[0])
    return 0, None, math.inf


def _judge(
    reading: Reading, entry: FeatureEntry | None, image_size: tuple[int, int]
) -> tuple[tuple[float, ...], Reading]:
    """Return how badly a reading disagrees with the described channels, the image's aspect and the described grid.

    It is returned too, with the described reduction: the last grids of a tiny image cannot tell it.
    """
    wrong_channels = entry is not None and reading.channels != entry.channels
    aspect = size = math.inf
    if reading.grid is not None and 0 not in reading.grid:
        aspect = abs(math.log(reading.grid[0] / reading.grid[1] * image_size[1] / image_size[0]))
        size = abs(math.log(reading.reduction / entry.reduction)) if entry is not None else 0.0
    misfit = (wrong_channels, round(aspect, 1), round(size, 1))
    if entry is None or wrong_channels:
        return misfit, reading
    return misfit, reading._replace(reduction=entry.reduction)


def _best(ranks: Ranks) -> list[Reading]:
    """Return the readings that fit best."""
    return [reading for misfit, reading in ranks if misfit == ranks[0][0]]

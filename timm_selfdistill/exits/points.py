"""Every point of a backbone that an exit can be attached to, proved by one dry run, and the choice among them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timm_selfdistill.exits.layout import (
    Candidate,
    Layout,
    has_ordered_tokens,
    last_running_child,
    read_taps,
    resolve_feature_info,
)
from timm_selfdistill.exits.probe import (
    Backbone,
    Classifier,
    DryRun,
    ImageSize,
    check_contract,
    dry_run,
    find_classifier,
)

Exits = int | Sequence[int | float | str]

DEFAULT_EXITS = 3
# A tap below the first share is too shallow to classify from, one above the second saves nothing.
_MIN_COST, _MAX_COST = 0.02, 0.97
# Finer maps than the paper's finest are stems: tapped only where a backbone has too few other points.
_MAX_DOWNSAMPLE = 8


@dataclass(frozen=True)
class Tap:
    """A tensor that a module of the backbone returns and a head reads, as the dry run found it.

    Args:
        name: Of the exit, and which of the module's tensors it is where several are tapped; error messages name it.
        layout: Order of the tensor's dimensions.
        channels: Number of channels.
        grid: Height and width of the feature map at the dry run's input size, None for tokens that form no grid.
        num_prefix_tokens: Tokens in front of the grid's, such as a class token.
        downsample: How many times finer the grid is, along one side, than the backbone's deepest.
        member: Which member it is where the module returns a tuple or list, else None.
    """

    name: str
    layout: Layout
    channels: int
    grid: tuple[int, int] | None
    num_prefix_tokens: int
    downsample: int
    member: int | None


@dataclass(frozen=True)
class ExitPoint:
    """A place in a backbone that an exit is attached to, as the dry run found it.

    Args:
        name: Module path as `feature_info` or the caller gives it; the name that reports show.
        module: Path of the module whose output is tapped: `name`, or its last child where `name` is a container that
            the backbone may run child by child (as it does under gradient checkpointing).
        cost: Share of the backbone's multiply-accumulates that is spent when the point is reached, 0 to 1.
        taps: The tensors tapped there: one, or one for each branch of a network with several (CrossViT, HRNet).
    """

    name: str
    module: str
    cost: float
    taps: tuple[Tap, ...]

    @property
    def downsample(self) -> int:
        """How many times finer its coarsest grid is, along one side, than the backbone's deepest."""
        return min(tap.downsample for tap in self.taps)


@dataclass(frozen=True)
class BackboneTaps:
    """Where a backbone is tapped: at its exits, shallow to deep, and at its classifier; see also `DryRun`."""

    points: tuple[ExitPoint, ...]
    classifier: Classifier
    feature_dim: int
    feature_axes: Mapping[str, int]


@dataclass(frozen=True)
class Exploration:
    """Everything that one dry run tells about a backbone: all points that an exit can be attached to, shallow to deep.

    `candidates` are what `feature_info` and the caller named, by name, of which some may be no points;
    `without_module` are the names in `feature_info` that are not modules.
    """

    points: tuple[ExitPoint, ...]
    candidates: dict[str, Candidate]
    classifier: Classifier
    run: DryRun
    without_module: tuple[str, ...]

    def useful(self) -> list[ExitPoint]:
        """Return the points that are neither too shallow to classify from nor so deep that they save nothing."""
        return [point for point in self.points if _MIN_COST <= point.cost <= _MAX_COST]

    def faults(self) -> dict[str, str]:
        """Return why the other things that `feature_info` and the caller named are not points, by name."""
        points = {point.name for point in self.points}
        return {
            **dict.fromkeys(self.without_module, "is not a module"),
            **{name: self.fault(name) for name in self.candidates if name not in points},
        }

    def fault(self, name: str) -> str:
        """Return why the candidate of this name is not a point that an exit can be attached to."""
        record = self.run.records[self.candidates[name].module]
        if record.calls != 1:
            return f"runs {record.calls} times" if record.calls else "never runs"
        return "is overwritten in place" if record.overwritten else "returns no feature map or tokens"

    def shapes(self, point: ExitPoint) -> list[tuple[int, ...]]:
        """Return the shapes of the tensors tapped at a point, for one image."""
        return [self.run.records[point.module].shapes[tap.member or 0] for tap in point.taps]


def find_exit_points(
    backbone: Backbone, exits: Exits | None = None, image_size: ImageSize | None = None
) -> BackboneTaps:
    """Choose exit points, proved by one forward of zeros; `exits` and `image_size` are as in `wrap`.

    Args:
        backbone: A timm model, or a module that follows timm's contract (`feature_info`, `get_classifier`,
            `num_classes`, `num_features`); it is not changed.
        exits: Which exits, or how many.
        image_size: Input height and width of the dry run in pixels.

    Raises:
        ValueError: If the backbone does not follow the contract or has no classifier, or if an exit does not exist, is
            named twice or never, or is at a module that does not run exactly once or whose output is overwritten.
    """
    return choose(explore(backbone, image_size, exits), exits)


def explore(backbone: Backbone, image_size: ImageSize | None = None, exits: Exits | None = None) -> Exploration:
    """Find every point that an exit can be attached to, at the modules that `feature_info` and `exits` name."""
    names = _module_names(exits)
    check_contract(backbone)
    candidates, without_module = resolve_feature_info(backbone)
    for name in names:
        if name not in candidates:
            candidates[name] = Candidate(name, last_running_child(backbone, name, candidates))
    classifier = find_classifier(backbone)
    run = dry_run(backbone, [c.module for c in candidates.values()], classifier, image_size)
    points = _prove(candidates, run, has_ordered_tokens(backbone))
    return Exploration(points, candidates, classifier, run, without_module)


def choose(found: Exploration, exits: Exits | None) -> BackboneTaps:
    """Choose among the points that were found; for the forms of `exits` and the errors see `find_exit_points`."""
    run = found.run
    return BackboneTaps(tuple(_choose(found, exits)), found.classifier, run.feature_dim, run.feature_axes)


def _module_names(exits: Exits | None) -> tuple[str, ...]:
    """Return the module paths in a choice of exits; raise ValueError if it is neither a number nor a list."""
    if isinstance(exits, int | None):
        return ()
    if isinstance(exits, str) or not isinstance(exits, Sequence) or not exits:
        raise ValueError(
            f"exits={exits!r}: give a number, or a list of feature_info indices, cost shares or module names."
        )
    return tuple(item for item in exits if isinstance(item, str))


def _prove(candidates: dict[str, Candidate], run: DryRun, tokens_in_order: bool) -> tuple[ExitPoint, ...]:
    """Return an exit point for each candidate that ran exactly once and was kept, in the order in which they ran."""
    records = run.records
    fired = [c for c in candidates.values() if records[c.module].calls == 1 and not records[c.module].overwritten]
    fired.sort(key=lambda c: records[c.module].order)
    readings = read_taps(fired, records, run.image_size)
    reductions = [reading.reduction for taps in readings.values() for reading in taps]
    coarsest = max(filter(math.isfinite, reductions), default=1.0)
    points = []
    for position, (name, found) in enumerate(readings.items()):
        module = candidates[name].module
        # Depth is the cost where no operation runs that can be counted.
        cost = records[module].macs / run.total_macs if run.total_macs else (position + 1) / (len(fired) + 1)
        taps = []
        for reading in found:
            is_readable = reading.layout in ("NCHW", "NHWC") or tokens_in_order
            tap = Tap(
                name=name if len(found) == 1 else f"{name}[{reading.member}]",
                layout=reading.layout,
                channels=reading.channels,
                grid=reading.grid if is_readable else None,
                num_prefix_tokens=reading.num_prefix_tokens,
                downsample=max(1, round(coarsest / reading.reduction)),
                member=reading.member,
            )
            taps.append(tap)
        points.append(ExitPoint(name, module, cost, tuple(taps)))
    return tuple(points)


def _choose(found: Exploration, exits: Exits | None) -> list[ExitPoint]:
    """Return the requested exit points from shallow to deep."""
    useful = found.useful()
    if exits is None:
        if not useful:
            raise ValueError(
                f"No exit point lies between {_MIN_COST:.0%} and {_MAX_COST:.0%} of this backbone's cost; name others: "
                f"exits=[...] takes the path of any module that runs once. Those found are {_names(found.points)}."
            )
        exits = min(DEFAULT_EXITS, len(useful))
    if isinstance(exits, int):
        if isinstance(exits, bool) or not 1 <= exits <= len(useful):
            raise ValueError(f"exits={exits}: this backbone has {len(useful)} useful exit points ({_names(useful)}).")
        stage_ends = [p for p in useful if p.downsample <= _MAX_DOWNSAMPLE]
        points = stage_ends if len(stage_ends) >= exits else useful
        return _nearest(points, [(k + 1) / (exits + 1) for k in range(exits)])
    chosen = [_pick(item, found) for item in exits if not isinstance(item, float)]
    free = [point for point in useful if point not in chosen]
    shares = sorted(item for item in exits if isinstance(item, float))
    wrong = [share for share in shares if not 0 < share < 1]
    if wrong or len(set(shares)) < len(shares) or len(shares) > len(free):
        raise ValueError(
            f"exits={list(exits)!r}: cost shares lie between 0 and 1, are all different, and take an exit point each; "
            f"left for them are {len(free)}: {_names(free)}."
        )
    chosen += _nearest(free, shares)
    if len({point.module for point in chosen}) != len(chosen):
        raise ValueError(f"exits={list(exits)!r} names the same exit point twice: {_names(chosen)}.")
    return sorted(chosen, key=lambda point: found.run.records[point.module].order)


def _pick(item: int | str, found: Exploration) -> ExitPoint:
    """Return the exit point that an index or a name means."""
    if isinstance(item, bool) or not isinstance(item, int | str):
        raise ValueError(f"An exit is a feature_info index, a cost share or a module name, not {item!r}.")
    if isinstance(item, int):
        indexed = {index: candidate.name for candidate in found.candidates.values() for index in candidate.indices}
        if item not in indexed:
            allowed = ", ".join(f"{index} ({name})" for index, name in sorted(indexed.items()))
            raise ValueError(f"feature_info has no module at index {item}; allowed are {allowed or 'none'}.")
        item = indexed[item]
    point = next((point for point in found.points if point.name == item), None)
    if point is None:
        raise ValueError(
            f"Module {item!r} {found.fault(item)} in a forward, so it can have no exit; exit points are "
            f"{_names(found.points)}, and any module that runs once is allowed."
        )
    return point


def _nearest(points: list[ExitPoint], shares: Sequence[float]) -> list[ExitPoint]:
    """Return one point for each share of the cost, the nearest in order, none twice."""
    chosen: list[ExitPoint] = []
    start = 0
    for done, share in enumerate(shares):
        stop = len(points) - (len(shares) - done - 1)
        index = min(range(start, stop), key=lambda i: abs(points[i].cost - share))
        chosen.append(points[index])
        start = index + 1
    return chosen


def _names(points: Sequence[ExitPoint]) -> str:
    return ", ".join(point.name for point in points) or "none"

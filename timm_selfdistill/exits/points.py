"""Choose a backbone's exit points and prove them."""

from collections.abc import Sequence
from dataclasses import dataclass

from timm_selfdistill.exits.candidates import (
    Backbone,
    Candidate,
    classifier_names,
    last_running_child,
    names_of,
    resolve_feature_info,
)
from timm_selfdistill.exits.dry_run import DryRun, Record, dry_run
from timm_selfdistill.exits.layout import Layout, Tap, recognise, reduction_of

Exits = int | Sequence[int | float | str]

_DEFAULT_EXITS = 3
# A tap below the first share is too shallow to classify from, one above the second saves nothing.
_MIN_COST, _MAX_COST = 0.02, 0.97
# Finer maps than the paper's finest are stems: tapped only where a backbone has too few other points.
_MAX_DOWNSAMPLE = 8
_CONTRACT = ("feature_info", "get_classifier", "num_classes", "num_features")


@dataclass(frozen=True)
class ExitPoint:
    """A place in a backbone that an exit hangs on, as the dry run found it.

    Args:
        name: Module path as `feature_info` or the caller gives it; the name that reports show.
        module: Path of the module whose output is tapped: `name`, or its last child where `name` is a container that
            the backbone may run child by child (as it does under gradient checkpointing).
        layout: Order of the tapped tensor's dimensions.
        channels: Number of channels of the tapped tensor.
        grid: Height and width of the feature map at the dry run's input size, None for tokens that form no grid.
        num_prefix_tokens: Tokens in front of the grid's, such as a class token.
        downsample: How many times finer the grid is, along one side, than the backbone's deepest tap's.
        cost: Share of the backbone's multiply-accumulates that is spent when the tap is reached, 0 to 1.
        member: Which member is tapped where the module returns a tuple or list, else None.
    """

    name: str
    module: str
    layout: Layout
    channels: int
    grid: tuple[int, int] | None
    num_prefix_tokens: int
    downsample: int
    cost: float
    member: int | None


@dataclass(frozen=True)
class BackboneTaps:
    """What one dry run tells about a backbone.

    Args:
        points: The exits, shallow to deep.
        classifiers: Module paths of the backbone's own classifier (two for distilled transformers), whose input is
            the teacher's feature.
        feature_dim: Width D of the teacher's feature.
    """

    points: tuple[ExitPoint, ...]
    classifiers: tuple[str, ...]
    feature_dim: int


def find_exit_points(
    backbone: Backbone, exits: Exits | None = None, image_size: int | tuple[int, int] | None = None
) -> BackboneTaps:
    """Choose exit points and prove them by one forward of zeros that leaves the backbone as it was.

    Args:
        backbone: A timm model, or a module that follows timm's contract (`feature_info`, `get_classifier`,
            `num_classes`, `num_features`).
        exits: How many exits, spread evenly over the backbone's cost; or for each exit an index into `feature_info`
            (int), a share of the cost (float) or a module path (str). By default three, as in the paper, or fewer
            where the backbone has fewer stages.
        image_size: Input height and width of the dry run in pixels; the backbone's own by default.

    Returns:
        The exit points from shallow to deep, and where the teacher's feature is read.

    Raises:
        ValueError: If the backbone does not follow the contract or has no classifier, or if an exit does not exist,
            is named twice or never, or hangs on a module that does not run exactly once or whose output is overwritten.
    """
    missing = [name for name in _CONTRACT if not hasattr(backbone, name)]
    if missing:
        raise ValueError(
            f"{type(backbone).__name__} cannot be wrapped: it has no {', '.join(missing)}. "
            f"A backbone is a timm model or a module with {', '.join(_CONTRACT)}."
        )
    infos = resolve_feature_info(backbone)
    if not isinstance(exits, int | None) and (isinstance(exits, str) or not isinstance(exits, Sequence) or not exits):
        raise ValueError(
            f"exits={exits!r}: give a number, or a list of feature_info indices, cost shares or module names."
        )
    for name in () if isinstance(exits, int | None) else exits:
        if isinstance(name, str) and name not in infos:
            infos[name] = Candidate(name, last_running_child(backbone, name, infos))

    classifiers = classifier_names(backbone)
    run = dry_run(backbone, [c.module for c in infos.values()], classifiers, image_size)
    proved = _prove(infos, run)
    chosen = _choose(exits, proved, infos, run)
    return BackboneTaps(tuple(chosen), classifiers, run.feature_dim)


def _prove(candidates: dict[str, Candidate], run: DryRun) -> dict[str, ExitPoint]:
    """Return an exit point for each candidate that ran exactly once and was kept, in the order in which they ran."""
    records = run.records
    fired = [c for c in candidates.values() if records[c.module].calls == 1 and not records[c.module].overwritten]
    fired.sort(key=lambda c: records[c.module].order)
    reductions = [c.reduction for c in candidates.values() if c.reduction]
    taps: dict[str, tuple[Candidate, Tap]] = {}
    for candidate in fired:
        tap = recognise(records[candidate.module], candidate, run.image_size, reductions)
        if tap is not None:
            taps[candidate.name] = (candidate, tap)
    shrinkage = {name: reduction_of(candidate, tap, run.image_size) for name, (candidate, tap) in taps.items()}
    points = {}
    for position, (name, (candidate, tap)) in enumerate(taps.items()):
        # Where nothing that can be counted runs, depth stands for cost.
        share = records[candidate.module].macs / run.total_macs if run.total_macs else None
        points[name] = ExitPoint(
            name=name,
            module=candidate.module,
            layout=tap.layout,
            channels=tap.channels,
            grid=tap.grid,
            num_prefix_tokens=tap.num_prefix_tokens,
            downsample=max(1, round(max(shrinkage.values()) / shrinkage[name])),
            cost=(position + 1) / (len(taps) + 1) if share is None else share,
            member=tap.member,
        )
    return points


def _choose(
    exits: Exits | None, proved: dict[str, ExitPoint], candidates: dict[str, Candidate], run: DryRun
) -> list[ExitPoint]:
    """Return the requested exit points from shallow to deep."""
    useful = [p for p in proved.values() if _MIN_COST <= p.cost <= _MAX_COST]
    if exits is None:
        exits = max(1, min(_DEFAULT_EXITS, len(useful)))
    if isinstance(exits, int):
        if isinstance(exits, bool) or not 1 <= exits <= len(useful):
            raise ValueError(f"exits={exits}: this backbone has {len(useful)} useful exit points ({names_of(useful)}).")
        stage_ends = [p for p in useful if p.downsample <= _MAX_DOWNSAMPLE]
        points = stage_ends if len(stage_ends) >= exits else useful
        return _nearest(points, [(k + 1) / (exits + 1) for k in range(exits)])
    chosen = [_pick(item, useful, proved, candidates, run) for item in exits]
    if len({point.module for point in chosen}) != len(chosen):
        raise ValueError(f"exits={list(exits)!r} names the same exit point twice: {names_of(chosen)}.")
    return sorted(chosen, key=lambda point: run.records[point.module].order)


def _pick(
    item: int | float | str,
    useful: list[ExitPoint],
    proved: dict[str, ExitPoint],
    candidates: dict[str, Candidate],
    run: DryRun,
) -> ExitPoint:
    """Return the exit point that one element of `exits` means."""
    if isinstance(item, bool) or not isinstance(item, int | float | str):
        raise ValueError(f"An exit is a feature_info index, a cost share or a module name, not {item!r}.")
    if isinstance(item, float):
        if not 0 < item < 1 or not useful:
            raise ValueError(f"A cost share lies between 0 and 1, got {item}; exit points are {names_of(proved)}.")
        return _nearest(useful, [item])[0]
    if isinstance(item, int):
        indexed = {c.index: c.name for c in candidates.values() if c.index is not None}
        if item not in indexed:
            allowed = ", ".join(f"{index} ({name})" for index, name in indexed.items())
            raise ValueError(f"feature_info has no module at index {item}; allowed are {allowed or 'none'}.")
        item = indexed[item]
    if item not in proved:
        raise ValueError(
            f"Module {item!r} {_fault(run.records[candidates[item].module])} in a forward, so no exit can hang on it; "
            f"exit points are {names_of(proved)}, and any module that runs once is allowed."
        )
    return proved[item]


def _fault(record: Record) -> str:
    """Return why a module that was tapped is no exit point."""
    if record.calls != 1:
        return f"runs {record.calls} times" if record.calls else "never runs"
    return "is overwritten in place" if record.overwritten else "returns no feature map or tokens"


def _nearest(points: list[ExitPoint], shares: Sequence[float]) -> list[ExitPoint]:
    """Return one point a share of the cost, the nearest in order, none twice."""
    chosen: list[ExitPoint] = []
    start = 0
    for done, share in enumerate(shares):
        stop = len(points) - (len(shares) - done - 1)
        index = min(range(start, stop), key=lambda i: abs(points[i].cost - share))
        chosen.append(points[index])
        start = index + 1
    return chosen

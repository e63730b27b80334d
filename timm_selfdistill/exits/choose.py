"""Choose a backbone's exits among the points that a dry run proved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from timm_selfdistill.exits.candidates import Backbone, Classifier, names_of
from timm_selfdistill.exits.points import ExitPoint, Exploration, explore

Exits = int | Sequence[int | float | str]

_DEFAULT_EXITS = 3
# A tap below the first share is too shallow to classify from, one above the second saves nothing.
_MIN_COST, _MAX_COST = 0.02, 0.97
# Finer maps than the paper's finest are stems: tapped only where a backbone has too few other points.
_MAX_DOWNSAMPLE = 8


@dataclass(frozen=True)
class BackboneTaps:
    """Where a backbone is tapped.

    Args:
        points: The exits, shallow to deep.
        classifier: The backbone's own classifier, whose input is the teacher's feature.
        feature_dim: Width D of the teacher's feature.
        feature_axes: For each module of the classifier, which dimension of its input holds the feature's channels.
    """

    points: tuple[ExitPoint, ...]
    classifier: Classifier
    feature_dim: int
    feature_axes: Mapping[str, int]


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
    return choose(explore(backbone, image_size, named_modules(exits)), exits)


def named_modules(exits: Exits | None) -> tuple[str, ...]:
    """Return the module paths in a choice of exits, which a dry run must look at.

    Raises:
        ValueError: If the choice is neither a number nor a list.
    """
    if isinstance(exits, int | None):
        return ()
    if isinstance(exits, str) or not isinstance(exits, Sequence) or not exits:
        raise ValueError(
            f"exits={exits!r}: give a number, or a list of feature_info indices, cost shares or module names."
        )
    return tuple(item for item in exits if isinstance(item, str))


def choose(found: Exploration, exits: Exits | None) -> BackboneTaps:
    """Choose among the points that were found; for the forms of `exits` and the errors see `find_exit_points`."""
    run = found.run
    return BackboneTaps(tuple(_choose(found, exits)), found.classifier, run.feature_dim, run.feature_axes)


def _choose(found: Exploration, exits: Exits | None) -> list[ExitPoint]:
    """Return the requested exit points from shallow to deep."""
    useful = [p for p in found.points if _MIN_COST <= p.cost <= _MAX_COST]
    if exits is None:
        if not useful:
            raise ValueError(
                f"No exit point lies between {_MIN_COST:.0%} and {_MAX_COST:.0%} of this backbone's cost; name others: "
                f"exits=[...] takes the path of any module that runs once. Those found are {names_of(found.points)}."
            )
        exits = min(_DEFAULT_EXITS, len(useful))
    if isinstance(exits, int):
        if isinstance(exits, bool) or not 1 <= exits <= len(useful):
            raise ValueError(f"exits={exits}: this backbone has {len(useful)} useful exit points ({names_of(useful)}).")
        stage_ends = [p for p in useful if p.downsample <= _MAX_DOWNSAMPLE]
        points = stage_ends if len(stage_ends) >= exits else useful
        return _nearest(points, [(k + 1) / (exits + 1) for k in range(exits)])
    chosen = [_pick(item, found) for item in exits if not isinstance(item, float)]
    chosen += _pick_by_cost(exits, [point for point in useful if point not in chosen])
    if len({point.module for point in chosen}) != len(chosen):
        raise ValueError(f"exits={list(exits)!r} names the same exit point twice: {names_of(chosen)}.")
    return sorted(chosen, key=lambda point: found.run.records[point.module].order)


def _pick_by_cost(exits: Sequence[int | float | str], free: list[ExitPoint]) -> list[ExitPoint]:
    """Return the exit points that the cost shares among `exits` mean: the nearest in order, each another one."""
    shares = sorted(item for item in exits if isinstance(item, float))
    wrong = [share for share in shares if not 0 < share < 1]
    if wrong or len(set(shares)) < len(shares) or len(shares) > len(free):
        raise ValueError(
            f"exits={list(exits)!r}: cost shares lie between 0 and 1, are all different, and take an exit point each; "
            f"left for them are {len(free)}: {names_of(free)}."
        )
    return _nearest(free, shares)


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
            f"Module {item!r} {found.fault(item)} in a forward, so no exit can "
            f"hang on it; exit points are {names_of(found.points)}, and any module that runs once is allowed."
        )
    return point


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

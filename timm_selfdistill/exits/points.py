"""Every point of a backbone that an exit could hang on, proved by one dry run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from timm_selfdistill.exits.candidates import (
    Backbone,
    Candidate,
    Classifier,
    check_contract,
    entries_without_module,
    find_classifier,
    last_running_child,
    oddity_of,
    resolve_feature_info,
)
from timm_selfdistill.exits.dry_run import DryRun, dry_run
from timm_selfdistill.exits.layout import Layout, Reading, read_taps


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
    """A place in a backbone that an exit hangs on, as the dry run found it.

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
class Exploration:
    """Everything that one dry run tells about a backbone.

    Args:
        points: All points that an exit could hang on, shallow to deep.
        candidates: What `feature_info` and the caller named, by name; some may be no points.
        classifier: The backbone's own classifier.
        run: What the dry run showed.
        without_module: Names in `feature_info` that are no modules.
    """

    points: tuple[ExitPoint, ...]
    candidates: dict[str, Candidate]
    classifier: Classifier
    run: DryRun
    without_module: tuple[str, ...]

    def faults(self) -> dict[str, str]:
        """Return why exits cannot hang on the other things that `feature_info` and the caller named, by name."""
        points = {point.name for point in self.points}
        return {
            **dict.fromkeys(self.without_module, "is no module"),
            **{name: self.fault(name) for name in self.candidates if name not in points},
        }

    def fault(self, name: str) -> str:
        """Return why the candidate of this name is no point that an exit could hang on."""
        record = self.run.records[self.candidates[name].module]
        if record.calls != 1:
            return f"runs {record.calls} times" if record.calls else "never runs"
        return "is overwritten in place" if record.overwritten else "returns no feature map or tokens"

    def shapes(self, point: ExitPoint) -> list[tuple[int, ...]]:
        """Return the shapes of the tensors tapped at a point, for one image."""
        return [self.run.records[point.module].shapes[tap.member or 0] for tap in point.taps]


def explore(
    backbone: Backbone, image_size: int | tuple[int, int] | None = None, names: Sequence[str] = ()
) -> Exploration:
    """Find every point that an exit could hang on, by one forward of zeros that leaves the backbone as it was.

    Args:
        backbone: A timm model, or a module that follows timm's contract.
        image_size: Input height and width of the dry run in pixels; the backbone's own by default.
        names: Paths of modules to look at beside those that `feature_info` names.

    Returns:
        What was found.

    Raises:
        ValueError: If the backbone does not follow the contract or has no classifier, or a named module does not exist.
    """
    check_contract(backbone)
    candidates = resolve_feature_info(backbone)
    for name in names:
        if name not in candidates:
            candidates[name] = Candidate(name, last_running_child(backbone, name, candidates))
    classifier = find_classifier(backbone)
    run = dry_run(backbone, [c.module for c in candidates.values()], classifier, image_size)
    points = _prove(candidates, run, oddity_of(backbone).tokens_in_order)
    without_module = tuple(entries_without_module(backbone, candidates))
    return Exploration(tuple(points), candidates, classifier, run, without_module)


def _prove(candidates: dict[str, Candidate], run: DryRun, tokens_in_order: bool) -> list[ExitPoint]:
    """Return an exit point for each candidate that ran exactly once and was kept, in the order in which they ran."""
    records = run.records
    fired = [c for c in candidates.values() if records[c.module].calls == 1 and not records[c.module].overwritten]
    fired.sort(key=lambda c: records[c.module].order)
    readings = read_taps(fired, records, run.image_size)
    reductions = [reading.reduction for taps in readings.values() for reading in taps]
    coarsest = max(filter(math.isfinite, reductions), default=1.0)
    points = []
    for position, (name, found) in enumerate(readings.items()):
        candidate = candidates[name]
        # Where nothing that can be counted runs, depth stands for cost.
        cost = records[candidate.module].macs / run.total_macs if run.total_macs else (position + 1) / (len(fired) + 1)
        taps = [
            _tap(name if len(found) == 1 else f"{name}[{reading.member}]", reading, coarsest, tokens_in_order)
            for reading in found
        ]
        points.append(ExitPoint(name, candidate.module, cost, tuple(taps)))
    return points


def _tap(name: str, reading: Reading, coarsest: float, tokens_in_order: bool) -> Tap:
    is_map = reading.layout in ("NCHW", "NHWC") or tokens_in_order
    return Tap(
        name=name,
        layout=reading.layout,
        channels=reading.channels,
        grid=reading.grid if is_map else None,
        num_prefix_tokens=reading.num_prefix_tokens,
        downsample=max(1, round(coarsest / reading.reduction)),
        member=reading.member,
    )

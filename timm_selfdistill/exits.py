"""Where a backbone can be tapped: the points that `feature_info` names, proved by one dry run."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

Layout = Literal["NCHW", "NHWC", "NLC"]
Exits = int | Sequence[int | float | str]
# A torch module that follows timm's contract, which no base class of timm's states.
Backbone = Any

# A tap below the first share is too shallow to classify from, one above the second saves nothing.
_MIN_COST, _MAX_COST = 0.02, 0.97
# Finer maps than the paper's finest are stems: tapped only where a backbone has too few other points.
_MAX_DOWNSAMPLE = 8
_MAX_PREFIX_TOKENS = 16
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
    backbone: Backbone, exits: Exits = 3, image_size: int | tuple[int, int] | None = None
) -> BackboneTaps:
    """Choose exit points and prove them by one forward of zeros that leaves the backbone as it was.

    Args:
        backbone: A timm model, or a module that follows timm's contract (`feature_info`, `get_classifier`,
            `num_classes`, `num_features`).
        exits: How many exits, spread evenly over the backbone's cost; or for each exit an index into `feature_info`
            (int), a share of the cost (float) or a module path (str).
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
    infos = _resolve_feature_info(backbone)
    if not isinstance(exits, int) and (isinstance(exits, str) or not isinstance(exits, Sequence) or not exits):
        raise ValueError(
            f"exits={exits!r}: give a number, or a list of feature_info indices, cost shares or module names."
        )
    for name in () if isinstance(exits, int) else exits:
        if isinstance(name, str) and name not in infos:
            infos[name] = _Candidate(name, _descend(backbone, name, infos))

    classifiers = _classifier_names(backbone)
    run = _dry_run(backbone, [c.module for c in infos.values()], classifiers, image_size)
    proved = _prove(infos, run)
    chosen = _choose(exits, proved, infos, run)
    return BackboneTaps(tuple(chosen), classifiers, run.feature_dim)


def pool_feature(value: Tensor) -> Tensor:
    """Return the teacher's feature [B, D] from what enters the classifier: [B, D], [B, D, H, W] or [B, L, D]."""
    if value.ndim == 4:
        return value.flatten(1) if value.shape[2:] == (1, 1) else value.mean((2, 3))
    return value.mean(1) if value.ndim == 3 else value


@dataclass(frozen=True)
class _Candidate:
    """A tap that `feature_info` or the caller names: where it hangs and what `feature_info` promises about it."""

    name: str
    module: str
    index: int | None = None
    channels: int | None = None
    reduction: int | None = None


@dataclass
class _Record:
    """What a hook saw at one module."""

    calls: int = 0
    overwritten: bool = False
    shapes: tuple[tuple[int, ...], ...] = ()
    is_sequence: bool = False
    flops: int = 0
    order: int = 0


@dataclass(frozen=True)
class _DryRun:
    """What one forward of zeros showed."""

    records: dict[str, _Record]
    image_size: tuple[int, int]
    total_flops: int
    feature_dim: int


def _resolve_feature_info(backbone: Backbone) -> dict[str, _Candidate]:
    """Return the candidates that `feature_info` names and that are modules, in its order."""
    modules = dict(backbone.named_modules())
    candidates: dict[str, _Candidate] = {}
    for index, info in enumerate(backbone.feature_info):
        for name in (info["module"], f"encoder.{info['module']}"):
            if name and name in modules:
                module = _descend(backbone, name, candidates)
                candidates.setdefault(name, _Candidate(name, module, index, info["num_chs"], info["reduction"]))
                break
    return candidates


def _descend(backbone: Backbone, name: str, known: dict[str, _Candidate]) -> str:
    """Return the path of the last module that runs inside the container `name`, or `name` itself."""
    try:
        module = backbone.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{type(backbone).__name__} has no module {name!r} to hang an exit on; "
            f"feature_info names {_names(known)}, and any module that runs once in a forward is allowed."
        ) from None
    # A plain container may be run child by child, and then a hook on it never fires.
    while isinstance(module, nn.ModuleList) or type(module).forward is nn.Sequential.forward:
        if len(module) == 0:
            break
        child, module = list(module.named_children())[-1]
        name = f"{name}.{child}"
    return name


def _classifier_names(backbone: Backbone) -> tuple[str, ...]:
    """Return the paths of the modules that map the teacher's feature to logits."""
    classifier = backbone.get_classifier()
    parts = classifier if isinstance(classifier, tuple | list | nn.ModuleList) else [classifier]
    paths = {id(module): name for name, module in backbone.named_modules()}
    if not parts or any(not isinstance(part, nn.Module) or isinstance(part, nn.Identity) for part in parts):
        raise ValueError(
            f"{type(backbone).__name__} has no classifier (num_classes={getattr(backbone, 'num_classes', None)}), so "
            "there is nothing to teach: create it with num_classes=N or call its reset_classifier(N) first."
        )
    unknown = [type(part).__name__ for part in parts if id(part) not in paths]
    if unknown:
        raise ValueError(f"get_classifier() of {type(backbone).__name__} returned {unknown}, not one of its modules.")
    return tuple(paths[id(part)] for part in parts)


def _dry_run(
    backbone: Backbone,
    taps: Sequence[str],
    classifiers: tuple[str, ...],
    image_size: int | tuple[int, int] | None,
) -> _DryRun:
    """Run the backbone once on zeros, counting calls, shapes and cost at every tap."""
    # Only the input size is read; with statistics given, timm does not warn about those of another channel count.
    channels, *size = resolve_input_data_config(backbone, {"mean": 0.5, "std": 0.5})["input_size"]
    if image_size is not None:
        size = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    parameter = next(backbone.parameters())
    zeros = torch.zeros(1, channels, *size, device=parameter.device, dtype=parameter.dtype)
    try:
        try:
            records, feature_dims, output, flops = _forward(backbone, zeros, taps, classifiers, count=True)
        except Exception:  # the counter itself fails on a few models; a fault of the backbone shows again without it
            records, feature_dims, output, flops = _forward(backbone, zeros, taps, classifiers, count=False)
    except Exception as error:
        raise ValueError(
            f"{type(backbone).__name__} fails on an input of shape {tuple(zeros.shape)}: {error}. "
            "Give image_size if it needs another one."
        ) from error
    if not isinstance(output, Tensor) or output.ndim != 2:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(f"{type(backbone).__name__} must return logits [B, num_classes], but returned {got}.")
    if len(feature_dims) != len(classifiers):
        raise ValueError(
            f"The classifier of {type(backbone).__name__} ({', '.join(classifiers)}) did not run as a module, "
            "so the teacher's feature cannot be read there."
        )
    if len(set(feature_dims)) != 1:
        raise ValueError(f"The classifiers {classifiers} read features of different widths: {feature_dims}.")
    return _DryRun(records, (size[0], size[1]), flops, feature_dims[0])


def _forward(
    backbone: Backbone, zeros: Tensor, taps: Sequence[str], classifiers: tuple[str, ...], *, count: bool
) -> tuple[dict[str, _Record], list[int], Any, int]:
    """Return the record of each tap, the width of each classifier's input, the output and the FLOPs."""
    counter = FlopCounterMode(display=False) if count else None
    records = {name: _Record() for name in taps}
    feature_dims: list[int] = []
    versions: list[tuple[_Record, Tensor, int]] = []
    clock = iter(range(10**9))

    def record_tap(name: str, module: nn.Module, args: Any, output: Any) -> None:
        members = output if isinstance(output, tuple | list) else (output,)
        record = records[name]
        record.calls += 1
        record.is_sequence = isinstance(output, tuple | list)
        record.shapes = tuple(tuple(m.shape) if isinstance(m, Tensor) else () for m in members)
        versions.extend((record, m, m._version) for m in members if isinstance(m, Tensor))
        record.flops = counter.get_total_flops() if counter else 0
        record.order = next(clock)

    def record_feature(module: nn.Module, args: Any) -> None:
        feature_dims.append(pool_feature(args[0]).shape[1])

    handles = [backbone.get_submodule(n).register_forward_hook(partial(record_tap, n)) for n in records]
    handles += [backbone.get_submodule(n).register_forward_pre_hook(record_feature) for n in classifiers]
    try:
        with _untouched(backbone), torch.no_grad(), counter or nullcontext():
            output = backbone(zeros)
    finally:
        for handle in handles:
            handle.remove()
    # A head reads its tap after the forward: an in-place operation behind the tap would have changed it by then.
    for record, member, version in versions:
        record.overwritten |= member._version != version
    return records, feature_dims, output, counter.get_total_flops() if counter else 0


@contextmanager
def _untouched(backbone: Backbone) -> Iterator[None]:
    """Run the body in eval mode, then restore every module's mode and the random number generators."""
    modes = [(module, module.training) for module in backbone.modules()]
    device = next(backbone.parameters()).device
    devices = [device] if device.type not in ("cpu", "meta") else []
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        backbone.eval()
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training


def _prove(candidates: dict[str, _Candidate], run: _DryRun) -> dict[str, ExitPoint]:
    """Return an exit point for each candidate that ran exactly once and was kept, in the order in which they ran."""
    records = run.records
    fired = [c for c in candidates.values() if records[c.module].calls == 1 and not records[c.module].overwritten]
    fired.sort(key=lambda c: records[c.module].order)
    reductions = [c.reduction for c in candidates.values() if c.reduction]
    taps: dict[str, tuple[_Candidate, _Tap]] = {}
    for candidate in fired:
        tap = _recognise(records[candidate.module], candidate, run.image_size, reductions)
        if tap is not None:
            taps[candidate.name] = (candidate, tap)
    shrinkage = {name: _reduction(candidate, tap, run.image_size) for name, (candidate, tap) in taps.items()}
    points = {}
    for position, (name, (candidate, tap)) in enumerate(taps.items()):
        # Without a FLOP count, depth stands for cost.
        share = records[candidate.module].flops / run.total_flops if run.total_flops else None
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


def _reduction(candidate: _Candidate, tap: "_Tap", image_size: tuple[int, int]) -> float:
    """Return the image's size over the grid's, as promised where it is: a tiny image's last grids cannot tell."""
    if candidate.reduction:
        return candidate.reduction
    return math.sqrt(math.prod(image_size) / math.prod(tap.grid)) if tap.grid else 1.0


@dataclass(frozen=True)
class _Tap:
    layout: Layout
    channels: int
    grid: tuple[int, int] | None
    num_prefix_tokens: int
    member: int | None


def _recognise(
    record: _Record, candidate: _Candidate, image_size: tuple[int, int], reductions: Sequence[int]
) -> _Tap | None:
    """Return the layout of a tapped output, or None where no member of it is a feature map or token list."""
    found: list[tuple[tuple[float, ...], _Tap]] = []
    for index, shape in enumerate(record.shapes):
        member = index if record.is_sequence else None
        for tap in _readings(shape, member, image_size, [candidate.reduction] if candidate.reduction else reductions):
            found.append((_misfit(tap, candidate, image_size), tap))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _readings(
    shape: tuple[int, ...], member: int | None, image_size: tuple[int, int], reductions: Sequence[int]
) -> Iterator[_Tap]:
    """Yield the ways in which a tensor's shape can be read, the commonest first."""
    if len(shape) == 4:
        yield _Tap("NCHW", shape[1], (shape[2], shape[3]), 0, member)
        yield _Tap("NHWC", shape[3], (shape[1], shape[2]), 0, member)
    elif len(shape) == 3:
        grids = [(math.ceil(image_size[0] / r), math.ceil(image_size[1] / r)) for r in reductions]
        grids += [(image_size[0] // r, image_size[1] // r) for r in reductions]
        extra = {grid: shape[1] - math.prod(grid) for grid in grids}
        fits = [grid for grid in grids if 0 <= extra[grid] <= _MAX_PREFIX_TOKENS]
        best = min(fits, key=lambda grid: extra[grid]) if fits else None
        yield _Tap("NLC", shape[2], best, extra[best] if best else 0, member)


def _misfit(tap: _Tap, candidate: _Candidate, image_size: tuple[int, int]) -> tuple[float, ...]:
    """Return how badly a reading disagrees with the promised channels, the image's aspect and the promised grid."""
    wrong_channels = candidate.channels is not None and tap.channels != candidate.channels
    if tap.grid is None or 0 in tap.grid:
        return (wrong_channels, math.inf, math.inf)
    aspect = abs(math.log(tap.grid[0] / tap.grid[1] * image_size[1] / image_size[0]))
    expected = image_size[0] / candidate.reduction if candidate.reduction else tap.grid[0]
    return (wrong_channels, round(aspect, 1), abs(math.log(tap.grid[0] / expected)))


def _choose(
    exits: Exits, proved: dict[str, ExitPoint], candidates: dict[str, _Candidate], run: _DryRun
) -> list[ExitPoint]:
    """Return the requested exit points from shallow to deep."""
    useful = [p for p in proved.values() if _MIN_COST <= p.cost <= _MAX_COST]
    if isinstance(exits, int):
        if isinstance(exits, bool) or not 1 <= exits <= len(useful):
            raise ValueError(f"exits={exits}: this backbone has {len(useful)} useful exit points ({_names(useful)}).")
        stage_ends = [p for p in useful if p.downsample <= _MAX_DOWNSAMPLE]
        points = stage_ends if len(stage_ends) >= exits else useful
        return _nearest(points, [(k + 1) / (exits + 1) for k in range(exits)])
    chosen = [_pick(item, useful, proved, candidates, run) for item in exits]
    if len({point.module for point in chosen}) != len(chosen):
        raise ValueError(f"exits={list(exits)!r} names the same exit point twice: {_names(chosen)}.")
    return sorted(chosen, key=lambda point: run.records[point.module].order)


def _pick(
    item: int | float | str,
    useful: list[ExitPoint],
    proved: dict[str, ExitPoint],
    candidates: dict[str, _Candidate],
    run: _DryRun,
) -> ExitPoint:
    """Return the exit point that one element of `exits` means."""
    if isinstance(item, bool) or not isinstance(item, int | float | str):
        raise ValueError(f"An exit is a feature_info index, a cost share or a module name, not {item!r}.")
    if isinstance(item, float):
        if not 0 < item < 1 or not useful:
            raise ValueError(f"A cost share lies between 0 and 1, got {item}; exit points are {_names(proved)}.")
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
            f"exit points are {_names(proved)}, and any module that runs once is allowed."
        )
    return proved[item]


def _fault(record: _Record) -> str:
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


def _names(known: Any) -> str:
    """Return the names of exit points as one comma-separated line."""
    return ", ".join(item if isinstance(item, str) else item.name for item in known) or "none"

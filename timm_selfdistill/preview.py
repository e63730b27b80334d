"""Preview the points of a backbone where exits can be added, and their costs, before anything is trained."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from timm_selfdistill.exits import Backbone, ExitPoint, Exits, Exploration, choose, explore
from timm_selfdistill.heads import (
    AUTO,
    PROPORTIONAL,
    PUBLISHED,
    ExitHead,
    HeadBudget,
    choose_head,
    default_kwargs,
    fit_heads,
    resolve_budget,
)
from timm_selfdistill.measure import MacCounter
from timm_selfdistill.model import create_backbone, with_image_size
from timm_selfdistill.report.render import align, with_prefix

# The number of classes of ImageNet, for models that timm creates without a classifier.
_NUM_CLASSES = 1000


@dataclass(frozen=True)
class ExitPreview:
    """A point where an exit can be added, its indices into `feature_info`, and the head it would get.

    `reductions` are the image's sides over the grid's for each tapped tensor, None for tokens without a grid.
    `head_params` includes the classifier, `head_macs` is for one image. `is_chosen` tells whether `wrap` adds an exit,
    `fits` whether a head of the budget's fits there (True for other heads); where none does, the smallest is shown.
    """

    point: ExitPoint
    indices: tuple[int, ...]
    reductions: tuple[float | None, ...]
    head: str
    head_params: int
    head_macs: int
    is_chosen: bool
    fits: bool


@dataclass(frozen=True)
class Preview:
    """What wrapping a backbone would do: every point, shallow to deep, and the backbone's own costs for one image.

    `unusable` tells why other modules that `feature_info` names cannot be tapped, `image_size` is [H, W] in pixels.
    """

    exits: tuple[ExitPreview, ...]
    unusable: Mapping[str, str]
    params: int
    macs: int
    image_size: tuple[int, int]
    num_classes: int


def preview_exits(
    name: str,
    *,
    exits: Exits | None = None,
    head: str = AUTO,
    head_budget: float | None = None,
    num_classes: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Preview:
    """Find where exits can be added to a timm model, without weights where the model can run without them.

    Args:
        name: Name of a timm model.
        exits: The exits to mark, as in `wrap`.
        head: Name of a registered head, "published" or "auto".
        head_budget: As in `wrap`.
        num_classes: Number of classes; the model's default otherwise, or 1000 where it has none.
        image_size: Input height and width in pixels; the model's own by default.
        model_kwargs: Further arguments of `timm.create_model`.

    Returns:
        All points, and what each costs.

    Raises:
        ValueError: If the model cannot be created or wrapped, or a choice is unknown; says what is allowed.
    """
    kwargs = dict(model_kwargs or {}) | ({} if num_classes is None else {"num_classes": num_classes})
    kwargs = with_image_size(name, kwargs, image_size)
    backbone, found = _explore(name, kwargs, image_size, exits)
    head = PROPORTIONAL if head == AUTO else head
    share = resolve_budget(head, None, head_budget)
    budget = None if share is None else HeadBudget(share, found, backbone)
    points = choose(found, exits).points if budget is None else fit_heads(budget, exits).taps.points
    pixels = math.prod(found.run.image_size)
    previews = []
    for point in found.points:
        width = None if budget is None else budget.width(point, len(points))
        head_kwargs = {} if budget is None else default_kwargs(point, width or budget.min_width)
        own_head = choose_head(point) if head == PUBLISHED else head
        indices = found.candidates[point.name].indices
        reductions = tuple(tap.grid and (pixels / math.prod(tap.grid)) ** 0.5 for tap in point.taps)
        costs = _costs(point, found, backbone.num_classes, own_head, head_kwargs)
        fits = budget is None or width is not None
        previews.append(ExitPreview(point, indices, reductions, own_head, *costs, point in points, fits))
    params = sum(parameter.numel() for parameter in backbone.parameters())
    run = found.run
    return Preview(tuple(previews), found.faults(), params, run.total_macs, run.image_size, backbone.num_classes)


def _explore(
    name: str, kwargs: dict[str, Any], image_size: int | tuple[int, int] | None, exits: Exits | None
) -> tuple[Backbone, Exploration]:
    """Return the backbone and its points; on the meta device, which needs neither memory nor time, where it can run."""
    try:
        with torch.device("meta"):
            backbone = _create(name, kwargs)
            return backbone, explore(backbone, image_size, exits)
    except Exception as error:  # of whatever kind: some models compute numbers while they are built or run
        if isinstance(error, ValueError) and error.__cause__ is None:
            raise  # our own judgement of the model, which real weights would not change
        backbone = _create(name, kwargs)
        return backbone, explore(backbone, image_size, exits)


def _create(name: str, kwargs: dict[str, Any]) -> Backbone:
    backbone = create_backbone(name, pretrained=False, kwargs=kwargs)
    if getattr(backbone, "num_classes", None) == 0 and "num_classes" not in kwargs:
        return create_backbone(name, pretrained=False, kwargs={**kwargs, "num_classes": _NUM_CLASSES})
    return backbone


def _costs(
    point: ExitPoint, found: Exploration, num_classes: int, head: str, head_kwargs: Mapping[str, Any]
) -> tuple[int, int]:
    """Return the parameters of a head at a point, and its MACs for one image."""
    with torch.device("meta"):
        network = ExitHead(point, found.run.feature_dim, num_classes, head, head_kwargs).eval()
        tapped = [torch.empty(shape) for shape in found.shapes(point)]
    with torch.no_grad(), MacCounter() as counter:
        network(*tapped)
    return sum(parameter.numel() for parameter in network.parameters()), counter.macs


def format_preview(preview: Preview) -> str:
    """Return a preview as a table and sentences for the terminal."""
    header = ["", "index", "module", "layout", "channels", "reduction", "MACs %", "head"]
    header += ["head MACs", "%", "head params", "%"]
    rows = [
        [
            "*" if row.is_chosen else "",
            ",".join(map(str, row.indices)),
            row.point.name,
            "+".join(tap.layout for tap in row.point.taps),
            "+".join(str(tap.channels) for tap in row.point.taps),
            "+".join("?" if reduction is None else f"{reduction:.3g}" for reduction in row.reductions),
            _percent(row.point.cost, 1),
            row.head,
            with_prefix(row.head_macs),
            _percent(row.head_macs, preview.macs),
            with_prefix(row.head_params),
            _percent(row.head_params, preview.params),
        ]
        for row in preview.exits
    ]
    height, width = preview.image_size
    unfit = [row.point.name for row in preview.exits if not row.fits]
    notes = [
        "* an exit is added here by default, or with the number given; others: exits=[index or module, ...].",
        f"Backbone: {with_prefix(preview.params)} parameters, {with_prefix(preview.macs)} multiply-accumulates (MACs) "
        f"for one image of {height} x {width}, {preview.num_classes} classes.",
        "A head's MACs and parameters are also told as a share of the backbone's, in percent.",
        *([f"No head fits the budget, or half of what the exit saves, at {', '.join(unfit)}."] if unfit else []),
        *(f"Not a point: {name!r} {fault}." for name, fault in preview.unusable.items()),
    ]
    return "\n".join([*align([header, *rows], text_columns=4), "", *notes])


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "?"

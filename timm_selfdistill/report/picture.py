"""The report as a picture: accuracy over compute, one point per exit."""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.ticker import EngFormatter, FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from matplotlib.transforms import Bbox, BboxBase

from timm_selfdistill.escape import each_text, plot_text
from timm_selfdistill.palette import BLUE, GREY, GRID, INK, ORANGE
from timm_selfdistill.report.build import Report

_EXIT, _ENSEMBLE, _BASELINE, _INK = BLUE, ORANGE, GREY, INK
# From this ratio of dearest to cheapest on, a linear axis would crowd the cheap exits.
_WIDE_SPAN = 8
# Percentage points above and below the data: at least so many that noise does not look like a trend.
_MIN_PADDING = 1.0
# Where a label may stand: direction from its point (right, up), best first, and distance in typographic points.
_Spot = tuple[tuple[int, int], int]
_DIRECTIONS = ((0, 1), (-1, 1), (1, -1), (0, -1), (-1, 0), (1, 0), (1, 1), (-1, -1))
_SPOTS: tuple[_Spot, ...] = tuple((way, distance) for distance in (9, 22, 36, 52) for way in _DIRECTIONS)
_LEADER_FROM = 20
_MARKER_RADIUS = 7
_STROKE_STEPS = 50


def draw_report(report: Report) -> Figure:
    """Draw top-1 accuracy over multiply-accumulates, with a point for each exit, the ensemble and the baseline.

    Args:
        report: What `build_report` returned, or `report.json` holds.

    Returns:
        A figure that belongs to no window and to no global state of matplotlib; save it with its `savefig`.
    """
    report = each_text(report, plot_text)
    figure = Figure(figsize=(8.4, 5.4), dpi=150, facecolor="white")
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.08)
    renderer = FigureCanvasAgg(figure).get_renderer()  # type: ignore[no-untyped-call]
    axes = figure.add_subplot()
    _plot(axes, report)
    _style_axes(axes, report)
    title = figure.suptitle(f"{report['backbone']}, self-distilled: accuracy at every exit", fontsize=14, ha="left")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9.5)
    labels = _labels(axes, report)
    # What follows needs the layout; the labels are no part of it.
    figure.draw_without_rendering()
    title.set_x(axes.get_position().x0)
    axes.set_yticks([tick for tick in axes.get_yticks() if 0 <= tick <= 100 and _within(tick, axes.get_ylim())])
    _place(axes, labels, renderer)
    return figure


def _plot(axes: Axes, report: Report) -> None:
    """Plot the points and lines."""
    exits, ensemble, baseline = report["exits"], report["ensemble"], report["baseline"]
    macs = [row["macs"] for row in exits]
    scores = [_score(row["top1"]) for row in exits]
    edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 1.2}
    axes.plot(macs, scores, "-o", color=_EXIT, linewidth=2, markersize=8, zorder=3, label="exits", **edge)
    point = (ensemble["macs"], _score(ensemble["top1"]))
    axes.plot(*point, "*", color=_ENSEMBLE, markersize=17, zorder=4, label="ensemble of all exits", **edge)
    if baseline is None:
        return
    score = _score(baseline["top1"])
    dashes: dict[str, Any] = {"color": _BASELINE, "linestyle": (0, (5, 4)), "linewidth": 1.3, "zorder": 2}
    # Hollow and large, so that it shows around the last exit where both are equally good.
    hollow: dict[str, Any] = {"marker": "D", "markersize": 12, "markerfacecolor": "none", "markeredgewidth": 1.6}
    axes.axhline(score, **dashes)
    label = f"baseline: the backbone trained on its own ({_percent(baseline['top1'])})"
    axes.plot(macs[-1], score, label=label, **dashes, **hollow)


def _style_axes(axes: Axes, report: Report) -> None:
    """Set limits, scales, ticks, axis labels and the line below the title."""
    low, high = _bounds([line.get_ydata() for line in axes.lines])
    padding = max(_MIN_PADDING, 0.2 * (high - low))
    axes.set_ylim(low - padding, high + padding)
    axes.margins(x=0.12)
    macs = [row["macs"] for row in [*report["exits"], report["ensemble"]]]
    wide = max(macs) >= _WIDE_SPAN * min(macs)
    if wide:
        axes.set_xscale("log")
    full = report["exits"][-1]["macs"]
    # Made after the scale is set: a change of scale would replace its ticks.
    relative = axes.secondary_xaxis("top", functions=(partial(np.multiply, 1 / full), partial(np.multiply, full)))
    formatters = ((axes.xaxis, EngFormatter(sep=" ")), (relative.xaxis, FuncFormatter(lambda x, _: f"{x:.3g}x")))
    for axis, formatter in formatters:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6))
        axis.set_major_formatter(formatter)
        axis.set_minor_formatter(NullFormatter())
    size = " x ".join(str(side) for side in report["input_size"])
    axes.set_xlabel(f"multiply-accumulates per image of {size} (MACs{', log scale' if wide else ''})", color=_INK)
    axes.set_ylabel("top-1 accuracy (%)", color=_INK)
    relative.set_xlabel("cost relative to the backbone", color=_BASELINE, fontsize=9)
    relative.tick_params(colors=_BASELINE, labelsize=8.5, which="both")
    relative.spines["top"].set_color("#c5cad1")
    axes.spines[["right", "top"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    conditions = f"{report['dataset']} ({report['num_samples']:,} samples)"
    subtitle = f"{conditions} · recipe {report['recipe']}, seed {report['seed']}"
    axes.set_title(subtitle, loc="left", fontsize=9.5, color=_BASELINE, pad=10)


def _labels(axes: Axes, report: Report) -> list[Annotation]:
    """Return a label for each exit and the ensemble, not yet placed."""
    names = [f"{row['index']}: {row['name']}" for row in report["exits"][:-1]] + ["backbone", "ensemble"]
    rows = [*report["exits"], report["ensemble"]]
    colors = [_EXIT] * len(report["exits"]) + [_ENSEMBLE]
    labels = []
    for name, row, color in zip(names, rows, colors, strict=True):
        if row["top1"] is None:
            continue
        label = axes.annotate(
            f"{name}\n{_percent(row['top1'])}",
            (row["macs"], row["top1"]),
            (0, 0),
            textcoords="offset points",
            color=color,
            fontsize=9.5,
            linespacing=1.25,
            zorder=5,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.8, "alpha": 0.6, "shrinkA": 2, "shrinkB": 6},
        )
        label.set_in_layout(False)
        labels.append(label)
    return labels


def _place(axes: Axes, labels: Sequence[Annotation], renderer: RendererAgg) -> None:
    """Move each label to the nearest spot where it covers no other label or marker, and as little of the lines.

    Nor may it stand nearer to another marker than to its own, unless a line leads to its own.
    """
    reach = _MARKER_RADIUS * renderer.dpi / 72
    taken: list[BboxBase] = []
    strokes, markers = [], []
    for line in axes.lines:
        path = line.get_transform().transform(line.get_xydata())
        strokes += [np.linspace(start, stop, _STROKE_STEPS) for start, stop in itertools.pairwise(path)]
        if line.get_marker() != "None":
            taken += [Bbox.from_extents(x - reach, y - reach, x + reach, y + reach) for x, y in path]
            markers += list(path)
    on_lines = np.concatenate(strokes)

    def harm(label: Annotation, spot: _Spot) -> tuple[int, int]:
        box = _move(label, spot, renderer)
        outside = not (axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1))
        center = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
        own = math.dist(center, axes.transData.transform(label.xy))
        misleading = spot[1] < _LEADER_FROM and any(math.dist(center, marker) < own - 1 for marker in markers)
        return int(box.count_overlaps(taken)) + outside + misleading, int(box.count_contains(on_lines))

    for label in labels:
        spot = min(_SPOTS, key=partial(harm, label))
        taken.append(_move(label, spot, renderer))


def _move(label: Annotation, spot: _Spot, renderer: RendererAgg) -> BboxBase:
    """Put a label beside its point, with a line to it if it is far, and return the pixels that its text covers."""
    (right, up), distance = spot
    label.set_position((right * distance, up * distance))
    label.set_horizontalalignment(("center", "left", "right")[right])
    label.set_verticalalignment(("center", "bottom", "top")[up])
    assert label.arrow_patch is not None
    label.arrow_patch.set_visible(distance >= _LEADER_FROM)
    label.update_positions(renderer)
    # Of the text alone: an annotation's own extent takes the line to its point in.
    return Text.get_window_extent(label)


def _score(top1: float | None) -> float:
    """Return an accuracy as matplotlib takes it, which leaves out what is not a number."""
    return math.nan if top1 is None else top1


def _percent(top1: float | None) -> str:
    return "n/a" if top1 is None else f"{top1:.2f} %"


def _bounds(values: Sequence[object]) -> tuple[float, float]:
    """Return the least and the greatest number; the whole scale where there is none."""
    numbers = np.concatenate([np.asarray(value, dtype=float) for value in values])
    finite = numbers[np.isfinite(numbers)]
    return (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 100.0)


def _within(value: float, limits: tuple[float, float]) -> bool:
    return limits[0] <= value <= limits[1]

"""The report of a calibration as a picture: accuracy over compute."""

from functools import partial
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from timm_selfdistill.calibration.calibration_report import CalibrationReport, Point
from timm_selfdistill.escape import each_text, plot_text
from timm_selfdistill.palette import BLUE, GREEN, GREY, GRID, INK, ORANGE

_CURVE, _EXIT, _ENSEMBLE, _GREY, _INK = GREEN, BLUE, ORANGE, GREY, INK
# Percentage points above and below the data: at least so many that noise does not look like a trend.
_MIN_PADDING: Final = 1.0


def draw_calibration(report: CalibrationReport) -> Figure:
    """Draw the accuracy-compute curve of early exit, beside fixed exits, ensemble, baseline and oracle.

    Args:
        report: What `calibrate_folder` returned, or `calibration.json` holds.

    Returns:
        A figure that belongs to no window and to no global state of matplotlib; save it with its `savefig`.
    """
    report = each_text(report, plot_text)
    figure = Figure(figsize=(8.4, 5.4), dpi=150, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    edge: dict[str, Any] = {"markeredgecolor": "white", "markeredgewidth": 1.2}

    def draw(points: list[Point], style: str, label: str, color: str, size: float, **options: Any) -> None:
        macs, scores = [point["macs"] for point in points], [point["top1"] for point in points]
        axes.plot(macs, scores, style, label=label, color=color, markersize=size, **{**edge, **options})

    draw([*report["curve"]], "-o", "early exit: other thresholds", _CURVE, 4, linewidth=1.6, alpha=0.75)
    draw([*report["exits"]], "o", "one exit for all images", _EXIT, 8, zorder=3)
    draw([report["ensemble"]], "*", "ensemble of all exits", _ENSEMBLE, 16, zorder=3)
    if report["baseline"] is not None:
        hollow = {"markerfacecolor": "none", "markeredgecolor": _GREY, "markeredgewidth": 1.6}
        draw([report["baseline"]], "D", "baseline: the backbone trained on its own", _GREY, 11, zorder=2, **hollow)
    draw([report["oracle"]], "^", "oracle: leaves at the first right exit", _INK, 9, zorder=3)
    draw([report["early_exit"]], "P", "early exit: chosen thresholds", _CURVE, 13, zorder=4)
    for row in report["exits"]:
        axes.annotate(str(row["index"]), (row["macs"], row["top1"]), (0, -15), textcoords="offset points", ha="center")
    scores = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axes.lines])
    padding = max(_MIN_PADDING, 0.1 * float(np.ptp(scores)))
    axes.set_ylim(scores.min() - padding, scores.max() + padding)
    full = report["exits"][-1]["macs"]
    relative = axes.secondary_xaxis("top", functions=(partial(np.multiply, 1 / full), partial(np.multiply, full)))
    relative.set_xlabel("cost relative to the backbone", color=_GREY, fontsize=9)
    relative.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.3g}x"))
    axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    size = " x ".join(str(side) for side in report["input_size"])
    axes.set_xlabel(f"mean multiply-accumulates per image of {size} (MACs)")
    axes.set_ylabel("top-1 accuracy (%)")
    axes.spines[["right", "top"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    conditions = f"{report['dataset']} ({report['num_samples']:,} samples) · recipe {report['recipe']}"
    axes.set_title(conditions, loc="left", fontsize=9.5, color=_GREY)
    figure.suptitle(f"{report['backbone']}, self-distilled: early exit", fontsize=14)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure

"""An analysis as a picture: noise on the weights, gradients by stage, features by exit."""

import math
from collections.abc import Sequence
from typing import Any, Final, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from timm_selfdistill.analysis.noise import NoisePoint
from timm_selfdistill.analysis.report import Analysis, FeatureRow
from timm_selfdistill.escape import each_text, plot_text
from timm_selfdistill.palette import BLUE, GREY, GRID, INK, ORANGE

_NETWORK, _OWN, _BASELINE, _INK = BLUE, ORANGE, GREY, INK
_COLUMNS: Final = 5


def draw_analysis(analysis: Analysis) -> Figure:
    """Draw accuracy and loss over the noise, gradients by stage, and the features of every exit in two dimensions.

    Args:
        analysis: What `analyze_folder` returned, or `analysis.json` holds.

    Returns:
        A figure that belongs to no window and to no global state of matplotlib; save it with its `savefig`.
    """
    analysis = each_text(analysis, plot_text)
    features = analysis["features"]
    columns = min(_COLUMNS, len(features))
    rows = math.ceil(len(features) / columns)
    figure = Figure(figsize=(12.6, 4.4 + 2.9 * rows), dpi=110, facecolor="white", layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(4.0, 2.9 * rows))[:, 0]
    accuracy, loss, stages = upper.subplots(1, 3)
    _draw_noise(accuracy, loss, analysis)
    _draw_gradients(stages, analysis)
    axes = np.ravel(lower.subplots(rows, columns, squeeze=False))
    for index, (panel, row) in enumerate(zip(axes, features, strict=False)):
        title = row["name"] if row["name"] == "baseline" else f"{index}: {row['name']}"
        _draw_features(panel, row, title, analysis["classes"])
    lower.suptitle("features in their first two principal components", x=0.01, ha="left", fontsize=10, color=_INK)
    for panel in axes[len(features) :]:
        panel.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    lower.legend(handles, labels, loc="outside lower center", ncols=10, frameon=False, fontsize=8.5)
    conditions = f"{analysis['dataset']} ({analysis['num_samples']:,} samples) · recipe {analysis['recipe']}"
    figure.suptitle(f"{analysis['backbone']}, self-distilled: {conditions}", fontsize=12, color=_INK)
    return figure


def _draw_noise(accuracy: Axes, loss: Axes, analysis: Analysis) -> None:
    noise = analysis["noise"]
    curves = [("network", noise["network"], _NETWORK, "o"), ("baseline", noise["baseline"], _BASELINE, "D")]
    for label, points, color, marker in curves:
        if points is None:
            continue
        options: dict[str, Any] = {"color": color, "marker": marker, "markersize": 4, "capsize": 2, "label": label}
        sigmas = [point["sigma"] for point in points]
        accuracy.errorbar(sigmas, [point["top1"] for point in points], _spreads(points, "top1_std"), **options)
        losses = [_value(point["loss"]) for point in points]
        loss.errorbar(sigmas, losses, _spreads(points, "loss_std"), **options)
    for axes, title in ((accuracy, "top-1 accuracy (%)"), (loss, "cross-entropy")):
        _style(axes, f"{title} under noise")
        axes.set_xlabel("standard deviation of the noise on all weights")
        axes.legend(frameon=False, fontsize=9)


def _draw_gradients(axes: Axes, analysis: Analysis) -> None:
    stages = analysis["gradients"]["stages"]
    places = range(len(stages))
    network, alone = [_value(stage["network"]) for stage in stages], [_value(stage["network_ce"]) for stage in stages]
    series = [
        ("network, the loss it trained with", network, _OWN, "s"),
        ("network, its own classifier's CE", alone, _NETWORK, "o"),
        ("baseline, CE", [_value(stage["baseline"]) for stage in stages], _BASELINE, "D"),
    ]
    for label, values, color, marker in series:
        if not np.isnan(values).all():
            axes.plot(places, values, marker=marker, markersize=5, color=color, label=label)
    axes.set_yscale("log", nonpositive="mask")
    axes.set_xticks(places, [stage["name"] for stage in stages], rotation=45, ha="right", fontsize=8.5)
    _style(axes, "mean gradient magnitude by stage")
    axes.legend(frameon=False, fontsize=8.5)


def _draw_features(axes: Axes, row: FeatureRow, title: str, classes: dict[str, str]) -> None:
    points, labels = np.asarray(row["projection"]["points"]), np.asarray(row["projection"]["classes"])
    colors = colormaps["tab10"]
    for index, (label, name) in enumerate(classes.items()):
        of_class = points[labels == int(label)]
        axes.scatter(of_class[:, 0], of_class[:, 1], s=9, color=colors(index), label=name, linewidths=0)
    ratio = row["scatter"]["ratio"]
    axes.set_title(f"{title}\nwithin / between {'n/a' if ratio is None else f'{ratio:.3g}'}", fontsize=9.5, color=_INK)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color("#c5cad1")


def _style(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.spines[["right", "top"]].set_visible(False)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _spreads(points: Sequence[NoisePoint], key: Literal["top1_std", "loss_std"]) -> list[float]:
    values = [point[key] for point in points]
    return [0.0 if value is None else value for value in values]


def _value(value: float | None) -> float:
    """Return a number as matplotlib takes it, which leaves out what is not a number."""
    return math.nan if value is None else value

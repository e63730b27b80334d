"""An analysis as tables, as markdown, as a picture and as files."""

import math
from typing import Final, Literal, TypedDict

import numpy as np

from timm_selfdistill.analysis.probes import NoisePoint, Projection, Scatter
from timm_selfdistill.escape import each_text, plot_text
from timm_selfdistill.report import render

_COLUMNS: Final = 5


class NoiseCurves(TypedDict):
    """Results over the noise, for `draws` draws of it; `weight_rms` is the root mean square of all weights."""

    draws: int
    network: list[NoisePoint]
    baseline: list[NoisePoint] | None
    weight_rms: float
    baseline_weight_rms: float | None


class StageGradients(TypedDict):
    """Mean magnitude of the gradient in one stage of the backbone, of `params` parameters; None where not finite.

    `network` is of the loss that the run trained with, `network_ce` of the cross-entropy of the backbone's own
    classifier alone, `baseline` of the same in the baseline; None where there is no such loss or baseline.
    """

    name: str
    params: int
    network: float | None
    network_ce: float | None
    baseline: float | None


class Gradients(TypedDict):
    """Gradients by stage, over augmented batches; `own_loss` tells why those of the run's loss are missing, or None."""

    stages: list[StageGradients]
    dataset: str
    num_batches: int
    batch_size: int
    own_loss: str | None


class FeatureRow(TypedDict):
    """How well the features of one exit tell the classes apart; `name` is its module path, or "baseline"."""

    name: str
    scatter: Scatter
    projection: Projection


class Analysis(TypedDict):
    """The content of `analysis.json`; `baseline` is where its weights come from, None if there is none.

    `features` go from shallow to deep, the last exit the backbone's own, then the baseline's own if there is one.
    `classes` are the names of the classes that are projected, by their index.
    """

    noise: NoiseCurves
    gradients: Gradients
    features: list[FeatureRow]
    classes: dict[str, str]
    baseline: str | None
    backbone: str
    dataset: str
    num_samples: int
    num_skipped: int
    recipe: str
    precision: str
    seed: int
    versions: dict[str, str]


def draw_analysis(analysis: Analysis) -> "render.Figure":
    """Draw accuracy and loss over the noise, gradients by stage, and the features of every exit in two dimensions."""
    from matplotlib.figure import Figure

    analysis = each_text(analysis, plot_text)
    features = analysis["features"]
    columns = min(_COLUMNS, len(features))
    rows = math.ceil(len(features) / columns)
    figure = Figure(figsize=(12.6, 4.4 + 2.9 * rows), dpi=110, facecolor="white", layout="constrained")
    upper, lower = figure.subfigures(2, 1, squeeze=False, height_ratios=(4.0, 2.9 * rows))[:, 0]
    accuracy, loss, stages = upper.subplots(1, 3)
    _draw_noise(accuracy, analysis["noise"], "top1", "top-1 accuracy (%) under noise")
    _draw_noise(loss, analysis["noise"], "loss", "cross-entropy under noise")
    _draw_gradients(stages, analysis["gradients"])
    panels = np.ravel(lower.subplots(rows, columns, squeeze=False))
    for index, (axes, row) in enumerate(zip(panels, features, strict=False)):
        title = row["name"] if row["name"] == "baseline" else f"{index}: {row['name']}"
        _draw_features(axes, row, title, analysis["classes"])
    lower.suptitle("features in their first two principal components", x=0.01, ha="left", fontsize=10, color=render.INK)
    for axes in panels[len(features) :]:
        axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    lower.legend(handles, labels, loc="outside lower center", ncols=10, frameon=False, fontsize=8.5)
    conditions = f"{analysis['dataset']} ({analysis['num_samples']:,} samples) · recipe {analysis['recipe']}"
    figure.suptitle(f"{analysis['backbone']}, self-distilled: {conditions}", fontsize=12, color=render.INK)
    return figure


def _draw_noise(axes: "render.Axes", noise: NoiseCurves, key: Literal["top1", "loss"], title: str) -> None:
    curves = [("network", noise["network"], render.BLUE, "o"), ("baseline", noise["baseline"], render.GREY, "D")]
    spread: Literal["top1_std", "loss_std"] = "top1_std" if key == "top1" else "loss_std"
    for label, points, color, marker in curves:
        if points is None:
            continue
        sigmas, values = [point["sigma"] for point in points], render.floats([point[key] for point in points])
        spreads = [point[spread] or 0.0 for point in points]
        axes.errorbar(sigmas, values, spreads, color=color, marker=marker, markersize=4, capsize=2, label=label)
    _finish_panel(axes, title)
    axes.set_xlabel("standard deviation of the noise on all weights")


def _draw_gradients(axes: "render.Axes", gradients: Gradients) -> None:
    stages = gradients["stages"]
    series = [
        ("network, the loss it trained with", [stage["network"] for stage in stages], render.ORANGE, "s"),
        ("network, its own classifier's CE", [stage["network_ce"] for stage in stages], render.BLUE, "o"),
        ("baseline, CE", [stage["baseline"] for stage in stages], render.GREY, "D"),
    ]
    for label, values, color, marker in series:
        if any(value is not None for value in values):
            axes.plot(range(len(stages)), render.floats(values), marker=marker, markersize=5, color=color, label=label)
    axes.set_yscale("log", nonpositive="mask")
    axes.set_xticks(range(len(stages)), [stage["name"] for stage in stages], rotation=45, ha="right", fontsize=8.5)
    _finish_panel(axes, "mean gradient magnitude by stage")


def _draw_features(axes: "render.Axes", row: FeatureRow, title: str, classes: dict[str, str]) -> None:
    from matplotlib import colormaps

    points, labels = np.asarray(row["projection"]["points"]), np.asarray(row["projection"]["classes"])
    colors = colormaps["tab10"]
    for index, (label, name) in enumerate(classes.items()):
        of_class = points[labels == int(label)]
        axes.scatter(of_class[:, 0], of_class[:, 1], s=9, color=colors(index), label=name, linewidths=0)
    ratio = render.number(row["scatter"]["ratio"], ".3g")
    axes.set_title(f"{title}\nwithin / between {ratio}", fontsize=9.5, color=render.INK)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(render.FRAME)


def _finish_panel(axes: "render.Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=render.INK)
    render.style_axes(axes)
    axes.legend(frameon=False, fontsize=9)


def _noise(noise: NoiseCurves) -> render.Table:
    curves = [noise["network"]] if noise["baseline"] is None else [noise["network"], noise["baseline"]]
    rows = [["noise", "top-1 %", "loss", "baseline %", "its loss"][: 1 + 2 * len(curves)]]
    for points in zip(*curves, strict=True):
        rows.append([f"{points[0]['sigma']:g}"])
        for point in points:
            rows[-1].append(render.spread(point["top1"], point["top1_std"], ".2f"))
            rows[-1].append(render.spread(point["loss"], point["loss_std"], ".3f"))
    return rows


def _gradients(analysis: Analysis) -> render.Table:
    has_own, has_baseline = analysis["gradients"]["own_loss"] is None, analysis["baseline"] is not None
    columns = [True, True, has_own, True, has_baseline]
    rows = [["stage", "params", "own loss", "its CE alone", "baseline's CE"]]
    for stage in analysis["gradients"]["stages"]:
        values = [render.number(value, ".3g") for value in (stage["network"], stage["network_ce"], stage["baseline"])]
        rows.append([stage["name"], render.with_prefix(stage["params"]), *values])
    return [[cell for cell, is_shown in zip(row, columns, strict=True) if is_shown] for row in rows]


def _features(features: list[FeatureRow]) -> render.Table:
    rows = [["features", "within", "between", "within/between", "in 2-D"]]
    num_exits = sum(row["name"] != "baseline" for row in features)
    for index, row in enumerate(features):
        note = " (backbone)" if index == num_exits - 1 else ""
        name = "baseline" if index == num_exits else f"{index}: {row['name']}{note}"
        scatter = [render.number(row["scatter"][key], ".3g") for key in ("within", "between", "ratio")]
        rows.append([name, *scatter, f"{sum(row['projection']['explained']):.0%}"])
    return rows


def _sentences(analysis: Analysis) -> list[str]:
    noise, gradients = analysis["noise"], analysis["gradients"]
    draws = f"mean and standard deviation of {noise['draws']} draws" if noise["draws"] > 1 else "one draw"
    of_baseline = noise["baseline_weight_rms"]
    beside = "" if of_baseline is None else f", {of_baseline:.3g} in the baseline"
    found = [
        f"{analysis['dataset']} ({analysis['num_samples']:,} samples), recipe {analysis['recipe']}, seed "
        f"{analysis['seed']}.",
        "Noise: standard deviation of what is added to every parameter of the backbone, whose own classifier answers, "
        f"in precision {analysis['precision']}; {draws}. The root mean square of the weights is "
        f"{noise['weight_rms']:.3g}{beside}.",
        f"Gradients: mean magnitude over the parameters of a stage, in training mode, over {gradients['num_batches']} "
        f"batches of {gradients['batch_size']} images of {gradients['dataset']}, at the saved weights.",
        "Features: mean squared distance of an image from the mean of its class (within), and of that from the mean of "
        "all (between); in 2-D: the share of the variance that the picture shows.",
    ]
    if gradients["own_loss"] is not None:
        found.append(f"The gradient of the loss it was trained with is not shown: {gradients['own_loss']}.")
    if analysis["baseline"] is None:
        found.append(
            "There is no baseline: neither a checkpoint of one in the run (baseline=true), nor --baseline FOLDER."
        )
    else:
        found.append(f"The baseline is the same backbone, trained on its own: {analysis['baseline']}.")
    if analysis["num_skipped"]:
        found.append(f"Images that could not be decoded, and are not counted: {analysis['num_skipped']:,}.")
    return found


_PAGE = render.Page(
    "analysis",
    "Why it works",
    "Noise on the weights, gradients by stage, features by exit",
    lambda analysis: [_noise(analysis["noise"]), _gradients(analysis), _features(analysis["features"])],
    _sentences,
    draw_analysis,
)
format_analysis, write_analysis = _PAGE.terminal, _PAGE.write

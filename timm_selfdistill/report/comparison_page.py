"""A comparison of losses: means, spreads and paired differences over seeds, as tables, a picture and files."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Final, TypedDict

from timm_selfdistill.escape import each_text, plot_text
from timm_selfdistill.report import Report, render

BASELINE: Final = "none"
_CONFIDENCE: Final = 0.95
_COLORS: Final = (render.GREY, "#8a5fb0", render.GREEN, render.BLUE, render.ORANGE, "#b03a5b", "#7a8b1f", "#3f3f9f")
# The width of the band in which the losses of one output stand side by side; 1 would fill the axis.
_BAND: Final = 0.5


class Spread(TypedDict):
    """Values of several seeds, in the seeds' order, their mean and sample standard deviation (None for one seed)."""

    values: list[float]
    mean: float
    std: float | None


class Difference(TypedDict):
    """Mean over seeds of an accuracy minus the baseline's, in points, and its 95 % interval by Student's t, if any."""

    mean: float
    low: float | None
    high: float | None


class OutputSummary(TypedDict):
    """Top-1 accuracy of one output in percent, and its paired difference to the baseline's backbone."""

    name: str
    top1: Spread
    difference: Difference | None


class LossSummary(TypedDict):
    """One loss: its outputs from shallow to deep, then the ensemble; the backbone alone if the loss trains no exits."""

    loss: str
    outputs: list[OutputSummary]
    train_seconds: Spread


class Comparison(TypedDict):
    """The content of `comparison.json`; `baseline` is the loss that differences are taken to."""

    recipe: str
    backbone: str
    dataset: str
    num_samples: int
    epochs: int
    seeds: list[int]
    baseline: str
    losses: list[LossSummary]
    versions: dict[str, str]
    device: str


def summarize(
    reports: Mapping[str, Sequence[Report]], *, recipe: str, epochs: int, seeds: Sequence[int], backbone_only: set[str]
) -> Comparison:
    """Summarise the reports of each loss, in the order of the seeds. Losses in `backbone_only` train no exits.

    Differences are taken to the loss "none" if it was trained, else to the first.
    """
    baseline = BASELINE if BASELINE in reports else next(iter(reports))
    reference = [_top1(baseline, report, -1) for report in reports[baseline]]
    first = reports[baseline][0]
    losses: list[LossSummary] = []
    for loss, runs in reports.items():
        outputs = _outputs(loss, runs, reference, loss in backbone_only, loss == baseline)
        seconds = _spread([report["train_seconds"]["self-distilled"] for report in runs])
        losses.append({"loss": loss, "outputs": outputs, "train_seconds": seconds})
    return {
        "recipe": recipe,
        "backbone": first["backbone"],
        "dataset": first["dataset"],
        "num_samples": first["num_samples"],
        "epochs": epochs,
        "seeds": list(seeds),
        "baseline": baseline,
        "losses": losses,
        "versions": first["versions"],
        "device": first["device"],
    }


def draw_comparison(comparison: Comparison) -> "render.Figure":
    """Draw the mean top-1 accuracy of every output with each loss, and its standard deviation over the seeds."""
    comparison = each_text(comparison, plot_text)
    losses, seeds, names = comparison["losses"], comparison["seeds"], _output_names(comparison)
    spread = f"mean and standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}"
    conditions = f"{comparison['dataset']} · recipe {comparison['recipe']}, {comparison['epochs']} epochs · {spread}"
    figure, axes = render.new_picture(conditions)
    for index, entry in enumerate(losses):
        shift = _BAND * ((index + 0.5) / len(losses) - 0.5)
        color = _COLORS[index % len(_COLORS)]
        places = [names.index(output["name"]) + shift for output in entry["outputs"]]
        means = [output["top1"]["mean"] for output in entry["outputs"]]
        spreads = [output["top1"]["std"] or 0.0 for output in entry["outputs"]]
        axes.errorbar(places, means, spreads, fmt="o", color=color, markersize=7, capsize=3, label=entry["loss"])
        for place, output in zip(places, entry["outputs"], strict=True):
            values = output["top1"]["values"]
            axes.plot([place] * len(values), values, "_", color=color, alpha=0.5, markersize=9)
    deepest = next(output for output in reversed(_base(comparison)["outputs"]) if output["name"] != "ensemble")
    axes.axhline(deepest["top1"]["mean"], color=render.GREY, linestyle=(0, (5, 4)), linewidth=1.2, zorder=1)
    last = len(names) - 1 - (names[-1] == "ensemble")
    labels = [name if index > last else f"{index}: {name}" for index, name in enumerate(names)]
    labels[last] = "backbone"
    axes.set_xticks(range(len(names)), labels)
    render.style_accuracy(axes)
    render.style_axes(axes, grid="y")
    render.finish_picture(figure, axes, f"{comparison['backbone']}: losses compared", columns=min(4, len(losses)))
    return figure


def _outputs(
    loss: str, runs: Sequence[Report], reference: Sequence[float], backbone_only: bool, is_baseline: bool
) -> list[OutputSummary]:
    names = [row["name"] for row in runs[0]["exits"]]
    positions = [len(names) - 1] if backbone_only else range(len(names) + 1)
    outputs: list[OutputSummary] = []
    for position in positions:
        values = [_top1(loss, report, position) for report in runs]
        is_reference = is_baseline and position == len(names) - 1
        difference = None if is_reference else _difference(values, reference)
        name = [*names, "ensemble"][position]
        outputs.append({"name": name, "top1": _spread(values), "difference": difference})
    return outputs


def _top1(loss: str, report: Report, position: int) -> float:
    """Return the top-1 accuracy of an output; the position after the last exit is the ensemble's."""
    exits = report["exits"]
    top1 = report["ensemble"]["top1"] if position == len(exits) else exits[position]["top1"]
    if top1 is None:
        raise ValueError(f"{loss}, seed {report['seed']}: the accuracy is not a number; see the run's report.")
    return top1


def _spread(values: Sequence[float]) -> Spread:
    std = statistics.stdev(values) if len(values) > 1 else None
    return {"values": list(values), "mean": statistics.fmean(values), "std": std}


def _difference(values: Sequence[float], reference: Sequence[float]) -> Difference:
    from scipy.special import stdtrit

    pairs = [value - other for value, other in zip(values, reference, strict=True)]
    mean, count = statistics.fmean(pairs), len(pairs)
    if count == 1:
        return {"mean": mean, "low": None, "high": None}
    quantile = float(stdtrit(count - 1, (1 + _CONFIDENCE) / 2))
    half = quantile * statistics.stdev(pairs) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def _tables(comparison: Comparison) -> list[render.Table]:
    """Return the accuracies with the time to train, and the paired differences to the baseline's backbone."""
    names = _output_names(comparison)
    base_seconds = _base(comparison)["train_seconds"]["mean"]
    accuracies = [["top-1 %", *names, "minutes", "time"]]
    differences = [[f"vs. {comparison['baseline']}", *names]]
    for entry in comparison["losses"]:
        spreads, gains = dict.fromkeys(names, ""), dict.fromkeys(names, "")
        for output in entry["outputs"]:
            spreads[output["name"]] = render.spread(output["top1"]["mean"], output["top1"]["std"], ".2f")
            gains[output["name"]] = _difference_text(output["difference"])
        seconds = entry["train_seconds"]["mean"]
        times = [f"{seconds / 60:.1f}", f"{seconds / base_seconds:.2f}x" if base_seconds else render.MISSING]
        accuracies.append([entry["loss"], *spreads.values(), *times])
        differences.append([entry["loss"], *gains.values()])
    return [accuracies, differences]


def _base(comparison: Comparison) -> LossSummary:
    return next(entry for entry in comparison["losses"] if entry["loss"] == comparison["baseline"])


def _output_names(comparison: Comparison) -> list[str]:
    return [output["name"] for output in max((entry["outputs"] for entry in comparison["losses"]), key=len)]


def _difference_text(difference: Difference | None) -> str:
    if difference is None:
        return ""
    if difference["low"] is None or difference["high"] is None:
        return f"{difference['mean']:+.2f}"
    return f"{difference['mean']:+.2f} [{difference['low']:+.2f}, {difference['high']:+.2f}]"


def _sentences(comparison: Comparison) -> list[str]:
    seeds = ", ".join(map(str, comparison["seeds"]))
    versions = ", ".join(f"{name} {version}" for name, version in comparison["versions"].items())
    found = [
        f"Accuracy on {comparison['dataset']} ({comparison['num_samples']:,} samples) after {comparison['epochs']} "
        f"epochs, recipe {comparison['recipe']}, seeds {seeds}.",
        f"Differences are percentage points to the backbone of {comparison['baseline']!r} with the same seed.",
        f"Minutes are those of the training steps on {comparison['device']}; versions: {versions}.",
    ]
    if len(comparison["seeds"]) > 1:
        found.insert(1, "± is the standard deviation over the seeds, [ ] the 95 % confidence interval of the mean.")
    return found


_PAGE = render.Page(
    "comparison", "Losses compared", "Top-1 accuracy of every exit with each loss", _tables, _sentences, draw_comparison
)
format_comparison, write_comparison = _PAGE.terminal, _PAGE.write
